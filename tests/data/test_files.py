"""Reading local files: every layout and container, and every kind of damage with its place.

python -m pytest tests/data/test_files.py
"""

import csv
import gzip
import json

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from prepare_data import load_datasets
from rlhf.data import files as data_files
from rlhf.data.files import find_files, read_file
from rlhf.data.layouts import LAYOUTS, detect
from rlhf.data.messages import BadRow, Skip
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
ROWS = [{"prompt": f"Is {i} prime? é", "completion": f"Think of\n{i}."} for i in range(5)]


def lines(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")


def pretty(path, rows):
    path.write_text("\n".join(json.dumps(row, indent=2, ensure_ascii=False) for row in rows), encoding="utf-8")


def as_csv(path, rows):
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


CONTAINERS = {
    "lines.jsonl": lines,
    "lines.json": lines,
    "list.json": lambda path, rows: path.write_text(json.dumps(rows), encoding="utf-8"),
    "pretty_list.json": lambda path, rows: path.write_text(json.dumps(rows, indent=1), encoding="utf-8"),
    "list.jsonl": lambda path, rows: path.write_text(json.dumps(rows), encoding="utf-8"),
    "pretty.json": pretty,
    "pretty.jsonl": pretty,
    "bom.jsonl": lambda path, rows: path.write_text("\n\n".join(map(json.dumps, rows)), encoding="utf-8-sig"),
    "bom.json": lambda path, rows: path.write_text(json.dumps(rows), encoding="utf-8-sig"),
    "rows.csv": as_csv,
    "windows.jsonl": lambda path, rows: path.write_bytes("\r\n".join(map(json.dumps, rows)).encode()),
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", CONTAINERS)
def test_the_same_rows_are_read_from_every_container(tmp_path, name, packed):
    path = tmp_path / name
    CONTAINERS[name](path, ROWS)
    if packed:
        path = tmp_path / f"{name}.gz"
        path.write_bytes(gzip.compress((tmp_path / name).read_bytes()))
    assert [row for _, row in read_file(path)] == ROWS


def test_parquet_and_message_lists_in_csv_are_read(tmp_path):
    pq.write_table(pa.Table.from_pylist([{"messages": TALK}]), tmp_path / "a.parquet")
    as_csv(tmp_path / "b.csv", [{"messages": json.dumps(TALK)}])
    as_csv(tmp_path / "c.csv", [{"prompt": "long", "completion": "x" * 200_000}])
    assert len(load(tmp_path / "c.csv", "sft")[0][0][1][0]) == 200_003
    assert load(tmp_path / "a.parquet", "sft")[0] == load(tmp_path / "b.csv", "sft")[0] == [[U, G]]


def test_a_json_list_is_read_in_pieces_whatever_their_size(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    rows = [{"prompt": "é" * i, "completion": '"]},[{' * 3} for i in range(40)]
    for indent in (None, 2):
        path.write_text(json.dumps(rows, ensure_ascii=False, indent=indent), encoding="utf-8")
        for size in (1, 2, 3, 7, 64):
            monkeypatch.setattr(data_files, "CHUNK", size)
            assert [row for _, row in read_file(path)] == rows


def test_places_count_the_lines_of_the_file(tmp_path):
    (tmp_path / "a.json").write_text('[\n{"prompt":\n"a"},\n\n{"prompt": "b"}]\n', encoding="utf-8")
    (tmp_path / "a.csv").write_text('prompt\n"two\nlines"\nb\n', encoding="utf-8")
    (tmp_path / "a.jsonl").write_text('\n{"prompt": "a"}\n\n\n{"prompt": "b"}\n', encoding="utf-8")
    for name, expected in (("a.json", [2, 5]), ("a.csv", [3, 4]), ("a.jsonl", [2, 5])):
        assert [int(place.rpartition(":")[2]) for place, _ in read_file(tmp_path / name)] == expected


def test_folders_are_split_by_the_names_in_them(tmp_path):
    for name, number in (("train-00000-of-00002", 0), ("train-00001-of-00002", 1), ("test", 2), ("validation", 3)):
        write(tmp_path / f"{name}.jsonl", {"prompt": f"{number}?", "completion": "Yes."})
    (tmp_path / "README.md").write_text("no data", encoding="utf-8")
    assert [path.name for path in find_files(tmp_path)["test"]] == ["validation.jsonl"]
    train, evals, _ = load_datasets(str(tmp_path), "sft")
    assert sorted(row["prompt"][0]["content"] for row in train) == ["0?", "1?"]
    assert [row["prompt"][0]["content"] for row in next(iter(evals.values()))] == ["3?"]


def test_a_folder_of_test_files_is_for_evaluation_alone(tmp_path):
    write(tmp_path / "held" / "test.jsonl", {"prompt": "1?", "completion": "Yes."})
    with pytest.raises(UserError, match="only test rows"):
        load_datasets(str(tmp_path / "held"), "sft")
    _, evals, _ = load_datasets("demo#5", "sft", eval_dataset_names=str(tmp_path / "held"))
    assert len(evals["held"]) == 1


GOOD_LINES = [json.dumps({"prompt": f"{i}?", "chosen": "Yes.", "rejected": "No."}) for i in range(40)]
DAMAGED = {  # what stands on line 3: why the row is dropped
    '{"prompt": "x", "chosen": "y"': "broken JSON",
    "[1, 2]": "not a JSON object",
    "17": "not a JSON object",
    '{"prompt": "x", "chosen": true, "rejected": "z"}': "a text is not a string but bool",
    '{"prompt": null, "chosen": "y", "rejected": "z"}': "not a Human/Assistant transcript",
    '{"prompt": "x", "rejected": "z"}': "no column 'chosen'",
    '{"messages": []}': "no column 'chosen'",
    '{"prompt": "x", "chosen": " ", "rejected": "z"}': "empty message",
    '{"prompt": "\\ud800", "chosen": "y", "rejected": "z"}': "broken Unicode",
    '{"prompt": "x", "chosen": [{"role": "narrator", "content": "y"}], "rejected": "z"}': "unknown role 'narrator'",
    json.dumps({"prompt": TALK, "chosen": "y", "rejected": "z"}): "prompt does not end with the user",
    json.dumps({"prompt": TALK[:1] * 2, "chosen": "y", "rejected": "z"}): "roles out of order",
    '{"prompt": "x", "input": [7], "chosen": "y", "rejected": "z"}': "a text is not a string but list",
    '{"prompt": "x", "chosen": "y", "rejected": "z", "margin": "wide"}': "'margin' is of the wrong type",
    '{"prompt": "x", "chosen": "same", "rejected": "same "}': "identical answers",
    "[" * 5000: "broken JSON",
    '{"prompt": ' + "9" * 5000 + "}": "broken JSON",
}


@pytest.mark.parametrize("line", DAMAGED, ids=lambda line: line[:60])
def test_a_line_that_is_merely_bad_is_dropped_and_counted_with_its_place(tmp_path, line):
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join([*GOOD_LINES[:2], line, *GOOD_LINES[2:]]), encoding="utf-8")
    rows, entry = load(path, "preference")
    assert len(rows) == 40 and entry["dropped"] == {DAMAGED[line]: 1}
    assert entry["first"] == {DAMAGED[line]: f"{path}:3"}


def test_too_many_bad_lines_stop_the_run_and_the_user_may_allow_more(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join([*GOOD_LINES, '{"prompt": 1}', "{", "{"]), encoding="utf-8")
    with pytest.raises(UserError) as error:
        load(path, "preference")
    assert f"3 of 43 rows are broken: broken JSON 2 (first: {path}:42)" in str(error.value)
    assert "--max_bad_percentage" in str(error.value)
    assert len(load(path, "preference", max_bad_percentage=10)[0]) == 40


def refused(path, task="sft"):
    with pytest.raises(UserError) as error:
        load(path, task)
    message = str(error.value)
    assert 1 <= len(message.splitlines()) <= 3
    return message


def test_files_that_cannot_be_right_stop_with_place_and_remedy(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes("\n".join([*GOOD_LINES, '{"prompt": "caf\xe9"}']).encode("latin-1"))
    assert f"{path}:41: not UTF-8" in refused(path) and "iconv" in refused(path)

    for name in ("rows.json", "rows.csv"):
        (tmp_path / name).write_bytes(b'[\n{"prompt": "a", "completion": "b"},\n{"prompt": "caf\xe9"}]')
        assert f"{name}:3: not UTF-8" in refused(tmp_path / name)

    packed = gzip.compress("\n".join(GOOD_LINES * 50).encode())
    for cut in (packed[: len(packed) // 2], packed[:-4], b"not gzip at all", packed[:200] + b"\0" * 50 + packed[250:]):
        (tmp_path / "rows.jsonl.gz").write_bytes(cut)
        assert "rows.jsonl.gz: the .gz file is cut short or damaged" in refused(
            tmp_path / "rows.jsonl.gz", "preference"
        )

    (tmp_path / "a.json").write_text('[\n{"prompt": "a", "completion": "b"},\n{"prompt": oops}]')
    assert "a.json:3: broken JSON" in refused(tmp_path / "a.json")
    (tmp_path / "b.json").write_text('[\n{"prompt": "a", "completion": "b"},\n{"prompt": "c", "completion": "d"}')
    assert "b.json:3: the file ends inside its list" in refused(tmp_path / "b.json")
    (tmp_path / "c.csv").write_text('prompt,completion\na,b\n"c,d\n')
    assert "c.csv:3: broken CSV" in refused(tmp_path / "c.csv")
    (tmp_path / "d.parquet").write_bytes(b"PAR1 and then nothing")
    assert "d.parquet: not a readable Parquet file" in refused(tmp_path / "d.parquet")


ENCODED = {  # encoding and text: what the error says
    "utf-16": ("Wie spät?", "iconv -f utf-16 -t utf-8"),
    "utf-16-le": ("late?", "iconv -f utf-16le -t utf-8"),
    "utf-16-be": ("late?", "iconv -f utf-16be -t utf-8"),
    "gbk": ("现在几点了，你知道吗？我不知道。", "iconv -f gbk -t utf-8"),
    "latin-1": ("Déjà vu à l'été", "iconv -f ENCODING"),
    "cp1251": ("Который сейчас час", "iconv -f ENCODING"),
    "euc-kr": ("지금 몇 시입니까 알려 주세요", "iconv -f ENCODING"),
    "euc-jp": ("今は何時ですか", "iconv -f ENCODING"),
    "big5": ("現在幾點了你知道嗎", "iconv -f ENCODING"),
}


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".jsonl.gz"])
@pytest.mark.parametrize("encoding", ENCODED)
def test_an_encoding_is_named_only_where_its_bytes_tell_it(tmp_path, encoding, suffix):
    text, said = ENCODED[encoding]
    row = f"prompt,completion\n{text},ok" if suffix == ".csv" else f'{{"prompt": "{text}", "completion": "ok"}}'
    content = row.encode(encoding)
    path = tmp_path / f"rows{suffix}"
    path.write_bytes(gzip.compress(content) if suffix.endswith(".gz") else content)
    message = refused(path)
    assert said in message and "latin1" not in message and str(path) in message


def test_a_cell_of_a_csv_file_is_a_text_until_it_becomes_messages(tmp_path):
    answer = '[{"thing": "hat"}]'
    as_csv(tmp_path / "a.csv", [{"prompt": ASKED, "completion": answer}])
    assert load(tmp_path / "a.csv", "sft")[0] == [[U, [f"a: {answer}"]]]
    as_csv(tmp_path / "b.csv", [{"messages": repr(TALK), "prompt": "", "system": ""}])
    assert load(tmp_path / "b.csv", "sft")[0] == [[U, G]]
    as_csv(tmp_path / "c.csv", [{"prompt": ASKED, "responses": json.dumps([GOOD, BAD]), "scores": "[2, 1]"}])
    assert load(tmp_path / "c.csv", "preference")[0] == [[U, G, B]]


def test_files_without_rows_or_known_keys_say_what_is_expected(tmp_path):
    assert "fit no known layout" in refused(write(tmp_path / "a.jsonl", {"frage": "x", "antwort": "y"}))
    assert "a.jsonl:1: its keys ('frage', 'antwort')" in refused(tmp_path / "a.jsonl")
    for text in ("", "\n\n", "[1, 2]\n"):
        (tmp_path / "b.jsonl").write_text(text)
        assert "no row in it is readable" in refused(tmp_path / "b.jsonl")
    (tmp_path / "empty").mkdir()
    assert "a folder without data" in refused(tmp_path / "empty")
    (tmp_path / "rows.txt").write_text("hello")
    assert "read are .jsonl .json .csv .parquet" in refused(tmp_path / "rows.txt")


def test_a_line_of_ten_megabytes_is_a_row_like_any_other(tmp_path):
    path = write(tmp_path / "a.jsonl", *ROWS, {"prompt": "long", "completion": "x" * 10_000_000})
    assert max(len(row[1][0]) for row in load(path, "sft")[0]) == 10_000_003


TEXTS = st.text(max_size=12) | st.sampled_from(["\n\nHuman: a\n\nAssistant: b", "user", "assistant", "A<B", "\ud800"])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(TEXTS, inner, max_size=3)
        | st.fixed_dictionaries({"role": inner, "content": inner})
        | st.fixed_dictionaries({"from": inner, "value": inner})
    ),
    max_leaves=8,
)
KEYS = st.sampled_from(
    "prompt completion response chosen rejected messages conversations text role replies rank message_id parent_id "
    "user_input score responses ranks ranking scores prefixes pos neg_replies history instruction instances input "
    "output score_chosen score_rejected margin label question answer context reference tree_state lang deleted".split()
)
ROWS_OF_A_LAYOUT = st.sampled_from(LAYOUTS).flatmap(
    lambda layout: st.builds(
        lambda needed, more: more | needed,
        st.fixed_dictionaries({key.split("|")[0]: VALUES for key in layout.keys}),
        st.dictionaries(KEYS, VALUES, max_size=3),
    )
)
FUZZ = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@FUZZ
@given(st.lists(ROWS_OF_A_LAYOUT, min_size=1, max_size=4), st.sampled_from(["sft", "preference", "prompt"]))
def test_no_row_whatever_it_holds_escapes_as_another_error(tmp_path, rows, task):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    try:
        loaded, _, _ = load_datasets(str(path), task, validation_split_percentage=0, max_bad_percentage=100)
    except UserError as error:
        assert str(error)
        return
    for row in loaded:
        for column in ("prompt", "completion", "chosen", "rejected"):
            for turn in row.get(column, []):
                assert (
                    turn["role"] in ("system", "user", "assistant", "text")
                    and turn["content"] == turn["content"].strip() != ""
                )


@FUZZ
@given(
    st.binary(max_size=200) | st.text(alphabet='{}[]",:\\ \nabc01é', max_size=60).map(str.encode),
    st.sampled_from([".jsonl", ".json", ".csv", ".parquet", ".jsonl.gz", ".json.gz", ".csv.gz"]),
)
@example(b'{"a": 1}\n' * 3 + b"\xff", ".jsonl")
@example(b"[" * 2000, ".json")
@example(b'a,b\n"', ".csv")
def test_no_bytes_whatever_they_are_escape_as_another_error(tmp_path, content, suffix):
    path = tmp_path / f"rows{suffix}"
    path.write_bytes(content)
    try:
        for place, row in read_file(path):
            assert place.startswith(str(path)) and isinstance(row, (dict, BadRow))
            if not isinstance(row, Skip):
                detect(row, place)
    except UserError as error:
        assert str(path) in str(error)
