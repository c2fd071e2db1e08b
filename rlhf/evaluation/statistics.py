"""The numbers of an evaluation: intervals, win rates, agreement, calibration, rank correlations, ROUGE.

Plain functions of lists. What is not defined (the mean of nothing, a correlation with a constant) is None, never NaN.
"""

import math
from collections import Counter

import numpy as np
import scipy  # scipy.stats itself is loaded at its first use, so that training need not wait for it

RESAMPLES = 2000  # enough for the second digit of a 95% interval
BINS = 10  # of a calibration
AT_ONCE = 100  # resamples in memory together


def mean(values) -> float | None:
    values = list(values)
    return float(np.mean(values)) if values else None


def interval(values, groups=None) -> dict | None:
    """The mean of values with its 95% percentile bootstrap interval: {"mean", "low", "high", "rows"} (Efron 1979).

    Args:
        values: one number a row.
        groups: what each row belongs to, a prompt say: whole groups are drawn, since their rows are not independent.
    """
    values = np.asarray(list(values), float)
    if len(values) == 0:
        return None
    names = np.arange(len(values)) if groups is None else np.unique(list(groups), return_inverse=True)[1]
    totals, sizes = np.bincount(names, values), np.bincount(names)

    def ratio(totals, sizes, axis=-1):
        return totals.sum(axis) / sizes.sum(axis)

    low = high = ratio(totals, sizes)
    if len(totals) > 1:  # scipy refuses to draw from one
        options = {"method": "percentile", "n_resamples": RESAMPLES, "batch": AT_ONCE, "rng": 0}
        low, high = scipy.stats.bootstrap((totals, sizes), ratio, paired=True, **options).confidence_interval
    return {"mean": float(values.mean()), "low": float(low), "high": float(high), "rows": len(values)}


def wilson(values, groups=None) -> dict | None:
    """The mean of values in [0, 1] with Wilson's 95% score interval (1927), as `interval` gives it.

    For the few votes of a person, where a bootstrap of ten wins would be sure of a rate of 1. A tie of 0.5 counts as
    half a win; values of one group, a prompt say, count as one observation.
    """
    values = list(values)
    if not values:
        return None
    p, n, z = mean(values), len(values if groups is None else set(groups)), 1.959964
    middle, scale = p + z * z / (2 * n), 1 + z * z / n
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return {"mean": p, "low": (middle - half) / scale, "high": (middle + half) / scale, "rows": len(values)}


def cohen_kappa(first, second) -> float | None:
    """Agreement of two judges beyond chance (Cohen 1960); None where chance alone explains all of it."""
    n, ours, theirs = len(first), Counter(first), Counter(second)
    observed = sum(a == b for a, b in zip(first, second, strict=True)) / max(n, 1)
    expected = sum(ours[choice] * theirs[choice] for choice in ours) / max(n * n, 1)
    return (observed - expected) / (1 - expected) if n and expected < 1 else None


def outcomes(differences) -> np.ndarray:
    """1 where a difference is positive, a win; 0.5 for a tie, 0 for a loss."""
    return (1 + np.sign(differences)) / 2


def win_rate(ours, theirs, groups=None) -> dict | None:
    """How often our score is the higher one, a tie counting half: an `interval` with "wins", "ties" and "losses"."""
    found = outcomes([a - b for a, b in zip(ours, theirs, strict=True)])
    counts = Counter(found.tolist())
    rate = interval(found, groups)
    return rate and rate | {"wins": counts[1], "ties": counts[0.5], "losses": counts[0]}


def calibration(margins) -> dict | None:
    """Whether a reward model is as often right as it says it is.

    A margin m between two answers predicts that the higher one is preferred with probability sigmoid(|m|), Bradley and
    Terry's model; it is observed whether it was. Bins hold equally many pairs, at least 20 where there are as many.

    Args:
        margins: score of the chosen answer less that of the rejected one, one a pair.
    Returns:
        "bins" of {"predicted", "observed", "low", "high", "rows"}, and their mean distance "error", weighted by rows
        (the expected calibration error).
    """
    margins = np.asarray(list(margins), float)
    if len(margins) == 0:
        return None
    predicted, observed = scipy.special.expit(np.abs(margins)), outcomes(margins)
    found = []
    for rows in np.array_split(np.argsort(predicted, kind="stable"), max(1, min(BINS, len(margins) // 20))):
        seen = interval(observed[rows])
        found.append({"predicted": float(predicted[rows].mean()), "observed": seen.pop("mean"), **seen})
    error = sum(b["rows"] * abs(b["predicted"] - b["observed"]) for b in found) / len(margins)
    return {"bins": found, "error": float(error)}


def rank_correlation(measure, first, second) -> float | None:
    return float(measure(first, second).statistic) if min(len(set(first)), len(set(second))) > 1 else None


def spearman(first, second) -> float | None:
    """Spearman's rank correlation; None where either is constant."""
    return rank_correlation(scipy.stats.spearmanr, first, second)


def kendall(first, second) -> float | None:
    """Kendall's tau-b, which allows for ties; None where either is constant."""
    return rank_correlation(scipy.stats.kendalltau, first, second)


def ranked_sets(pairs) -> tuple[list[tuple[list, list[int]]], int]:
    """The rankings behind pairs of answers to one prompt each, where all pairs of a ranking are there.

    Args:
        pairs: (prompt, chosen, rejected), each hashable.
    Returns:
        A list of (answers, how many answers are better than each), of three and more answers; and how many prompts
        have as many answers but too few pairs to rank them.
    """
    prompts = {}
    for prompt, chosen, rejected in pairs:
        prompts.setdefault(prompt, set()).add((chosen, rejected))
    sets, partial = [], 0
    for found in prompts.values():
        answers = list(dict.fromkeys(answer for pair in sorted(found) for answer in pair))
        if len(answers) < 3:
            continue
        better = Counter(rejected for _, rejected in found)
        # in a ranking each two answers that are not tied are a pair, and the one with fewer above it is its chosen one
        implied = {(a, b) for a in answers for b in answers if better[a] < better[b]}
        if implied == found:
            sets.append((answers, [better[answer] for answer in answers]))
        else:
            partial += 1
    return sets, partial


def distinct(texts, n: int) -> float | None:
    """Distinct-n of Li et al. (arXiv 1510.03055): different n-grams of words per n-gram, over all texts together.

    It falls as texts get more and longer, so compare it on the same prompts only.
    """
    texts = [text.lower().split() for text in texts]
    grams = [tuple(words[i : i + n]) for words in texts for i in range(len(words) + 1 - n)]
    return len(set(grams)) / len(grams) if grams else None


def rouge(predictions, references) -> dict[str, list[float]]:
    """F1 of ROUGE-1, -2 and -L by the rouge-score package, and their average, one each a pair; 0 for an empty answer.

    The package knows Latin letters and digits only: texts in other scripts score 0.
    """
    from rouge_score.rouge_scorer import RougeScorer

    names = ("rouge1", "rouge2", "rougeL")
    scorer = RougeScorer(list(names))
    scores = [scorer.score(reference, answer) for answer, reference in zip(predictions, references, strict=True)]
    found = {name: [score[name].fmeasure for score in scores] for name in names}
    return found | {"rouge_avg": [sum(parts) / 3 for parts in zip(*found.values(), strict=True)]}


def best_of_curve(scores, picker) -> dict[int, float]:
    """The mean score of the best of the first k samples by the picker's scores, for k = 1, 2, 4 ... and all.

    Args:
        scores, picker: (prompts, samples), whose score is reported and whose decides.
    """
    scores, picker = np.asarray(scores, float), np.asarray(picker, float)
    samples = scores.shape[1]
    sizes = sorted({2**i for i in range(samples.bit_length())} | {samples})
    best = {k: picker[:, :k].argmax(1) for k in sizes}
    return {k: float(scores[np.arange(len(scores)), best[k]].mean()) for k in sizes}
