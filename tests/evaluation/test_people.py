"""Figures of people's votes, counted by hand: `pytest tests/evaluation/test_people.py`."""

import pytest
import torch

from rlhf.data.votes import Vote
from rlhf.evaluation.people import people_report
from rlhf.evaluation.statistics import cohen_kappa, wilson


def prompt(i):
    return [{"role": "user", "content": f"Question {i}?"}]


def vote(i, left, right, said, judge="ann"):
    return Vote(prompt(i), f"{left} {i}", f"{right} {i}", left, right, said, judge, "demo", "")


def sample(i):
    labels = ("sft", "dpo", "data")
    texts, ended = {label: [f"{label} {i}"] for label in labels}, {label: [True] for label in labels}
    return {"dataset": "demo", "prompt": prompt(i), "reference": "", "answers": texts, "ended": ended}


SAMPLES = [sample(i) for i in range(12)]


class Likes:
    """A judge that scores by the first word of an answer."""

    def __init__(self, **scores):
        self.scores = scores

    def __call__(self, prompts, completions, ended, columns):
        return torch.tensor([float(self.scores[text.split()[0]]) for text in completions])


# dpo against sft: 6 wins, 2 losses, a tie and two bad ones: (6 + 2 / 2) / 10 = 0.7
VOTES = [vote(i, "dpo", "sft", "left") for i in range(3)] + [vote(i, "sft", "dpo", "right") for i in range(3, 6)]
VOTES += [vote(6, "sft", "dpo", "left"), vote(7, "dpo", "sft", "right"), vote(8, "dpo", "sft", "tie")]
VOTES += [vote(9, "dpo", "sft", "both bad"), vote(10, "sft", "dpo", "skip"), vote(11, "data", "dpo", "left")]


def report(votes=VOTES, baseline="sft", **judges):
    return people_report(votes, judges, SAMPLES, baseline, 4)


def test_win_rates_and_intervals_are_those_counted_by_hand():
    found = report()
    assert found["votes"] == {"left": 5, "right": 4, "tie": 1, "both bad": 1, "skip": 1}
    wins = found["wins"]["dpo"]["against_baseline"]
    assert wins["mean"] == pytest.approx(0.7) and wins["rows"] == 10
    # Wilson: (0.7 + 3.8415 / 20 -+ 1.96 sqrt(0.021 + 3.8415 / 400)) / 1.38415
    assert (wins["low"], wins["high"]) == pytest.approx((0.39677, 0.89221), abs=1e-4)
    assert found["wins"]["sft"]["against_others"]["mean"] == pytest.approx(0.3)
    assert found["wins"]["sft"]["against_baseline"] is None
    assert found["wins"]["dpo"]["against_data"]["mean"] == 0 and found["wins"]["data"]["against_others"]["mean"] == 1
    assert found["wins"]["dpo"]["against_others"]["mean"] == pytest.approx(7 / 11)
    assert found["left"]["mean"] == pytest.approx(5 / 9)


def test_a_judge_that_likes_what_people_like_agrees_and_its_inverse_does_not():
    found = report(VOTES[:6], same=Likes(dpo=1, sft=0), inverse=Likes(dpo=0, sft=1), none=Likes(dpo=1, sft=1))[
        "judges"
    ]
    assert (found["same"]["accuracy"]["mean"], found["same"]["kappa"]) == (1, 1)
    assert (found["inverse"]["accuracy"]["mean"], found["inverse"]["kappa"]) == (0, -1)
    assert (found["none"]["accuracy"]["mean"], found["none"]["kappa"]) == (0.5, 0)
    assert found["same"]["accuracy"]["high"] == 1 and found["same"]["accuracy"]["low"] == pytest.approx(
        0.60967, abs=1e-4
    )
    # of eight decided votes two are the other way, and they stand once on each side: 0.75, and (0.75 - 0.5) / 0.5
    found = report(VOTES[:8], same=Likes(dpo=1, sft=0))["judges"]["same"]
    assert found["accuracy"]["mean"] == 0.75 and found["kappa"] == pytest.approx(0.5)


def test_the_kappa_of_two_people_is_that_of_the_textbook():
    assert cohen_kappa("y" * 20 + "y" * 5 + "n" * 10 + "n" * 15, "y" * 20 + "n" * 5 + "y" * 10 + "n" * 15) == (
        pytest.approx(0.4)
    )  # 20 yes-yes, 5 yes-no, 10 no-yes, 15 no-no
    assert cohen_kappa("aab", "bba") < 0 and cohen_kappa("aa", "aa") is None and cohen_kappa("", "") is None


def test_people_are_compared_on_the_answers_that_both_have_seen_whatever_the_side():
    bob = [vote(i, "sft", "dpo", "right", "bob") for i in range(3)]  # the same answer as ann's, from the other side
    bob += [vote(3, "sft", "dpo", "left", "bob"), vote(8, "sft", "dpo", "both bad", "bob")]
    bob += [vote(11, "sft", "dpo", "tie", "bob"), vote(10, "dpo", "sft", "left", "bob")]  # not of ann's
    (found,) = report([*VOTES, *bob])["people"]
    assert (found["first"], found["second"], found["pairs"]) == ("ann", "bob", 5)
    assert found["same"]["mean"] == 0.8
    # ann: left 3, right 1, none 1; bob as ann saw them: left 4, right 0, none 1; chance (3 * 4 + 1) / 25
    assert found["kappa"] == pytest.approx((0.8 - 13 / 25) / (1 - 13 / 25))


def test_votes_on_other_answers_say_nothing_of_these_models():
    stale = vote(0, "dpo", "sft", "right")._replace(left="what dpo said before")
    found = report([*VOTES, stale], same=lambda prompts, texts, *_: torch.tensor([float(len(text)) for text in texts]))
    assert found["other_answers"] == 1 and found["wins"] == report()["wins"]
    assert found["judges"]["same"]["accuracy"]["rows"] == 10  # but of the judge they do


def test_votes_that_count_for_nothing_are_counted():
    class Short(Likes):
        def __call__(self, prompts, texts, ended, columns):
            return torch.tensor([1.0] * len(texts))

    class Blind:  # a judge of few positions: it reads no answer of sft
        tokenizer = type("Tokenizer", (), {"eos_token_id": 0})

        def encode(self, prompt, text, ended):
            return [1] if text.startswith("sft") else [2, 0]

        def score_tokens(self, ids):
            return torch.tensor([1.0] * len(ids))

    nameless = [VOTES[0]._replace(left_model="", right_model=""), VOTES[1]._replace(left_model="")]
    found = report([*VOTES[2:], *nameless], same=Short(), blind=Blind())
    assert found["nameless"] == 2 and found["other_answers"] == 0
    assert found["wins"] == report(VOTES[2:])["wins"]
    assert found["judges"]["same"]["unread"] == 0 and found["judges"]["blind"]["unread"] == 8
    assert found["judges"]["blind"]["accuracy"]["rows"] == 1


def test_samples_of_one_model_make_no_win_rate():
    own = vote(0, "dpo", "dpo", "left")._replace(right="dpo 1")
    found = report([own], same=Likes(dpo=1))
    assert all(rate is None for by in found["wins"].values() for rate in by.values())
    assert found["judges"]["same"]["accuracy"]["rows"] == 1 and found["other_answers"] == 0


def test_wilsons_interval():
    assert wilson([]) is None
    ten = wilson([1] * 10)
    assert (ten["low"], ten["high"]) == pytest.approx((0.72246, 1), abs=1e-4)  # a bootstrap would say 1 to 1
    assert wilson([1, 1, 0, 0], groups=[0, 0, 1, 1]) == wilson([1, 0]) | {"rows": 4}
