"""Open Assistant's message trees: flat messages gathered into trees, and the rows that a tree gives.

As in Open Assistant's own loader, messages that are deleted, were rejected by the reviewers or come from a model are
left out with all that hangs below them, and counted.
"""

import math
from collections.abc import Iterator

from rlhf.data.messages import BadRow, Skip, is_set
from rlhf.data.rows import Demonstration, Prompt, Ranking
from rlhf.user_error import UserError

# a message's keys: those that are read here, and those that say nothing about what to learn
KEYS = (
    "message_id parent_id user_id created_date text role lang review_count review_result deleted rank synthetic "
    "model_name detoxify message_tree_id tree_state emojis labels events replies"
)
LEFT_OUT = (("deleted", "deleted", True), ("rejected", "review_result", False), ("synthetic", "synthetic", True))
KEPT = ("text", "role", "lang", "rank", "deleted", "review_result", "synthetic")


def trees_of(rows) -> Iterator[tuple[str, object]]:
    """Open Assistant's flat messages as trees, in the order of their roots; holds the messages in memory."""
    nodes, roots, known = {}, [], set(KEYS.split())
    for place, row in rows:
        try:
            hash((row["message_id"], row.get("parent_id")))  # a TypeError where an id is a list
            node = {key: value for key, value in row.items() if key in KEPT or key not in known}
            state = row.get("tree_state") or "ready_for_export"
            if row["message_id"] in nodes:
                yield place, BadRow("a 'message_id' that another message has")
            else:
                nodes[row["message_id"]] = (node, row.get("parent_id") or None, state, place)
        except (AttributeError, KeyError, TypeError):
            yield place, row if isinstance(row, BadRow) else BadRow("no usable 'message_id'")
    for node, parent, state, place in nodes.values():
        if parent is None:
            roots.append((place, {"tree_state": state, "prompt": node}))
        elif parent in nodes:
            nodes[parent][0].setdefault("replies", []).append(node)
        else:
            yield place, BadRow("the parent message is missing")
    reached, stack = set(), [tree["prompt"] for _, tree in roots]
    while stack:
        reached.add(id(node := stack.pop()))
        stack += node.get("replies", [])
    for node, parent, _, place in nodes.values():
        if parent in nodes and id(node) not in reached:
            yield place, BadRow("its tree has no root that is there")
    yield from roots


def left_out(node) -> list[Skip]:
    """Where a message is not to be learnt from, a Skip for it and for each below it."""
    for reason, mark, bad in LEFT_OUT:
        if node.get(mark) not in (None, "") and is_set(mark, node[mark]) is bad:
            count, stack = 0, [node]
            while stack:
                count += 1
                stack += stack.pop().get("replies") or []
            return [Skip(f"{reason} message, or below one")] * count
    return []


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
    if skips := left_out(root):
        yield from skips
        return
    stack = [(root, [], 0, True)]  # node, the turns before it, how many of those are demonstrated, among the best?
    while stack:
        node, before, done, best = stack.pop()
        path = [*before, {"role": node["role"], "content": node["text"]}]
        replies = []
        for reply in node.get("replies") or []:
            skips = left_out(reply)
            yield from skips
            if not skips:
                replies.append(reply)
        asks = node["role"] in ("prompter", "user")
        if asks:
            replies.sort(key=lambda reply: math.inf if reply.get("rank") is None else float(reply["rank"]))
            yield {"prompt": path, "reference": replies[0]["text"] if replies else ""}
            ranked = [reply for reply in replies if reply.get("rank") is not None]
            if len(ranked) > 1:
                texts, ranks = [reply["text"] for reply in ranked], [float(reply["rank"]) for reply in ranked]
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
