"""Reading rows from files: .jsonl .json .csv .parquet, .gz of the first three, and folders of them.

Every reader yields (place, row), the place as "file:line"; a line that is merely broken comes as a BadRow in the row's
stead, and a file that cannot be right raises UserError. No reader holds more than a few rows at a time.
"""

import codecs
import csv
import gzip
import itertools
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path

from rlhf.data.messages import BadRow
from rlhf.user_error import UserError

CHUNK = 1 << 20  # characters that the JSON reader takes at a time
# words in a file's name (or its folder's) that keep it out of training; of these, the first kind found is evaluated on
HELD_OUT = (("validation", "valid", "val", "eval", "dev"), ("test",))


def read_file(path: Path) -> Iterator[tuple[str, object]]:
    """The rows of one file with their places."""
    reader, line = file_reader(path), 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as stream:
            if reader is not parquet_rows:
                refuse_utf16(stream.peek(64)[:64], path)
            for line, row in reader(stream, path):
                if isinstance(row, str):
                    row = {"prompt": row}  # a list of bare strings is a list of prompts
                usable = isinstance(row, (dict, BadRow))
                yield f"{path}:{line}", row if usable else BadRow("not a JSON object")
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(
            f"{path}: the .gz file is cut short or damaged after line {line} ({error})\ncopy or download it again"
        ) from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error


def json_lines(stream, path) -> Iterator[tuple[int, object]]:
    """One JSON value a line; a file that is not so laid out is read as JSON over several lines."""
    rows = ((number, parse(line)) for number, line in text_lines(stream, path) if line and not line.isspace())
    head = list(itertools.islice(rows, 3))
    if head and (isinstance(head[0][1], list) or all(isinstance(row, BadRow) for _, row in head)):
        stream.seek(0)
        yield from json_values(stream, path)
    else:
        yield from head
        yield from rows


class KeyTwice(ValueError):
    pass


def each_once(pairs: list[tuple]) -> dict:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise KeyTwice(f"the key {next(key for key in keys if keys.count(key) > 1)!r} twice")
    return found


DECODER = json.JSONDecoder(object_pairs_hook=each_once)


def parse(line: str):
    """The line's JSON value, or a BadRow."""
    try:
        return DECODER.decode(line)
    except KeyTwice as error:
        return BadRow(str(error))
    except (ValueError, RecursionError):  # ValueError also covers integers of more than 4,300 digits
        return BadRow("broken JSON")


def json_values(stream, path) -> Iterator[tuple[int, object]]:
    """JSON values one after another, or the elements of one list, whatever the line breaks."""
    decode = codecs.getincrementaldecoder("utf-8-sig")().decode
    text, position, line, closed, wanted, ended = "", 0, 1, False, CHUNK, False

    def more():
        nonlocal text, position, ended
        chunk = stream.read(wanted)
        ended = not chunk
        try:
            text, position = text[position:] + decode(chunk, final=ended), 0
        except UnicodeDecodeError as error:
            place = line + text.count("\n", position) + chunk[: error.start].count(b"\n")
            raise not_utf8(path, place, chunk) from error

    more()
    in_list = text.lstrip().startswith("[")
    if in_list:
        position = text.index("[") + 1
        line += text.count("\n", 0, position)
    between = re.compile(r"[\s,\]]*" if in_list else r"\s*")
    while True:
        gap = between.match(text, position)
        line += gap.group().count("\n")
        closed = "]" in gap.group() or (closed and gap.end() == len(text))
        position = gap.end()
        if closed and position < len(text):
            raise UserError(
                f"{path}:{line}: something follows the end of the list\nmake it one list, or one row a line"
            )
        if position == len(text):
            if ended:
                break
            more()
            continue
        try:
            row, end = DECODER.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            reason = getattr(error, "msg", str(error))
            place = getattr(error, "pos", position)
            if not ended and (reason.startswith("Unterminated") or place > len(text) - 16):
                wanted *= 2  # the value goes on: a doubled step keeps one huge value from being scanned too often
                more()
                continue
            line += text.count("\n", position, place)
            raise UserError(
                f"{path}:{line}: broken JSON ({reason})\nmend it there, or write one object a line"
            ) from error
        yield line, row
        line += text.count("\n", position, end)
        position, wanted = end, CHUNK
    if in_list and not closed:
        raise UserError(f"{path}:{line}: the file ends inside its list\ncopy or download it again")


def csv_rows(stream, path) -> Iterator[tuple[int, object]]:
    """A row for each record below the header; cells are texts, whatever is written in them."""
    csv.field_size_limit(2**31 - 1)  # the default refuses a text of 131 KB
    reader = csv.DictReader((line for _, line in text_lines(stream, path)), strict=True)
    try:
        names = [name for name in reader.fieldnames or () if name]
        refuse_twice(path, names)
        for row in reader:
            row.pop("", None)  # the index that pandas writes
            if None in row or None in row.values():
                yield reader.line_num, BadRow("cells do not match the header")
            else:
                yield reader.line_num, row
    except csv.Error as error:
        raise UserError(
            f"{path}:{reader.reader.line_num}: broken CSV ({error})\nis a quotation mark left open?"
        ) from error


def refuse_twice(path, names: list[str]) -> None:
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"{path}: two columns are called {twice[0]!r}\nrename or remove one of them")


def parquet_rows(stream, path) -> Iterator[tuple[int, object]]:
    """The rows of a Parquet file; the number is the row's, counted from 1."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        number = 0
        file = pq.ParquetFile(stream)
        refuse_twice(path, file.schema_arrow.names)
        for batch in file.iter_batches(batch_size=500):
            for row in batch.to_pylist():
                number += 1
                yield number, row
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a readable Parquet file ({str(error).splitlines()[0]})") from error


READERS = {".jsonl": json_lines, ".json": json_values, ".csv": csv_rows, ".parquet": parquet_rows}


def text_lines(stream, path) -> Iterator[tuple[int, str]]:
    """The numbered lines of a UTF-8 file, without its byte order mark."""
    for number, line in enumerate(stream, start=1):
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        try:
            yield number, line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise not_utf8(path, number, line) from error


def refuse_utf16(head: bytes, path):
    """Raises a UserError for UTF-16, by its byte order mark or by the zero in every other byte."""
    marked = head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    if marked or b"\0" in head[:4]:
        name = "utf-16" if marked else "utf-16le" if head[1:2] == b"\0" else "utf-16be"
        raise UserError(f"{path}: UTF-16 text, and read is UTF-8\nconvert it with: iconv -f {name} -t utf-8")


def not_utf8(path, line: int, seen: bytes) -> UserError:
    """The error for bytes that are not UTF-8, with the encoding only if their pattern tells it."""
    if looks_like_gbk(seen):
        return UserError(
            f"{path}:{line}: not UTF-8 text, but GBK by its bytes\nconvert it with: iconv -f gbk -t utf-8"
        )
    return UserError(
        f"{path}:{line}: not UTF-8 text\nfind out which encoding it was saved in, and convert it from that one: "
        "iconv -f ENCODING -t utf-8\na wrong guess gives wrong letters without an error"
    )


def looks_like_gbk(seen: bytes) -> bool:
    """Whether all bytes above ASCII come in pairs, and those pairs are mostly the common Chinese characters."""
    runs = re.findall(rb"[\x80-\xff]+", seen)
    if not all(re.fullmatch(rb"(?:[\xa1\xa3\xb0-\xf7][\xa1-\xfe])+", run) for run in runs):
        return False
    leads = b"".join(run[::2] for run in runs)
    common = sum(lead < 0xD8 for lead in leads)  # the first level of GB 2312, and punctuation
    chinese = sum(0xC8 < lead < 0xD8 for lead in leads)  # where EUC-KR has no Korean
    return len(leads) >= 4 and common >= 0.8 * len(leads) and chinese >= len(leads) / 8


def file_reader(path: Path):
    """The function that reads files of such a name, or None."""
    packed = path.suffix == ".gz"
    reader = READERS.get(path.with_suffix("").suffix if packed else path.suffix)
    return None if packed and reader is parquet_rows else reader


def find_files(path: Path) -> dict[str, list[Path]]:
    """{"train": files, "test": files} of a file or folder; a single file is all "train", to be split by prompt."""
    formats = f"{' '.join(READERS)} and .gz of them"
    if path.is_file():
        if not file_reader(path):
            raise UserError(f"{path}: cannot tell its format by its name\nread are {formats}")
        return {"train": [path], "test": []}
    hidden = ("dataset_info", "dataset_infos", "state")  # what `datasets` writes beside the data
    files = sorted(
        file
        for file in path.rglob("*")
        if file.is_file() and file_reader(file) and file.stem not in hidden and not file.name.startswith(".")
    )
    if not files:
        raise UserError(f"{path}: a folder without data\nread are {formats}")
    words = {file: set(re.split(r"[^a-z]+", str(file.relative_to(path)).lower())) for file in files}
    held_out = [[file for file in files if words[file] & set(kind)] for kind in HELD_OUT]
    train = [file for file in files if not any(file in group for group in held_out)]
    return {"train": train, "test": next((group for group in held_out if group), [])}
