"""What a row is: its four kinds, the views that a task takes of them, and what makes a row unusable.

    raw row -> kind (Demonstration, Preference, Ranking, Prompt) -> clean() -> views() -> problem_with()

Rows are conversational and carry no chat markup; the tokenizer's template renders them, later and elsewhere.
"""

import ast
import json
import math
import re
from collections.abc import Iterable, Iterator
from itertools import combinations
from typing import TypedDict, get_args, get_type_hints

Message = dict[str, str]  # {"role": "system" | "user" | "assistant", "content": text}
ASKED = "prompt|instruction|INSTRUCTION|question|user_input|query"


class Prompt(TypedDict):
    """A conversation that ends with the user's turn."""

    prompt: list[Message]


class Demonstration(Prompt):
    """The prompt's continuation, worth imitating from the completion's first turn to its last."""

    completion: list[Message]


class Preference(Prompt):
    """Two continuations of one prompt, the better one first."""

    chosen: list[Message]
    rejected: list[Message]


class Ranking(Prompt):
    """Several replies to one prompt with their ranks: 0 is the best, equal ranks are a tie, None is unranked."""

    responses: list[str]
    ranks: list[int | None]


# Each task with the kinds it can be served from, the best suited first. A row may also carry `margin` (preferences:
# how much better, in the data's own unit; 0 is a tie) and `score` (of a prompt's answers SFT takes the highest).
SERVES = {
    "sft": (Demonstration, Preference, Ranking),
    "preference": (Preference, Ranking),
    "prompt": (Prompt, Demonstration, Preference, Ranking),
}
COLUMNS = {
    "sft": ("prompt", "completion"),
    "preference": ("prompt", "chosen", "rejected"),
    "prompt": ("prompt", "reference"),
}
ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "bot", "chatgpt", "model"), "assistant"),
    "text": "text",  # no turn: a text to imitate as it stands, alone in its row
}
TOOL_ROLES = ("tool", "function", "function_call", "tool_call", "tool_response", "observation", "ipython")
MARKS = ("label", "kto_tag", "weight", "train", "trainable", "training", "loss")  # false or 0: not to be imitated


class Skip(Exception):
    """The row is sound but of no use here, for the reason given (a tie, another language)."""


class BadRow(Skip):
    """The row is broken, for the reason given; too many of them stop the run."""


def user(text: str) -> Message:
    """One turn of the user's."""
    return {"role": "user", "content": text}


def assistant(text: str) -> Message:
    """One turn of the assistant's."""
    return {"role": "assistant", "content": text}


def kinds_of(convert) -> tuple[type, ...]:
    """The kinds that a function's return annotation names: `Preference`, `list[Prompt]`, `Iterator[A | B]`..."""

    def named(annotation):
        if annotation in (Prompt, Demonstration, Preference, Ranking):
            return (annotation,)
        return tuple(kind for inner in get_args(annotation) for kind in named(inner))

    return named(get_type_hints(convert).get("return"))


def kind_of(row: dict) -> type:
    """The kind of a converted row, by its columns."""
    columns = (("completion", Demonstration), ("chosen", Preference), ("responses", Ranking))
    return next((kind for column, kind in columns if column in row), Prompt)


def kind_for(task: str, kinds: Iterable[type]) -> type | None:
    """Which of a dataset's kinds serves the task, or None."""
    return next((kind for kind in SERVES[task] if kind in kinds), None)


def parse_transcript(text: str) -> list[Message]:
    """The turns of an HH transcript ("\\n\\nHuman: ...\\n\\nAssistant: ..."); neighbours of one role become one turn.

    Only a marker at a paragraph's start opens a turn: HH's texts mention "Human:" and "Assistant:" inline too.
    """
    before, *parts = re.split(r"\n\n(Human|Assistant):", "\n\n" + text.lstrip())
    if before.strip():
        raise BadRow("not a Human/Assistant transcript")
    messages: list[Message] = []
    for speaker, content in zip(parts[::2], parts[1::2], strict=True):
        role = "user" if speaker == "Human" else "assistant"
        if messages and messages[-1]["role"] == role:
            messages[-1]["content"] += "\n\n" + content.strip()
        else:
            messages.append({"role": role, "content": content.strip()})
    return messages


def as_messages(value, role: str = "user") -> list[Message]:
    """Messages from what datasets hold: a text, an HH transcript, one message, or a list of them, as text too."""
    if isinstance(value, str):
        if value.lstrip().startswith("Human:"):
            return parse_transcript(value)
        value = written_messages(value) or value
    if isinstance(value, dict):
        value = [value]
    return [as_message(turn) for turn in value] if isinstance(value, list) else [{"role": role, "content": value}]


def written_messages(text: str) -> list[dict] | None:
    """The messages that a text holds as JSON or as Python's repr; None of any other text, JSON that answers too."""
    if not re.match(r"\s*\[\s*\{\s*['\"]|\s*\{\s*['\"](role|content|from|value)['\"]", text):
        return None
    turns = parsed(text)
    if isinstance(turns, dict) and str(turns.get("role", turns.get("from"))) in (*ROLES, *TOOL_ROLES):
        turns = [turns]
    keys = [{"role", "content"}, {"from", "value"}]
    if not isinstance(turns, list) or not all(isinstance(t, dict) and any(k <= t.keys() for k in keys) for t in turns):
        return None
    for key in (key for turn in turns for key, value in turn.items() if value not in (None, "", [], {})):
        if key not in ("role", "content", "from", "value", *MARKS):
            raise BadRow(f"a message that is written as text has {key!r}: put the list itself into the column")
    return turns


def parsed(text: str):
    """The value that a text writes down as JSON or as Python's repr, numpy's line breaks included, or None."""
    for parse in (json.loads, lambda text: ast.literal_eval(text.strip().replace("}\n {", "}, {"))):
        try:
            return parse(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
    return None


def as_message(turn) -> Message:
    """One message in OpenAI's or ShareGPT's keys; `masked` names the mark of an answer that is not to be imitated."""
    if not isinstance(turn, dict):
        raise BadRow("a message is no object with role and content")
    role, content = ("role", "content") if turn.get("role") is not None else ("from", "value")
    message = {"role": known_role(turn.get(role)), "content": turn.get(content)}
    for mark in MARKS if len(turn) > 2 else ():
        if turn.get(mark) is not None:
            answers = message["role"] == "assistant"
            if is_set(mark, turn[mark]) is not answers:
                if not answers:
                    raise BadRow(f"{mark!r} is set on a turn of the {message['role']}'s: only answers are imitated")
                message["masked"] = mark
    return message


def known_role(role) -> str:
    """Our name of a role; raises BadRow for those that are none or cannot be used."""
    known = ROLES.get(role) if isinstance(role, str) else None
    if known is None and role in TOOL_ROLES:
        raise BadRow(f"role {role!r} cannot be used: write what the tool was told and what it said into the texts")
    if known is None:
        raise BadRow(f"unknown role {str(role)[:30]!r}")
    return known


def is_set(mark: str, value) -> bool:
    """What the mark of an answer says: whether it is to be imitated."""
    known = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
    try:
        return known[str(value).strip().lower()]
    except KeyError:
        raise BadRow(f"{mark!r} is {str(value)[:20]!r}: known are true or 1, and false or 0") from None


def demonstration(messages, role: str = "user") -> Demonstration:
    """A conversation whose answers are all worth imitating: the completion starts at the first of them."""
    messages = as_messages(messages, role)
    answers = ("assistant", "text")
    first = next((i for i, turn in enumerate(messages) if ROLES.get(str(turn["role"])) in answers), len(messages))
    return {"prompt": messages[:first], "completion": messages[first:]}


def imitated(row: dict) -> Iterator[dict]:
    """A row for each run of answers to imitate; what is marked otherwise is part of the next one's prompt."""
    if "completion" not in row:
        marked = [turn["masked"] for side in ("chosen", "rejected") for turn in row.get(side, ()) if "masked" in turn]
        if marked:
            raise BadRow(f"an answer of a pair is marked by {marked[0]!r}")
        yield row
        return
    turns, start, mark, given = row["prompt"] + row["completion"], None, None, False
    for i in range(len(row["prompt"]), len(turns) + 1):
        mark = turns[i].get("masked", mark) if i < len(turns) else mark
        if i == len(turns) or "masked" in turns[i]:
            if start is not None:
                yield row | {"prompt": turns[:start], "completion": turns[start:i]}
            start, given = None, given or start is not None
        elif start is None and ROLES.get(turns[i]["role"]) in ("assistant", "text"):
            start = i
    if not given:
        yield Skip(f"its answers are marked as bad ({mark!r})") if mark else row


def clean(row: dict) -> dict:
    """The row with stripped texts and the three known role names; raises BadRow where that cannot be done."""
    for column in ("prompt", "completion", "chosen", "rejected"):
        if column in row:
            row[column] = [cleaned for message in row[column] if (cleaned := clean_message(message))]
    for column in ("margin", "score"):
        if row.get(column) is not None:
            row[column] = float(row[column])
            if not math.isfinite(row[column]):
                raise BadRow(f"{column} is not a finite number")
    if "responses" in row:
        row["responses"] = [clean_message(assistant(text))["content"] for text in a_list(row["responses"])]
        if len(row["responses"]) != len(row["ranks"]):
            raise BadRow("responses and ranks differ in number")
    if "reference" in row:
        row["reference"] = text_of(row["reference"])
    return row


def a_list(value) -> list:
    """The value if it is a list, or the list that a text writes down: a text would be taken for a list of letters."""
    value = parsed(value) if isinstance(value, str) else value
    if not isinstance(value, list):
        raise BadRow("a column that should be a list is none")
    return value


def text_of(value) -> str:
    """The text that a value is: a string, a number, or parts that are all texts."""
    if isinstance(value, list) and all(isinstance(part, dict) for part in value):
        kinds = [part.get("type") or "text" for part in value]
        other = next((kind for kind in kinds if kind not in ("text", "input_text", "output_text")), None)
        if other is not None:
            raise BadRow(f"content of type {str(other)[:30]!r} cannot be used: only text is")
        value = "".join(text_of(part.get("text")) for part in value)
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        return str(value)
    if not isinstance(value, str):
        named = "dict" if isinstance(value, dict) else type(value).__name__
        raise BadRow("a text is missing" if value is None else f"a text is not a string but {named}")
    return value


def clean_message(message: Message) -> Message | None:
    """The message with its text stripped; None for a system prompt that says nothing."""
    role, content = message["role"], message["content"]
    role = ROLES[role] if type(role) is str and role in ROLES else known_role(role)
    if type(content) is not str:
        content = text_of(content or "" if role == "system" else content)
    content = content.strip()
    if not content:
        if role == "system":
            return None
        raise BadRow("empty message")
    try:
        content.encode()
    except UnicodeEncodeError as error:  # half of a surrogate pair: legal in JSON, but no UTF-8 exists for it
        raise BadRow("broken Unicode") from error
    return {"role": role, "content": content}


def views(row: dict, task: str, kind: type, most_pairs: int) -> Iterator[dict | Skip]:
    """The rows that `task` takes from a clean row of `kind`: one, or at most so many pairs of a ranking."""
    prompt, ranked = row["prompt"], []
    if kind is Ranking:
        ranked = [(rank, text) for rank, text in zip(row["ranks"], row["responses"], strict=True) if rank is not None]
        ranked.sort(key=lambda reply: reply[0])
    if task == "preference" and kind is Ranking:
        # the clearest differences first, so that the cap takes the doubtful ones
        pairs = sorted(combinations(ranked, 2), key=lambda pair: pair[0][0] - pair[1][0])
        pairs = [(better, worse) for (high, better), (low, worse) in pairs if high < low]
        if not pairs:
            yield Skip("tie" if len(ranked) > 1 else "fewer than two ranked replies")
        for better, worse in pairs[:most_pairs]:
            yield {"prompt": prompt, "chosen": [assistant(better)], "rejected": [assistant(worse)]}
        for _ in pairs[most_pairs:]:
            yield Skip(f"more than {most_pairs} pairs of a prompt")
        return
    if task == "preference":
        yield {column: row[column] for column in ("prompt", "chosen", "rejected", "margin") if column in row}
        return
    if kind is Ranking:
        answer = [assistant(ranked[0][1])] if ranked else []
    else:
        answer = row.get("completion") or row.get("chosen") or []
    if task == "sft":
        while answer and answer[-1]["role"] not in ("assistant", "text"):
            answer = answer[:-1]
        yield {"prompt": prompt, "completion": answer, "score": row.get("score")}
        return
    # prompts: everything up to the last turn of the user's; what the data answered there is the reference
    thread = prompt + answer
    if thread and thread[-1]["role"] == "text":
        raise Skip("a text serves sft alone")
    reference = thread[-1]["content"] if thread and thread[-1]["role"] == "assistant" else ""
    yield {
        "prompt": thread[:-1] if reference else thread,
        "reference": reference or row.get("reference", ""),
        "score": row.get("score"),
    }


def problem_with(row: dict) -> str | None:
    """Why a clean row of a task cannot be used, in a few words, or None."""
    prompt = row["prompt"]
    answers = [row[column] for column in ("completion", "chosen", "rejected") if column in row]
    if any(turn["role"] == "text" for turn in row.get("completion", ())):
        return None if len(prompt + row["completion"]) == 1 else "a text stands beside turns"
    if any(not answer or answer[-1]["role"] != "assistant" for answer in answers):
        return "answer does not end with the assistant"
    starts = "completion" in row and all(turn["role"] == "system" for turn in prompt)  # with the assistant's turn
    if not starts and (not prompt or prompt[-1]["role"] != "user"):
        return "prompt does not end with the user"
    if not all(alternates(prompt + answer) for answer in answers or [[]]):
        return "roles out of order"
    if "chosen" in row:
        if row["chosen"] == row["rejected"]:
            return "identical answers"
        if row.get("margin") is not None and row["margin"] <= 0:
            return "tie" if row["margin"] == 0 else "rejected has the higher score"
    return None


# problems of a pair that speak of its annotators, not of a broken file
SOUND = ("identical answers", "tie", "rejected has the higher score")


def alternates(messages: list[Message]) -> bool:
    """Whether user and assistant take turns, whoever begins, after at most one system message."""
    last = "first"
    for turn in messages:
        role = turn["role"]
        if role == last or role == "text" or (role == "system" and last != "first"):
            return False
        last = role
    return True
