"""Messages out of what datasets hold: texts, transcripts, lists in several keys, and lists stored as text."""

import ast
import contextlib
import io
import json
import math
import re
import tokenize

Message = dict[str, str]  # {"role": "system" | "user" | "assistant", "content": text}
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
        # HH's own opening; or one that was stripped of it, with an answer to tell it from a text about some Human
        if value.startswith("\n\nHuman:") or value.lstrip().startswith("Human:") and "\n\nAssistant:" in value:
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


def tokens_of(text: str) -> list:
    """Python's tokens of a text but for line breaks, as far as it is Python."""
    found = []
    with contextlib.suppress(tokenize.TokenError, SyntaxError):
        for token in tokenize.generate_tokens(io.StringIO(text.strip()).readline):
            if token.type != tokenize.NL:
                found.append(token)
    return found


def parsed(text: str):
    """The value that a text writes down as JSON or as Python's repr, numpy's line breaks included, or None."""
    if re.search(r"""(['"])\s+['"]""", text) and text.lstrip().startswith("["):
        quoted = [token.type == tokenize.STRING for token in tokens_of(text)]
        if any(map(all, zip(quoted, quoted[1:], strict=False))):  # Python would join them
            raise BadRow("a list without commas between its texts, as numpy prints one: write it as JSON")
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
        if turn.get(mark) not in (None, ""):
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
