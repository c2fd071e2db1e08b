"""A whole mix of datasets as tokens, and what that leaves of each, in one place for all stages."""

from collections import Counter

from rlhf.models.rendering import SAME, WHAT_TO_DO, encode_rows, tokenize, told
from rlhf.user_error import UserError


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
        if 100 * (bad / entry["kept"] + entry["bad"] / entry["read"]) > max_bad_percentage and bad:
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
