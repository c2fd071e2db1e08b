"""Datasets as tokens, and what that leaves of each, in one place for all stages."""

from collections import Counter
from importlib.metadata import version
from pathlib import Path

from datasets.fingerprint import Hasher

from rlhf.models.fingerprints import sha256_of
from rlhf.models.rendering import SAME, encode_demonstrations, encode_preference, encode_prompt
from rlhf.models.templates import PROBE, Unrenderable
from rlhf.processes import first_here_first
from rlhf.user_error import UserError

WHAT_TO_DO = (
    "  where rows are too long, raise --max_length (at most the model's positions; in PPO lower --response_length),"
    " else mend the rows; prepare_data.py --preview shows them"
)
# What stands for a dropped row in the columns of its encoder; of the right type, should a whole batch be dropped.
DROPPED = {
    encode_demonstrations: {"input_ids": [0], "labels": [0]},
    encode_preference: dict.fromkeys(
        ("prompt_ids", "chosen_ids", "rejected_ids", "chosen_mask", "rejected_mask"), [0]
    ),
    encode_prompt: {"prompt_ids": [0], "prompt": PROBE[:1], "reference": ""},
}


def encode_rows(dataset, encode, tokenizer, name: str, num_proc: int | None = None, **limits):
    """A dataset's rows through one of the encoders: (the examples, what became of the rows, as `count_rows` says it).

    Rows that cannot be trained on are dropped.
    """

    def encode_row(row, place):
        try:
            encoded, problem = encode(row, tokenizer, **limits), ""
        except Unrenderable as reason:
            encoded, problem = DROPPED[encode] | {"shortened": False}, str(reason)
            if row.get("margin") is not None and encode is encode_preference:
                encoded["margin"] = 0.0
        for example in encoded if isinstance(encoded, list) else [encoded]:
            size = sum(len(ids) for column, ids in example.items() if column.endswith("ids"))
            yield example | {"problem": problem, "size": size, "source": row.get("dataset", name), "place": place}

    def encode_batch(batch, places):
        rows = (dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True))
        examples = [example for row, place in zip(rows, places, strict=True) for example in encode_row(row, place)]
        return {column: [example[column] for example in examples] for column in examples[0]}

    # all that decides the result; datasets would read this closure with all that it reaches, for longer than it works
    code = [version(package) for package in ("transformers", "tokenizers", "jinja2")]
    code += [sha256_of(*sorted(Path(__file__).parent.glob("*.py")))]
    made_by = Hasher.hash((dataset._fingerprint, name, encode.__name__, sorted(limits.items()), tokenizer, code))
    columns, options = dataset.column_names, {"num_proc": num_proc, "desc": f"Tokenizing {name}"}
    with first_here_first():  # one process writes the cache, the others read it
        options |= {"with_indices": True, "remove_columns": columns, "new_fingerprint": made_by}
        encoded = dataset.map(encode_batch, batched=True, **options)
        kept = encoded
        if any(encoded["problem"]):
            options = {"input_columns": "problem", "new_fingerprint": f"{made_by}kept"}
            kept = encoded.filter(lambda problem: not problem, **options)
    counts = count_rows(encoded) | {"examples": len(kept)}
    return kept.remove_columns(["problem", "shortened", "size", "source", "place"]), counts


def count_rows(encoded) -> dict:
    """What became of rows: `{"kept": rows, "shortened": rows, "dropped": {reason: rows}, "dropped_of": {dataset:
    {reason: rows}}, "tokens": n, "tokens_of": {dataset: n}}`."""
    dropped_of, tokens_of, places, shortened = {}, Counter(), set(), set()
    about = (encoded[column] for column in ("problem", "source", "size", "place", "shortened"))
    for problem, source, size, place, short in zip(*about, strict=True):
        if problem:
            dropped_of.setdefault(source, Counter())[problem] += 1
        else:
            tokens_of[source] += size
            places.add(place)
            shortened |= {place} if short else set()
    return {
        "kept": len(places),
        "shortened": len(shortened),
        "dropped": dict(sum(dropped_of.values(), Counter())),
        "dropped_of": {source: dict(reasons) for source, reasons in dropped_of.items()},
        "tokens": tokens_of.total(),
        "tokens_of": dict(tokens_of),
    }


def tokenize(dataset, encode, tokenizer, **options):
    """`encode_rows` of training rows, which must not all be dropped.

    Raises:
        UserError: if no row is left.
    """
    kept, counts = encode_rows(dataset, encode, tokenizer, "train", **options)
    if not counts["kept"]:
        raise UserError(f"no row of train can be trained on: {told(counts['dropped'])}\n{WHAT_TO_DO}")
    return kept, counts


def told(dropped: dict[str, int]) -> str:
    return ", ".join(
        f"{reason} ({count:,} row{'s' * (count > 1)})" for reason, count in Counter(dropped).most_common()
    )


def tokenize_all(train, evals: dict, data: dict, encode, tokenizer, *, max_bad_percentage, evaluate: bool, **options):
    """Training rows and evaluation sets through an encoder; what was dropped enters the report of the mix, `data`.

    Args:
        max_bad_percentage: of a dataset's training rows; what loading found broken counts too.
        evaluate: whether a set that no row is left of is a mistake; it is left out otherwise.
    Raises:
        UserError: if more rows cannot be rendered than that, or none of a set.
    """
    train, data["tokenized"] = tokenize(train, encode, tokenizer, **options)
    for label, entry in data["datasets"].items():
        dropped = data["tokenized"]["dropped_of"].get(label, {})
        bad = sum(count for reason, count in dropped.items() if reason != SAME)
        if bad and 100 * (bad / entry["kept"] + entry["bad"] / entry["read"]) > max_bad_percentage:
            raise UserError(
                f"{label}: {bad:,} of {entry['kept']:,} rows cannot be rendered: {told(dropped)}\n{WHAT_TO_DO}, "
                f"or let more than {max_bad_percentage:g} % of broken rows pass with --max_bad_percentage"
            )
        enter(entry, dropped)
    total = sum(entry["kept"] for entry in data["datasets"].values())
    for entry in data["datasets"].values():
        entry["share"] = entry["kept"] / total
    tokenized = {}
    for label, rows in evals.items():
        tokenized[label], counts = encode_rows(rows, encode, tokenizer, label, **options)
        enter(data["evaluation"][label], counts["dropped"])
        if counts["dropped"]:
            data["notes"].append(f"eval_{label}: dropped: {told(counts['dropped'])}")
        if not counts["kept"]:
            if evaluate:
                raise UserError(
                    f"no held-out row of {label} can be evaluated on: {told(counts['dropped'])}\n{WHAT_TO_DO}, "
                    "or train without evaluation: --eval_strategy no"
                )
            del tokenized[label]
    return train, tokenized


def enter(entry: dict, dropped: dict[str, int]) -> None:
    """Move rows of a report's entry from those that were kept to those that were dropped."""
    entry["kept"] -= sum(dropped.values())
    entry["dropped"] = dict(Counter(entry["dropped"]) + Counter(dropped))
