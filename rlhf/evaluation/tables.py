"""What an evaluation found, as numbers: by model and dataset, of a reward model by dataset, and the rows behind them.

Answers, scores and measurements are {label: one entry a row}, in the order of the rows; an answer's entry is the list
of its samples, and the first of them is the model's answer. The data's own answers have the label "data".
"""

import csv
import json
import math
from pathlib import Path

import numpy as np

from rlhf.evaluation.answers import Answer, judge, prompt_key
from rlhf.evaluation.statistics import (
    best_of_curve,
    calibration,
    distinct,
    interval,
    kendall,
    mean,
    ranked_sets,
    rouge,
    spearman,
    win_rate,
)
from rlhf.models.rewards import STATISTICS
from rlhf.user_error import UserError


def groups_of(rows) -> dict[str, list[int]]:
    """The rows of each dataset, and of all where there are several."""
    found = {}
    for i, row in enumerate(rows):
        found.setdefault(row["dataset"], []).append(i)
    return {"all": list(range(len(rows))), **found} if len(found) > 1 else found


def summarize(rows, answers, measured, scores, baseline: str | None) -> dict:
    """{"prompts", "groups": {dataset: {label: figures}}, "raw": what the picture draws}; what is unknown is None.

    Figures: "kl" (to the baseline), "tokens", "words", "ended", "empty", "distinct_1", "distinct_2", ROUGE with the
    data's answers, "perplexity" of the model's own answers and "reference_perplexity" of the data's; and by judge
    "score", and the win rates "against_baseline" and "against_data".
    """
    rouges = {}
    for label in answers:
        at = [i for i, row in enumerate(rows) if row["reference"] and label != "data"]
        found = rouge([answers[label][i][0].text for i in at], [rows[i]["reference"] for i in at])
        rouges[label] = {name: dict(zip(at, values, strict=True)) for name, values in found.items()}

    def figures(label, group):
        own = [i for i in group if answers[label][i][0]]
        texts, mine = [answers[label][i][0].text for i in own], [measured[label][i] for i in own]
        overlaps = {name: [values[i] for i in own if i in values] for name, values in rouges[label].items()}
        found = {
            "kl": interval(known(mine, "kl")),
            "kl_by": next(iter(known(mine, "kl_by")), None),
            "tokens": mean(known(mine, "tokens")),
            "words": mean(len(text.split()) for text in texts),
            "ended": mean(answers[label][i][0].ended for i in own) if label != "data" else None,
            "empty": sum(not text for text in texts),
            "distinct_1": distinct(texts, 1),
            "distinct_2": distinct(texts, 2),
            **{name: mean(values) for name, values in overlaps.items()},
            "rouge_avg_interval": interval(overlaps["rouge_avg"]),
            "perplexity": perplexity(mine, ""),
            "reference_perplexity": perplexity(mine, "reference_"),
            "judged": {},
        }
        for name, by_label in scores.items():
            ours = {i: value for i in own if (value := by_label[label][i][0]) is not None}
            found["judged"][name] = {"score": interval(ours.values())}
            for other, key in ((baseline, "against_baseline"), ("data", "against_data")):
                theirs = {i: s[0] for i, s in enumerate(by_label.get(other, [])) if s[0] is not None}
                both = [i for i in ours if i in theirs]
                found["judged"][name][key] = win_rate([ours[i] for i in both], [theirs[i] for i in both])
        return found

    groups = groups_of(rows)
    words = {label: [len(row[0].text.split()) for row in made if row[0]] for label, made in answers.items()}
    return {
        "prompts": {name: len(group) for name, group in groups.items()},
        "groups": {name: {label: figures(label, group) for label in answers} for name, group in groups.items()},
        "raw": {"words": words, "samples": samples_of(rows, answers, scores)},
    }


def samples_of(rows, answers, scores) -> list[dict]:
    """What there is to read and to judge: by row the prompt, and all samples of each label with their scores by judge.

    "answers" are {label: texts}, "ended" {label: whether each ended by itself}, "scores" {judge: {label: numbers}}.
    """
    found = []
    for i, row in enumerate(rows):
        made = {label: samples[i] for label, samples in answers.items() if samples[i][0]}
        found.append(
            {name: row.get(name, "") for name in ("dataset", "prompt", "reference")}
            | {"answers": {label: [sample.text for sample in samples] for label, samples in made.items()}}
            | {"ended": {label: [sample.ended for sample in samples] for label, samples in made.items()}}
            | {"scores": {name: {label: by_label[label][i] for label in made} for name, by_label in scores.items()}}
        )
    return found


def known(measured: list[dict], name: str) -> list:
    return [value for row in measured if (value := row.get(name)) is not None]


def perplexity(measured, prefix: str) -> float | None:
    """exp of the mean negative log-probability a token, over all tokens; None where it would be infinite."""
    found = [(m[f"{prefix}logprob"], m[f"{prefix}tokens"]) for m in measured if f"{prefix}logprob" in m]
    tokens = sum(size for _, size in found)
    loss = -sum(logprob for logprob, _ in found) / max(tokens, 1)
    return math.exp(loss) if tokens and loss < 700 else None


def pick_best(label: str, scores) -> dict:
    """What the best of a model's samples, by the first judge, is worth to all judges.

    Returns:
        "picker", its name; "picked": the sample of each row; "curve": by judge the mean score of the best of k
        samples; "gain": by judge how much more the best of all scores than the first one.
    """
    picker = next(iter(scores))
    picked = np.argmax(scores[picker][label], axis=1).tolist()
    gains = {
        judge: interval(row[k] - row[0] for row, k in zip(found[label], picked, strict=True))
        for judge, found in scores.items()
    }
    curves = {judge: best_of_curve(found[label], scores[picker][label]) for judge, found in scores.items()}
    return {"picker": picker, "picked": picked, "curve": curves, "gain": gains}


def write_pairs(path: Path, rows, answers: list[list[Answer]], scores: list[list[float]]) -> None:
    """The best and the worst sample of each prompt as preference data, where they differ."""
    lines = []
    for row, samples, values in zip(rows, answers, scores, strict=True):
        best, worst = np.argmax(values), np.argmin(values)
        chosen, rejected = samples[best].text, samples[worst].text
        if values[best] > values[worst] and chosen and rejected and chosen != rejected:
            pair = {"prompt": row["prompt"], "chosen": chosen, "rejected": rejected}
            lines.append(json.dumps(pair | {"score_chosen": values[best], "score_rejected": values[worst]}))
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def conversation(prompt) -> str:
    """A prompt as text: a question alone as it is, a dialogue with its roles."""
    return prompt[0]["content"] if len(prompt) == 1 else "\n".join(f"{t['role']}: {t['content']}" for t in prompt)


def cell(value):
    """A value as a spreadsheet shows it: a text that starts like a formula gets an apostrophe before it."""
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")) else value


def write_table(path: Path, rows: list[dict]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows({name: cell(value) for name, value in row.items()} for row in rows)


def write_samples(path: Path, rows, answers, scores, best_of: dict) -> None:
    """A row a prompt: dataset, prompt, each model's answer and its scores, the data's own as `reference`."""
    shown = [("reference" if label == "data" else label, label, [0] * len(rows)) for label in answers]
    shown += [(f"{label} best of {len(answers[label][0])}", label, f["picked"]) for label, f in best_of.items()]
    lines = []
    for i, row in enumerate(rows):
        line = {"dataset": row["dataset"], "prompt": conversation(row["prompt"])}
        for name, label, picked in shown:
            sample = answers[label][i][picked[i]]
            line[name] = sample.text if sample else ""
            line |= {f"{name} {judge}": found[label][i][picked[i]] for judge, found in scores.items()}
        lines.append({**line, "reference": row["reference"]})
    write_table(path, lines)


SIDES = ("chosen", "rejected")


def score_pairs(judges: dict, rows: list[dict], batch_size: int) -> tuple[list[dict], dict]:
    """Pairs with the last answers' texts beside them, and their scores {judge: {side: one a pair}}.

    Pairs of which a judge cannot read an answer to its end are left out.
    """
    # of an answer of several turns the last is scored, the others are part of what it answers
    pairs = [
        {"dataset": row["dataset"], "prompt": row["prompt"] + row["chosen"][:-1], "key": prompt_key(row["prompt"])}
        | {side: row[side][-1]["content"] for side in SIDES}
        for row in rows
    ]
    columns = {"dataset": [pair["dataset"] for pair in pairs]}
    prompts = {side: [row["prompt"] + row[side][:-1] for row in rows] for side in SIDES}
    answers = {side: [Answer([], pair[side], True) for pair in pairs] for side in SIDES}
    scores = {
        name: {side: judge(reward, name, prompts[side], answers[side], columns, batch_size) for side in SIDES}
        for name, reward in judges.items()
    }
    every = [found[side] for found in scores.values() for side in SIDES]
    read = [i for i in range(len(rows)) if all(values[i] is not None for values in every)]
    if not read:
        raise UserError(f"{', '.join(judges)}: too few positions to read any pair to the end of its answers")
    kept = {name: {side: [found[side][i] for i in read] for side in SIDES} for name, found in scores.items()}
    return [pairs[i] for i in read], kept


def reward_report(judges: dict, rows: list[dict], folder: Path, batch_size: int) -> dict:
    """The report on reward models, by judge and dataset, from pairs that people have compared.

    Writes samples.csv and, for the first judge, the mean and standard deviation of its scores, as PPO reads them from
    a reward model's folder.
    """
    pairs, scores = score_pairs(judges, rows, batch_size)
    groups = groups_of(pairs)
    answers = {side: [[Answer([], pair[side], True)] for pair in pairs] for side in SIDES}
    by_sample = {name: {side: [[v] for v in found[side]] for side in SIDES} for name, found in scores.items()}
    figures, raw = {}, {"samples": samples_of(pairs, answers, by_sample), "judges": {}}
    for name, found in scores.items():
        figures[name] = {
            group: reward_figures([pairs[i] for i in at], *([found[side][i] for i in at] for side in SIDES))
            for group, at in groups.items()
        }
        raw["judges"][name] = {
            "margins": [a - b for a, b in zip(*found.values(), strict=True)],
            "scores": [value for side in SIDES for value in found[side]],
            "words": [len(pair[side].split()) for side in SIDES for pair in pairs],
        }
    table = []
    for i, pair in enumerate(pairs):
        line = {"dataset": pair["dataset"], "prompt": conversation(pair["prompt"])} | {s: pair[s] for s in SIDES}
        table.append(line | {f"{side} {name}": found[side][i] for name, found in scores.items() for side in SIDES})
    write_table(folder / "samples.csv", table)
    whole = next(iter(next(iter(figures.values())).values()))
    statistics = {"mean": whole["mean"], "std": whole["std"], "rows": 2 * len(pairs)}
    (folder / STATISTICS).write_text(json.dumps(statistics, indent=2) + "\n")
    sizes = {name: len(at) for name, at in groups.items()}
    return {"pairs": sizes, "left_out": len(rows) - len(pairs), "reward_models": figures, "raw": raw}


def reward_figures(pairs: list[dict], chosen: list[float], rejected: list[float]) -> dict:
    """What is known of a reward model from pairs and their scores; lengths are in words, intervals draw prompts."""
    keys, scores = [pair["key"] for pair in pairs], chosen + rejected
    texts = [pair[side] for side in SIDES for pair in pairs]
    lengths = np.array([len(text.split()) for text in texts])
    longer, margins = lengths[: len(pairs)] - lengths[len(pairs) :], np.subtract(chosen, rejected)
    uneven = longer != 0
    score_of = dict(zip(zip(keys * 2, texts, strict=True), scores, strict=True))
    sets, partial = ranked_sets(
        (key, (key, pair["chosen"]), (key, pair["rejected"])) for key, pair in zip(keys, pairs, strict=True)
    )
    orders = [([score_of[answer] for answer in answers], [-above for above in better]) for answers, better in sets]
    return {
        "accuracy": win_rate(chosen, rejected, keys),
        "margin": mean(margins),
        "calibration": calibration(margins),
        "length_correlation": spearman(lengths, scores),
        "longer_preferred": mean(longer[uneven] > 0),
        "longer_scored_higher": mean((longer * margins)[uneven] > 0),
        "ranked_sets": len(sets),
        "partial_sets": partial,
        "kendall": mean(v for order in orders if (v := kendall(*order)) is not None),
        "spearman": mean(v for order in orders if (v := spearman(*order)) is not None),
        "mean": mean(scores),
        "std": float(np.std(scores)),
    }
