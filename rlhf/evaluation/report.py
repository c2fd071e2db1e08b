"""The report of an evaluation: report.md, report.json, and the same tables on the terminal.

A table is a title and its rows, {column: text}.
"""

import json
import textwrap
from pathlib import Path

from jinja2 import StrictUndefined, Template
from rich.console import Console
from rich.table import Table

from rlhf.user_error import visible

WIDTH = 80
NAME = 15  # of a model, beside its samples and in the picture
PAGE = Template(
    Path(__file__).with_name("report.md.jinja").read_text(encoding="utf-8"),
    trim_blocks=True,
    keep_trailing_newline=True,
    undefined=StrictUndefined,
)


def short(label: str) -> str:
    """A label of some NAME characters: the model gives way, not the sampling that comes after it."""
    model, space, sampling = label.partition(" ")
    room = max(NAME - len(space + sampling), 4)
    return (model if len(model) <= room else model[: room - 1] + "…") + space + sampling


def number(value, digits: int = 2) -> str:
    if value is None:
        return "-"
    return f"{value:z.{digits}f}" if abs(value) < 1e5 else f"{value:.1e}"  # z: no "-0.00"


def percent(value) -> str:
    return "-" if value is None else f"{100 * value:.0f}%"


def between(found) -> str:
    """A value with its interval: `2.10 (1.98 to 2.22)`."""
    return "-" if found is None else f"{number(found['mean'])} ({number(found['low'])} to {number(found['high'])})"


def share(found, most: int = 0) -> str:
    """A share of rows with its interval: `62% (55-69)`; and of how many, where they are less than `most`."""
    if found is None:
        return "-"
    few = f" of {found['rows']}" if found["rows"] < most else ""
    return f"{percent(found['mean'])} ({100 * found['low']:.0f}-{100 * found['high']:.0f}){few}"


def model_tables(report, group: str) -> list[tuple[str, list[dict]]]:
    """What is known of the models on one dataset."""
    figures, baseline, most = report["groups"][group], report["baseline"], report["prompts"][group]
    tables = []
    for judge in report["judges"]:
        rows = []
        for label, f in figures.items():
            judged = f["judged"][judge]
            rows.append(
                {
                    "model": label,
                    "score": between(judged["score"]),
                    f"wins against {baseline}": share(judged["against_baseline"] if label != baseline else None, most),
                    "wins against data": share(judged["against_data"] if label != "data" else None, most),
                }
            )
        tables.append((f"by {judge}", without_empty(rows)))
    answers = [
        {
            "model": label,
            f"KL to {baseline}": number(f["kl"] and f["kl"]["mean"]),
            "tokens": number(f["tokens"], 1),
            "words": number(f["words"], 1),
            "ended": percent(f["ended"]),
            "distinct-1": number(f["distinct_1"], 3),
            "distinct-2": number(f["distinct_2"], 3),
        }
        for label, f in figures.items()
    ]
    overlaps = [
        {
            "model": label,
            "ROUGE-1": number(f["rouge1"], 3),
            "ROUGE-2": number(f["rouge2"], 3),
            "ROUGE-L": number(f["rougeL"], 3),
            "average": number(f["rouge_avg"], 3),
            "perplexity": number(f["perplexity"], 1),
            "of data's": number(f["reference_perplexity"], 1),
        }
        for label, f in figures.items()
        if label != "data"
    ]
    tables += [("answers", without_empty(answers)), ("against the data's answers", without_empty(overlaps))]
    return tables


def without_empty(rows: list[dict]) -> list[dict]:
    """The rows without the columns that nothing is known of."""
    known = [column for column in rows[0] if any(row[column] != "-" for row in rows)]
    return [{column: row[column] for column in known} for row in rows]


def best_of_tables(report) -> list[tuple[str, list[dict]]]:
    """The mean score of the best of k samples, a table a judge."""
    tables = []
    for judge in report["judges"]:
        rows = []
        for label, found in report["best_of"].items():
            curve = {"one" if k == 1 else f"best of {k}": number(v) for k, v in found["curve"][judge].items()}
            rows.append({"model": label, **curve, "gain": between(found["gain"][judge])})
        tables.append((f"{judge} of the best of several samples, picked by {found['picker']}", rows))
    return tables


def reward_tables(report) -> list[tuple[str, list[dict]]]:
    """What is known of the reward models."""
    tables = []
    for judge, groups in report["reward_models"].items():
        rows = [
            {
                "dataset": name,
                "pairs": str(f["accuracy"]["rows"]),
                "accuracy": share(f["accuracy"]),
                "margin": number(f["margin"]),
                "calibration error": number(f["calibration"]["error"], 3),
            }
            for name, f in groups.items()
        ]
        tables.append((judge, rows))
        rows = [
            {
                "dataset": name,
                "score": f"{number(f['mean'])} ± {number(f['std'])}",
                "length corr.": number(f["length_correlation"]),
                "longer liked": percent(f["longer_preferred"]),
                "longer higher": percent(f["longer_scored_higher"]),
            }
            for name, f in groups.items()
        ]
        tables.append((f"{judge}: scores and length", rows))
        if any(f["ranked_sets"] for f in groups.values()):
            rows = [
                {
                    "dataset": name,
                    "ranked sets": str(f["ranked_sets"]),
                    "Kendall tau": number(f["kendall"]),
                    "Spearman": number(f["spearman"]),
                }
                for name, f in groups.items()
            ]
            tables.append((f"{judge}: order within ranked sets", rows))
    return tables


def people_tables(report) -> list[tuple[str, list[dict]]]:
    """What the votes of people say: who wins, and how far judges, and people among themselves, agree with them."""
    people, tables = report["people"], []
    wins = [
        {
            "model": label,
            "wins against all": share(found["against_others"]),
            f"wins against {report.get('baseline')}": share(found["against_baseline"]),
            "wins against data": share(found["against_data"]),
            "votes": str(found["against_others"]["rows"]) if found["against_others"] else "-",
        }
        for label, found in people["wins"].items()
    ]
    if any(row["votes"] != "-" for row in wins):
        tables.append(("by human", without_empty(wins)))
    judges = [
        {
            "judge": name,
            "agrees": share(found["accuracy"]),
            "kappa": number(found["kappa"]),
            "votes": str(found["accuracy"]["rows"]),
        }
        for name, found in people["judges"].items()
        if found["accuracy"]
    ]
    if judges:
        tables.append(("judges beside human", judges))
    people = [
        {
            "people": f"{found['first']} and {found['second']}",
            "pairs": str(found["pairs"]),
            "the same": share(found["same"]),
            "kappa": number(found["kappa"]),
        }
        for found in people["people"]
    ]
    return tables + ([("people beside each other", people)] if people else [])


def sections(report) -> list[tuple[str, list]]:
    """(heading, tables) in the order of the report."""
    people = people_tables(report) if report.get("people") else []
    people = [("votes of people", people)] if people else []
    if "reward_models" in report:
        return [("", reward_tables(report)), *people]
    groups = [(f"{name}, {report['prompts'][name]} prompts", model_tables(report, name)) for name in report["groups"]]
    best = [("best of several samples", best_of_tables(report))] if report["best_of"] else []
    return groups[:1] + best + people + groups[1:]


def clipped(text: str, most: int = 400) -> str:
    text = visible(" ".join(text.split()))
    return text if len(text) <= most else text[: most - 2] + " …"


def samples_as_text(report) -> str:
    """A few prompts with all answers, side by side."""
    lines = [f"scores are by {', '.join(report['judges'])}", ""] if report["judges"] else []
    for sample in report["raw"]["samples"][:3]:
        lines += textwrap.wrap("Q: " + clipped(sample["prompt"][-1]["content"]), WIDTH)
        name = max(len(short(label)) for label in sample["answers"])
        for label, texts in sample["answers"].items():
            scores = "".join(f" {number(by_label[label][0], 1)}" for by_label in sample["scores"].values())
            start = f"{short(label):<{name}}{scores}  "
            lines += textwrap.wrap(start + (clipped(texts[0]) or "(empty)"), WIDTH, subsequent_indent=" " * (name + 2))
        lines.append("")
    return "\n".join(lines).strip()


def page(report):
    """The filled template: str() of it is report.md; `notes` say how to read the figures and what was left out."""
    figures = next(iter(report.get("groups", {}).values()), {})
    judged = figures["data"]["judged"] if "data" in figures else {}
    read = {judge: found["score"]["rows"] if found["score"] else 0 for judge, found in judged.items()}
    rewards = [next(iter(groups.values())) for groups in report.get("reward_models", {}).values()]
    return PAGE.make_module(
        {
            **report,
            "sections": sections(report),
            "samples": samples_as_text(report) if figures else "",
            "by_text": [label for label, f in figures.items() if f["kl_by"] == "text"],
            "empty": [f"{label} {f['empty']}" for label, f in figures.items() if f["empty"]],
            "unread": {judge: rows for judge, rows in read.items() if rows < next(iter(report["prompts"].values()))},
            "partial": sum(f["partial_sets"] for f in rewards[:1]),  # of the same pairs for every judge
        }
    )


def terminal_table(title: str, rows: list[dict]) -> Table:
    """The table, 80 columns wide: where they do not fit, headers and names go on in the next line, not figures."""
    table = Table(title=f"{title}:", title_justify="left", box=None, padding=(0, 0, 0, 1), pad_edge=False, expand=True)
    for i, name in enumerate(rows[0]):
        whole = i > 0 and len(name) <= max(len(row[name]) for row in rows)
        table.add_column(name, justify="right" if i else "left", no_wrap=whole, overflow="fold")
    for row in rows:
        table.add_row(*row.values())
    return table


def print_report(report, folder: Path) -> None:
    console = Console(width=WIDTH, markup=False, emoji=False, highlight=False)
    for heading, tables in sections(report)[: 1 + bool(report.get("best_of")) + bool(report.get("people"))]:
        print(f"\n{heading}" if heading else "")
        for table in tables:
            print()
            console.print(terminal_table(*table))
    if "groups" in report:
        print("\n" + samples_as_text(report))
    print()
    for line in page(report).notes.splitlines():
        print(*textwrap.wrap(line, WIDTH, subsequent_indent="  "), sep="\n")
    print(f"report: {folder}/report.md, report.png, report.json, samples.csv")
    print(f"to read all answers and to judge them, open in a browser: {folder}/report.html")
    if report.get("best_of"):
        print(f"best and worst samples as pairs to train on: {folder}/pairs_*.jsonl")


def write_report(report, folder: Path) -> None:
    """report.json (all figures; never a NaN) and report.md."""
    stored = {key: value for key, value in report.items() if key != "raw"}
    (folder / "report.json").write_text(json.dumps(stored, indent=2, default=str, allow_nan=False) + "\n")
    (folder / "report.md").write_text(str(page(report)), encoding="utf-8")
