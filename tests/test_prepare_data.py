"""The registry: every dataset on stored rows of its hub's own columns, and the command.

    python -m pytest tests/test_prepare_data.py

A dataset that is added to the registry is tested here by itself, as soon as tests/samples/<name>.jsonl has rows of it.
"""

import dataclasses
import gzip
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import pytest

import prepare_data
from prepare_data import DATASETS, describe, load_datasets
from rlhf.data.cache import prepare
from rlhf.data.rows import COLUMNS, SERVES, kind_for
from rlhf.data.sources import located, registered
from rlhf.user_error import UserError

ROOT = Path(__file__).resolve().parent.parent
SAMPLES = ROOT / "tests" / "samples"
REAL_HH = ROOT.parent / "shared" / "data" / "hh_helpful_online" / "test.jsonl.gz"
SERVED = [
    (name, task)
    for name, entry in DATASETS.items()
    for task in SERVES
    if kind_for(task, prepare_data.kinds_of(entry.convert))
]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def raw_rows(name):
    return [json.loads(line) for line in (SAMPLES / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def served(name, task, subset=""):
    """The task's rows of the stored raw rows, as [column, "role: text", ...] lists, and the reasons for drops."""
    raw = raw_rows(name)
    source = registered(DATASETS[name], subset)
    source = dataclasses.replace(source, open=lambda task, side: ("sample", lambda: located(raw)))
    rows, report = prepare(source, task, "train", max_bad_percentage=100)
    return [short(row, task) for row in rows], report["dropped"]


def short(row, task):
    return [
        row[column]
        if isinstance(row[column], str)
        else [f"{turn['role'][0]}: {turn['content']}" for turn in row[column]]
        for column in COLUMNS[task]
    ]


GOAT = ["u: What is a good name for a goat?", "a: Juniper suits a goat.", "u: And for two goats?"]
BREAD = [
    "u: How do I keep bread fresh?",
    "a: Keep it in a linen bag.",
    "u: And in summer?",
    "a: Freeze half of the loaf.",
    "u: Thanks! How long does it last frozen?",
]
POST = (
    "SUBREDDIT: r/pets\nTITLE: My cat opens doors\n"
    "POST: She learnt it from the dog. Now no cupboard is safe and I sleep badly."
)
PEPPERS, PEEL = ["u: Can I roast & freeze peppers?"], ["a: Yes, peel them first."]
SOFT = ["a: They turn soft, which is fine for soup."]
PAINT = ["u: Can I paint in the rain?", "a: Better not.", "u: Why?"]
WALK = ["u: Where can I walk at night?"]
QUAY = "a: On the quay, which has lamps until two."
CODE = "a: It divides by n - 1:\n\n```\nif a < b:\n    var(x)\n```"

# the rows of (dataset, task), and how many of the stored raw rows are dropped for which reason
EXPECTED = {
    ("uc", "sft"): (
        [
            [BREAD[:1], BREAD[1:] + ["a: About three months."]],
            [["u: Name a river in Peru."], ["a: The Ucayali."]],
            [["u: Tell me a riddle."], ["a: What has teeth and cannot bite? A comb."]],
        ],
        {},
    ),
    ("uc", "prompt"): (
        [
            [BREAD, "About three months."],
            [["u: Name a river in Peru."], "The Ucayali."],
            [["u: Tell me a riddle.", "a: What has teeth and cannot bite? A comb.", "u: Another one?"], ""],
        ],
        {},
    ),
    ("ufb", "preference"): (
        [
            [["u: Why is the sea salty?"], ["a: Rivers carry dissolved rock into it."], ["a: Because of fish."]],
            [["u: Rhyme on moon."], ["a: Spoon."], ["a: Sun."]],
        ],
        {"tie": 1},
    ),
    ("ufb", "sft"): (
        [
            [["u: Why is the sea salty?"], ["a: Rivers carry dissolved rock into it."]],
            [["u: Add 2 and 3."], ["a: 5"]],
            [["u: Rhyme on moon."], ["a: Spoon."]],
        ],
        {},
    ),
    ("hh", "preference"): (
        [
            [GOAT, ["a: Juniper and Sage."], ["a: I do not know any."]],
            [
                ['u: Who wrote "Human: a history"?'],
                ["a: I cannot find a book of that title. Assistant: is a word I know, though."],
                ["a: Someone."],
            ],
            [["u: Is it late?"], ["a: Not yet."], ["a: Ask a clock."]],
        ],
        {"identical answers": 1, "empty message": 1},
    ),
    ("hh", "sft"): (
        [
            [GOAT, ["a: Juniper and Sage."]],
            [
                ['u: Who wrote "Human: a history"?'],
                ["a: I cannot find a book of that title. Assistant: is a word I know, though."],
            ],
            [["u: Hello"], ["a: Hello to you."]],
            [["u: Is it late?"], ["a: Not yet."]],
        ],
        {"empty message": 1},
    ),
    ("shp", "preference"): (
        [
            [PEPPERS, PEEL, ["a: No idea."]],
            [PEPPERS, PEEL, SOFT],
            [PEPPERS, SOFT, ["a: No idea."]],
            [["u: Do I salt the water?"], ["a: Always, and before it boils."], ["a: Yes."]],
        ],
        {"set aside by the dataset's own rule": 1},
    ),
    ("se", "preference"): (
        [
            [["u: What does `var` do?"], [CODE], ["a: It is slow."]],
            [["u: What does `var` do?"], [CODE], ["a: See the manual."]],
        ],
        {"tie": 1},
    ),
    ("se", "sft"): ([[["u: What does `var` do?"], [CODE]], [["u: Is zero even?"], ["a: Yes."]]], {}),
    ("tldr", "sft"): (
        [
            [[f"u: {POST}\nTL;DR:"], ["a: my cat learnt to open doors and nothing is safe."]],
            [
                ["u: SUBREDDIT: r/running\nTITLE: Knee\nPOST: It hurts after hills.\nTL;DR:"],
                ["a: knee hurts after hills."],
            ],
        ],
        {},
    ),
    ("cmp", "preference"): (
        [
            [
                [f"u: {POST}\nTL;DR:"],
                ["a: my cat opens doors and I sleep badly."],
                ["a: a story about pets and doors."],
            ],
            [
                [f"u: {POST}\nTL;DR:"],
                ["a: cat learnt doors from the dog."],
                ["a: the dog learnt doors from the cat."],
            ],
        ],
        {"a summary of fewer than five words": 1},
    ),
    ("oasst1", "sft"): (
        [
            [WALK, [QUAY, "u: And with a dog?", "a: Then take the north path."]],
            [[*WALK, QUAY, "u: Is it far?"], ["a: Ten minutes from the station."]],
            [["u: Wo ist der Hafen?"], ["a: Hinter dem Markt."]],
        ],
        {"rejected message, or below one": 1},
    ),
    ("oasst1", "preference"): (
        [
            [WALK, [QUAY], ["a: Nowhere."]],
            [WALK, [QUAY], ["a: Along the lit quay."]],
            [WALK, ["a: Along the lit quay."], ["a: Nowhere."]],
        ],
        {"rejected message, or below one": 1, "nothing for preference": 1},
    ),
    ("oasst1", "prompt"): (
        [
            [WALK, QUAY[3:]],
            [[*WALK, QUAY, "u: And with a dog?"], "Then take the north path."],
            [[*WALK, QUAY, "u: Is it far?"], "Ten minutes from the station."],
            [["u: Wo ist der Hafen?"], "Hinter dem Markt."],
        ],
        {"rejected message, or below one": 1},
    ),
    ("self_instruct", "sft"): (
        [
            [["u: Sort the words by length.\n\nInput: lamp, sea\n\nOutput:"], ["a: sea, lamp"]],
            [["u: Name a colour.\n\nOutput:"], ["a: Ochre"]],
        ],
        {},
    ),
    ("slimorca", "sft"): (
        [
            [
                ["s: You answer in one sentence.", "u: Why do cats purr?"],
                ["a: Often because they are at ease."],
            ],
            [["u: Is a whale a fish?"], ["a: No, it is a mammal."]],
        ],
        {},
    ),
    ("alpaca", "sft"): (
        [
            [["u: Name the capital.\n\nNorway"], ["a: Oslo"]],
            [["u: Give a tip for packing."], ["a: Roll your shirts."]],
            [["u: Write a rhyme."], ["a: The cat sat flat."]],
        ],
        {},
    ),
    ("dolly", "sft"): (
        [
            [["u: When was the bridge built?\n\nThe bridge was built in 1911."], ["a: In 1911."]],
            [["u: What is a good breakfast?"], ["a: Porridge."]],
        ],
        {},
    ),
    ("webgpt", "preference"): (
        [
            [["u: Why is glass clear?"], ["a: Its electrons do not take up visible light."], ["a: It is thin."]],
            [["u: Why is glass clear?"], ["a: Light passes because no electron takes it up."], ["a: It is thin."]],
        ],
        {"tie": 1},
    ),
    ("rm_static", "preference"): (
        [
            [PAINT, ["a: The paint would run."], ["a: Because."]],
            [["u: Is tea older than coffee?"], ["a: Yes, by far."], ["a: I like both."]],
        ],
        {},
    ),
}
EXPECTED["full_hh", "preference"] = EXPECTED["rm_static", "preference"]
EXPECTED["alpaca_cleaned", "sft"] = EXPECTED["alpaca", "sft"]


@pytest.mark.parametrize("name, task", EXPECTED)
def test_raw_rows_become_the_expected_roles_and_texts(name, task):
    rows, dropped = EXPECTED[name, task]
    assert served(name, task) == (rows, dropped)


@pytest.mark.parametrize("name, task", SERVED)
def test_a_dataset_serves_each_task_that_its_kinds_promise(name, task):
    assert len(raw_rows(name)) >= 2, f"put two or more raw rows of {name} into {SAMPLES / name}.jsonl"
    rows, _ = served(name, task)
    assert rows
    for row in rows:
        assert len(row) == len(COLUMNS[task]) and row[0][-1].startswith("u: ")
        assert not any(mark in str(row) for mark in ("\n\nHuman:", "\n\nAssistant:", "<|", "&amp;", "<p>"))


@pytest.mark.parametrize("name", DATASETS)
def test_a_docstring_says_what_a_dataset_is_in_one_line(name):
    text = DATASETS[name].convert.__doc__
    assert text.endswith(".") and "\n" not in text and len(text) < 115


def test_three_turns_stay_three_turns_for_every_task():
    for task in SERVES:
        rows, _ = served("hh", task)
        assert rows[0][0] == GOAT


def test_oasst_options_choose_languages_and_how_many_replies_to_imitate():
    assert served("oasst1", "sft", "de") == (
        [[["u: Wo ist der Hafen?"], ["a: Hinter dem Markt."]]],
        {"another language": 1},
    )
    rows, _ = served("oasst1", "sft", "en+de+top2")
    assert [WALK, ["a: Along the lit quay."]] in rows and [WALK, ["a: Nowhere."]] not in rows
    with pytest.raises(UserError, match="topN"):
        served("oasst1", "sft", "top0")


@pytest.fixture
def hub(monkeypatch):
    """A hub that serves the stored rows, the last of them as held-out split, and writes down what it was asked for."""
    asked = []

    def load_dataset(path, split, **arguments):
        asked.append((path, split, arguments))
        name = next(name for name, entry in DATASETS.items() if entry.path == path)
        rows = raw_rows(name)
        return datasets.Dataset.from_list(rows[-1:] if split.startswith(("test", "valid")) else rows)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


@pytest.mark.parametrize("task", SERVES)
def test_the_four_sets_of_the_reward_model_load_and_mix(hub, task):
    train, evals, report = load_datasets("uc,ufb,hh,shp,demo#50", task, max_eval_samples=20, max_bad_percentage=50)
    assert train.column_names == [*COLUMNS[task], "dataset"]
    names = {"ufb", "hh", "shp", "demo"} | ({"uc"} if task != "preference" else set())
    assert set(train["dataset"]) == set(evals) == set(report["datasets"]) == names
    assert len(evals["demo"]) == 20 and len(evals["hh"]) == 1
    assert report["datasets"]["hh"]["dropped"]["prompt is in an evaluation set"] == 1
    assert report["notes"] == (["uc serves sft and prompt, not preference: skipped"] if task == "preference" else [])
    assert sum(entry["share"] for entry in report["datasets"].values()) == pytest.approx(1)
    for entry in [*report["datasets"].values(), *report["evaluation"].values()]:
        gone = sum(entry["dropped"].values()) + sum(entry["set_aside"].values())
        assert entry["read"] + entry["extra"] == entry["kept"] + gone
    assert max(map(len, describe(report).splitlines())) <= 80
    json.dumps(report)


def test_a_set_is_asked_for_by_the_names_that_the_hub_knows(hub):
    load_datasets("hh@helpful-base", "preference", max_bad_percentage=50)
    load_datasets("self_instruct", "sft", validation_split_percentage=0)
    load_datasets("se@stats.stackexchange.com", "sft", validation_split_percentage=0)
    load_datasets("ufb", "sft")
    parquet = {"revision": "refs/convert/parquet"}
    assert hub == [
        ("Anthropic/hh-rlhf", "train", {"data_dir": "helpful-base"}),
        ("Anthropic/hh-rlhf", "test", {"data_dir": "helpful-base"}),
        ("yizhongw/self_instruct", "train", {"data_dir": "self_instruct", **parquet}),
        ("HuggingFaceH4/stack-exchange-preferences", "train", {"data_dir": "data/stats.stackexchange.com"}),
        ("HuggingFaceH4/ultrafeedback_binarized", "train_sft", {}),
        ("HuggingFaceH4/ultrafeedback_binarized", "test_sft", {}),
    ]


def test_a_subset_names_its_metrics(hub):
    names = {"eval_dataset_names": "hh@helpful-base,hh@harmless-base:0.5"}
    _, evals, _ = load_datasets("ufb", "preference", **names, max_bad_percentage=50)
    assert list(evals) == ["hh_helpful_base", "hh_harmless_base"]


def test_only_a_mix_of_sets_with_margins_has_the_margin(hub):
    assert load_datasets("ufb", "preference")[0]["margin"] == [4.5]
    assert "margin" not in load_datasets("ufb,shp", "preference")[0].column_names


def test_of_a_prompts_scored_answers_the_best_alone_is_a_demonstration(hub):
    train, _, report = load_datasets("shp", "sft")
    assert [short(row, "sft") for row in train] == [[PEPPERS, PEEL]]
    assert report["datasets"]["shp"]["dropped"]["not its prompt's best answer"] == 1


def test_a_prompt_comes_once_however_many_rows_have_it(hub):
    train, _, _ = load_datasets("shp", "prompt")
    assert [short(row, "prompt") for row in train] == [[PEPPERS, "Yes, peel them first."]]


def test_demo_worlds_are_numbered_and_bring_their_own_test_rows():
    train, evals, _ = load_datasets("demo@1#10", "sft")
    other, _, _ = load_datasets("demo#10", "sft")
    assert list(evals) == ["demo_1"] and train["prompt"][:] != other["prompt"][:]
    with pytest.raises(UserError, match="demo@1"):
        load_datasets("demo@x", "sft")


@pytest.mark.parametrize(
    "names, task, said",
    [
        ("ufbb", "sft", "did you mean ufb"),
        ("uc", "preference", "uc serves sft and prompt, not preference\nfor preference use one of ufb, hh"),
        ("dolly@en", "sft", "without @en"),
        ("demo,demo:0.5", "sft", "named twice"),
        ("missing.jsonl", "sft", "no such file"),
        ("./demo", "sft", "no such file"),
        ("~nobody/rows.jsonl", "sft", "no such file"),
        (",", "sft", "type for example --dataset_names uc"),
    ],
)
def test_a_wrong_name_ends_with_what_to_type(names, task, said):
    with pytest.raises(UserError, match=re.escape(said)) as error:
        load_datasets(names, task)
    assert len(str(error.value).splitlines()) <= 3


def test_a_hub_that_cannot_be_reached_is_the_users_error(monkeypatch):
    def load_dataset(*args, **kwargs):
        raise ConnectionError("Couldn't reach 'Anthropic/hh-rlhf' on the Hub\nmore")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for name in ("hh", "someone/something"):
        with pytest.raises(UserError, match="HF_HUB_OFFLINE") as error:
            load_datasets(name, "sft")
        assert len(str(error.value).splitlines()) <= 3


def test_any_hub_dataset_is_read_by_its_columns(monkeypatch):
    parts = {"test_sft": [], "validation_sft": raw_rows("uc")[1:2], "train_sft": raw_rows("uc")[:1]}
    parts = datasets.DatasetDict({name: datasets.Dataset.from_list(rows) for name, rows in parts.items()})
    monkeypatch.setattr(datasets, "load_dataset", lambda path, **arguments: parts)
    train, evals, _ = load_datasets("HuggingFaceH4/ultrachat_200k:1.0", "sft")
    assert short(train[0], "sft") == EXPECTED["uc", "sft"][0][0] and list(evals) == ["ultrachat_200k"]


@pytest.mark.skipif(not REAL_HH.exists(), reason="the real HH file is not here")
def test_drops_of_the_real_hh_file_match_a_count_by_other_means():
    """Counted with plain string methods on the raw text, not with the parser."""
    counted = {"empty message": 0, "identical answers": 0, "answer does not end with the assistant": 0}
    for line in gzip.open(REAL_HH, "rt", encoding="utf-8"):
        sides = list(json.loads(line).values())
        answers = [side[side.rindex("\n\nAssistant:") + 12 :] for side in sides]
        turns = [
            turn for side in sides for turn in side.replace("\n\nHuman:", "\n\nAssistant:").split("\n\nAssistant:")[1:]
        ]
        if any("\n\nHuman:" in answer for answer in answers):
            counted["answer does not end with the assistant"] += 1
        elif not all(map(str.strip, turns)):
            counted["empty message"] += 1
        elif answers[0].strip() == answers[1].strip():
            counted["identical answers"] += 1
    _, _, report = load_datasets(str(REAL_HH), "preference", validation_split_percentage=0)
    assert report["datasets"]["test"]["dropped"] == counted and report["datasets"]["test"]["read"] == 1137


def run(*arguments, cwd=ROOT, **environment):
    command = [sys.executable, str(ROOT / "prepare_data.py"), *arguments]
    return subprocess.run(command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True)


def test_exported_rows_are_read_back_by_load_dataset_and_by_name(tmp_path):
    raw = [json.dumps({"prompt": f"Count to {i}.", "response": "é " * i}) for i in range(1, 101)]
    (tmp_path / "numbers.jsonl").write_text("\n".join(raw), encoding="utf-8")
    arguments = ["--dataset_names", "numbers.jsonl", "--output_dir", "out", "--validation_split_percentage", "20"]
    done = run(*arguments, "--preview", "1", cwd=tmp_path, HF_DATASETS_CACHE=str(tmp_path / "c"))
    assert done.returncode == 0, done.stderr
    assert "numbers" in done.stdout and "prompt user: Count to" in done.stdout
    back = datasets.load_dataset(str(tmp_path / "out"))
    assert set(back) == {"train", "test"} and len(back["train"]) + len(back["test"]) == 100
    assert "é" in (tmp_path / "out" / "train.jsonl").read_text(encoding="utf-8")
    train, evals, _ = load_datasets(str(tmp_path / "out"), "sft")
    assert len(train) == len(back["train"]) and len(evals["out"]) == len(back["test"])
    again = run(*arguments, cwd=tmp_path, HF_DATASETS_CACHE=str(tmp_path / "c"))
    assert (again.returncode, again.stdout) == (2, "") and "--overwrite_output_dir" in again.stderr


def test_texts_and_what_starts_with_the_assistant_are_exported_and_read_back(tmp_path):
    hello = {"messages": [{"role": "assistant", "content": "Hello."}, {"role": "user", "content": "Late?"}]}
    hello["messages"].append({"role": "assistant", "content": "No."})
    for name, row in (("texts", {"text": "Once there was a gull."}), ("talks", hello)):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row), encoding="utf-8")
        arguments = ["--dataset_names", str(tmp_path / f"{name}.jsonl"), "--output_dir", str(tmp_path / f"out_{name}")]
        prepare_data.main(prepare_data.make_parser().parse_args([*arguments, "--validation_split_percentage", "0"]))
        rows = [
            load_datasets(str(tmp_path / path), "sft", validation_split_percentage=0)[0].remove_columns("dataset")[:]
            for path in (f"{name}.jsonl", f"out_{name}")
        ]
        assert rows[0] == rows[1] and len(rows[0]["prompt"]) == 1


def test_the_command_imports_nothing_heavy_until_it_works():
    code = (
        "import sys, prepare_data; print([m for m in ('numpy', 'torch', 'datasets', 'pyarrow') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_a_mistake_on_the_command_line_ends_with_2_and_no_traceback():
    done = run("--dataset_names", "ufbb")
    assert done.returncode == 2 and done.stderr.startswith("error: unknown dataset 'ufbb'")
    assert "Traceback" not in done.stderr


def test_the_list_names_every_dataset_with_its_tasks_and_source(capsys):
    prepare_data.main(prepare_data.make_parser().parse_args(["--list"]))
    output = capsys.readouterr().out
    assert all(f"\n{name} " in f"\n{output}" for name in DATASETS)
    assert "deleted, rejected or synthetic" in output
    assert re.search(r"^hh +sft preference prompt +Anthropic/hh-rlhf$", output, flags=re.MULTILINE)


def test_a_dataset_of_eight_lines_is_added_as_the_page_says(tmp_path):
    """Follows docs/data.md to the letter in a copy: the entry, the sample, the command that tests it."""
    page = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    _, _, text = page.partition("## Add your own dataset in 8 lines")
    entry, sample = (re.search(rf"```{kind}\n(.*?)```", text, flags=re.DOTALL).group(1) for kind in ("python", "json"))
    path, command = (
        re.search(r"`(tests/samples/\S+)`", text).group(1),
        re.search(r"`python (-m pytest .*?)`", text).group(1),
    )
    assert len(entry.splitlines()) <= 8
    for file in [*ROOT.glob("*.py"), ROOT / "pyproject.toml"]:
        shutil.copy(file, tmp_path)
    shutil.copytree(ROOT / "rlhf", tmp_path / "rlhf")
    shutil.copytree(SAMPLES, tmp_path / "tests" / "samples")
    shutil.copy(__file__, tmp_path / "tests")
    code = (tmp_path / "prepare_data.py").read_text(encoding="utf-8")
    before, marker, after = code.partition("\ndef export(")
    (tmp_path / "prepare_data.py").write_text(f"{before}\n{entry}\n{marker}{after}", encoding="utf-8")
    (tmp_path / path).write_text(sample, encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    arguments = [sys.executable, *command.split(), "-p", "no:cacheprovider"]
    done = subprocess.run(arguments, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "3 passed" in done.stdout, done.stdout
