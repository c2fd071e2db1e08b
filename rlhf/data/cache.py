"""Prepared rows on disk: read, cleaned and checked once, memory-mapped ever after.

A prepared part is a folder with rows.arrow (the task's columns and three hashes of each row), report.json (how many
were read, kept and dropped) and a fingerprint of both. Its name is a hash of the source, the task and the code, so
that no stale rows are used; the fingerprint is verified, so that no damaged ones are.
"""

import contextlib
import functools
import hashlib
import itertools
import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from rlhf.data.columns import Row, nothing, opening_of, unused_columns, with_opening, without
from rlhf.data.messages import MARKS, BadRow, Skip, is_set
from rlhf.data.rows import COLUMNS, SOUND, Prompt, clean, imitated, kind_for, kind_of, problem_with, views
from rlhf.data.sources import Source
from rlhf.user_error import UserError

BATCH_ROWS, BATCH_CHARACTERS = 1000, 1 << 26  # what is held in memory before it is written


@functools.cache
def code_text() -> str:
    """The code that shapes rows: when it changes, no cached rows are used."""
    names = ("cache", "columns", "files", "layouts", "messages", "rows", "trees", "votes")
    files = [Path(__file__).with_name(f"{name}.py") for name in names]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


@contextlib.contextmanager
def alone(lock_file: Path, label: str):
    """Holds the lock; says so when that means to wait for another process."""
    from filelock import FileLock, Timeout

    lock = FileLock(lock_file)
    try:
        lock.acquire(timeout=10)
    except Timeout:
        print(f"waiting for another process that prepares {label}", file=sys.stderr)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def prepare(source: Source, task: str, side: str, max_bad_percentage: float):
    """(rows, report) of one side of a source, or None; prepared once, whoever asks, and cached on disk.

    Of several processes one works while the others wait at a file lock. No collective is under way meanwhile, so no
    process group can time out, however long it takes.
    """
    from datasets import Dataset, config
    from datasets.table import MemoryMappedTable

    opened = source.open(task, side)
    if opened is None:
        return None
    identity, rows = opened
    what = [identity, source.label, task, source.code, code_text(), sorted(source.ignored), source.most_pairs]
    key = hashlib.sha256(json.dumps(what).encode()).hexdigest()[:32]
    cache = Path(config.HF_DATASETS_CACHE) / "rows"
    folder = cache / key
    if not is_intact(folder):
        try:
            cache.mkdir(parents=True, exist_ok=True)
            with alone(cache / f"{key}.lock", source.label):
                if not is_intact(folder):
                    if folder.exists():
                        print(f"{source.label}: its prepared rows are damaged and made anew", file=sys.stderr)
                    work = cache / f"{key}.unfinished"
                    shutil.rmtree(work, ignore_errors=True)  # of a process that was killed
                    work.mkdir()
                    report = write_rows(source, task, rows, work / "rows.arrow")
                    (work / "report.json").write_text(json.dumps(report), encoding="utf-8")
                    (work / "fingerprint").write_text(contents_hash(work), encoding="utf-8")
                    shutil.rmtree(folder, ignore_errors=True)
                    os.replace(work, folder)  # at once: no reader ever sees half of it
        except OSError as error:
            raise UserError(f"{cache}: {error.strerror}\nset HF_DATASETS_CACHE to a folder with room") from error
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    refuse_bad(source.label, report, max_bad_percentage)
    return Dataset(MemoryMappedTable.from_file(str(folder / "rows.arrow")), fingerprint=key), report


def is_intact(folder: Path) -> bool:
    """Whether the prepared rows are those that were written; hashed once a process, and again when they change."""
    try:
        stats = [(folder / name).stat() for name in ("rows.arrow", "report.json", "fingerprint")]
        return matches(folder, *((stat.st_size, stat.st_mtime_ns) for stat in stats))
    except OSError:
        return False


@functools.lru_cache
def matches(folder: Path, *stats) -> bool:
    return (folder / "fingerprint").read_bytes() == contents_hash(folder).encode()


def contents_hash(folder: Path) -> str:
    """A hash of rows and report; xxh3 takes a tenth of a second for a gigabyte, and nobody forges a cache."""
    import xxhash

    state = xxhash.xxh3_128()
    for name in ("rows.arrow", "report.json"):
        with open(folder / name, "rb") as file:
            while chunk := file.read(1 << 20):
                state.update(chunk)
    return state.hexdigest()


def refuse_bad(label: str, report: dict, max_bad_percentage: float):
    """Raises a UserError when nothing is left, or when more rows are broken than the user lets pass."""
    reasons = sorted(report["dropped"], key=report["dropped"].get, reverse=True)
    first = report["first"]
    where = [f"{reason} {report['dropped'][reason]:,} (first: {first.get(reason, '?')})" for reason in reasons[:3]]
    reasons = ", ".join(where) or "it is empty"
    if not report["rows"]:
        raise UserError(f"{label}: none of {report['read']:,} rows can be used: {reasons}")
    if 100 * report["bad"] > max_bad_percentage * report["read"]:
        raise UserError(
            f"{label}: {report['bad']:,} of {report['read']:,} rows are broken: {reasons}\n"
            f"mend the data, or let more than {max_bad_percentage:g} % pass with --max_bad_percentage"
        )


def usable_rows(source: Source, task: str, raw, unused: set[str]) -> Iterator[dict | Skip]:
    """The task's rows of one raw row, and a Skip for each that had to be left out; columns without use are added."""
    kind = kind_for(task, source.kinds)
    try:
        if isinstance(raw, Skip):
            raise raw
        raw = Row(without(raw, source.ignored, unused) if source.ignored else raw)
        if source.keep and not source.keep(raw):
            raise Skip("set aside by the dataset's own rule")
        rows = whole_rows(source, raw)
        unused.update(unused_columns(raw, source.unused, source.kinds == (Prompt,)))
        for row in rows:
            if isinstance(row, Skip):
                yield row
            elif kind_of(row) is kind:
                yield from checked(row, task, kind, source.most_pairs)
    except Skip as skip:
        yield skip
    except KeyError as error:
        yield BadRow(f"no column {error}")
    except RecursionError:
        yield BadRow("a value is nested too deep")
    except (TypeError, AttributeError, ValueError, IndexError):
        yield BadRow(f"{raw.last!r} is of the wrong type")


def whole_rows(source: Source, raw: Row) -> list[dict | Skip]:
    """What a raw row is converted to, with the turns that it holds apart and its own mark of a bad answer."""
    rows = source.convert(raw)
    rows = [rows] if isinstance(rows, dict) else list(rows)
    if raw.unread:
        turns = [turn for row in rows if isinstance(row, dict) for turn in row.get("completion", ())]
        marks = MARKS if any(turn["role"] != "text" for turn in turns) else ()
        for mark in raw.unread.intersection(marks):
            if not nothing(dict.get(raw, mark)) and not is_set(mark, raw[mark]):
                raise Skip(f"its answer is marked as bad ({mark!r})")
        opening = opening_of(raw)
        if any(opening):
            rows = [with_opening(row, *opening) if isinstance(row, dict) else row for row in rows]
    return [part for row in rows for part in (imitated(row) if isinstance(row, dict) else (row,))]


def checked(row: dict, task: str, kind: type, most_pairs: int) -> Iterator[dict | Skip]:
    try:
        for view in views(clean(row), task, kind, most_pairs):
            problem = None if isinstance(view, Skip) else problem_with(view)
            yield view if problem is None else (Skip if problem in SOUND else BadRow)(problem)
    except Skip as skip:  # of this row alone: its siblings in the same raw row go on
        yield skip


def digest(*parts: bytes) -> bytes:
    """64 bits are enough: among ten million rows the odds of any two sharing them are one in 370,000."""
    return hashlib.blake2b(b"\x1d".join(parts), digest_size=8).digest()


def as_bytes(messages) -> bytes:
    return "\x1e".join([f"{message['role']}\x1f{message['content']}" for message in messages]).encode()


def hashes(row: dict, answers: list[str]) -> dict[str, bytes]:
    """Hashes of the whole row, of its prompt, and of the conversation's opening.

    Rows that share an opening stay on one side of the split: the later turns of one dialogue, the branches of one tree
    and the pairs of one prompt all do. A text without a prompt is its own.
    """
    prompt = as_bytes(row["prompt"])
    whole = digest(prompt, *(as_bytes(row[column]) for column in answers))
    turns = row["prompt"] + row[answers[0]] if answers else row["prompt"]
    opening = next((message["content"].encode() for message in turns if message["role"] == "user"), None)
    return {
        "row_hash": whole,
        "prompt_hash": digest(prompt) if prompt else whole,
        "opening_hash": digest(opening) if opening else whole,
    }


def schema_of(task: str):
    """The columns of a task's prepared rows: its own, what is known of them, and their hashes."""
    import pyarrow as pa

    message = pa.struct([("role", pa.string()), ("content", pa.string())])
    columns = [(name, pa.string() if name == "reference" else pa.list_(message)) for name in COLUMNS[task]]
    columns += [("margin", pa.float64())] if task == "preference" else []
    columns += [("score", pa.float64()), ("dataset", pa.string()), ("held_out", pa.bool_())]
    return pa.schema(columns + [(name, pa.uint64()) for name in ("row_hash", "prompt_hash", "opening_hash")])


def record_batch(rows: list[dict], schema):
    import pyarrow as pa

    def column(field):
        values = [row.get(field.name) for row in rows]
        if pa.types.is_uint64(field.type):
            return pa.array([int.from_bytes(value, "little") for value in values], field.type)
        if not pa.types.is_list(field.type):
            return pa.array(values, field.type)
        # (rows, turns): three flat arrays are many times faster than a list of dicts
        ends = pa.array([0, *itertools.accumulate(map(len, values))], pa.int32())
        message, turns = field.type.value_type, [turn for messages in values for turn in messages]
        flat = [pa.array([turn[key.name] for turn in turns], key.type) for key in message]
        return pa.ListArray.from_arrays(ends, pa.StructArray.from_arrays(flat, fields=list(message)))

    return pa.RecordBatch.from_arrays([column(field) for field in schema], schema=schema)


def write_rows(source: Source, task: str, open_rows, path: Path) -> dict:
    """Writes the usable rows as an Arrow stream; returns how many were read, kept and dropped, and where first."""
    import pyarrow as pa
    from tqdm import tqdm

    schema, texts = schema_of(task), [column for column in COLUMNS[task] if column != "reference"]
    counts, dropped, first, unused = Counter(read=0, extra=0, rows=0, bad=0), Counter(), {}, set()
    batch, characters, content = [], 0, hashlib.sha256()
    step = 0.5 if sys.stderr.isatty() else 30  # seconds between the bar's updates
    rows = source.regroup(open_rows()) if source.regroup else open_rows()
    bar = tqdm(rows, desc=f"preparing {source.label}", unit=" rows", delay=3, mininterval=step, leave=False)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        for place, raw in bar:
            counts["read"] += 1
            made = 0
            for row in usable_rows(source, task, raw, unused):
                made += 1
                if isinstance(row, Skip):
                    dropped[str(row)] += 1
                    counts["bad"] += isinstance(row, BadRow)
                    first.setdefault(str(row), place)
                    continue
                row |= hashes(row, texts[1:]) | {"dataset": source.label}
                row["held_out"] = raw.get("held_out") is True and "held_out" not in source.ignored
                content.update(row["row_hash"])
                counts["rows"] += 1
                batch.append(row)
                characters += sum(len(turn["content"]) for column in texts for turn in row[column])
                if len(batch) == BATCH_ROWS or characters > BATCH_CHARACTERS:
                    writer.write_batch(record_batch(batch, schema))
                    batch, characters = [], 0
            if not made:
                dropped[f"nothing for {task}"] += 1
            counts["extra"] += max(made - 1, 0)
        writer.write_batch(record_batch(batch, schema))
    found = {"dropped": dict(dropped), "first": first, "unused": sorted(unused)}
    return dict(counts) | found | {"fingerprint": content.hexdigest()[:16]}
