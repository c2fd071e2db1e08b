"""The picture of a report, report.png: scores, win rates, KL, lengths; of reward models accuracy and calibration."""

from functools import partial
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from rlhf.evaluation.report import number, short


def draw(report, path: Path) -> None:
    panels = (reward_panels if "reward_models" in report else model_panels)(report) + people_panels(report)
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


def people_panels(report) -> list:
    """Wins by the votes of people, and how far each judge agrees with them."""
    if not report.get("people"):
        return []
    found, against = report["people"], "against_baseline" if report.get("baseline") else "against_others"
    other = report.get("baseline") or "all"
    wins, panels = {label: by[against] for label, by in found["wins"].items()}, []
    colors = colors_of(report) if "groups" in report else dict.fromkeys(wins, "C0")
    if any(wins.values()):
        panels.append(partial(win_panel, wins=wins, colors=colors, other=other, judge="human"))
    judges = {name: by["accuracy"] for name, by in found["judges"].items()}
    if any(judges.values()):
        colors = dict.fromkeys(judges, "C0")
        panels.append(partial(shares, found=judges, colors=colors, title="agrees with human", unit="votes"))
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
        raw, whole = report["raw"]["judges"][judge], next(iter(groups.values()))
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
