"""A row is read whole or not at all: what each shape of row becomes, in jsonl and in parquet with null columns.

python -m pytest tests/data/test_columns.py
"""

# ruff: noqa: E501 (a row of the tables is a line)
import json

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import prepare_data
from prepare_data import describe, load_datasets
from rlhf.data.columns import Row, left_over
from rlhf.user_error import UserError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def load(path, task="sft", **options):
    rows, _, report = load_datasets(str(path), task, validation_split_percentage=0, **options)
    columns = [column for column in rows.column_names if column not in ("dataset", "margin")]
    texts = [[short(row[column]) for column in columns] for row in rows]
    return sorted(texts, key=str), next(iter(report["datasets"].values())), report


def short(value):
    return value if isinstance(value, str) else [f"{turn['role'][0]}: {turn['content']}" for turn in value]


def turn(role, content, **more):
    return {"role": role, "content": content} | more


def talk(*texts, **marks):
    """User and assistant in turn; `a1={"weight": 0}` adds keys to the second turn of the assistant's."""
    turns = [turn(("user", "assistant")[i % 2], text) for i, text in enumerate(texts)]
    for name, more in marks.items():
        turns[int(name[1:]) * 2 + (name[0] == "a")] |= more
    return turns


Q, A, B = "Is it late?", "Not yet.", "Yes."
U, G, W = ["u: Is it late?"], ["a: Not yet."], ["a: Yes."]
S = "s: Be brief."
PAIR = {"prompt": Q, "chosen": A, "rejected": B}
PLAIN = {"prompt": Q, "completion": A}
SHAREGPT = [{"from": "human", "value": Q}, {"from": "gpt", "value": A}]
SHP = {"post_id": "p", "domain": "d", "history": Q, "human_ref_A": B, "human_ref_B": A, "labels": 0}
SHP |= {"score_A": 1, "score_B": 9, "score_ratio": 9.0, "seconds_difference": 3.0}
WEBGPT = {"question": {"full_text": Q, "id": "q", "dataset": "d"}, "answer_0": A + " [1]", "answer_1": B}
WEBGPT |= {"score_0": 0.5, "score_1": -0.5, "quotes_0": {"title": ["t"], "extract": ["e"]}, "tokens_0": {"p": [1]}}
UFB = {"prompt": Q, "prompt_id": "7", "chosen": talk(Q, A), "rejected": talk(Q, B), "messages": talk(Q, A)}
UFB |= {"score_chosen": 8.0, "score_rejected": 2.0}
SUMMARIES = {
    "info": {"id": "1", "subreddit": "pets", "title": "Cat", "post": "It runs.", "article": None},
    "choice": 1,
}
SUMMARIES |= {"summaries": [{"text": "a dog"}, {"text": "a cat"}], "worker": "w", "extra": {"confidence": 3}}
MASKED = talk(Q, A, "And now?", B, "Sure?", "Quite.")

# what a row becomes: (task, row, the rows made of it)
USED = {
    "system": ("sft", PLAIN | {"system": "Be brief."}, [[[S, *U], G]]),
    "system_prompt": ("sft", {"messages": talk(Q, A), "system_prompt": "Be brief."}, [[[S, *U], G]]),
    "system of ShareGPT": ("sft", {"conversations": SHAREGPT, "system": "Be brief."}, [[[S, *U], G]]),
    "system twice the same": ("sft", {"messages": [turn("system", "Be brief."), *talk(Q, A)], "system": "Be brief."}, [[[S, *U], G]]),
    "system of alpaca": ("sft", {"instruction": Q, "input": "", "output": A, "system": "Be brief."}, [[[S, *U], G]]),
    "system of a pair": ("preference", PAIR | {"system": "Be brief."}, [[[S, *U], G, W]]),
    "Intel/orca_dpo_pairs": ("preference", {"system": "Be brief.", "question": Q, "chosen": A, "rejected": B}, [[[S, *U], G, W]]),
    "system of a ranking": ("preference", {"prompt": Q, "responses": [A, B], "system": "Be brief."}, [[[S, *U], G, W]]),
    "system of prompts": ("prompt", {"prompt": Q, "system": "Be brief."}, [[[S, *U], ""]]),
    "system empty": ("sft", PLAIN | {"system": " "}, [[U, G]]),
    "history": ("sft", {"instruction": Q, "output": A, "history": [["Hi", "Hello."]]}, [[["u: Hi", "a: Hello.", *U], G]]),
    "history and system": ("preference", PAIR | {"history": [["Hi", "Hello."]], "system": "Be brief."}, [[[S, "u: Hi", "a: Hello.", *U], G, W]]),
    "history of messages": ("prompt", {"prompt": Q, "history": talk("Hi", "Hello.")}, [[["u: Hi", "a: Hello.", *U], ""]]),
    "history before system turn": ("sft", {"messages": [turn("system", "Be brief."), *talk(Q, A)], "history": [["Hi", "Hello."]]}, [[[S, "u: Hi", "a: Hello.", *U], G]]),
    "system of scored answers": ("sft", {"user_input": Q, "completion": A, "score": 1, "system": "Be brief."}, [[[S, *U], G]]),
    "history empty": ("sft", PLAIN | {"history": []}, [[U, G]]),
    "label true": ("sft", PLAIN | {"label": True}, [[U, G]]),
    "weight 1": ("sft", {"messages": talk(Q, A, a0={"weight": 1})}, [[U, G]]),
    "weight of SlimOrca": ("sft", {"conversations": [SHAREGPT[0] | {"weight": 0.0}, SHAREGPT[1] | {"weight": 1.0}]}, [[U, G]]),
    "first answer masked": ("sft", {"messages": talk(Q, A, "And now?", B, a0={"weight": 0})}, [[[*U, *G, "u: And now?"], W]]),
    "middle answer masked": ("sft", {"messages": MASKED[:3] + [MASKED[3] | {"train": False}] + MASKED[4:]}, [[U, G], [[*U, *G, "u: And now?", *W, "u: Sure?"], ["a: Quite."]]]),
    "last answer masked": ("sft", {"messages": talk(Q, A, "And now?", B, a1={"label": False})}, [[U, G]]),
    "masked in completion": ("sft", {"prompt": talk(Q), "completion": [turn("assistant", B, weight=0), *talk("And now?", A)]}, [[[*U, *W, "u: And now?"], G]]),
    "LLaMA-Factory pair": ("preference", {"conversations": SHAREGPT[:1], "chosen": SHAREGPT[1], "rejected": {"from": "gpt", "value": B}}, [[U, G, W]]),
    "LLaMA-Factory pair in lists": ("preference", {"conversations": SHAREGPT[:1], "chosen": SHAREGPT[1:], "rejected": [{"from": "gpt", "value": B}]}, [[U, G, W]]),
    "rejected_response": ("preference", {"messages": talk(Q, A), "rejected_response": B}, [[U, G, W]]),
    "rejected_messages": ("preference", {"messages": talk(Q, A), "rejected_messages": talk(Q, B)}, [[U, G, W]]),
    "query and rejected_response": ("preference", {"query": Q, "response": A, "rejected_response": B}, [[U, G, W]]),
    "chosen_response": ("preference", {"prompt": Q, "chosen_response": A, "rejected_response": B}, [[U, G, W]]),
    "augmented": ("preference", {"prefixes": [Q], "responses": [A], "augmented": [B]}, [[U, G, W]]),
    "scores of which one is null": ("preference", {"prompt": Q, "responses": [B, "Hm.", A], "scores": [1, None, 2]}, [[U, G, W]]),
    "SHP": ("preference", SHP, [[U, G, W]]),
    "WebGPT": ("preference", WEBGPT, [[U, G, W]]),
    "UltraFeedback": ("preference", UFB, [[U, G, W]]),
    "Stack Exchange": ("preference", {"qid": 1, "question": f"<p>{Q}</p>", "answers": [{"text": f"<p>{B}</p>", "pm_score": 0}, {"text": A, "pm_score": 4, "selected": True}]}, [[U, G, W]]),
    "stack-exchange-paired": ("preference", {"qid": 1, "question": Q, "date": "1", "response_j": A, "response_k": B}, [[U, G, W]]),
    "OpenAI's comparisons": ("preference", SUMMARIES, [[["u: SUBREDDIT: r/pets\nTITLE: Cat\nPOST: It runs.\nTL;DR:"], ["a: a cat"], ["a: a dog"]]]),
    "prompt beside whole dialogues": ("preference", {"prompt": Q, "chosen": talk(Q, A), "rejected": talk(Q, B)}, [[U, G, W]]),
    "text parts": ("sft", {"messages": [turn("user", [{"type": "text", "text": "Is it "}, {"type": "text", "text": "late?"}]), turn("assistant", [{"type": "text", "text": A}])]}, [[U, G]]),
    "empty system turn": ("sft", {"messages": [turn("system", ""), *talk(Q, A)]}, [[U, G]]),
    "system turn of null": ("sft", {"messages": [turn("system", None), *talk(Q, A)]}, [[U, G]]),
    "developer": ("sft", {"messages": [turn("developer", "Be brief."), *talk(Q, A)]}, [[[S, *U], G]]),
    "number as an answer": ("sft", {"prompt": Q, "completion": 42}, [[U, ["a: 42"]]]),
    "messages as JSON text": ("sft", {"messages": json.dumps(talk(Q, A))}, [[U, G]]),
    "messages as a repr": ("sft", {"messages": repr(talk(Q, A))}, [[U, G]]),
    "messages as numpy prints them": ("sft", {"messages": repr(talk(Q, A)).replace("}, {", "}\n {")}, [[U, G]]),
    "answer as JSON messages": ("preference", {"prompt": Q, "chosen": json.dumps([turn("assistant", A)]), "rejected": repr([turn("assistant", B)])}, [[U, G, W]]),
    "answer that is JSON": ("sft", {"prompt": Q, "completion": '[{"thing": "hat"}]'}, [[U, ['a: [{"thing": "hat"}]']]]),
    "answer that is a JSON object": ("sft", {"prompt": Q, "completion": '{"role": "admin", "content": "x"}'}, [[U, ['a: {"role": "admin", "content": "x"}']]]),
    "answer that is code": ("sft", {"prompt": Q, "completion": "[{'role': role, 'content': text}]"}, [[U, ["a: [{'role': role, 'content': text}]"]]]),
    "assistant first": ("sft", {"messages": [turn("assistant", "Hello."), *talk(Q, A)]}, [[[], ["a: Hello.", *U, *G]]]),
    "system and assistant first": ("sft", {"messages": [turn("system", "Be brief."), turn("assistant", A)]}, [[[S], G]]),
    "text": ("sft", {"text": "Once there was a gull."}, [[[], ["t: Once there was a gull."]]]),
    "text as exported": ("sft", {"prompt": [], "completion": [turn("text", "Once there was a gull.")]}, [[[], ["t: Once there was a gull."]]]),
    "assistant first as exported": ("sft", {"prompt": [], "completion": [turn("assistant", "Hello."), *talk(Q, A)]}, [[[], ["a: Hello.", *U, *G]]]),
    "input and context": ("sft", {"instruction": Q, "input": "At sea.", "context": "In May.", "output": A}, [[["u: Is it late?\n\nAt sea.\n\nIn May."], G]]),
    "unknown texts and numbers": ("sft", PLAIN | {"source": "web", "url": "u", "quality": 3, "metadata": {"a": [1]}}, [[U, G]]),
}  # fmt: skip

# what a row is refused for: (task, row, words of the error)
REFUSED = {
    "label false": ("sft", PLAIN | {"label": False}, "its answer is marked as bad ('label')"),
    "label false in a CSV": ("sft", PLAIN | {"label": "False"}, "its answer is marked as bad ('label')"),
    "weight 0": ("sft", {"messages": talk(Q, A, a0={"weight": 0})}, "its answers are marked as bad ('weight')"),
    "weight 0 of the row": ("sft", {"messages": talk(Q, A), "weight": 0}, "its answer is marked as bad ('weight')"),
    "weight 0.5": ("sft", {"messages": talk(Q, A, a0={"weight": 0.5})}, "'weight' is '0.5': known are true or 1"),
    "label as a word": ("sft", PLAIN | {"label": "bad"}, "'label' is 'bad'"),
    "weight on the user's turn": ("sft", {"messages": talk(Q, A, u0={"weight": 1})}, "'weight' is set on a turn of the user's"),
    "label of a pair": ("preference", PAIR | {"label": 0}, "'label' changes the meaning"),
    "label of a text": ("sft", {"text": "A gull.", "label": 0}, "'label' changes the meaning"),
    "a masked answer in a pair": ("preference", {"prompt": Q, "chosen": [turn("assistant", A, weight=0)], "rejected": B}, "an answer of a pair is marked by 'weight'"),
    "tools": ("sft", {"messages": talk(Q, A), "tools": [{"name": "f"}]}, "'tools' changes the meaning and cannot be used: convert it, or --ignore_columns tools"),
    "tools as text": ("sft", PLAIN | {"tools": "[]"}, "'tools' changes the meaning"),
    "tool_calls": ("sft", {"messages": talk(Q, A, a0={"tool_calls": [{"name": "f"}]})}, "--ignore_columns messages.tool_calls"),
    "function_call": ("sft", {"messages": [turn("user", Q), turn("assistant", None, function_call={"name": "f"})]}, "'messages.function_call' changes"),
    "reasoning_content": ("sft", {"messages": talk(Q, A, a0={"reasoning_content": "Hm."})}, "'messages.reasoning_content' changes"),
    "thinking of a ShareGPT turn": ("sft", {"conversations": [SHAREGPT[0], SHAREGPT[1] | {"thinking": "Hm."}]}, "'conversations.thinking' changes"),
    "tool_calls in chosen": ("preference", {"prompt": Q, "chosen": [turn("assistant", A, tool_calls=[{"n": 1}])], "rejected": B}, "'chosen.tool_calls' changes"),
    "tool_calls in text": ("sft", {"messages": json.dumps(talk(Q, A, a0={"tool_calls": [1]}))}, "a message that is written as text has 'tool_calls'"),
    "system of an instance": ("sft", {"instruction": Q, "instances": [{"output": A, "system": "Be brief."}]}, "'instances.system' changes"),
    "images": ("sft", PLAIN | {"images": ["a.png"]}, "'images' changes"),
    "role tool": ("sft", {"messages": [*talk(Q, A), turn("tool", "4")]}, "role 'tool' cannot be used"),
    "role observation": ("sft", {"conversations": [*SHAREGPT, {"from": "observation", "value": "4"}]}, "role 'observation' cannot be used"),
    "unknown role": ("sft", {"messages": [turn("narrator", "Hm."), *talk(Q, A)]}, "unknown role 'narrator'"),
    "an image in the content": ("sft", {"messages": [turn("user", [{"type": "image_url", "image_url": {"url": "x"}}]), turn("assistant", [{"type": "text", "text": A}])]}, "image_url"),
    "an unknown list": ("sft", PLAIN | {"steps": ["a"]}, "nothing reads 'steps': rename it"),
    "an unknown dict": ("sft", {"messages": talk(Q, A, a0={"audit": {"a": 1}})}, "nothing reads 'messages.audit'"),
    "an unknown boolean": ("sft", PLAIN | {"is_bad": True}, "nothing reads 'is_bad'"),
    "a prompt and an unknown text": ("prompt", {"prompt": Q, "antwort": A}, "its keys ('prompt', 'antwort') fit no known layout"),
    "two unknown answers": ("preference", {"prompt": Q, "response_0": A, "response_1": B, "better": 1}, "fit no known layout"),
    "messages beside a pair": ("preference", PAIR | {"messages": talk(Q, A)}, "nothing reads 'messages'"),
    "another prompt beside dialogues": ("preference", {"prompt": "What?", "chosen": talk(Q, A), "rejected": talk(Q, B)}, "the prompt is none of the turns"),
    "two system prompts": ("sft", {"messages": [turn("system", "Be long."), *talk(Q, A)], "system": "Be brief."}, "two system prompts that differ"),
    "history that is none": ("sft", PLAIN | {"history": ["Hi", "Hello."]}, "'history' is no list of [question, answer]"),
    "user twice, no prompt": ("sft", {"messages": [turn("assistant", A), turn("assistant", B), *talk(Q, A)]}, "roles out of order"),
    "text with a system prompt": ("sft", {"text": "A gull.", "system": "Be brief."}, "a text stands beside turns"),
    "choice 2": ("preference", SUMMARIES | {"choice": 2}, "'choice' is not the place"),
    "boolean as an answer": ("sft", {"prompt": Q, "completion": True}, "a text is not a string but bool"),
    "column of the wrong type": ("sft", {"instruction": Q, "instances": [[A]]}, "'instances' is of the wrong type"),
    "OpenAI's axis": ("preference", {"info": {"post": "x"}, "summary": {"text": "y", "axes": {"overall": 3}}}, "fit no known layout"),
}  # fmt: skip
NULLS = (
    "prompt messages conversations text system history label weight tools images chosen rejected responses"
).split()


def write(path, row):
    """The row as one line of JSON, or as a table whose other columns and keys are null, as tables have them."""
    if path.suffix == ".jsonl":
        path.write_text(json.dumps(row), encoding="utf-8")
    else:
        filled = dict.fromkeys(NULLS) | {"meta": [], "extras": {"a": None}, "note": ""} | row
        lists = [value for value in row.values() if isinstance(value, list) and value and isinstance(value[0], dict)]
        keys = {key for items in lists for item in items for key in item}
        filled = {
            key: [dict.fromkeys(keys | {"tool_calls"}) | item for item in value]
            if any(value is v for v in lists)
            else value
            for key, value in filled.items()
        }
        pq.write_table(pa.Table.from_pylist([filled]), path)
    return path


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize("name", USED)
def test_a_row_is_used_whole(tmp_path, name, suffix):
    task, row, expected = USED[name]
    rows, entry, _ = load(write(tmp_path / f"rows.{suffix}", row), task)
    assert rows == sorted(expected, key=str)


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize("name", REFUSED)
def test_a_row_that_cannot_be_used_whole_is_refused_by_name(tmp_path, name, suffix):
    task, row, said = REFUSED[name]
    path = write(tmp_path / f"rows.{suffix}", row)
    if suffix == "parquet" and "antwort" in row:
        path = write(tmp_path / "rows.jsonl", row | dict.fromkeys(NULLS[1:]))
    with pytest.raises(UserError) as error:
        load(path, task)
    assert said in str(error.value) and str(path) in str(error.value)
    assert len(str(error.value).splitlines()) <= 3


def test_what_nobody_reads_is_named_in_the_table_once(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [PLAIN | {"source": "web", "url": f"u{i}"} | ({} if i else {"metadata": {"a": 1}}) for i in range(3)]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    _, entry, report = load(path)
    assert entry["unused"] == ["metadata", "source", "url"]
    assert describe(report).count("not used: metadata, source, url") == 1


@pytest.mark.parametrize(
    "row, ignored",
    [
        (PLAIN | {"tools": [1], "steps": ["a"]}, "tools,steps"),
        ({"messages": talk(Q, A, a0={"tool_calls": [1]})}, "messages.tool_calls"),
        ({"messages": talk(Q, A, a0={"tool_calls": [1]})}, "tool_calls"),
        ({"messages": [turn("system", "Be long."), *talk(Q, A)], "system": "Be brief."}, "system"),
        (PLAIN | {"label": False, "text": "Be"}, "label, text"),
    ],
)
def test_ignored_columns_are_done_without_and_said(tmp_path, row, ignored):
    path = write(tmp_path / "rows.jsonl", row)
    rows, entry, _ = load(path, ignore_columns=ignored)
    assert [row[-1] for row in rows] == [G] and set(entry["unused"]) >= set(ignored.replace(" ", "").split(","))
    with pytest.raises(UserError, match="--ignore_columns sytem: no row has"):
        load(path, ignore_columns=ignored + ",sytem")


def test_an_unknown_answer_beside_a_prompt_can_be_done_without(tmp_path):
    path = write(tmp_path / "rows.jsonl", {"prompt": Q, "antwort": A})
    assert load(path, "prompt", ignore_columns="antwort")[0] == [[U, ""]]
    flags = [f"--dataset_names={path}", "--task=prompt", "--validation_split_percentage=0", "--ignore_columns=antwort"]
    prepare_data.main(prepare_data.make_parser().parse_args(flags))


def test_refused_rows_are_counted_with_the_place_of_the_first(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [PLAIN | {"completion": f"It is {i}."} | ({"tools": [1]} if i > 8 else {}) for i in range(11)]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    with pytest.raises(UserError, match=f"2 of 11 rows are broken: 'tools' .* 2 .first: {path}:10."):
        load(path)
    assert len(load(path, max_bad_percentage=20)[0]) == 9


def test_what_is_read_of_a_merged_row_counts_as_read():
    row = Row({"a": 1, "b": [{"c": 2, "d": 3}], "e": 0, "f": 4})
    merged = row | {"a": 7}
    assert merged["a"] == 7 and merged["b"][0]["c"] == 2 and merged.get("gone") is None
    assert dict(left_over(row)) == {"b.d": 3, "e": 0, "f": 4}


TREE = {"tree_state": "ready_for_export", "user_id": "u", "lang": "en"}
ASKS = TREE | {"message_id": "q", "parent_id": None, "role": "prompter", "text": "Why?"}


@pytest.mark.parametrize(
    ("task", "row", "gives"),
    [
        ("sft", {"question": "Why?", "answer": "So.", "label": 1}, "So."),
        ("sft", {"question": "Why?", "answer": "So.", "label": 0}, "marked as bad"),
        ("sft", {"prompt": "Why?", "label": 1}, "'label' is a mark"),
        ("preference", {"prompt": "Why?", "responses": "['So.' 'No.']"}, "a list without commas"),
        ("preference", {"history": "Why?", "human_ref_A": "So.", "human_ref_B": "No.", "labels": "1", "score_A": 9,
                        "score_B": 2, "score_ratio": 4.5}, "'labels' is neither 0 nor 1"),
        ("sft", {"prompt": "Why?", "responses": ["No.", "So."], "scores": [float("nan"), 2]}, "So."),
        ("sft", {"prompt": "Why?", "prompt_id": "x", "messages": [{"role": "assistant", "content": "So."}]},
         "'prompt' is not the conversation's first question"),
        ("preference", {"prompt": "Why?", "responses": ["a", "b", "c"], "ranking": "A>B>C>A"}, "names an answer twice"),
        ("sft", {"messages": [{"role": "user", "content": "Why?"},
                              {"role": "assistant", "content": "So.", "train_on_turn": 0}]}, "train_on_turn"),
        ("sft", {"prompt": "Why?", "completion": "So.", "Tools": "x"}, "'Tools' changes the meaning"),
        ("sft", {"prompt": "Why?", "completion": "Human: a film."}, "Human: a film."),
    ],
)  # fmt: skip
def test_what_an_attack_found(tmp_path, task, row, gives):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    try:
        rows = load_datasets(str(path), task, validation_split_percentage=0)[0]
    except UserError as error:
        assert gives in str(error)
    else:
        assert rows[0]["completion"][-1]["content"] == gives


@pytest.mark.parametrize(
    ("replies", "best"),
    [
        ([("a", {"rank": 0, "review_result": 0}), ("b", {"rank": 1})], "b"),
        ([("a", {"rank": "10"}), ("b", {"rank": "9"})], "b"),
        ([("a", {"rank": 0, "deleted": "False"}), ("b", {"rank": 1})], "a"),
    ],
)
def test_marks_of_trees_are_read_whatever_their_type(tmp_path, replies, best):
    nodes = [TREE | {"message_id": text, "parent_id": "q", "role": "assistant", "text": text} | marks
             for text, marks in replies]  # fmt: skip
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(node) + "\n" for node in [ASKS, *nodes]))
    rows = load_datasets(str(tmp_path / "t.jsonl"), "sft", validation_split_percentage=0)[0]
    assert rows[0]["completion"][-1]["content"] == best


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.csv", "prompt,completion,completion\nq,a,b\n", "two columns are called 'completion'"),
        ("a.json", '[{"prompt": "q", "completion": "a"}]\n[{"prompt": "p", "completion": "b"}]', "something follows"),
        ("a.jsonl", json.dumps(ASKS) + "\n" + json.dumps(ASKS | {"message_id": "x", "parent_id": "x"}), "no root"),
        ("a.jsonl", json.dumps(ASKS) + "\n" + json.dumps(ASKS), "that another message has"),
        ("a.jsonl", '{"prompt": "q", "completion": "a", "completion": "b"}', "the key 'completion' twice"),
        ("a.json", '[{"prompt": "q", "completion": "a", "completion": "b"}]', "the key 'completion' twice"),
    ],
)
def test_files_that_hold_more_than_is_read_are_refused(tmp_path, name, text, says):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=says):
        load_datasets(str(tmp_path / name), "prompt", validation_split_percentage=0)
