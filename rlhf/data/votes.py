"""Votes of people, as the report's page saves them: two answers to a prompt, and which of them is better.

A line of votes.jsonl is whole by itself: `prompt` (messages), `left` and `right` (the two answers' texts), `vote`,
`judge` (who voted) and `time`; `left_model`, `right_model` and the like say where the answers come from, `held_out`
that the prompt is there to measure on.
"""

import json
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from rlhf.data.columns import Row, opening_of, with_opening
from rlhf.data.files import file_reader, read_file
from rlhf.data.messages import BadRow, Message, Skip, as_messages, assistant
from rlhf.data.rows import Preference, clean_message, problem_with
from rlhf.user_error import UserError

VOTES = ("left", "right", "tie", "both bad", "skip")
UNTIMED = "no 'time', and its person's other vote on these answers has one: which is the later?"
UNUSED = "left_model right_model left_sample right_sample judge time seed report dataset comparison held_out"


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
    if row.get("held_out") not in (None, False, True):
        raise BadRow("'held_out' of a vote is neither true nor false")
    time_of(texts["time"])
    # as in the rows that the answers were made for, so that both are known for the same prompt
    asked = with_opening({"prompt": as_messages(row.get("prompt"))}, *opening_of(Row(row)))["prompt"]
    prompt = [turn for message in asked if (turn := clean_message(message))]
    if problem := problem_with({"prompt": prompt}):
        raise BadRow(problem)
    texts |= {side: texts[side].strip() for side in ("left", "right")} | {"judge": texts["judge"].strip() or judge}
    try:
        "".join(texts.values()).encode()
    except UnicodeEncodeError as error:
        raise BadRow("broken Unicode") from error
    return Vote(prompt, **texts)


def time_of(text: str) -> datetime:
    """When it was; without a zone UTC, without a time the dawn of time."""
    try:
        time = datetime.fromisoformat(text) if text else datetime.min
    except ValueError as error:
        raise BadRow(f"'time' is {text[:30]!r}: write it as 2026-01-31T10:30:00Z") from error
    return time if time.tzinfo else time.replace(tzinfo=UTC)


def last_votes(votes: list[tuple[Vote, str, dict]], on: str) -> tuple[list[tuple], list[tuple[str, Skip]]]:
    """The votes, (Vote, place, row), that their person has not changed later; and (place, why) of the others.

    Args:
        on: the property that votes on the same share.
    """
    groups, kept, others = {}, [], []
    for entry in votes:
        groups.setdefault((entry[0].judge, getattr(entry[0], on)), []).append(entry)
    for entries in groups.values():
        timed = [entry for entry in entries if entry[0].time] or entries
        *earlier, last = sorted(timed, key=lambda entry: time_of(entry[0].time))  # without times the later line counts
        kept.append(last)
        others += [(place, Skip("changed later")) for _, place, _ in earlier]
        others += [(entry[1], BadRow(UNTIMED)) for entry in entries if entry not in timed]
    return kept, others


def by_pair(rows) -> Iterator[tuple[str, object]]:
    """One row for each two answers, with what most of its people say; a Skip for each further vote on them."""
    votes, pairs = [], {}
    for place, row in rows:
        try:
            votes.append((vote_of(row, judge=place.rpartition(":")[0]), place, row))
        except (Skip, AttributeError, TypeError, ValueError) as error:  # a row that is none, or none that can be asked
            yield place, row if isinstance(row, Skip) else error if isinstance(error, Skip) else BadRow("no vote")
    votes, others = last_votes(votes, "pair")
    yield from others
    for entry in votes:
        pairs.setdefault(entry[0].pair, []).append(entry)
    for entries in pairs.values():
        (_, place, row), *further = entries
        held_out = any(row.get("held_out") for *_, row in entries)
        yield place, row | {"vote": verdict([vote for vote, *_ in entries]), "held_out": held_out}
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
    votes, files, stems = [], {}, [Path(path).stem for path in paths]
    for path in map(Path, paths):
        if not file_reader(path):
            raise UserError(f"--votes {path}: give the votes.jsonl that the report's page saves")
        for place, row in read_file(path):
            try:
                if isinstance(row, Skip):
                    raise row
                vote = vote_of(row, judge=path.stem if stems.count(path.stem) == 1 else str(path))
            except Skip as error:
                raise UserError(f"{place}: {error}\ngive the votes.jsonl that the report's page saves") from error
            votes.append((vote, place, row))
            files.setdefault(vote.judge, {})[str(path)] = None
    if not any(vote.vote != "skip" for vote, *_ in votes):
        raise UserError(f"--votes {','.join(paths)}: there is no vote in it")
    for judge, names in files.items():
        if len(names) > 1:
            print(f"{' and '.join(names)} hold votes of one person, {judge}: the later one on the same answers counts")
    kept, others = last_votes(votes, "contest")
    for place, why in others:
        if isinstance(why, BadRow):
            raise UserError(f"{place}: {why}")
    return [vote for vote, *_ in kept]
