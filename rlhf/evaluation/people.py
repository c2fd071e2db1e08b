"""People as a judge: who wins by their votes, and how far reward models, and people among themselves, agree with them.

A vote has `prompt`, `left`, `right` (texts), `left_model`, `right_model`, `vote` ("left", "right", "tie", "both bad"
or "skip"), `judge`, `dataset`; its `pair` names the two answers, its `choice` is the text that was liked better.
"""

from collections import Counter
from itertools import combinations

from rlhf.evaluation.answers import Answer, judge, prompt_key
from rlhf.evaluation.statistics import cohen_kappa, outcomes, wilson

SIDES = ("left", "right")


def people_report(votes: list, judges: dict, samples: list[dict], baseline: str | None, batch_size: int) -> dict:
    """What the votes say of the models and of the judges: what is unknown is None.

    Args:
        samples: what the report is on, as `rlhf.evaluation.tables.samples_of` gives it.
    Returns:
        "votes", how many of each kind; "other_answers", how many are on answers that are not in this report, and so
        say nothing of its models; "nameless", how many do not tell whose answers they are on; "wins": by label
        "against_others", "against_baseline" and "against_data"; "judges": by name "accuracy", "kappa" and "unread",
        how many votes are on an answer that it cannot read to its end; "people": for each two of them "pairs", "same"
        and "kappa"; "left": how often the answer on the left was preferred.
    """
    rows = [(prompt_key(row["prompt"]), row) for row in samples]
    ended = {
        (key, label, text.strip()): row["ended"][label][i]
        for key, row in rows
        for label, texts in row["answers"].items()
        for i, text in enumerate(texts)
    }
    kinds = Counter(vote.vote for vote in votes)
    votes = [vote for vote in votes if vote.vote != "skip"]
    decided = [vote for vote in votes if vote.vote in SIDES]
    scores = score_votes(judges, decided, dict(rows), ended, batch_size)
    between = [vote for vote in votes if vote.left_model != vote.right_model and vote.left_model and vote.right_model]
    ours = [vote for vote in between if all(answer_of(vote, side) in ended for side in SIDES)]
    labels = dict.fromkeys(label for row in samples for label in row["answers"])
    return {
        "votes": dict(kinds),
        "other_answers": len(between) - len(ours),
        "nameless": sum(not (vote.left_model and vote.right_model) for vote in votes),
        "wins": {label: wins_of(label, ours, baseline) for label in labels},
        "judges": {name: agreement(decided, found) for name, found in scores.items()},
        "people": between_people(votes),
        "left": wilson([vote.vote == "left" for vote in decided]),
    }


def answer_of(vote, side: str) -> tuple[str, str, str]:
    return prompt_key(vote.prompt), getattr(vote, f"{side}_model"), getattr(vote, side)


def wins_of(label: str, votes: list, baseline: str | None) -> dict:
    """How often the label's answer was preferred, a tie or two bad ones counting half."""

    def rate(other=None):
        own = [v for v in votes if {label, other} - {None} <= {v.left_model, v.right_model}]
        values = [{"left": 1.0, "right": 0.0}.get(vote.vote, 0.5) for vote in own]
        values = [x if vote.left_model == label else 1 - x for x, vote in zip(values, own, strict=True)]
        return wilson(values, [prompt_key(vote.prompt) for vote in own])

    against = {"against_baseline": baseline, "against_data": "data"}
    found = {key: rate(other) if other not in (label, None) else None for key, other in against.items()}
    return {"against_others": rate()} | found


def score_votes(judges: dict, votes: list, rows: dict, ended: dict, batch_size: int) -> dict[str, dict[str, list]]:
    """{judge: {side: the scores of the votes' answers on that side}}; as they ended, where that is known."""
    known = [rows.get(prompt_key(vote.prompt), {}) for vote in votes]
    columns = {
        "reference": [row.get("reference", "") for row in known],
        "dataset": [row.get("dataset", vote.dataset) for row, vote in zip(known, votes, strict=True)],
    }
    prompts, found = [vote.prompt for vote in votes], {name: {} for name in judges}
    for side in SIDES:
        made = [Answer([], getattr(vote, side), ended.get(answer_of(vote, side), True)) for vote in votes]
        for name, reward in judges.items():
            found[name][side] = judge(reward, name, prompts, made, columns, batch_size)
    return found


def agreement(votes: list, scores: dict[str, list]) -> dict:
    """How often a judge scores the answer higher that a person prefers, and kappa, by the side it stood on."""
    rows = list(zip(votes, *(scores[side] for side in SIDES), strict=True))
    rows = [(vote, left - right) for vote, left, right in rows if None not in (left, right)]
    theirs = ["left" if margin > 0 else "right" if margin else "tie" for _, margin in rows]
    right = outcomes([margin if vote.vote == "left" else -margin for vote, margin in rows])
    return {
        "accuracy": wilson(right, [prompt_key(vote.prompt) for vote, _ in rows]),
        "kappa": cohen_kappa([vote.vote for vote, _ in rows], theirs),
        "unread": len(votes) - len(rows),
    }


def between_people(votes: list) -> list[dict]:
    """For each two people who have judged the same answers how often they said the same, a tie being no preference.

    Answers are told apart by where the first of the two saw them, which was drawn: by their models, one that always
    wins would make kappa small.
    """
    by_person, found = {}, []
    for vote in votes:
        by_person.setdefault(vote.judge, {})[vote.pair] = vote
    for first, second in combinations(by_person, 2):
        shared = [
            (vote, by_person[second][pair]) for pair, vote in by_person[first].items() if pair in by_person[second]
        ]
        sides = [{vote.left: "left", vote.right: "right"} for vote, _ in shared]
        choices = [[names.get(pair[i].choice) for names, pair in zip(sides, shared, strict=True)] for i in (0, 1)]
        same = [a == b for a, b in zip(*choices, strict=True)]
        groups = [prompt_key(vote.prompt) for vote, _ in shared]
        found.append({"first": first, "second": second, "pairs": len(shared), "same": wilson(same, groups),
                      "kappa": cohen_kappa(*choices)})  # fmt: skip
    return found
