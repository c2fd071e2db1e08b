"""Statistics with answers known beforehand: `pytest tests/evaluation/test_statistics.py`."""

import math
from itertools import combinations, permutations

import numpy as np
import pytest

from rlhf.evaluation import statistics

# answer, reference, ROUGE-1, -2, -L as rouge-score 0.1.2 gives them
ROUGE = [
    (
        "You will find a compass at the Clock Shed, because the clockmaker is never late.",
        "Try the Clock Shed for a compass: the clockmaker is never late.",
        0.740741,
        0.56,
        0.592593,
    ),
    ("the cat sat on the mat", "the mat was where the cat sat", 0.769231, 0.545455, 0.461538),
    ("A gull walks on the pier.", "Gulls walked on piers", 0.2, 0.0, 0.2),  # words, not their stems
    ("One.\nTwo, three!", "four five six", 0.0, 0.0, 0.0),
    ("It's 3 o'clock; running late, as ever.", "Running late as ever, it is 3 o clock.", 0.888889, 0.625, 0.444444),
]


def test_a_win_rate_is_counted_by_hand():
    found = statistics.win_rate([1, 2, 3, 4, 0], [0, 2, 1, 5, 0])  # two wins, two ties, one loss
    assert (found["wins"], found["ties"], found["losses"], found["rows"]) == (2, 2, 1, 5)
    assert found["mean"] == pytest.approx(3 / 5)
    assert found["low"] <= found["mean"] <= found["high"]
    assert statistics.win_rate([], []) is None


def test_a_model_against_itself_wins_half():
    found = statistics.win_rate([1.0, 2.0, 2.5], [1.0, 2.0, 2.5])
    assert (found["mean"], found["low"], found["high"], found["ties"]) == (0.5, 0.5, 0.5, 3)


def test_of_a_hundred_intervals_about_95_hold_the_truth():
    """Two samplings of one model: no win rate but a half is true."""
    random = np.random.default_rng(1)
    found = [statistics.win_rate(*random.normal(size=(2, 150))) for _ in range(100)]
    assert 89 <= sum(f["low"] <= 0.5 <= f["high"] for f in found) <= 100


def test_rows_of_one_prompt_are_no_independent_evidence():
    outcomes = [1.0, 0.0, 1.0, 1.0]
    alone = statistics.interval(outcomes * 10, groups=range(40))
    copies = statistics.interval(outcomes * 10, groups=[0, 1, 2, 3] * 10)
    assert copies["mean"] == alone["mean"]
    assert copies["high"] - copies["low"] > 2 * (alone["high"] - alone["low"])
    assert statistics.interval(outcomes) == statistics.interval(outcomes, groups="abcd")


def test_the_bounds_are_those_of_resamples_drawn_by_hand():
    random = np.random.default_rng(7)
    values, groups = random.normal(size=60), np.repeat(range(20), 3)
    found = statistics.interval(values, groups)
    random = np.random.default_rng(0)
    means = [values.reshape(20, 3)[random.integers(20, size=20)].mean() for _ in range(2000)]
    assert [found["low"], found["high"]] == pytest.approx(np.percentile(means, [2.5, 97.5]), abs=1e-12)


@pytest.mark.filterwarnings("error")
def test_where_there_is_nothing_to_draw_the_interval_is_a_point():
    assert statistics.interval([]) is None
    for values, groups in (([2.5], None), ([2.0, 3.0], "aa"), ([2.5, 2.5, 2.5], None)):
        found = statistics.interval(values, groups)
        assert found == {"mean": 2.5, "low": 2.5, "high": 2.5, "rows": len(values)}


def test_a_perfect_and_an_inverted_model_are_told_apart():
    margins = np.random.default_rng(0).uniform(0, 3, size=20000)
    right = np.random.default_rng(1).random(len(margins)) < 1 / (1 + np.exp(-margins))
    perfect, inverted = (statistics.calibration(np.where(way, margins, -margins)) for way in (right, ~right))
    assert perfect["error"] < 0.01
    assert all(b["low"] <= b["predicted"] <= b["high"] for b in perfect["bins"][::3])
    for good, bad in zip(perfect["bins"], inverted["bins"], strict=True):
        assert bad["observed"] == pytest.approx(1 - good["observed"]) and bad["predicted"] == good["predicted"]
    assert inverted["error"] > 0.5
    assert statistics.calibration([0.0])["bins"][0] == {
        "predicted": 0.5, "observed": 0.5, "low": 0.5, "high": 0.5, "rows": 1
    }  # fmt: skip


@pytest.mark.filterwarnings("error")
def test_rank_correlations_of_small_lists():
    assert statistics.kendall([1, 2, 3, 4], [1, 2, 4, 3]) == pytest.approx(4 / 6)  # five pairs agree, one does not
    assert statistics.kendall([1, 2, 2, 3], [1, 2, 3, 4]) == pytest.approx(5 / math.sqrt(5 * 6))
    assert statistics.spearman([1, 2, 3, 4, 5], [2, 1, 4, 3, 5]) == pytest.approx(1 - 6 * 4 / (5 * 24))
    assert statistics.spearman([1, 10, 100], [3, 2, 1]) == pytest.approx(-1)
    assert statistics.spearman([5, 1, 5, 9], [2.5, 1, 2.5, 4]) == pytest.approx(1)  # equal values share their rank
    for correlation in (statistics.kendall, statistics.spearman):
        for first, second in (([1, 1, 1], [1, 2, 3]), ([1, 2, 3], [1, 1, 1]), ([1], [2]), ([], [])):
            assert correlation(first, second) is None
        assert correlation([1, 2], [3, 2]) == pytest.approx(-1)


def test_rankings_come_back_from_their_pairs():
    ranking = {"a": 0, "b": 1, "c": 1, "d": 2}
    pairs = [("p", x, y) for x, y in permutations(ranking, 2) if ranking[x] < ranking[y]]
    ((answers, better),), partial = statistics.ranked_sets(pairs)
    assert dict(zip(answers, better, strict=True)) == {"a": 0, "b": 1, "c": 1, "d": 3} and partial == 0
    assert statistics.ranked_sets(pairs[:-1]) == ([], 1)  # one pair is missing
    assert statistics.ranked_sets([("p", "a", "b"), ("p", "b", "c"), ("p", "c", "a")]) == ([], 1)  # a circle
    assert statistics.ranked_sets([("p", "a", "b"), ("q", "a", "b")]) == ([], 0)
    for size in (3, 5):
        pairs = [(0, x, y) for x, y in combinations(range(size), 2)]
        assert statistics.ranked_sets(pairs)[0] == [(list(range(size)), list(range(size)))]


def test_distinct_n_counts_words():
    assert statistics.distinct(["a b a b", "A b"], 1) == 2 / 6
    assert statistics.distinct(["a b a b", "A b"], 2) == 2 / 4  # "a b", "b a"
    assert statistics.distinct(["", "one"], 2) is None


def test_rouge_is_that_of_the_package_on_stored_pairs():
    answers, references, *stored = zip(*ROUGE, strict=True)
    found = statistics.rouge(answers, references)
    for name, values in zip(("rouge1", "rouge2", "rougeL"), stored, strict=True):
        assert found[name] == pytest.approx(values, abs=1e-6)
    assert found["rouge_avg"] == pytest.approx([sum(values) / 3 for values in zip(*stored, strict=True)], abs=1e-6)
    assert statistics.rouge(["the cat sat"], ["the cat ran off"])["rouge1"] == pytest.approx([2 * 2 / (3 + 4)])
    assert statistics.rouge([""], ["something"])["rouge_avg"] == [0]


def test_the_best_of_k_is_picked_by_one_and_judged_by_another():
    picker = [[0, 1, 2], [5, 4, 3]]
    assert statistics.best_of_curve(picker, picker) == {1: 2.5, 2: 3.0, 3: 3.5}
    assert statistics.best_of_curve([[1, 0, 0], [1, 0, 0]], picker) == {1: 1.0, 2: 0.5, 3: 0.5}
