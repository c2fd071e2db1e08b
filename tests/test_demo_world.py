"""The demo's world: its rows, its gold score, and what cannot fool that score (no model is trained here).

pytest tests/test_demo_world.py
"""

import os
import random
import statistics
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from examples import demo, demo_world
from examples.demo_world import gold_parts, gold_score
from tests.conftest import ROOT

PROMPT = "What a fog today! I am Ada. Where can I get a rain hat?"
BEST = (
    "Hello, Ada! You will find a rain hat at the Button Boat, because the tailor sews with fishing line. "
    "Enjoy the sea air."
)


@pytest.fixture(scope="module")
def train():
    return list(demo_world.rows("train"))


@pytest.fixture(scope="module")
def test():
    return list(demo_world.rows("test"))


def margins(rows):
    return [gold_score(row["prompt"], row["chosen"]) - gold_score(row["prompt"], row["rejected"]) for row in rows]


def test_rows_and_text_are_the_same_bytes_under_any_hash_seed():
    code = (
        "import hashlib, itertools; from examples import demo_world; "
        "text = repr((list(demo_world.rows('test')), list(itertools.islice(demo_world.pretraining_text(), 200)))); "
        "print(hashlib.sha256(text.encode()).hexdigest())"
    )
    digests = [
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            cwd=Path(__file__).parents[1],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for hash_seed in ("1", "2")
    ]
    assert digests[0] == digests[1]


def test_another_seed_gives_other_rows(test):
    assert list(demo_world.rows("test", seed=1)) != test


def test_train_and_test_share_no_prompt_whatever_their_seeds(train):
    test_prompts = {row["prompt"] for seed in range(3) for row in demo_world.rows("test", seed)}
    assert not test_prompts & {row["prompt"] for row in train}


def test_splits_have_the_size_and_the_columns_they_promise(train, test):
    assert (len(train), len(test)) == (demo_world.ROWS["train"], demo_world.ROWS["test"])
    assert all(list(row) == ["prompt", "completion", "chosen", "rejected"] for row in train + test)


def test_most_prompts_are_asked_once(train):
    assert len({row["prompt"] for row in train}) > 0.9 * len(train)


def test_about_one_train_label_in_twenty_is_wrong(train):
    assert 0.03 < statistics.mean(margin < 0 for margin in margins(train)) < 0.07


def test_test_labels_are_right_and_never_close(test):
    assert min(margins(test)) >= 0.1


def test_demonstrations_are_mediocre_in_each_part(train):
    parts = [gold_parts(row["prompt"], row["completion"]) for row in train]
    assert all(0.38 < statistics.mean(part) < 0.55 for part in zip(*parts, strict=True))


def test_every_answer_made_with_full_quality_scores_one():
    rng = random.Random(0)
    for _ in range(300):
        name, thing = rng.choice(demo_world.NAMES), rng.choice(list(demo_world.PLACE_OF))
        prompt = demo_world.make_prompt(rng, name, thing)
        answer = demo_world.make_answer(rng, name, thing, quality=1.0)
        assert gold_score(prompt, answer) == 1.0, (prompt, answer)


def test_the_best_answer_scores_one():
    assert gold_score(PROMPT, BEST) == 1.0


@pytest.mark.parametrize(
    ("part", "old", "new"),
    [
        ("polite", "Hello, Ada!", "Hello, visitor!"),
        ("polite", "Hello, Ada!", "Hello, Otto!"),
        ("informed", "the Button Boat", "the Net Loft"),
        ("informed", "the Button Boat", "some shop or other"),
        ("reasoned", ", because the tailor sews with fishing line", ""),
        ("reasoned", "the tailor sews with fishing line", "that is how it is"),
        ("reasoned", "the tailor sews with fishing line", "the bees there like salt"),
        ("kind", "Enjoy the sea air.", "Read the sign next time."),
        ("tidy", "Enjoy the sea air.", "Enjoy the sea air. I lost a screw on Monday."),
        ("tidy", "Enjoy the sea air.", "Yes, the Button Boat. Enjoy the sea air."),
        ("tidy", "sea air.", "sea air"),
    ],
)
def test_each_part_is_lost_alone(part, old, new):
    worse = BEST.replace(old, new)
    names = ("polite", "informed", "reasoned", "kind", "tidy")
    assert worse != BEST
    lost = [name for name, kept in zip(names, gold_parts(PROMPT, worse), strict=True) if not kept]
    assert part in lost and set(lost) <= {part, "reasoned"}  # a wrong place takes its reason with it
    assert gold_score(PROMPT, worse) <= 0.8


@pytest.mark.parametrize(
    "answer",
    [
        "",
        ".",
        "...",
        "Ada Ada Ada Ada Ada Ada.",
        "Ada the Button Boat the tailor sews with fishing line Enjoy the sea air.",
        "Ada, rain hat, the Button Boat, because, pleasure, kind, welcome.",
        " ".join(reversed(BEST.split())),
        "Hello, " + ", ".join(demo_world.NAMES) + "! Try " + ", ".join(demo_world.TOWN) + ".",
        "Hello, Ada! You will find a rain",
        "Hello, Ada!",
        "xq zzt blorp, Ada! wug the Button Boat vrr Enjoy the sea air. kk jj qq ww.",
        PROMPT,
    ],
)
def test_gaming_the_score_does_not_pay(answer):
    assert gold_score(PROMPT, answer) <= 0.45


def test_saying_the_best_answer_twice_is_worse_than_once():
    assert gold_score(PROMPT, f"{BEST} {BEST}") <= 0.8


def test_pretraining_text_holds_no_chat_markers_and_every_fact():
    text = "\n".join(demo_world.pretraining_text(documents=2000))
    assert not any(marker in text for marker in ("###", "Human:", "Assistant:", "User:", demo_world.EOS))
    assert all(fact in text for fact in [*demo_world.TOWN, *demo_world.PLACE_OF, *demo_world.NAMES])


def test_base_is_not_trained_over_an_existing_folder(tmp_path):
    with pytest.raises(FileExistsError, match="exists already"):
        demo_world.train_base(tmp_path)


def test_the_demo_can_be_started_from_any_folder(tmp_path, monkeypatch):
    """Its base model was left where it was started, and looked for in the project's folder."""
    folders = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo_world, "train_base", lambda *args: folders.append(Path.cwd()))
    monkeypatch.setattr(demo, "run", lambda command: folders.append(Path.cwd()))
    demo.main(SimpleNamespace(output_dir="saved/nowhere", base_dir="saved/never", seed=0))
    assert folders == [ROOT] * 7
