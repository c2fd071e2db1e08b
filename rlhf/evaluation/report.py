"""The report of an evaluation: report.md, report.json, report.png, and the same tables on the terminal."""

import json
import textwrap
from pathlib import Path

from rlhf.user_error import visible

WIDTH = 80
NAME = 15  # of a model, on the terminal


def number(value, digits: int = 2) -> str:
    if value is None:
        return "-"
    return f"{round(value, digits) + 0.0:.{digits}f}" if abs(value) < 1e5 else f"{value:.1e}"  # + 0.0: no "-0.00"


def percent(value) -> str:
    return "-" if value is None else f"{100 * value:.0f}%"


def between(found) -> str:
    """A value with its interval: `2.10 (1.98 to 2.22)`."""
    return "-" if found is None else f"{number(found['mean'])} ({number(found['low'])} to {number(found['high'])})"


def share(found) -> str:
    """A share of rows with its interval: `62% (55-69)`."""
    return "-" if found is None else f"{percent(found['mean'])} ({100 * found['low']:.0f}-{100 * found['high']:.0f})"


def model_tables(report, group: str) -> list[tuple[str, list[str], list[list[str]]]]:
    """(title, header, rows) of what is known of the models on one dataset."""
    figures, baseline = report["groups"][group], report["baseline"]
    tables = []
    for judge in report["judges"]:
        header = ["model", "score", f"wins against {baseline}", "wins against data"]
        rows = []
        for label, found in figures.items():
            judged = found["judged"][judge]
            own = [judged["against_baseline"], judged["against_data"]]
            own = [None if label == other else w for other, w in zip((baseline, "data"), own, strict=True)]
            rows.append([label, between(judged["score"]), *map(share, own)])
        tables.append(without_empty(f"by {judge}", header, rows))
    header = ["model", f"KL to {baseline}", "tokens", "words", "ended", "distinct-1", "distinct-2"]
    rows = [
        [
            label,
            number(f["kl"] and f["kl"]["mean"]),
            number(f["tokens"], 1),
            number(f["words"], 1),
            percent(f["ended"]),
            number(f["distinct_1"], 3),
            number(f["distinct_2"], 3),
        ]
        for label, f in figures.items()
    ]
    tables.append(without_empty("answers", header, rows))
    header = ["model", "ROUGE-1", "ROUGE-2", "ROUGE-L", "average", "perplexity", "of data's"]
    names = ("rouge1", "rouge2", "rougeL", "rouge_avg", "perplexity", "reference_perplexity")
    digits = (3, 3, 3, 3, 1, 1)
    rows = [
        [label, *(number(f[name], d) for name, d in zip(names, digits, strict=True))]
        for label, f in figures.items()
        if label != "data"
    ]
    tables.append(without_empty("against the data's answers", header, rows))
    return tables


def best_of_tables(report):
    """(title, header, rows): the mean score of the best of k samples, for each judge."""
    tables = []
    for judge in report["judges"] if report["best_of"] else []:
        curves = {label: found["curve"][judge] for label, found in report["best_of"].items()}
        sizes = list(next(iter(curves.values())))
        picker = next(iter(report["best_of"].values()))["picker"]
        header = ["model", *(f"best of {k}" if k > 1 else "one" for k in sizes), "gain"]
        rows = [
            [label, *(number(curve[k]) for k in sizes), between(report["best_of"][label]["gain"][judge])]
            for label, curve in curves.items()
        ]
        tables.append((f"{judge} of the best of several samples, picked by {picker}", header, rows))
    return tables


def reward_tables(report):
    """(title, header, rows) of what is known of the reward models."""
    tables = []
    for judge, groups in report["reward_models"].items():
        header = ["dataset", "pairs", "accuracy", "margin", "calibration error"]
        rows = [
            [
                name,
                str(f["accuracy"]["rows"]),
                share(f["accuracy"]),
                number(f["margin"]),
                number(f["calibration"]["error"], 3),
            ]
            for name, f in groups.items()
        ]
        tables.append((judge, header, rows))
        header = ["dataset", "score", "length corr.", "longer liked", "longer higher"]
        rows = [
            [
                name,
                f"{number(f['mean'])} ± {number(f['std'])}",
                number(f["length_correlation"]),
                percent(f["longer_preferred"]),
                percent(f["longer_scored_higher"]),
            ]
            for name, f in groups.items()
        ]
        tables.append((f"{judge}: scores and length", header, rows))
        if any(f["ranked_sets"] for f in groups.values()):
            header = ["dataset", "ranked sets", "Kendall tau", "Spearman"]
            rows = [
                [name, str(f["ranked_sets"]), number(f["kendall"]), number(f["spearman"])]
                for name, f in groups.items()
            ]
            tables.append((f"{judge}: order within ranked sets", header, rows))
    return tables


def without_empty(title, header, rows):
    """The table without the columns that nothing is known of."""
    known = [i for i in range(len(header)) if any(row[i] != "-" for row in rows)]
    return title, [header[i] for i in known], [[row[i] for i in known] for row in rows]


def as_text(title, header, rows) -> str:
    """The table for a terminal, at most 80 columns wide."""
    widths = [max(len(line[i]) for line in (header, *rows)) for i in range(len(header))]
    name = min(widths[0], max(NAME, WIDTH - sum(widths[1:]) - 2 * len(widths[1:])))
    room = max(7, (WIDTH - name) // max(len(widths) - 1, 1) - 1)

    def line(cells):
        first = cells[0] if len(cells[0]) <= name else cells[0][: name - 1] + "…"
        return f"{first:<{name}}" + "".join(
            f" {cell:>{max(min(room, w + 3), w)}}" for cell, w in zip(cells[1:], widths[1:], strict=True)
        )

    return "\n".join([f"{title}:" if title else "", line(header), *map(line, rows)])


def as_markdown(title, header, rows) -> str:
    def escaped(cells):
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    ruler = "|---|" + "---:|" * (len(header) - 1)
    return "\n".join([f"**{title}**\n", escaped(header), ruler, *map(escaped, rows)])


def sections(report) -> list[tuple[str, list]]:
    """(heading, tables) in the order of the report."""
    if "reward_models" in report:
        return [("", reward_tables(report))]
    groups = [(f"{name}, {report['prompts'][name]} prompts", model_tables(report, name)) for name in report["groups"]]
    return (
        groups[:1] + ([("best of several samples", best_of_tables(report))] if report["best_of"] else []) + groups[1:]
    )


def notes(report) -> list[str]:
    """How to read the figures of this report, and what was left out."""
    lines = list(report["data"].get("notes", []))
    if "reward_models" in report:
        partial = sum(next(iter(groups.values()))["partial_sets"] for groups in report["reward_models"].values())
        lines += [
            "accuracy: how often the preferred answer has the higher score, a tie counting half, with a 95% bootstrap "
            "interval over prompts; calibration error: how far the share of right answers lies from the probability "
            "that the margin gives by sigmoid; length is counted in words",
            "score_statistics.json holds mean and standard deviation of the scores: in the reward model's folder PPO "
            "reads them",
        ]
        if report["left_out"]:
            lines.append(f"pairs left out that are too long for a judge: {report['left_out']}")
        if partial:
            lines.append(
                f"prompts with three answers and more that lack pairs, so that their order is unknown: {partial}"
            )
        return lines
    settings, figures = report["settings"], next(iter(report["groups"].values()))
    lines.append(
        f"answers of up to {settings['response_length']} tokens at temperature {settings['temperature']:g}, seed "
        f"{settings['seed']}; all models draw with the same random numbers"
    )
    if report["judges"]:
        lines.append(
            "wins: how often the judge scores an answer higher, a tie counting half; in brackets 95% bootstrap "
            "intervals over prompts"
        )
    else:
        lines.append("no --reward_model_name_or_path was given, so nothing is said of who wins")
    if report["baseline"]:
        by_text = [label for label, f in figures.items() if f.get("kl_by") == "text"]
        lines.append(f"KL to {report['baseline']}: nats over a whole answer")
        if by_text:
            lines.append(f"KL of {', '.join(by_text)}: by the text's log-ratio, since the tokens are others")
        if settings["temperature"] == 0:
            lines.append("KL along greedy answers is that of the next tokens, not of the models' distributions")
    lines.append(
        "perplexity: of the model's own answers, and of the data's, a token of its own: compare it between models "
        "of one tokenizer"
    )
    for judge in report["judges"] if "data" in figures else ():
        scored = figures["data"]["judged"][judge]["score"]
        if not scored or scored["rows"] < next(iter(report["prompts"].values())):
            lines.append(f"of the data's answers {judge} could read {scored['rows'] if scored else 0} to their end")
    if empty := {label: f["empty"] for label, f in figures.items() if f["empty"]}:
        lines.append("empty answers: " + ", ".join(f"{label} {count}" for label, count in empty.items()))
    return lines


def clipped(text: str, most: int = 400) -> str:
    text = visible(" ".join(text.split()))
    return text if len(text) <= most else text[: most - 2] + " …"


def samples_as_text(report) -> str:
    """A few prompts with all answers, side by side."""
    lines = ["", f"scores are by {', '.join(report['judges'])}"] if report["judges"] else []
    for sample in report["raw"]["samples"]:
        lines += ["", *textwrap.wrap("Q: " + clipped(sample["prompt"][-1]["content"]), WIDTH)]
        name = min(NAME, max(map(len, sample["answers"])))
        for label, text in sample["answers"].items():
            scores = "".join(f" {number(by_label[label], 1)}" for by_label in sample["scores"].values())
            start = f"{label[:name]:<{name}}{scores}  "
            lines += textwrap.wrap(start + (clipped(text) or "(empty)"), WIDTH, subsequent_indent=" " * (name + 2))
    return "\n".join(lines)


def print_report(report, folder: Path) -> None:
    for heading, tables in sections(report)[: 2 if report.get("best_of") else 1]:
        print(f"\n{heading}" if heading else "")
        for table in tables:
            print("\n" + as_text(*table))
    if "groups" in report:
        print(samples_as_text(report))
    print()
    for line in notes(report):
        print(*textwrap.wrap(line, WIDTH, subsequent_indent="  "), sep="\n")
    print(f"report: {folder}/report.md, report.png, report.json, samples.csv")
    if report.get("best_of"):
        print(f"best and worst samples as pairs to train on: {folder}/pairs_*.jsonl")


def write_report(report, folder: Path) -> None:
    """report.json (all figures; never a NaN), report.md and report.png."""
    stored = {key: value for key, value in report.items() if key != "raw"}
    (folder / "report.json").write_text(json.dumps(stored, indent=2, default=str, allow_nan=False) + "\n")
    lines = ["# Evaluation", "", "![](report.png)", ""]
    for heading, tables in sections(report):
        lines += [f"## {heading}", ""] if heading else []
        for table in tables:
            lines += [as_markdown(*table), ""]
    if "groups" in report:
        lines += ["## To read", "", "```", samples_as_text(report).strip(), "```", ""]
    lines += ["## How to read it", "", *(f"- {line}" for line in notes(report)), ""]
    (folder / "report.md").write_text("\n".join(lines), encoding="utf-8")
    draw(report, folder / "report.png")


def draw(report, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = reward_panels(report) if "reward_models" in report else model_panels(report)
    columns = 2 if len(panels) in (2, 4) else min(3, len(panels))
    lines = -(-len(panels) // columns)
    with pyplot.rc_context(
        {"font.size": 12, "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True}
    ):
        figure, axes = pyplot.subplots(
            lines, columns, figsize=(4.8 * columns, 3.5 * lines), squeeze=False, layout="constrained"
        )
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)
        for axis, panel in zip(axes.flat, panels, strict=False):
            panel(axis)
            axis.grid(alpha=0.3)
        for axis in list(axes.flat)[len(panels) :]:
            axis.axis("off")
        if "groups" in report:
            for label, color in colors_of(report).items():
                axes.flat[0].plot([], [], "o-", color=color, label=short(label))
            figure.legend(loc="outside lower center", ncols=6, frameon=False)
        figure.savefig(path, dpi=100)
        pyplot.close(figure)


def short(label: str) -> str:
    return label if len(label) <= NAME else label[: NAME - 1] + "…"


def colors_of(report) -> dict[str, str]:
    labels = next(iter(report["groups"].values()))
    return {label: "grey" if label == "data" else f"C{i}" for i, label in enumerate(labels)}


def reach(found: dict, scale: float = 1) -> list[list[float]]:
    """How far an interval reaches to both sides of its mean, as matplotlib wants it."""
    sides = found["mean"] - found["low"], found["high"] - found["mean"]
    return [[scale * max(side, 0)] for side in sides]


def points(axis, found: dict, colors: dict, title: str, unit: str, scale: float = 1) -> None:
    """Means with their intervals, one a line, the first on top."""
    found = {label: value for label, value in found.items() if value}
    for i, (label, value) in enumerate(found.items()):
        axis.errorbar(scale * value["mean"], i, xerr=reach(value, scale), fmt="o", color=colors[label], capsize=4)
    axis.set_yticks(range(len(found)), [short(label) for label in found])
    axis.set_ylim(len(found) - 0.4, -0.6)
    axis.set(title=title, xlabel=unit)


def model_panels(report) -> list:
    """Functions that draw what is known, each into its axes."""
    figures, baseline, judges = next(iter(report["groups"].values())), report["baseline"], report["judges"]
    colors = colors_of(report)
    models = {label: f for label, f in figures.items() if label != "data"}
    panels = []

    def add(found, title, unit, scale=1):
        if any(found.values()):
            panels.append(lambda axis: points(axis, found, colors, title, unit, scale))

    for judge in judges:
        scores = {label: f["judged"][judge]["score"] for label, f in figures.items()}
        add(scores, f"score by {judge}", "mean, 95% interval")
    for judge in judges[:1]:
        for key, other in (("against_baseline", baseline), ("against_data", "data")):
            wins = {label: f["judged"][judge][key] for label, f in figures.items() if label != other}
            if any(wins.values()):
                panels.append(lambda axis, w=wins, o=other, j=judge: win_panel(axis, w, colors, o, j))
    if judges and any(f["kl"] for f in models.values()):
        panels.append(lambda axis: frontier(axis, models, colors, judges[-1], baseline))
    if report["best_of"]:
        panels.append(lambda axis: best_of_panel(axis, report["best_of"], colors, judges[-1]))
    panels.append(lambda axis: length_panel(axis, report["raw"]["words"], colors))
    add({label: f["rouge_avg_interval"] for label, f in models.items()}, "ROUGE with the data's answers",
        "average of ROUGE-1, -2, -L; 95% interval")  # fmt: skip
    return panels


def win_panel(axis, wins, colors, other, judge) -> None:
    points(axis, wins, colors, f"wins against {short(other)}", f"% of prompts by {judge}, 95% interval", scale=100)
    axis.axvline(50, color="grey", linestyle=":")
    axis.set_xlim(-3, 103)


def frontier(axis, models, colors, judge, baseline) -> None:
    """What a score has cost in KL: better is up and to the left."""
    for label, f in models.items():
        if f["kl"]:
            score = f["judged"][judge]["score"]
            axis.errorbar(f["kl"]["mean"], score["mean"], yerr=reach(score), fmt="o", capsize=4, color=colors[label])
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
        accuracies = {name: f["accuracy"] for name, f in groups.items()}

        def accuracy(axis, found=accuracies, judge=judge):
            points(axis, found, dict.fromkeys(found, "C0"), f"accuracy of {judge}", "% of pairs, 95% interval", 100)
            axis.axvline(50, color="grey", linestyle=":")

        def margins(axis, raw=raw):
            axis.hist(raw["margins"], bins=40, color="C0")
            axis.axvline(0, color="grey", linestyle=":")
            axis.set(title="margins", xlabel="score of the chosen less the rejected", ylabel="pairs")

        def calibrated(axis, found=whole["calibration"]):
            bins = found["bins"]
            middle = [100 * b["observed"] for b in bins]
            errors = [[max(100 * (b["observed"] - b["low"]), 0) for b in bins],
                      [max(100 * (b["high"] - b["observed"]), 0) for b in bins]]  # fmt: skip
            axis.plot([50, 100], [50, 100], ":", color="grey", label="as good as it says")
            axis.errorbar(
                [100 * b["predicted"] for b in bins], middle, yerr=errors, fmt="o-", capsize=4, label="observed"
            )
            axis.legend(fontsize="small")
            axis.set(title="calibration", xlabel="% sure, by its margin", ylabel="% right, 95% interval")

        def length(axis, raw=raw, found=whole):
            axis.scatter(raw["words"], raw["scores"], s=8, alpha=0.3, linewidths=0)
            rank = number(found["length_correlation"])
            axis.set(title="score and length", xlabel=f"words; rank correlation {rank}", ylabel="score")

        panels += [accuracy, margins, calibrated, length]
    return panels
