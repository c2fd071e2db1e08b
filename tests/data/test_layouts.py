"""The layouts of rows: every key set of local files, real message trees, and rankings.

python -m pytest tests/data/test_layouts.py
"""

import gzip
import json
from collections import Counter
from itertools import combinations

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prepare_data import load_datasets
from rlhf.data.layouts import ranks_in
from rlhf.data.messages import BadRow, parse_transcript
from rlhf.user_error import UserError
from tests.conftest import ROOT

SHARED = ROOT.parent / "shared" / "data"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return path


def load(path, task, **options):
    """The task's rows as [column, ...] with "role: text" turns, and the report's entry."""
    rows, _, report = load_datasets(str(path), task, validation_split_percentage=0, **options)
    columns = [column for column in rows.column_names if column not in ("dataset", "margin")]
    texts = [[short(row[column]) for column in columns] for row in rows]
    return sorted(texts, key=str), next(iter(report["datasets"].values()))


def short(value):
    return value if isinstance(value, str) else [f"{turn['role'][0]}: {turn['content']}" for turn in value]


ASKED, GOOD, BAD = "Is it late?", "Not yet.", "Yes."
U, G, B = [f"u: {ASKED}"], [f"a: {GOOD}"], [f"a: {BAD}"]
TALK = [{"role": "user", "content": ASKED}, {"role": "assistant", "content": GOOD}]
WORSE = [TALK[0], {"role": "assistant", "content": BAD}]
SHAREGPT = [{"from": "human", "value": ASKED}, {"from": "gpt", "value": GOOD}]
HH = f"\n\nHuman: {ASKED}\n\nAssistant: "
TREE = {
    "message_tree_id": "t",
    "tree_state": "ready_for_export",
    "prompt": {
        "text": ASKED,
        "role": "prompter",
        "lang": "en",
        "replies": [
            {"text": BAD, "role": "assistant", "rank": 1},
            {"text": GOOD, "role": "assistant", "rank": 0, "replies": None},
        ],
    },
}


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": ASKED, "context": "", "response": GOOD},
        {"instruction": ASKED, "input": "n/a", "output": GOOD, "text": "### Instruction: ..."},
        {"prompt": ASKED, "completion": GOOD},
        {"prompt": ASKED, "response": GOOD},
        {"prompt": ASKED, "label": GOOD},
        {"question": ASKED, "answer": GOOD},
        {"INSTRUCTION": ASKED, "RESPONSE": GOOD, "SOURCE": "x"},
        {"messages": TALK},
        {"conversations": SHAREGPT},
        {"text": HH + GOOD},
        {"text": f"### Human: {ASKED}### Assistant: {GOOD}"},
        {"prompt": TALK[:1], "completion": TALK[1:]},
        {"instruction": ASKED, "instances": [{"input": "", "output": GOOD}], "is_classification": False},
    ],
)
def test_demonstrations_are_known_by_their_keys(tmp_path, row):
    assert load(write(tmp_path / "rows.jsonl", row), "sft")[0] == [[U, G]]
    assert load(tmp_path / "rows.jsonl", "prompt")[0] == [[U, GOOD]]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": ASKED, "chosen": GOOD, "rejected": BAD},
        {"instruction": ASKED, "chosen": TALK[1:], "rejected": WORSE[1:]},
        {"prompt": f"\n\nHuman: {ASKED}\n\nAssistant:", "response": GOOD, "chosen": f" {GOOD}", "rejected": f" {BAD}"},
        {"prompt": ASKED, "chosen": TALK, "rejected": WORSE},
        {"chosen": TALK, "rejected": WORSE},
        {"chosen": HH + GOOD, "rejected": HH + BAD},
        {"prompt": ASKED, "responses": [GOOD, BAD]},
        {"prompt": ASKED, "responses": [BAD, GOOD], "ranks": [1, 0]},
        {"prompt": ASKED, "responses": {"A": BAD, "B": GOOD}, "ranking": "A<B"},
        {"prompt": ASKED, "responses": [BAD, GOOD], "scores": ["0.1", "0.5"]},
        {"prefixes": [ASKED], "responses": [GOOD, BAD], "augmented": [], "split": "train"},
        {"prompt": ASKED, "history": [], "pos": GOOD, "neg_replies": [BAD]},
        TREE,
        TREE["prompt"] | {"lang": "en"},
    ],
)
def test_preferences_are_known_by_their_keys_and_serve_every_task(tmp_path, row):
    path = write(tmp_path / "rows.jsonl", row)
    assert load(path, "preference")[0] == [[U, G, B]]
    assert load(path, "prompt")[0] == [[U, GOOD]]
    assert load(path, "sft")[0] == [[U, G]]


def test_scored_answers_of_one_prompt_are_compared_wherever_they_stand(tmp_path):
    rows = [("Tea?", "Yes.", 0.2), ("Coffee?", "No.", 1), ("Tea?", "Please, green tea.", 0.9), ("Tea?", "Sure.", 0.2)]
    rows = [{"user_input": asked, "completion": answer, "score": score} for asked, answer, score in rows]
    pairs, entry = load(write(tmp_path / "rows.json", rows), "preference")
    best = ["a: Please, green tea."]
    assert pairs == [[["u: Tea?"], best, ["a: Sure."]], [["u: Tea?"], best, ["a: Yes."]]]
    assert entry["dropped"] == {"fewer than two ranked replies": 1}
    demonstrations = [[["u: Coffee?"], ["a: No."]], [["u: Tea?"], ["a: Please, green tea."]]]
    assert load(tmp_path / "rows.json", "sft")[0] == demonstrations


def test_earlier_turns_stay_in_the_prompt(tmp_path):
    row = {
        "prompt": "And now?",
        "history": [["Is it late?", "Not yet."]],
        "pos": "Yes.",
        "neg_replies": ["No.", "Hm."],
    }
    pairs, _ = load(write(tmp_path / "rows.jsonl", row), "preference")
    assert len(pairs) == 2 and pairs[0][0] == ["u: Is it late?", "a: Not yet.", "u: And now?"]


def test_a_plain_text_is_imitated_without_a_prompt(tmp_path):
    path = write(tmp_path / "rows.jsonl", {"text": "Once there was a gull."}, {"text": "And then there were two."})
    assert load(path, "sft")[0][1] == [[], ["t: Once there was a gull."]], "a text is no turn"
    with pytest.raises(UserError, match="a text serves sft alone 2"):
        load(path, "prompt")
    write(path, *({"text": f"Story {i}."} for i in range(100)))
    train, evals, _ = load_datasets(str(path), "sft", validation_split_percentage=20)
    assert len(evals["rows"]) > 10 and len(train) + len(evals["rows"]) == 100, "texts do not share the empty prompt"


def test_columns_without_a_value_are_not_taken_for_the_layout(tmp_path):
    empty = dict.fromkeys(("chosen", "rejected", "text", "conversations"))
    pq.write_table(pa.Table.from_pylist([{"messages": TALK} | empty]), tmp_path / "a.parquet")
    assert load(tmp_path / "a.parquet", "sft")[0] == [[U, G]]


def test_prompts_may_be_objects_or_bare_strings(tmp_path):
    write(tmp_path / "a.jsonl", {"prompt": ASKED, "id": 1})
    write(tmp_path / "b.jsonl", ASKED)
    assert load(tmp_path / "a.jsonl", "prompt")[0] == load(tmp_path / "b.jsonl", "prompt")[0] == [[U, ""]]
    with pytest.raises(UserError, match="serves prompt, not sft"):
        load(tmp_path / "b.jsonl", "sft")


def test_ranking_notation_puts_the_best_first_and_ties_together():
    assert ranks_in("A<B<C=D<E") == {"E": 0, "C": 1, "D": 1, "B": 2, "A": 3}
    assert ranks_in("B > A") == {"B": 0, "A": 1}
    for wrong in ("A", "A<B>C"):
        with pytest.raises(BadRow):
            ranks_in(wrong)


def test_a_tie_gives_no_pair_and_a_long_list_gives_at_most_ten(tmp_path):
    letters = {name: f"Answer {name}." for name in "ABCDE"}
    row = {"prompt": ASKED, "responses": letters, "ranking": "A<B<C=D<E"}
    pairs, entry = load(write(tmp_path / "rows.jsonl", row), "preference")
    assert len(pairs) == 9 and not any({"a: Answer C.", "a: Answer D."} == {p[1][0], p[2][0]} for p in pairs)
    row = {"prompt": ASKED, "responses": [f"Answer {i}." for i in range(9)]}
    pairs, entry = load(write(tmp_path / "many.jsonl", row), "preference")
    assert len(pairs) == 10 and entry["dropped"] == {"more than 10 pairs of a prompt": 26}
    assert [U, ["a: Answer 0."], ["a: Answer 8."]] in pairs, "the clearest differences are the ones to keep"
    with pytest.raises(UserError, match="none of 1 rows can be used: tie 1"):
        load(
            write(tmp_path / "ties.jsonl", {"prompt": ASKED, "responses": [GOOD, BAD], "ranks": [0, 0]}), "preference"
        )


def test_margins_are_the_difference_of_the_scores(tmp_path):
    row = {"chosen": TALK, "rejected": WORSE, "score_chosen": 8.5, "score_rejected": 4}
    rows, _, _ = load_datasets(str(write(tmp_path / "a.jsonl", row)), "preference", validation_split_percentage=0)
    assert rows["margin"] == [4.5]
    for scores, reason in (((4, 4), "tie"), ((3, 4), "higher score"), ((float("inf"), 4), "finite")):
        row |= dict(zip(("score_chosen", "score_rejected"), scores, strict=True))
        with pytest.raises(UserError, match=reason):
            load(write(tmp_path / "a.jsonl", row), "preference")
    row |= {"score_chosen": float("nan")}  # how a table without nulls writes that there is none
    rows, _, _ = load_datasets(str(write(tmp_path / "a.jsonl", row)), "preference", validation_split_percentage=0)
    assert "margin" not in rows.column_names


@pytest.mark.parametrize("text", ["Assistant: is a word\n\nAnd Human: too", "a\n\nb", "line\nAssistant: x"])
def test_a_marker_inside_a_paragraph_opens_no_turn(text):
    assert parse_transcript(f"\n\nHuman: {text}\n\nAssistant: ok")[0] == {"role": "user", "content": text}


def test_each_side_of_a_pair_is_cut_at_its_own_last_answer(tmp_path):
    prompt = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c"
    rows = [
        {"chosen": prompt + "\n\nAssistant: one", "rejected": prompt + "\n\nAssistant: another, longer one"},
        {"chosen": prompt + "\n\nAssistant: one", "rejected": "\n\nHuman: x\n\nAssistant: two"},
        {"chosen": prompt + "\n\nAssistant: one\n\nHuman: d", "rejected": prompt + "\n\nAssistant: two"},
        {"chosen": "no transcript", "rejected": prompt},
    ]
    pairs, entry = load(write(tmp_path / "rows.jsonl", *rows), "preference", max_bad_percentage=100)
    assert pairs == [[["u: a", "a: b", "u: c"], ["a: one"], ["a: another, longer one"]]]
    assert entry["dropped"] == {
        "chosen and rejected answer different prompts": 1,
        "answer does not end with the assistant": 1,
        "not a Human/Assistant transcript": 1,
    }


def flat(node, parent=None, number=None):
    """The rows of a tree as Open Assistant's table has them."""
    number = number if number is not None else iter(range(1000))
    name = f"m{next(number)}"
    yield {"message_id": name, "parent_id": parent, **{k: v for k, v in node.items() if k != "replies"}}
    for reply in node.get("replies") or []:
        yield from flat(reply, name, number)


def test_flat_messages_in_any_order_give_the_rows_of_their_tree(tmp_path):
    write(tmp_path / "a.jsonl", TREE)
    write(tmp_path / "b.jsonl", *reversed(list(flat(TREE["prompt"]))))
    for task in ("sft", "preference", "prompt"):
        assert load(tmp_path / "a.jsonl", task)[0] == load(tmp_path / "b.jsonl", task)[0]


def test_an_unranked_reply_is_neither_best_nor_compared(tmp_path):
    replies = [{"text": "Unranked.", "role": "assistant", "rank": None}, *TREE["prompt"]["replies"]]
    path = write(tmp_path / "a.jsonl", TREE | {"prompt": TREE["prompt"] | {"replies": replies}})
    assert load(path, "sft")[0] == [[U, G]] and load(path, "preference")[0] == [[U, G, B]]


def test_ids_that_are_no_ids_are_counted(tmp_path):
    odd = [
        {"message_id": name, "parent_id": parent, "text": "x", "role": "prompter"}
        for name, parent in ((["m"], None), ("m", []))
    ]
    _, entry = load(write(tmp_path / "a.jsonl", *flat(TREE["prompt"]), *odd), "sft", max_bad_percentage=80)
    assert entry["dropped"] == {"no usable 'message_id'": 2}


def test_a_reply_whose_parent_is_missing_is_counted(tmp_path):
    rows = list(flat(TREE["prompt"])) + [{"message_id": "x", "parent_id": "gone", "text": "Hm.", "role": "assistant"}]
    _, entry = load(write(tmp_path / "a.jsonl", *rows), "sft", max_bad_percentage=60)
    assert entry["dropped"] == {"the parent message is missing": 1}


@pytest.mark.skipif(not (SHARED / "oasst_trees_en50").exists(), reason="the real trees are not here")
def test_threads_groups_and_pairs_of_real_trees_match_a_recursive_count():
    path = SHARED / "oasst_trees_en50" / "trees.jsonl.gz"
    counts = Counter()

    def gone(node):
        return node.get("deleted") or node.get("review_result") is False or node.get("synthetic")

    def all_below(node):
        return 1 + sum(map(all_below, node.get("replies") or []))

    def walk(node, best):
        """Counts prompts, groups and pairs below a node; returns the answers on best paths."""
        replies = [reply for reply in node.get("replies") or [] if not gone(reply)]
        counts["out"] += sum(all_below(reply) for reply in node.get("replies") or [] if gone(reply))
        ranks = sorted(reply["rank"] for reply in replies if reply.get("rank") is not None)
        if node["role"] == "prompter":
            counts["prompts"] += 1
            counts["groups"] += len(ranks) > 1
            pairs = sum(a != b for a, b in combinations(ranks, 2))
            counts["pairs"] += min(pairs, 10)
            counts["capped"] += max(pairs - 10, 0)
            top = [r for r in replies if r.get("rank") == ranks[0]][:1] if ranks else replies[:1]
            return sum(walk(reply, best and reply in top) for reply in replies)
        return best + sum(walk(reply, best) for reply in replies)

    with gzip.open(path, "rt", encoding="utf-8") as file:
        trees = [json.loads(line)["prompt"] for line in file]
    counts["out"] += sum(all_below(tree) for tree in trees if gone(tree))
    answers = sum(walk(tree, True) for tree in trees if not gone(tree))
    pairs, entry = load(path, "preference")
    assert len(pairs) == counts["pairs"] and entry["dropped"].pop("more than 10 pairs of a prompt") == counts["capped"]
    assert sum(entry["dropped"].values()) == counts["out"] + entry["dropped"].get("nothing for preference", 0) > 10
    assert len({str(pair[0]) for pair in pairs}) == counts["groups"]
    assert len(load(path, "prompt")[0]) == counts["prompts"]
    threads, _ = load(path, "sft")
    demonstrated = [turn for row in threads for turn in row[1] if turn.startswith("a: ")]
    assert len(demonstrated) == answers, "each best answer is imitated once, however many threads run through it"
