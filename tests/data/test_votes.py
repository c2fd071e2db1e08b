"""Votes of people as a dataset: pairs that most prefer, the rest by reason: `pytest tests/data/test_votes.py`."""

import json

import datasets
import pytest

from prepare_data import load_datasets
from rlhf.data.loading import load_held_out
from rlhf.data.votes import load_votes
from rlhf.user_error import UserError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def vote(said="left", left="Not yet.", right="Yes.", judge="ann", time="", question="Is it late?", **more):
    more = {"left_model": "sft", "right_model": "dpo", "left_sample": 0, "right_sample": 0, "seed": 1} | more
    prompt = [{"role": "user", "content": question}]
    return {"prompt": prompt, "left": left, "right": right, "vote": said, "judge": judge, "time": time, **more}


def write(path, lines):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


ANSWERS = ("Not yet.", "Yes.")
AGAIN = "changed later"
FURTHER = "another person's vote on the same answers"
TURNED = {"left": "Yes.", "right": "Not yet."}

# votes on one pair -> the chosen answer or None, and what is counted as dropped
DECIDED = {
    "left": ([vote("left")], "Not yet.", {}),
    "right": ([vote("right")], "Yes.", {}),
    "tie": ([vote("tie")], None, {"tie": 1}),
    "both bad": ([vote("both bad")], None, {"both bad": 1}),
    "skip": ([vote("skip")], None, {"skipped by the judge": 1}),
    "the same twice": ([vote("left"), vote("left")], "Not yet.", {AGAIN: 1}),
    "changed": ([vote("left"), vote("right")], "Yes.", {AGAIN: 1}),
    "changed, by time": ([vote("right", time="2026-01-02"), vote("left", time="2026-01-01")], "Yes.", {AGAIN: 1}),
    "changed, by time of two zones": (
        [vote("right", time="2026-01-01T09:00:00Z"), vote("left", time="2026-01-01T10:30:00+02:00")],
        "Yes.",
        {AGAIN: 1},
    ),
    "two system prompts are two": (
        [vote("left", system="Be late."), vote("tie", system="Be rude.")],
        "Not yet.",
        {"tie": 1},
    ),
    "two histories are two": (
        [vote("left", history=[["Hi.", "Hello."]]), vote("tie", history=[["Hi.", "What?"]])],
        "Not yet.",
        {"tie": 1},
    ),
    "changed to a tie": ([vote("left"), vote("tie")], None, {AGAIN: 1, "tie": 1}),
    "seen from the other side": ([vote("left"), vote("right", **TURNED)], "Not yet.", {AGAIN: 1}),
    "two agree": ([vote("left"), vote("right", **TURNED, judge="bob")], "Not yet.", {FURTHER: 1}),
    "two disagree": ([vote("left"), vote("right", judge="bob")], None, {"people disagree": 1, FURTHER: 1}),
    "a tie is no preference": ([vote("left"), vote("tie", judge="bob")], None, {"people disagree": 1, FURTHER: 1}),
    "two of three": ([vote("left", judge=who) for who in "ab"] + [vote("right", judge="c")], "Not yet.", {FURTHER: 2}),
    "a skip is no vote": ([vote("skip"), vote("right", judge="bob")], "Yes.", {FURTHER: 1}),
    "an empty answer": ([vote("left", right="")], None, {"an answer is empty": 1}),
    "equal answers": ([vote("left", right="Not yet.")], None, {"identical answers": 1}),
    "without names": ([{key: vote()[key] for key in ("prompt", "left", "right", "vote")}], "Not yet.", {}),
}


@pytest.mark.parametrize("case", DECIDED)
@pytest.mark.parametrize("task", ["preference", "sft"])
def test_what_most_people_prefer_is_trained_on_and_the_rest_is_counted(case, task, tmp_path):
    lines, chosen, dropped = DECIDED[case]
    other = vote("left", question="And now?")
    path = write(tmp_path / "votes.jsonl", [*lines, other])
    rows, _, report = load_datasets(str(path), task, validation_split_percentage=0)
    better = {row["prompt"][-1]["content"]: row["chosen" if task == "preference" else "completion"] for row in rows}
    assert better.pop("And now?") == [{"role": "assistant", "content": "Not yet."}]
    entry = report["datasets"]["votes"]
    if task == "sft" and case == "equal answers":  # SFT may imitate it all the same
        chosen, dropped = "Not yet.", {}
    assert [turn["content"] for turns in better.values() for turn in turns] == ([chosen] if chosen else [])
    assert entry["dropped"] == dropped and entry["bad"] == 0 and entry["unused"] == []
    assert entry["read"] == len(lines) + 1


def test_many_ties_stop_no_run_but_broken_votes_do(tmp_path):
    ties = [vote("tie", question=f"Is it {i}?") for i in range(30)]
    path = write(tmp_path / "votes.jsonl", [vote(), *ties])
    for task in ("preference", "sft", "prompt"):
        assert len(load_datasets(str(path), task, validation_split_percentage=0)[0]) == 1
    with pytest.raises(UserError, match="30 of 31 rows are broken: 'vote' is 'banana': known are left, right, tie"):
        broken = [line | {"vote": "banana"} for line in ties]
        load_datasets(str(write(tmp_path / "votes.jsonl", [vote(), *broken])), "preference")


def test_a_folder_of_peoples_files_is_decided_by_the_majority(tmp_path):
    write(tmp_path / "people" / "ann.jsonl", [vote("left"), vote("left", question="And now?")])
    write(
        tmp_path / "people" / "bob.jsonl", [vote("right", judge="bob"), vote("left", question="And now?", judge="bob")]
    )
    rows, _, report = load_datasets(str(tmp_path / "people"), "preference", validation_split_percentage=0)
    assert [row["prompt"][0]["content"] for row in rows] == ["And now?"]
    assert report["datasets"]["people"]["dropped"] == {"people disagree": 1, FURTHER: 2}


@pytest.mark.parametrize("task", ["preference", "sft", "prompt"])
def test_votes_that_would_be_judged_apart_are_refused(task, tmp_path):
    ann = write(tmp_path / "ann.jsonl", [vote("left")])
    bob = write(tmp_path / "bob.jsonl", [vote("right", judge="bob")])
    with pytest.raises(UserError, match=r"ann.jsonl and .*bob.jsonl are votes(.|\n)*into one folder"):
        load_datasets(f"{ann},{bob}", task, validation_split_percentage=0)
    pairs = [{"prompt": "Is it late?", "chosen": a, "rejected": b} for a, b in (ANSWERS, ANSWERS[::-1])]
    other = write(tmp_path / "pairs.jsonl", pairs)  # whose annotators may well contradict each other
    assert len(load_datasets(f"{ann},{other}", task, validation_split_percentage=0)[0]) >= 1
    load_datasets(str(ann), task, eval_dataset_names=str(write(tmp_path / "cy.jsonl", [vote(question="And now?")])))


@pytest.mark.parametrize("task", ["preference", "sft", "prompt"])
def test_votes_on_prompts_that_were_held_out_are_counted_and_measured_on_but_not_trained_on(task, tmp_path):
    lines = [vote(), vote(question="And now?", held_out=False), vote("left", question="Held?", held_out=True)]
    lines.insert(0, vote("left", question="Held?", judge="bob"))  # from a page that did not say so yet
    path = write(tmp_path / "votes.jsonl", lines)
    rows, _, report = load_datasets(str(path), task, validation_split_percentage=0)
    assert sorted(row["prompt"][0]["content"] for row in rows) == ["And now?", "Is it late?"]
    assert report["datasets"]["votes"]["set_aside"] == {"prompt was held out where it was voted on": 1}
    held = write(tmp_path / "held.jsonl", lines[-1:])
    assert len(load_datasets(str(path), task, eval_dataset_names=str(held))[1]["held"]) == 1
    with pytest.raises(UserError, match="no row is left(.|\n)*votes to train on are given on others"):
        load_datasets(str(held), task)


@pytest.mark.parametrize(
    ("name", "whole", "held_out"),
    [("rows.jsonl", True, False), ("rows.jsonl", False, True), ("own", True, True), ("demo", True, True)],
)
def test_a_prompt_is_held_out_unless_its_file_is_taken_whole(name, whole, held_out, tmp_path):
    rows = [{"prompt": f"Is it {i}?", "chosen": "Yes.", "rejected": "No."} for i in range(20)]
    for path in ("rows.jsonl", "own/train.jsonl", "own/test.jsonl"):
        write(tmp_path / path, rows)
    named = name if name == "demo" else str(tmp_path / name)
    _, report = load_held_out(named, "prompt", whole_files=whole, validation_split_percentage=50)
    assert [entry["held_out"] for entry in report["evaluation"].values()] == [held_out]


BROKEN = {
    "left": (vote(left="\ud800"), "broken Unicode"),
    "judge": (vote(judge="\udfff"), "broken Unicode"),
    "time": (vote(time="1000"), "'time' is '1000': write it as"),
    "held_out": (vote(held_out="no"), "'held_out' of a vote is neither"),
    "no question": (vote() | {"prompt": [{"role": "system", "content": "Be brief."}]}, "prompt does not end with the"),
    "no prompt": (vote() | {"prompt": []}, "prompt does not end with the user"),
    "answered": (vote() | {"prompt": [{"role": r, "content": "Hi."} for r in ("user", "assistant")]}, "does not end"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_broken_for_training_is_broken_for_figures(case, tmp_path):
    line, says = BROKEN[case]
    path = write(tmp_path / "votes.jsonl", [vote(), line])
    dropped = load_datasets(str(path), "preference", max_bad_percentage=60)[2]["datasets"]["votes"]["dropped"]
    assert any(says in reason for reason in dropped), dropped
    with pytest.raises(UserError, match=f"votes.jsonl:2: .*{says}"):
        load_votes([str(path)])


def test_which_vote_is_the_later_is_never_guessed(tmp_path):
    path = write(tmp_path / "votes.jsonl", [vote(time="2026-01-01"), vote("right"), vote(question="And now?")])
    rows, _, report = load_datasets(str(path), "preference", validation_split_percentage=0, max_bad_percentage=60)
    assert len(rows) == 2 and report["datasets"]["votes"]["bad"] == 1
    with pytest.raises(UserError, match="votes.jsonl:2: no 'time'"):
        load_votes([str(path)])


def test_two_files_of_one_person_are_said(tmp_path, capsys):
    first = write(tmp_path / "ann.jsonl", [vote("left", time="2026-01-01"), vote(question="And now?")])
    second = write(tmp_path / "bob.jsonl", [vote("right", time="2026-01-02")])
    assert [v.vote for v in load_votes([str(first), str(second)])] == ["right", "left"]
    assert "hold votes of one person, ann" in capsys.readouterr().out
    load_votes([str(first)])
    assert not capsys.readouterr().out


def test_a_vote_is_read_whole(tmp_path):
    path = write(tmp_path / "votes.jsonl", [vote(tools=[{"name": "clock"}])])
    with pytest.raises(UserError, match="'tools' changes the meaning"):
        load_datasets(str(path), "preference")
    rows, _, _ = load_datasets(
        str(write(tmp_path / "votes.jsonl", [vote(system="Be brief.")])), "preference", validation_split_percentage=0
    )
    assert rows[0]["prompt"][0] == {"role": "system", "content": "Be brief."}


def test_votes_on_held_out_prompts_are_not_trained_on_by_chance(tmp_path):
    with pytest.raises(UserError, match="its prompts are held out of training"):
        path = write(tmp_path / "votes.jsonl", [vote()])
        load_datasets(str(path), "preference", validation_split_percentage=99.999)


def test_for_figures_a_vote_is_one_or_stops(tmp_path):
    path = write(tmp_path / "carol.jsonl", [vote("left", judge=""), vote("right", judge="", left_model="ppo"), vote()])
    votes = load_votes([str(path)])
    assert [(v.judge, v.left_model, v.vote) for v in votes] == [
        ("carol", "sft", "left"), ("carol", "ppo", "right"), ("ann", "sft", "left")]  # fmt: skip
    other = write(tmp_path / "more" / "carol.jsonl", [vote("left", judge="")])
    assert len({v.judge for v in load_votes([str(path), str(other)])}) == 3  # two files of one name are two people
    for line, says in (
        (vote("banana"), r"carol.jsonl:2: 'vote' is 'banana'"),
        ("{", r"carol.jsonl:2: broken JSON"),
        (
            {"prompt": "?", "chosen": "a", "rejected": "b"},
            "carol.jsonl:2: a vote without 'left'",
        ),
        (vote(left=7), "carol.jsonl:2: 'left' of a vote is no text"),
        (vote() | {"prompt": None}, "carol.jsonl:2: a text is missing"),
    ):
        with pytest.raises(UserError, match=says):
            load_votes([str(write(path, [vote(), line]))])
    for lines, name in (([], "no.jsonl"), ([vote("skip")], "skips.jsonl")):
        with pytest.raises(UserError, match="there is no vote in it"):
            load_votes([str(write(tmp_path / name, lines))])
    with pytest.raises(UserError, match="give the votes.jsonl"):
        load_votes([str(write(tmp_path / "votes.txt", [vote()]))])
