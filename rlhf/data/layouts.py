"""The key sets that rows of local files and unregistered hub datasets come in, told apart by their first row.

A layout is a function decorated with the keys that it needs ("a|b": either); the first that fits is taken, and its
return annotation says what it serves. `regroup` is for layouts whose rows only make sense together.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

from rlhf.data.rows import (
    ROLES,
    BadRow,
    Demonstration,
    Preference,
    Prompt,
    Ranking,
    Skip,
    a_list,
    as_messages,
    assistant,
    demonstration,
    parse_transcript,
    user,
)
from rlhf.user_error import UserError

LAYOUTS: list["Layout"] = []
ASKED = "prompt|instruction|INSTRUCTION|question|user_input|query"
ANSWERED = "completion|response|RESPONSE|output|label|answer"
NO_INPUT = ("", "no input", "noinput", "<noinput>", "n/a", "none")


class Layout(NamedTuple):
    keys: tuple[str, ...]
    convert: Callable
    regroup: Callable | None
    when: Callable | None


def layout(*keys: str, regroup=None, when=None):
    def register(convert):
        LAYOUTS.append(Layout(keys, convert, regroup, when))
        return convert

    return register


def detect(row: dict, place: str) -> Layout:
    """The layout of the row, or a UserError that lists its keys and those that are known."""
    found = [key for key, value in row.items() if value is not None]  # tables have all columns in all rows
    for candidate in LAYOUTS:
        if all(any(key in found for key in keys.split("|")) for keys in candidate.keys):
            if candidate.when is None or candidate.when(row):
                return candidate
    known = "; ".join(" + ".join(entry.keys) for entry in LAYOUTS if entry.when is None)
    found = ", ".join(map(repr, found)) or "none"
    raise UserError(
        f"{place}: its keys ({found}) fit no known layout\nknown are {known}\nrename the keys to one of these"
    )


def pick(row, keys: str):
    """The value of the first of the keys that the row has."""
    for key in keys.split("|"):
        if row.get(key) is not None:
            return row[key]
    raise KeyError(keys.split("|")[0])


def question(row) -> list[dict]:
    """The messages that ask: a text, a transcript or a list, with what stands in `input` or `context` below it."""
    messages = as_messages(pick(row, ASKED))
    if len(messages) > 1 and not messages[-1]["content"]:
        messages = messages[:-1]  # a transcript that ends with "Assistant:", where the answer is to follow
    extra = row.get("input") or row.get("context") or ""
    if not isinstance(extra, str):
        raise BadRow(f"a text is not a string but {type(extra).__name__}")
    if extra.strip().lower() not in NO_INPUT:
        messages = [*messages[:-1], user(f"{messages[-1]['content'].strip()}\n\n{extra}")]
    return messages


@layout("prompt", when=lambda row: isinstance(row["prompt"], dict))
def oasst_tree(row, subset: str = "") -> Iterator[Demonstration | Ranking | Prompt]:
    """A message tree of Open Assistant's export."""
    if row.get("tree_state", "ready_for_export") != "ready_for_export":
        raise Skip("tree not ready for export")
    return tree_rows(row["prompt"], subset)


@layout("text", "role", "replies")
def oasst_root(row, subset: str = "") -> Iterator[Demonstration | Ranking | Prompt]:
    """A message tree without its envelope."""
    return tree_rows(row, subset)


def trees_of(rows) -> Iterator[tuple[str, object]]:
    """Open Assistant's flat messages as trees, in the order of their roots; holds the messages in memory."""
    nodes, roots = {}, []
    for place, row in rows:
        try:
            hash((row["message_id"], row.get("parent_id")))  # a TypeError where an id is a list
            node = {key: row.get(key) for key in ("text", "role", "lang", "rank", "deleted", "review_result")}
            node |= {"parent": row.get("parent_id"), "state": row.get("tree_state"), "replies": [], "place": place}
            nodes[row["message_id"]] = node
        except (AttributeError, KeyError, TypeError):
            yield place, row if isinstance(row, BadRow) else BadRow("no usable 'message_id'")
    for node in nodes.values():
        if node["parent"] is None:
            roots.append(node)
        elif node["parent"] in nodes:
            nodes[node["parent"]]["replies"].append(node)
        else:
            yield node["place"], BadRow("the parent message is missing")
    for root in roots:
        yield root["place"], {"tree_state": root["state"] or "ready_for_export", "prompt": root}


@layout("message_id", "text", "role", regroup=trees_of)
def oasst_messages(row, subset: str = "") -> Iterator[Demonstration | Ranking | Prompt]:
    """Open Assistant's flat messages, already gathered into a tree."""
    return oasst_tree(row, subset)


def tree_rows(root, subset: str = "") -> Iterator[Demonstration | Ranking | Prompt]:
    """All rows of a message tree. `subset`: languages and how many of the best replies to imitate, as in "en+de+top2".

    Every turn of the user's gives a prompt, every one with two or more ranked replies a ranking. The threads to
    imitate follow the best replies (rank 0 is the best), and an answer that several threads share is demonstrated in
    the first of them only: in the others it is part of the prompt.
    """
    options = [option for option in subset.split("+") if option]
    tops = [option[3:] for option in options if option.startswith("top")]
    languages = [option for option in options if not option.startswith("top")]
    if len(tops) > 1 or not all(top.isdigit() and int(top) for top in tops):
        raise UserError(f"@{subset}: give languages and at most one topN, as in oasst1@en+top2")
    top_k = int(tops[0]) if tops else 1
    if languages and root.get("lang") not in languages:
        raise Skip("another language")
    stack = [(root, [], 0, True)]  # node, the turns before it, how many of those are demonstrated, among the best?
    while stack:
        node, before, done, best = stack.pop()
        path = [*before, {"role": node["role"], "content": node["text"]}]
        replies = [
            reply
            for reply in node.get("replies") or []
            if not reply.get("deleted") and reply.get("review_result") is not False
        ]
        asks = node["role"] in ("prompter", "user")
        if asks:
            replies.sort(key=lambda reply: math.inf if reply.get("rank") is None else reply["rank"])
            yield {"prompt": path, "reference": replies[0]["text"] if replies else ""}
            ranked = [reply for reply in replies if reply.get("rank") is not None]
            if len(ranked) > 1:
                texts, ranks = [reply["text"] for reply in ranked], [reply["rank"] for reply in ranked]
                yield {"prompt": path, "responses": texts, "ranks": ranks}
        if best and not replies:
            fresh = [i for i, turn in enumerate(path) if i >= done and turn["role"] == "assistant"]
            if fresh:
                yield {"prompt": path[: fresh[0]], "completion": path[fresh[0] :]}
        branches = [
            (reply, path, done if i == 0 else len(path), best and (not asks or i < top_k))
            for i, reply in enumerate(replies)
        ]
        stack.extend(reversed(branches))


def ranks_of(scores: list[float]) -> list[int]:
    """The rank of each score, 0 for the highest; equal scores share one."""
    ladder = sorted(set(scores), reverse=True)
    return [ladder.index(score) for score in scores]


def by_prompt(rows) -> Iterator[tuple[str, object]]:
    """Scored answers gathered by their prompt, in the order of first appearance; holds the texts in memory."""
    groups: dict[str, dict] = {}
    for place, row in rows:
        try:
            score = float(row["score"])
            group = groups.setdefault(row["user_input"], {"place": place, "responses": [], "scores": []})
            group["responses"].append(row["completion"])
            group["scores"].append(score)
        except (KeyError, TypeError, ValueError):
            yield place, row if isinstance(row, BadRow) else BadRow("no score that is a number")
    for prompt, group in groups.items():
        yield group["place"], {"user_input": prompt, **group}


@layout("user_input", "completion", "score", regroup=by_prompt)
def scored_answers(row) -> Ranking:
    """Answers with scores; those of one `user_input` are ranked against each other."""
    return {"prompt": question(row), "responses": row["responses"], "ranks": ranks_of(row["scores"])}


@layout("prompt", "pos|pos_reply", "neg_replies")
def one_against_many(row) -> list[Preference]:
    """A good reply and a list of bad ones; `history` holds the earlier [question, answer] pairs."""
    messages = [turn for asked, answered in row.get("history") or [] for turn in (user(asked), assistant(answered))]
    messages, good = [*messages, user(row["prompt"])], [assistant(pick(row, "pos|pos_reply"))]
    return [{"prompt": messages, "chosen": good, "rejected": [assistant(bad)]} for bad in a_list(row["neg_replies"])]


@layout("prefixes", "responses")
def prefixes_responses(row) -> Ranking:
    """Alternating turns and replies to the last of them, the best reply first."""
    prompt = [(user, assistant)[i % 2](text) for i, text in enumerate(a_list(row["prefixes"]))]
    return {"prompt": prompt, "responses": row["responses"], "ranks": list(range(len(row["responses"])))}


@layout(ASKED, "responses")
def ranked_responses(row) -> Ranking:
    """Replies from best to worst, or with `ranks` (0 is the best), `scores`, or a `ranking` such as "A<B<C=D<E"."""
    responses = row["responses"]
    names = [chr(ord("A") + i) for i in range(len(responses))]
    if isinstance(responses, dict):
        names, responses = list(responses), list(responses.values())  # {"A": text, "B": text, ...}
    if row.get("ranking"):
        ranks = ranks_in(row["ranking"])
        ranks = [ranks.get(name) for name in names]
    elif row.get("scores"):
        ranks = ranks_of([float(score) for score in row["scores"]])
    else:
        ranks = row.get("ranks") or list(range(len(responses)))
    return {"prompt": question(row), "responses": responses, "ranks": ranks}


def ranks_in(notation: str) -> dict[str, int]:
    """{"E": 0, "C": 1, "D": 1, ...} of "A<B<C=D<E": "<" points at the worse reply, "=" is a tie."""
    if ("<" in notation) == (">" in notation):
        raise BadRow("a ranking uses '<' or '>', and not both")
    sign = "<" if "<" in notation else ">"
    groups = [[name.strip() for name in group.split("=")] for group in notation.split(sign)]
    return {name: rank for rank, group in enumerate(groups[::-1] if sign == "<" else groups) for name in group}


@layout("chosen", "rejected")
def comparison(row) -> Preference:
    """Two answers, the better one in `chosen`: texts, HH transcripts or message lists, with a prompt or holding it."""
    asked = any(key in row for key in ASKED.split("|"))
    if isinstance(row["chosen"], str) and (not asked or row["chosen"].startswith("\n\nHuman:")):
        pair = transcript_pair(row)
    else:
        chosen, rejected = as_messages(row["chosen"], "assistant"), as_messages(row["rejected"], "assistant")
        if asked and ROLES.get(chosen[0]["role"]) == "assistant":
            pair = {"prompt": question(row), "chosen": chosen, "rejected": rejected}
        elif chosen[:-1] == rejected[:-1]:
            pair = {"prompt": chosen[:-1], "chosen": chosen[-1:], "rejected": rejected[-1:]}
        else:
            raise BadRow("chosen and rejected answer different prompts")
    if "score_chosen" in row and "score_rejected" in row:
        pair["margin"] = float(row["score_chosen"]) - float(row["score_rejected"])
    elif row.get("margin") is not None:
        pair["margin"] = float(row["margin"])
    return pair


def transcript_pair(row) -> Preference:
    """HH's form: two whole dialogues. Each is cut at its own last answer, for their lengths may differ before it."""
    sides = [row[side].rpartition("\n\nAssistant:") for side in ("chosen", "rejected")]
    if not all(marker for _, marker, _ in sides):
        raise BadRow("not a Human/Assistant transcript")
    prompts, _, answers = zip(*sides, strict=True)
    prompt = parse_transcript(prompts[0])
    if prompts[0] != prompts[1] and parse_transcript(prompts[1]) != prompt:
        raise BadRow("chosen and rejected answer different prompts")
    if any("\n\nHuman:" in answer for answer in answers):
        raise BadRow("answer does not end with the assistant")
    return {"prompt": prompt, "chosen": [assistant(answers[0])], "rejected": [assistant(answers[1])]}


@layout("messages|conversations")
def conversation(row) -> Demonstration:
    """A conversation whose answers are all worth imitating (OpenAI's keys, or ShareGPT's `from` and `value`)."""
    return demonstration(as_messages(pick(row, "messages|conversations")))


@layout("instruction", "instances")
def seed_task(row) -> list[Demonstration]:
    """Self-Instruct's seed tasks: one instruction with several inputs and outputs."""
    instances = [{"instruction": row["instruction"], **instance} for instance in row["instances"]]
    return [instruction(instance) for instance in instances]


@layout(ASKED, ANSWERED)
def instruction(row) -> Demonstration:
    """A question, below it `input` or `context` if there is one, and the answer."""
    return {"prompt": question(row), "completion": as_messages(pick(row, ANSWERED), "assistant")}


@layout("text")
def plain_text(row) -> Demonstration:
    """A text to imitate as it is, without a prompt, unless it is a transcript (Human/Assistant, "### Human:")."""
    text = row["text"]
    if text.lstrip().startswith("### Human:"):
        text = text.replace("### Human:", "\n\nHuman:").replace("### Assistant:", "\n\nAssistant:")
    messages = as_messages(text, "assistant")
    return demonstration(messages)


@layout(ASKED)
def prompt_only(row) -> Prompt:
    """A prompt; other columns are ignored."""
    return {"prompt": question(row), "reference": row.get("reference") or ""}
