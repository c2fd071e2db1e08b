"""Votes of people, as the report's page saves them: two answers to a prompt, and which of them is better.

A line of votes.jsonl is whole by itself: `prompt` (messages), `left` and `right` (the two answers' texts), `vote`,
`judge` (who voted) and `time`; `left_model`, `right_model` and the like say where the answers come from.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from rlhf.data.files import is_data, read_file
from rlhf.data.messages import BadRow, Message, Skip, as_messages, assistant
from rlhf.data.rows import Preference, clean_message
from rlhf.user_error import UserError

VOTES = ("left", "right", "tie", "both bad", "skip")
UNUSED = "left_model right_model left_sample right_sample judge time seed report dataset"


class Vote(NamedTuple):
    """One person's vote; the models' names are "" where the line does not tell them."""

    prompt: list[Message]
    left: str
    right: str
    left_model: str
    right_model: str
    vote: str
    judge: str
    dataset: str
    time: str

    @property
    def pair(self) -> tuple[str, ...]:
        """What votes on the same answers share, whichever of them stood on the left."""
        return json.dumps(self.prompt), *sorted((self.left, self.right))

    @property
    def contest(self) -> tuple[str, ...]:
        """The pair and whose it is: two models may have said the same, and each has a vote of its own."""
        return *self.pair, *sorted((self.left_model, self.right_model))

    @property
    def choice(self) -> str | None:
        """The text that was liked better; None without a preference."""
        return {"left": self.left, "right": self.right}.get(self.vote)


def vote_of(row: dict, judge: str = "") -> Vote:
    """The vote in a line; `judge` is its person's name where the line has none. Raises BadRow where it is no vote."""
    texts = {key: row.get(key) or "" for key in Vote._fields if key != "prompt"}
    if "left" not in row or "right" not in row:
        raise BadRow("a vote without 'left' and 'right', its two answers")
    if other := next((key for key, text in texts.items() if not isinstance(text, str)), None):
        raise BadRow(f"{other!r} of a vote is no text")
    if texts["vote"] not in VOTES:
        raise BadRow(f"'vote' is {texts['vote'][:20]!r}: known are {', '.join(VOTES)}")
    # as in the rows that the answers were made for, so that both are known for the same prompt
    prompt = [turn for message in as_messages(row.get("prompt")) if (turn := clean_message(message))]
    texts |= {side: texts[side].strip() for side in ("left", "right")}
    return Vote(prompt, **texts | {"judge": texts["judge"].strip() or judge})


def last_votes(votes: list[tuple], on: str) -> tuple[list[tuple], list[tuple]]:
    """Tuples of a Vote and more, without those that their person has changed later; and those.

    Args:
        on: the property that votes on the same share.
    """
    last = {}
    for entry in sorted(votes, key=lambda entry: entry[0].time):  # stable: without times the later line counts
        last[entry[0].judge, getattr(entry[0], on)] = entry
    kept = {id(entry) for entry in last.values()}
    return [entry for entry in votes if id(entry) in kept], [entry for entry in votes if id(entry) not in kept]


def by_pair(rows) -> Iterator[tuple[str, object]]:
    """One row for each two answers, with what most of its people say; a Skip for each further vote on them."""
    votes, pairs = [], {}
    for place, row in rows:
        try:
            votes.append((vote_of(row, judge=place.rpartition(":")[0]), place, row))
        except (Skip, AttributeError, TypeError) as error:  # a row that is none, or none that can be asked
            yield place, row if isinstance(row, Skip) else error if isinstance(error, Skip) else BadRow("no vote")
    votes, changed = last_votes(votes, "pair")
    for _, place, _ in changed:
        yield place, Skip("a later vote of the same person")
    for entry in votes:
        pairs.setdefault(entry[0].pair, []).append(entry)
    for entries in pairs.values():
        (_, place, row), *further = entries
        yield place, row | {"vote": verdict([vote for vote, *_ in entries])}
        for _, place, _ in further:
            yield place, Skip("another person's vote on the same answers")


def verdict(votes: list[Vote]) -> str:
    """The side, as in the first vote, that more than half of those who voted prefer; else why there is none."""
    choices = [vote.choice for vote in votes if vote.vote != "skip"]
    for side in ("left", "right"):
        if 2 * choices.count(getattr(votes[0], side)) > len(choices):
            return side
    return votes[0].vote if len({vote.vote for vote in votes}) == 1 else "people disagree"


def voted_pair(row) -> Preference:
    """The pair of a row of `by_pair`; raises Skip where nobody, or no majority, prefers one."""
    sides, verdict = {side: row[side] for side in ("left", "right")}, row["vote"]
    if verdict not in sides:
        raise Skip("skipped by the judge" if verdict == "skip" else verdict)
    if not all(text.strip() for text in sides.values()):
        raise Skip("an answer is empty")
    chosen = sides.pop(verdict)
    (rejected,) = sides.values()
    return {"prompt": as_messages(row["prompt"]), "chosen": [assistant(chosen)], "rejected": [assistant(rejected)]}


def load_votes(paths: list[str]) -> list[Vote]:
    """All votes of some files, the last one where a person has changed it; nameless ones are by their file's name.

    Raises:
        UserError: naming file and line, where something is no vote; a figure must not rest on half a file.
    """
    votes, stems = [], [Path(path).stem for path in paths]
    for path in map(Path, paths):
        if not is_data(path):
            raise UserError(f"--votes {path}: give the votes.jsonl that the report's page saves")
        for place, row in read_file(path):
            try:
                if isinstance(row, Skip):
                    raise row
                votes.append((vote_of(row, judge=path.stem if stems.count(path.stem) == 1 else str(path)),))
            except Skip as error:
                raise UserError(f"{place}: {error}\ngive the votes.jsonl that the report's page saves") from error
    if not any(vote.vote != "skip" for (vote,) in votes):
        raise UserError(f"--votes {','.join(paths)}: there is no vote in it")
    return [vote for (vote,) in last_votes(votes, "contest")[0]]
