"""What a row is: its four kinds, the views that a task takes of them, and what makes a row unusable.

    raw row -> kind (Demonstration, Preference, Ranking, Prompt) -> clean() -> views() -> problem_with()

Rows are conversational and carry no chat markup; the tokenizer's template renders them, later and elsewhere.
"""

import math
from collections.abc import Iterable, Iterator
from itertools import combinations
from typing import TypedDict, get_args, get_type_hints

from rlhf.data.messages import ROLES, BadRow, Message, Skip, a_list, as_messages, assistant, known_role, text_of

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


def clean_message(message: Message) -> Message | None:
    """The message with its text stripped; None for a system prompt that says nothing."""
    role, content = known_role(message["role"]), message["content"]
    content = text_of(content or "" if role == "system" else content).strip()
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
