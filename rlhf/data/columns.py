"""A row is read whole or not at all: which of its columns were read, and what is done about those that were not.

A raw row and all dicts in it become `Row`s, which remember what the conversion reads. What nobody read and is not
empty is judged here, in one place: named in the table of the mix, or the row is bad.
"""

import datetime
import numbers
from collections.abc import Iterator

from rlhf.data.messages import MARKS, ROLES, BadRow, Message, a_list, as_messages, assistant, user
from rlhf.data.rows import ASKED

# ids, sources, times and the like: whatever their type, what is learnt does not hang on them
NO_MEANING = frozenset(
    "id _id uuid idx index prompt_id row_id sample_id message_id conversation_id conv_id source sources origin "
    "dataset dataset_name data_source split url urls link links author authors user_id annotator annotators worker "
    "created created_at created_utc created_date updated_at date time timestamp lang language license licence "
    "category categories domain topic topics tags task_type task_name name version hash meta metadata "
    "is_classification model model_name generator num_turns tokens token_count length".split()
)
# what an answer means without them is another thing than what it means with them
REFUSED = frozenset(
    "tools tool tool_calls tool_call tool_call_id tool_choice functions function function_call images image image_url "
    "videos video audios audio reasoning_content reasoning thinking thought thoughts refusal documents mask loss_mask "
    "masked train_on_turn train_on_input loss_scale train_mask weights sample_weight loss_weight "
    "chat_template_kwargs".split()
)
SYSTEM = ("system", "system_prompt", "system_message")
APART = (*SYSTEM, "history")  # the turns that a row of any layout may hold apart
ITS_OWN = frozenset(("role", "content", "from", "value", "type", "text"))  # the keys that make a message


class Row(dict):
    """A raw row, or a dict in it, that knows which of its keys nobody has read yet, and which was read last."""

    __slots__ = ("unread", "last")

    def __init__(self, raw: dict):
        dict.__init__(self, raw)
        self.unread, self.last = set(raw), None

    def __getitem__(self, key):
        value = dict.__getitem__(self, key)
        self.last = key
        if key in self.unread:
            self.unread.discard(key)
            if isinstance(value, (dict, list)):
                value = self[key] = watched(value)
            elif value != value:
                value = self[key] = None
        return value

    def get(self, key, default=None):
        return self[key] if key in self else default

    def __or__(self, other):
        """The row with some columns replaced; what is read of it counts as read."""
        self.update((key, watched(value)) for key, value in self.items() if isinstance(value, (dict, list)))
        merged = Row(super().__or__(other))
        merged.unread = self.unread
        return merged


def watched(value):
    """The value with a Row for every dict in it, and None for NaN, which is how a table without nulls writes it."""
    if isinstance(value, dict):
        return value if isinstance(value, Row) else Row(value)
    return [watched(item) if isinstance(item, (dict, list)) else item if item == item else None for item in value]


def nothing(value) -> bool:
    """Whether a value says nothing: a table gives every column to every row, nested ones too."""
    if isinstance(value, str):
        return not value or value.isspace()
    if isinstance(value, (dict, list)):
        return all(map(nothing, value.values() if isinstance(value, dict) else value))
    return value is None or value != value  # NaN


def left_over(value, path: str = "") -> Iterator[tuple[str, object]]:
    """What nobody has read in a Row or a list of them, as ("column" or "column.key", value)."""
    if isinstance(value, list):
        for item in value:
            if isinstance(item, (Row, list)):
                yield from left_over(item, path)
        return
    for key, inner in value.items():
        if key in value.unread:
            if not nothing(inner):
                yield path + key, inner
        elif isinstance(inner, (Row, list)):
            yield from left_over(inner, path or f"{key}.")


def unused_columns(row: Row, known: frozenset, only_asks: bool) -> list[str]:
    """The columns that the conversion did not need, for the table; a BadRow where they could change the meaning.

    `known` are the names that the dataset itself says are of no use. A row that only asks may hold no further text:
    it may be the answer, under a name that nobody knows.
    """
    names = []
    for path, value in left_over(row):
        key = path.rpartition(".")[2]
        if key in known:
            continue
        key = key.lower()
        if key in REFUSED or key in MARKS or key in APART:
            raise BadRow(f"{path!r} changes the meaning and cannot be used: convert it, or --ignore_columns {path}")
        plain = isinstance(value, (str, numbers.Number, datetime.date)) and not isinstance(value, bool)
        if key not in NO_MEANING and (not plain or (only_asks and isinstance(value, str))):
            raise BadRow(f"nothing reads {path!r}: rename it to a column that is known, or --ignore_columns {path}")
        names.append(path)
    return names


def only_asks(row: dict) -> bool:
    """Whether a first row holds nothing but a question and what belongs to one."""
    known = {*ASKED.split("|"), *APART, "input", "context", "reference", *NO_MEANING, *REFUSED}
    return all(
        key in known or nothing(value) or not isinstance(value, (str, list, dict)) for key, value in row.items()
    )


def without(value, ignored: frozenset, seen: set, path: str = ""):
    """The value without the ignored columns ("column", "column.key", or a key of any message); fills in `seen`."""
    if isinstance(value, list):
        return [without(item, ignored, seen, path) for item in value]
    if not isinstance(value, dict):
        return value
    kept = {}
    for key, inner in value.items():
        names = {path + key} if path and key in ITS_OWN else {path + key, key}
        if names & ignored:
            seen.update(names & ignored)
        else:
            kept[key] = without(inner, ignored, seen, path or f"{key}.")
    return kept


def opening_of(row: Row) -> tuple[list[Message], list[Message]]:
    """The turns that a row of any layout may hold apart: its system prompt, and its `history`."""
    given = [row[key] for key in SYSTEM if key in row.unread and not nothing(dict.get(row, key))]
    if len({str(text).strip() for text in given}) > 1:
        raise BadRow(f"{' and '.join(SYSTEM)} differ")
    turns = []
    if "history" in row.unread and not nothing(dict.get(row, "history")):
        for turn in a_list(row["history"]):
            if isinstance(turn, dict):
                turns += as_messages(turn)
            elif isinstance(turn, list) and len(turn) == 2:
                turns += [user(turn[0]), assistant(turn[1])]
            else:
                raise BadRow("'history' is no list of [question, answer]")
    return [{"role": "system", "content": text} for text in given[:1]], turns


def with_opening(row: dict, system: list[Message], history: list[Message]) -> dict:
    """The row with its prompt behind what the raw row had apart."""
    prompt = row["prompt"]
    own = [turn for turn in prompt[:1] if ROLES.get(turn["role"]) == "system" and not nothing(turn["content"])]
    if own and system and str(own[0]["content"]).strip() != str(system[0]["content"]).strip():
        raise BadRow("two system prompts that differ")
    rest = prompt[1:] if prompt and ROLES.get(prompt[0]["role"]) == "system" else prompt
    return row | {"prompt": [*(system or own), *history, *rest]}
