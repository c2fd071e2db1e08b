"""What a row is: its four kinds, the views that a task takes of them, and what makes a row unusable.

    raw row -> kind (Demonstration, Preference, Ranking, Prompt) -> clean() -> views() -> problem_with()

Rows are conversational and carry no chat markup; the tokenizer's template renders them, later and elsewhere.
"""

import math
import re
from collections.abc import Iterable, Iterator
from itertools import combinations
from typing import TypedDict, get_args, get_type_hints

Message = dict[str, str]  # {"role": "system" | "user" | "assistant", "content": text}
MAX_PAIRS_PER_PROMPT = 10  # a prompt with nine ranked replies has 36 pairs and would outweigh its neighbours


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
    "system": "system",
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "bot", "chatgpt", "model"), "assistant"),
}


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
    """Messages from what datasets hold: a text, an HH transcript, or a list in OpenAI's or ShareGPT's keys."""
    if isinstance(value, str):
        transcript = value.lstrip().startswith("Human:")
        return parse_transcript(value) if transcript else [{"role": role, "content": value}]
    return [
        {"role": turn["role"], "content": turn["content"]}
        if "role" in turn
        else {"role": turn["from"], "content": turn["value"]}
        for turn in value
    ]


def demonstration(messages: list[Message]) -> Demonstration:
    """A conversation whose answers are all worth imitating: the completion starts at the first of them."""
    first = next((i for i, turn in enumerate(messages) if ROLES.get(turn["role"]) == "assistant"), len(messages))
    return {"prompt": messages[:first], "completion": messages[first:]}


def clean(row: dict) -> dict:
    """The row with stripped texts and the three known role names; raises BadRow where that cannot be done."""
    for column in ("prompt", "completion", "chosen", "rejected"):
        if column in row:
            row[column] = [clean_message(message) for message in row[column]]
    for column in ("margin", "score"):
        if row.get(column) is not None:
            row[column] = float(row[column])
            if not math.isfinite(row[column]):
                raise BadRow(f"{column} is not a finite number")
    if "responses" in row:
        row["responses"] = [clean_message(assistant(text))["content"] for text in a_list(row["responses"])]
        if len(row["responses"]) != len(row["ranks"]):
            raise BadRow("responses and ranks differ in number")
    if not isinstance(row.get("reference", ""), str):
        raise BadRow("a text is not a string")
    return row


def a_list(value) -> list:
    """The value if it is a list: a text would be taken for a list of letters."""
    if not isinstance(value, list):
        raise BadRow("a column that should be a list is none")
    return value


def clean_message(message: Message) -> Message:
    role, content = message["role"], message["content"]
    if not isinstance(content, str):
        raise BadRow(
            "a text is missing" if content is None else f"a text is not a string but {type(content).__name__}"
        )
    content = content.strip()
    if not content:
        raise BadRow("empty message")
    if role not in ROLES:
        raise BadRow("unknown role")
    try:
        content.encode()
    except UnicodeEncodeError as error:  # half of a surrogate pair: legal in JSON, but no UTF-8 exists for it
        raise BadRow("broken Unicode") from error
    return {"role": ROLES[role], "content": content}


def views(row: dict, task: str, kind: type) -> Iterator[dict | Skip]:
    """The rows that `task` takes from a clean row of `kind`: one, or the pairs of a ranking."""
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
        for better, worse in pairs[:MAX_PAIRS_PER_PROMPT]:
            yield {"prompt": prompt, "chosen": [assistant(better)], "rejected": [assistant(worse)]}
        for _ in pairs[MAX_PAIRS_PER_PROMPT:]:
            yield Skip(f"more than {MAX_PAIRS_PER_PROMPT} pairs of a prompt")
        return
    if task == "preference":
        yield {column: row[column] for column in ("prompt", "chosen", "rejected", "margin") if column in row}
        return
    if kind is Ranking:
        answer = [assistant(ranked[0][1])] if ranked else []
    else:
        answer = row.get("completion") or row.get("chosen") or []
    if task == "sft":
        while answer and answer[-1]["role"] != "assistant":
            answer = answer[:-1]
        yield {"prompt": prompt, "completion": answer, "score": row.get("score")}
        return
    # prompts: everything up to the last turn of the user's; what the data answered there is the reference
    thread = prompt + answer
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
    if any(not answer or answer[-1]["role"] != "assistant" for answer in answers):
        return "answer does not end with the assistant"
    if prompt or "completion" not in row:  # a completion alone is plain text to imitate
        if not prompt or prompt[-1]["role"] != "user":
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
    """Whether user and assistant take turns, the user first, after at most one system message."""
    start = 1 if messages[0]["role"] == "system" else 0
    return all(turn["role"] == ("user", "assistant")[i % 2] for i, turn in enumerate(messages[start:]))
