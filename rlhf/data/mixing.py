"""From names to one training set and its evaluation sets: split, sampled, freed of duplicates, shuffled.

No random generator is involved: a hash of the conversation's opening decides the split, a hash of the row and the seed
decides sampling and order. So every rank, run and machine agrees, and adding a dataset moves no row of another between
training and evaluation.
"""

import textwrap

from rlhf.data.cache import prepare
from rlhf.data.names import Name
from rlhf.data.rows import COLUMNS
from rlhf.data.sources import Source
from rlhf.data.votes import by_pair
from rlhf.user_error import UserError

# salts: were sampling and order to share one, a sample would come first in the mix
PAIRS, SAMPLE, ORDER, EVALUATE = 0, 1, 2, 3


def earlier_with_same(keys):
    """For each element how many equal ones stand before it: 0 marks the first of its kind."""
    import numpy as np

    order = np.argsort(keys, kind="stable")
    starts = np.flatnonzero(np.r_[True, keys[order][1:] != keys[order][:-1]]) if len(keys) else np.array([], int)
    count = np.empty(len(keys), np.int64)
    count[order] = np.arange(len(keys)) - np.repeat(starts, np.diff(np.r_[starts, len(keys)]))
    return count


def scramble(keys, seed: int, salt: int):
    """Well mixed 64-bit numbers of hashes and a seed (splitmix64): sorting by them is a seeded shuffle."""
    import numpy as np

    z = keys.astype(np.uint64) + np.uint64(((seed * 4 + salt) * 0x9E3779B97F4A7C15) % 2**64)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


class Part:
    """Rows of one prepared source with their hashes, and which of them are still in (`index`)."""

    def __init__(self, source: Source, task: str, prepared, seed: int):
        import numpy as np

        self.source, (self.rows, self.report) = source, prepared
        table = self.rows.data
        self.hash = {name: table.column(f"{name}_hash").to_numpy() for name in ("row", "prompt", "opening")}
        self.dropped, self.set_aside = dict(self.report["dropped"]), {}
        self.index = np.arange(len(self.rows))
        self.drop("duplicate", earlier_with_same(self.hash["row"]) > 0)
        # of a prompt's answers the one with the highest score, where there are scores, stands for it
        score = np.nan_to_num(table.column("score").to_numpy(), nan=0.0)[self.index]
        best_first = np.argsort(-score, kind="stable")
        another = np.empty(len(self.index), bool)
        another[best_first] = earlier_with_same(self.of("prompt")[best_first]) > 0
        if task == "prompt":
            self.drop("prompt seen before", another)
        elif task == "sft" and table.column("score").null_count < len(self.rows):
            self.drop("not its prompt's best answer", another)
        if task == "preference" and source.max_pairs:
            drawn = np.argsort(scramble(self.of("row"), seed, PAIRS), kind="stable")
            beyond = np.empty(len(self.index), bool)
            beyond[drawn] = earlier_with_same(self.of("prompt")[drawn]) >= source.max_pairs
            self.drop(f"more than {source.max_pairs} pairs of a prompt", beyond)

    def of(self, name: str):
        """The hashes of the rows that are still in."""
        return self.hash[name][self.index]

    def drop(self, reason: str, mask, counts: dict | None = None):
        """Takes rows out and counts them: as dropped, or in `counts`."""
        counts = self.dropped if counts is None else counts
        if mask.any():
            counts[reason] = counts.get(reason, 0) + int(mask.sum())
        self.index = self.index[~mask]

    def split(self, side: str, percentage: float):
        """Leaves one side of a split by prompt; no seed decides it, so that every stage holds out the same prompts."""
        held_out = scramble(self.of("opening"), 0, 0).astype(float) / 2.0**64 < percentage / 100
        if side == "train":
            self.drop("held out for evaluation", held_out, self.set_aside)
        else:
            self.drop("trained on", ~held_out, self.set_aside)

    def take(self, wanted: Name, seed: int, salt: int = SAMPLE):
        """Keeps the wanted fraction or count; a smaller sample is always part of a larger one."""
        import numpy as np

        size = len(self.index)
        if wanted.fraction is not None:
            size = max(1, int(wanted.fraction * size + 0.5))
        size = min(size, size if wanted.count is None else wanted.count)
        left_out = np.ones(len(self.index), bool)
        left_out[np.argsort(scramble(self.of("row"), seed, salt), kind="stable")[:size]] = False
        self.drop("not sampled", left_out, self.set_aside)


def part_of(source: Source, task: str, side: str, max_bad_percentage: float, seed: int = 0) -> Part | None:
    prepared = prepare(source, task, side, max_bad_percentage)
    return prepared and Part(source, task, prepared, seed)


def evaluation_part(source: Source, task: str, whole: bool, percentage: float, max_bad_percentage: float) -> Part:
    """The rows to evaluate a source on: its test side, or what the split holds out, or with `whole` all there is."""
    rows = part_of(source, task, "test", max_bad_percentage)
    if rows is None:
        rows = part_of(source, task, "train", max_bad_percentage)
        if not whole:
            rows.split("test", percentage)
    return rows


def hold_out(wanted: list, task: str, *, whole_files: bool, percentage, max_eval_samples, max_bad_percentage):
    """({label: evaluation rows}, report) of a list of (Source, Name): just what `mix` keeps out of training."""
    evals, report = {}, {"datasets": {}, "evaluation": {}, "notes": []}
    for source, name in wanted:
        whole = whole_files and source.path is not None
        rows = evaluation_part(source, task, whole, percentage, max_bad_percentage)
        add_evaluation(evals, report, rows, [name], max_eval_samples, [*COLUMNS[task], "dataset"])
        report["evaluation"][source.label]["held_out"] = not (whole and source.open(task, "test") is None)
    return evals, report


def add_evaluation(evals: dict, report: dict, rows: Part, names: list[Name], max_eval_samples, columns: list[str]):
    """Adds what is sampled of the rows: the same under every seed, so that runs can be compared."""
    for name in (*names, Name("", count=max_eval_samples)):
        rows.take(name, 0, EVALUATE)
    label = rows.source.label
    report["evaluation"][label] = account(rows)
    if len(rows.index):
        evals[label] = rows.rows.select_columns(columns).select(rows.index)
    else:
        report["notes"].append(
            f"{label}: no prompt is held out to evaluate on (a set without a test split holds out more by a larger"
            " --validation_split_percentage)"
        )


def mix(train: list, evaluate: list | None, task: str, *, percentage, max_eval_samples, seed, max_bad_percentage):
    """(training rows, {label: evaluation rows}, report) of lists of (Source, Name).

    Without `evaluate` every training set is evaluated on: on its own test side, or on what the split holds out.
    """
    import numpy as np

    report = {"task": task, "seed": seed, "validation_split_percentage": percentage}
    report |= {"datasets": {}, "evaluation": {}, "notes": []}
    trained, tests = training_parts(train, task, seed, max_bad_percentage), {}
    for source, _ in train if evaluate is None else evaluate:
        # a file that is named for evaluation alone is evaluated on whole
        whole = source.path is not None and source.label not in trained
        tests[source.label] = evaluation_part(source, task, whole, percentage, max_bad_percentage)
    # the rows that an evaluation leaves out for brevity count as seen too: its size must not change what is trained on
    seen = np.concatenate([rows.of("prompt") for rows in tests.values()])

    for source, name in train:
        rows = trained[source.label]
        held_out = rows.rows.data.column("held_out").to_numpy()[rows.index]  # of a vote, by the page that it is from
        rows.drop("prompt was held out where it was voted on", held_out, rows.set_aside)
        if source.label in tests and source.open(task, "test") is None:
            rows.split("train", percentage)
        rows.drop("prompt is in an evaluation set", np.isin(rows.of("prompt"), seen))
        rows.take(name, seed)
    contained = drop_repeated(trained, "prompt" if task == "prompt" else "row")
    report["notes"] += [f"{label}: left out, for sets named before have all its rows" for label in contained]
    if evaluate is not None and any(label not in tests for label in trained):
        report["notes"].append("nothing is held out of sets that --eval_dataset_names does not name")

    total = sum(len(rows.index) for rows in trained.values())
    for label, rows in trained.items():
        if not len(rows.index) and label not in contained:
            raise nothing_left(rows)
        report["datasets"][label] = account(rows) | {"share": len(rows.index) / max(total, 1)}
    columns, tables = [*COLUMNS[task], "dataset"], [rows.rows.data for rows in [*trained.values(), *tests.values()]]
    if task == "preference" and all(table.column("margin").null_count == 0 for table in tables):
        columns.insert(-1, "margin")
    evals = {}
    for rows, (_, name) in zip(tests.values(), evaluate or train, strict=True):
        add_evaluation(evals, report, rows, [name] if evaluate else [], max_eval_samples, columns)
    return shuffled(list(trained.values()), columns, seed), evals, report


def training_parts(train: list, task: str, seed: int, max_bad_percentage: float) -> dict[str, Part]:
    """The rows of each set by its label; raises a UserError where there are none, and for votes in several sets."""
    votes = [str(source.path or source.origin.strip()) for source, _ in train if source.regroup is by_pair]
    if len(votes) > 1:
        raise UserError(
            f"{' and '.join(votes)} are votes: apart, a pair and its reverse could both be trained on\n"
            "put the files into one folder, each under its own name, and give the folder: there the majority decides"
        )
    parts = {source.label: part_of(source, task, "train", max_bad_percentage, seed) for source, _ in train}
    for source, _ in train:
        if parts[source.label] is None:
            raise UserError(
                f"{source.origin.strip()}: only test rows, none to train on\nname a file in it to train on that"
            )
    return parts


def drop_repeated(parts: dict[str, Part], unique: str) -> list[str]:
    """Takes out what a set named before has; returns the labels of the sets that have nothing else."""
    import numpy as np

    again = earlier_with_same(np.concatenate([rows.of(unique) for rows in parts.values()])) > 0
    contained = []
    for label, rows in parts.items():
        mine, again = again[: len(rows.index)], again[len(rows.index) :]
        if len(mine) and mine.all():
            contained.append(label)
        rows.drop("in a set named before", mine)
    return contained


def nothing_left(rows: Part) -> UserError:
    reasons = ", ".join(f"{reason} {count:,}" for reason, count in (rows.dropped | rows.set_aside).items())
    held = "\nits prompts are held out of training, to measure on: votes to train on are given on others"
    hint = held if any("held out" in reason for reason in rows.set_aside) else ""
    return UserError(f"{rows.source.label}: no row is left to train on: {reasons}{hint}")


def shuffled(parts: list[Part], columns: list[str], seed: int):
    """The rows of all parts that are still in, in the order that the seed and their hashes decide."""
    import numpy as np
    from datasets import concatenate_datasets

    starts = np.cumsum([0] + [len(rows.rows) for rows in parts[:-1]])
    index = np.concatenate([rows.index + start for rows, start in zip(parts, starts, strict=True)])
    order = np.argsort(scramble(np.concatenate([rows.of("row") for rows in parts]), seed, ORDER), kind="stable")
    return concatenate_datasets([rows.rows.select_columns(columns) for rows in parts]).select(index[order])


def account(rows: Part) -> dict:
    """What became of a part's rows: read + extra (rows beyond one for a raw row) == kept + set aside + dropped."""
    kept = {"kept": len(rows.index), "dropped": rows.dropped, "set_aside": rows.set_aside}
    names = ("read", "extra", "bad", "first", "unused", "fingerprint")
    return kept | {name: rows.report[name] for name in names}


def describe(report: dict) -> str:
    """The mix as a table of 80 columns. With `tokenized` in the report, the datasets' tokens get a column."""
    tokens = report.get("tokenized", {}).get("tokens_of", {})
    lines = [f"{'dataset':<28}{'read':>14}{'kept':>14}{'share':>8}" + (f"{'tokens':>16}" if tokens else "")]
    for label, entry in report["datasets"].items():
        line = f"{label[:27]:<28}{entry['read']:>14,}{entry['kept']:>14,}{entry['share']:>8.1%}"
        lines += [line + (f"{tokens.get(label, 0):>16,}" if tokens else ""), *reasons_of(entry)]
    for label, entry in report["evaluation"].items():
        lines.append(f"{'eval_' + label[:22]:<28}{entry['read']:>14,}{entry['kept']:>14,}")
        if "trained on" not in entry["set_aside"]:  # else its drops are those of the training set above
            lines += reasons_of(entry)
    return "\n".join(lines + report.get("notes", []))


def reasons_of(entry: dict) -> list[str]:
    """Indented lines that say where the rows went, the most frequent reason first."""
    lines = [("further rows, where a raw row gives several", {"": entry["extra"]})] if entry["extra"] else []
    lines += [(name.replace("_", " "), entry[name]) for name in ("set_aside", "dropped") if entry[name]]
    texts = []
    for name, counts in lines:
        ordered = sorted(counts.items(), key=lambda item: -item[1])
        texts.append(f"{name}: " + ", ".join(f"{reason} {count:,}".strip() for reason, count in ordered))
    if entry["unused"]:
        texts.append("not used: " + ", ".join(entry["unused"]))
    return [line for text in texts for line in textwrap.wrap(text, 80, initial_indent="  ", subsequent_indent="    ")]
