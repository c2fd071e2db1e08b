"""The report of an evaluation: report.md, report.json, report.png, and the same tables on the terminal.

A table is a title and its rows, {column: text}.
"""

import json
import textwrap
from functools import partial
from pathlib import Path

import numpy as np
from jinja2 import StrictUndefined, Template
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
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


def number(value, digits: int = 2) -> str:
    if value is None:
        return "-"
    return f"{value:z.{digits}f}" if abs(value) < 1e5 else f"{value:.1e}"  # z: no "-0.00"


def percent(value) -> str:
    return "-" if value is None else f"{100 * value:.0f}%"


def between(found) -> str:
    """A value with its interval: `2.10 (1.98 to 2.22)`."""
    return "-" if found is None else f"{number(found['mean'])} ({number(found['low'])} to {number(found['high'])})"


def share(found) -> str:
    """A share of rows with its interval: `62% (55-69)`."""
    return "-" if found is None else f"{percent(found['mean'])} ({100 * found['low']:.0f}-{100 * found['high']:.0f})"


def model_tables(report, group: str) -> list[tuple[str, list[dict]]]:
    """What is known of the models on one dataset."""
    figures, baseline = report["groups"][group], report["baseline"]
    tables = []
    for judge in report["judges"]:
        rows = []
        for label, f in figures.items():
            judged = f["judged"][judge]
            rows.append(
                {
                    "model": label,
                    "score": between(judged["score"]),
                    f"wins against {baseline}": share(judged["against_baseline"] if label != baseline else None),
                    "wins against data": share(judged["against_data"] if label != "data" else None),
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


def sections(report) -> list[tuple[str, list]]:
    """(heading, tables) in the order of the report."""
    if "reward_models" in report:
        return [("", reward_tables(report))]
    groups = [(f"{name}, {report['prompts'][name]} prompts", model_tables(report, name)) for name in report["groups"]]
    best = [("best of several samples", best_of_tables(report))] if report["best_of"] else []
    return groups[:1] + best + groups[1:]


def clipped(text: str, most: int = 400) -> str:
    text = visible(" ".join(text.split()))
    return text if len(text) <= most else text[: most - 2] + " …"


def samples_as_text(report) -> str:
    """A few prompts with all answers, side by side."""
    lines = [f"scores are by {', '.join(report['judges'])}", ""] if report["judges"] else []
    for sample in report["raw"]["samples"]:
        lines += textwrap.wrap("Q: " + clipped(sample["prompt"][-1]["content"]), WIDTH)
        name = min(NAME, max(map(len, sample["answers"])))
        for label, text in sample["answers"].items():
            scores = "".join(f" {number(by_label[label], 1)}" for by_label in sample["scores"].values())
            start = f"{label[:name]:<{name}}{scores}  "
            lines += textwrap.wrap(start + (clipped(text) or "(empty)"), WIDTH, subsequent_indent=" " * (name + 2))
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
    for heading, tables in sections(report)[: 2 if report.get("best_of") else 1]:
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
    if report.get("best_of"):
        print(f"best and worst samples as pairs to train on: {folder}/pairs_*.jsonl")


def write_report(report, folder: Path) -> None:
    """report.json (all figures; never a NaN), report.md and report.png."""
    stored = {key: value for key, value in report.items() if key != "raw"}
    (folder / "report.json").write_text(json.dumps(stored, indent=2, default=str, allow_nan=False) + "\n")
    (folder / "report.md").write_text(str(page(report)), encoding="utf-8")
    draw(report, folder / "report.png")


def draw(report, path: Path) -> None:
    panels = reward_panels(report) if "reward_models" in report else model_panels(report)
    columns = 2 if len(panels) in (2, 4) else min(3, len(panels))
    lines = -(-len(panels) // columns)
    with rc_context({"font.size": 12, "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True}):
        figure = Figure(figsize=(4.8 * columns, 3.5 * lines), layout="constrained")
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)
        for place, panel in enumerate(panels, 1):
            axis = figure.add_subplot(lines, columns, place)
            panel(axis)
            axis.grid(alpha=0.3)
        if "groups" in report:
            marks = [Line2D([], [], marker="o", color=c, label=short(label)) for label, c in colors_of(report).items()]
            figure.legend(handles=marks, loc="outside lower center", ncols=6, frameon=False)
        figure.savefig(path, dpi=100)


def short(label: str) -> str:
    return label if len(label) <= NAME else label[: NAME - 1] + "…"


def colors_of(report) -> dict[str, str]:
    labels = next(iter(report["groups"].values()))
    return {label: "grey" if label == "data" else f"C{i}" for i, label in enumerate(labels)}


def reach(intervals: list[dict], middle: str = "mean") -> np.ndarray:
    """How far intervals reach to both sides of their means, as matplotlib wants it: (2, intervals)."""
    sides = [(found[middle] - found["low"], found["high"] - found[middle]) for found in intervals]
    return np.maximum(sides, 0).T


def points(axis, found: dict, colors: dict, title: str, unit: str) -> None:
    """Means with their intervals, one a line, the first on top."""
    found = {label: value for label, value in found.items() if value}
    for i, (label, value) in enumerate(found.items()):
        axis.errorbar(value["mean"], i, xerr=reach([value]), fmt="o", color=colors[label], capsize=4)
    axis.set_yticks(range(len(found)), [short(label) for label in found])
    axis.set_ylim(len(found) - 0.4, -0.6)
    axis.set(title=title, xlabel=unit)


def in_percent(value: float, _) -> str:
    return f"{100 * value:g}"


def shares(axis, found: dict, colors: dict, title: str, unit: str) -> None:
    """Shares with their intervals, in per cent, and a line at a half."""
    points(axis, found, colors, title, f"% of {unit}, 95% interval")
    axis.axvline(0.5, color="grey", linestyle=":")
    axis.xaxis.set_major_formatter(in_percent)


def model_panels(report) -> list:
    """Functions that draw what is known, each into its axes."""
    figures, baseline, judges = next(iter(report["groups"].values())), report["baseline"], report["judges"]
    colors = colors_of(report)
    models = {label: f for label, f in figures.items() if label != "data"}
    panels = []

    def add(panel, **known):
        panels.append(partial(panel, colors=colors, **known))

    for judge in judges:
        scores = {label: f["judged"][judge]["score"] for label, f in figures.items()}
        add(points, found=scores, title=f"score by {judge}", unit="mean, 95% interval")
    for other, key in ((baseline, "against_baseline"), ("data", "against_data")) if judges else ():
        wins = {label: f["judged"][judges[0]][key] for label, f in figures.items() if label != other}
        if any(wins.values()):
            add(win_panel, wins=wins, other=other, judge=judges[0])
    if judges and any(f["kl"] for f in models.values()):
        add(frontier, models=models, judge=judges[-1], baseline=baseline)
    if report["best_of"]:
        add(best_of_panel, best_of=report["best_of"], judge=judges[-1])
    add(length_panel, words=report["raw"]["words"])
    overlaps = {label: f["rouge_avg_interval"] for label, f in models.items()}
    if any(overlaps.values()):
        unit = "average of ROUGE-1, -2, -L; 95% interval"
        add(points, found=overlaps, title="ROUGE with the data's answers", unit=unit)
    return panels


def win_panel(axis, wins, colors, other, judge) -> None:
    shares(axis, wins, colors, f"wins against {short(other)}", f"prompts by {judge}")
    axis.set_xlim(-0.03, 1.03)


def frontier(axis, models, colors, judge, baseline) -> None:
    """What a score has cost in KL: better is up and to the left."""
    for label, f in models.items():
        if f["kl"]:
            score = f["judged"][judge]["score"]
            axis.errorbar(f["kl"]["mean"], score["mean"], yerr=reach([score]), fmt="o", capsize=4, color=colors[label])
    axis.set(title="score and distance", xlabel=f"KL to {short(baseline)}, nats an answer", ylabel=f"score by {judge}")


def best_of_panel(axis, best_of, colors, judge) -> None:
    for label, found in best_of.items():
        curve = found["curve"][judge]
        axis.plot(list(curve), list(curve.values()), "o-", color=colors[label])
    axis.set_xscale("log", base=2)
    axis.set_xticks(list(curve), [str(size) for size in curve])
    axis.set(title=f"best of n by {found['picker']}", xlabel="n, samples a prompt", ylabel=f"score by {judge}")


def length_panel(axis, words: dict, colors) -> None:
    boxes = axis.boxplot(list(words.values()), orientation="horizontal", tick_labels=[short(label) for label in words],
                         showfliers=False, patch_artist=True, medianprops={"color": "black"})  # fmt: skip
    for box, label in zip(boxes["boxes"], words, strict=True):
        box.set(facecolor=colors[label], alpha=0.6)
    axis.invert_yaxis()
    axis.set(title="length of the answers", xlabel="words: median, quartiles, range")


def reward_panels(report) -> list:
    panels = []
    for judge, groups in report["reward_models"].items():
        raw, whole = report["raw"][judge], next(iter(groups.values()))
        accuracies, colors = {name: f["accuracy"] for name, f in groups.items()}, dict.fromkeys(groups, "C0")
        panels += [
            partial(shares, found=accuracies, colors=colors, title=f"accuracy of {judge}", unit="pairs"),
            partial(margin_panel, margins=raw["margins"]),
            partial(calibration_panel, bins=whole["calibration"]["bins"]),
            partial(score_and_length, raw=raw, correlation=whole["length_correlation"]),
        ]
    return panels


def margin_panel(axis, margins) -> None:
    axis.hist(margins, bins=40, color="C0")
    axis.axvline(0, color="grey", linestyle=":")
    axis.set(title="margins", xlabel="score of the chosen less the rejected", ylabel="pairs")


def calibration_panel(axis, bins) -> None:
    predicted, observed = [b["predicted"] for b in bins], [b["observed"] for b in bins]
    axis.plot([0.5, 1], [0.5, 1], ":", color="grey", label="as good as it says")
    axis.errorbar(predicted, observed, yerr=reach(bins, "observed"), fmt="o-", capsize=4, label="observed")
    axis.legend(fontsize="small")
    for ticks in (axis.xaxis, axis.yaxis):
        ticks.set_major_formatter(in_percent)
    axis.set(title="calibration", xlabel="% sure, by its margin", ylabel="% right, 95% interval")


def score_and_length(axis, raw, correlation) -> None:
    axis.scatter(raw["words"], raw["scores"], s=8, alpha=0.3, linewidths=0)
    axis.set(title="score and length", xlabel=f"words; rank correlation {number(correlation)}", ylabel="score")
