"""The key sets that rows of local files and unregistered hub datasets come in, told apart by their first row.

A layout is a function decorated with the keys that it needs ("a|b": either); the first that fits is taken, and its
return annotation says what it serves. `regroup` is for layouts whose rows only make sense together.
"""

import json
from collections.abc import Callable, Iterator
from typing import NamedTuple

from rlhf.data.columns import APART, nothing, only_asks
from rlhf.data.messages import (
    ROLES,
    BadRow,
    Skip,
    a_list,
    as_messages,
    assistant,
    parse_transcript,
    text_of,
    user,
    written_messages,
)
from rlhf.data.rows import ASKED, Demonstration, Preference, Prompt, Ranking, demonstration
from rlhf.data.trees import KEYS, tree_rows, trees_of
from rlhf.data.votes import UNUSED, by_pair, voted_pair
from rlhf.user_error import UserError

LAYOUTS: list["Layout"] = []
ANSWERED = "completion|response|RESPONSE|output|answer|label"  # beside another, `label` is the mark of an answer
TALK = "messages|conversations"
ASKED_OR_TALK = f"{ASKED}|{TALK}"
BETTER = "chosen|chosen_response|response_j|chosen_messages"
WORSE = "rejected|rejected_response|response_k|rejected_messages"
NO_INPUT = ("", "no input", "noinput", "<noinput>", "n/a", "none")


class Layout(NamedTuple):
    keys: tuple[str, ...]
    convert: Callable
    regroup: Callable | None
    when: Callable | None
    unused: frozenset[str]


def layout(*keys: str, regroup=None, when=None, unused: str = ""):
    """Registers a layout; `unused` names the keys that its genuine rows have and that it has no use for."""

    def register(convert):
        LAYOUTS.append(Layout(keys, convert, regroup, when, frozenset(unused.split())))
        return convert

    return register


def detect(row: dict, place: str) -> Layout:
    """The layout of the row, or a UserError that lists its keys and the usual ones."""
    with_value = [key for key, value in row.items() if not nothing(value)]  # tables have all columns in all rows
    for found in with_value, [key for key, value in row.items() if value is not None]:  # such as an empty prompt
        for candidate in LAYOUTS:
            if all(any(key in found for key in keys.split("|")) for keys in candidate.keys):
                if candidate.when is None or candidate.when(row):
                    return candidate
    found = ", ".join(map(repr, with_value)) or "none"
    raise UserError(
        f"{place}: its keys ({found}) fit no known layout\n"
        "known are prompt + completion; messages; text; prompt + chosen + rejected; prompt + responses; prompt\n"
        "others are in docs/data.md, under Local files; rename the keys, or do without by --ignore_columns"
    )


def has(row, keys: str) -> bool:
    """Whether one of the keys has a value; asking does not count as reading."""
    return any(key in row and not nothing(dict.get(row, key)) for key in keys.split("|"))


def pick(row, keys: str):
    """The value of the first of the keys that has one."""
    names = keys.split("|")
    for key in names:
        if key in row and not nothing(dict.get(row, key)):
            return row[key]
    for key in names:  # an empty one, such as the prompt of a conversation that starts with the assistant
        if row.get(key) is not None:
            return row[key]
    raise KeyError(names[0])


def question(row) -> list[dict]:
    """The messages that ask: a text, a transcript or a list, with what stands in `input` or `context` below it."""
    messages = as_messages(pick(row, ASKED))
    if len(messages) > 1 and not messages[-1]["content"]:
        messages = messages[:-1]  # a transcript that ends with "Assistant:", where the answer is to follow
    for key in ("input", "context"):
        extra = text_of(row[key]) if has(row, key) else ""
        if extra.strip().lower() not in NO_INPUT:
            messages = [*messages[:-1], user(f"{text_of(messages[-1]['content']).strip()}\n\n{extra}")]
    return messages


@layout("prompt", when=lambda row: isinstance(row["prompt"], dict), unused=KEYS)
def oasst_tree(row, subset: str = "") -> Iterator[Demonstration | Ranking | Prompt]:
    """A message tree of Open Assistant's export."""
    if row.get("tree_state", "ready_for_export") != "ready_for_export":
        raise Skip("tree not ready for export")
    return tree_rows(row["prompt"], subset)


@layout("text", "role", "replies", unused=KEYS)
def oasst_root(row, subset: str = "") -> Iterator[Demonstration | Ranking | Prompt]:
    """A message tree without its envelope."""
    return tree_rows(row, subset)


layout("message_id", "text", "role", regroup=trees_of, unused=KEYS)(oasst_tree)  # flat messages, already gathered


def ranks_of(scores: list[float | None]) -> list[int | None]:
    """The rank of each score, 0 for the highest; equal scores share one, and what has no score has no rank."""
    ladder = sorted({score for score in scores if score is not None}, reverse=True)
    return [None if score is None else ladder.index(score) for score in scores]


def numbers_of(scores) -> list[float | None]:
    return [None if nothing(score) else float(score) for score in a_list(scores)]


def by_prompt(rows) -> Iterator[tuple[str, object]]:
    """Scored answers gathered by their prompt, in the order of first appearance; holds the texts in memory."""
    groups: dict[str, tuple[str, dict]] = {}
    for place, row in rows:
        try:
            numbers_of([row["score"]])
            apart = {key: row[key] for key in APART if has(row, key)}
            asked = json.dumps([row["user_input"], row.get("input"), row.get("context"), apart], default=str)
            group = groups.setdefault(asked, (place, {"answers": []} | apart))[1]
            group["answers"].append({key: value for key, value in row.items() if key not in APART})
        except (KeyError, TypeError, ValueError):
            yield place, row if isinstance(row, BadRow) else BadRow("no score that is a number")
    yield from groups.values()


@layout("user_input", "completion", "score", regroup=by_prompt)
def scored_answers(row) -> Ranking:
    """Answers with scores; those of one `user_input` are ranked against each other."""
    answers = row["answers"]
    return {
        "prompt": [question(answer) for answer in answers][0],  # of all, so that all count as read
        "responses": [answer["completion"] for answer in answers],
        "ranks": ranks_of(numbers_of([answer["score"] for answer in answers])),
    }


@layout("prompt", "pos|pos_reply", "neg_replies")
def one_against_many(row) -> Ranking:
    """A good reply and a list of bad ones, which are not compared with each other."""
    bad = a_list(row["neg_replies"])
    return {"prompt": question(row), "responses": [pick(row, "pos|pos_reply"), *bad], "ranks": [0] + [1] * len(bad)}


@layout("prefixes", "responses")
def prefixes_responses(row) -> Ranking:
    """Alternating turns and replies to the last of them, the best first; `augmented` ones are worse than all these."""
    prompt = [(user, assistant)[i % 2](text) for i, text in enumerate(a_list(row["prefixes"]))]
    good, bad = a_list(row["responses"]), a_list(row["augmented"]) if has(row, "augmented") else []
    return {"prompt": prompt, "responses": good + bad, "ranks": [*range(len(good)), *[len(good)] * len(bad)]}


@layout(ASKED, "responses")
def ranked_responses(row) -> Ranking:
    """Replies from best to worst, or with `ranks` (0 is the best), `scores`, or a `ranking` such as "A<B<C=D<E"."""
    responses = row["responses"]
    if isinstance(responses, dict):
        names, responses = list(responses), [responses[name] for name in responses]  # {"A": text, "B": text, ...}
    else:
        responses = a_list(responses)
        names = [chr(ord("A") + i) for i in range(len(responses))]
    if has(row, "ranking"):
        ranks = ranks_in(row["ranking"])
        ranks = [ranks.get(name) for name in names]
    elif has(row, "scores"):
        ranks = ranks_of(numbers_of(row["scores"]))
    else:
        ranks = numbers_of(row["ranks"]) if has(row, "ranks") else list(range(len(responses)))
    return {"prompt": question(row), "responses": responses, "ranks": ranks}


def ranks_in(notation: str) -> dict[str, int]:
    """{"E": 0, "C": 1, "D": 1, ...} of "A<B<C=D<E": "<" points at the worse reply, "=" is a tie."""
    if ("<" in notation) == (">" in notation):
        raise BadRow("a ranking uses '<' or '>', and not both")
    sign = "<" if "<" in notation else ">"
    groups = [[name.strip() for name in group.split("=")] for group in notation.split(sign)]
    if len(names := [name for group in groups for name in group]) > len(set(names)):
        raise BadRow("a ranking names an answer twice")
    return {name: rank for rank, group in enumerate(groups[::-1] if sign == "<" else groups) for name in group}


@layout("info", "summaries", "choice", unused="id site policy note worker batch split extra")
def summary_pair(row) -> Preference:
    """OpenAI's comparisons of two summaries; `choice` is the place of the better one."""
    info, choice, texts = row["info"], row["choice"], [summary["text"] for summary in a_list(row["summaries"])]
    if choice not in (0, 1) or isinstance(choice, bool) or len(texts) != 2:
        raise BadRow("'choice' is not the place, 0 or 1, of one of two summaries")
    choice = int(choice)
    fields = ("SUBREDDIT: r/", "subreddit"), ("TITLE: ", "title"), ("POST: ", "post"), ("ARTICLE: ", "article")
    post = "".join(f"{name}{info[key]}\n" for name, key in fields if has(info, key))
    chosen, rejected = assistant(texts[choice]), assistant(texts[1 - choice])
    return {"prompt": [user(post + "TL;DR:")], "chosen": [chosen], "rejected": [rejected]}


layout("prompt", "left", "right", "vote", regroup=by_pair, unused=UNUSED)(voted_pair)  # votes of people


@layout(BETTER, WORSE)
def comparison(row) -> Preference:
    """Two answers, the better one in `chosen`: texts, HH transcripts or message lists, with a prompt or holding it."""
    better, worse = pick(row, BETTER), pick(row, WORSE)
    dialogues = isinstance(better, str) and better.startswith("\n\nHuman:")
    if dialogues or (isinstance(better, str) and not has(row, ASKED_OR_TALK) and written_messages(better) is None):
        pair = transcript_pair(better, worse)
    else:
        pair = pair_of(row, as_messages(better, "assistant"), as_messages(worse, "assistant"))
    if has(row, "score_chosen") and has(row, "score_rejected"):
        pair["margin"] = float(row["score_chosen"]) - float(row["score_rejected"])
    elif has(row, "margin"):
        pair["margin"] = float(row["margin"])
    return pair


def pair_of(row, chosen: list[dict], rejected: list[dict]) -> Preference:
    """A pair of answers to the row's prompt, or of dialogues that hold it; a prompt beside those is the same one."""
    asked = question(row) if has(row, ASKED) else as_messages(pick(row, TALK)) if has(row, TALK) else None
    if asked and ROLES.get(str(chosen[0]["role"])) == "assistant":
        return {"prompt": asked, "chosen": chosen, "rejected": rejected}
    prompt, texts = chosen[:-1], [text_of(turn["content"] or "").strip() for turn in chosen]
    if prompt != rejected[:-1]:
        raise BadRow("chosen and rejected answer different prompts")
    if asked and not all(text_of(turn["content"] or "").strip() in texts for turn in asked):
        raise BadRow("the prompt is none of the turns that chosen holds")
    return {"prompt": prompt, "chosen": chosen[-1:], "rejected": rejected[-1:]}


def transcript_pair(chosen: str, rejected: str) -> Preference:
    """HH's form: two whole dialogues. Each is cut at its own last answer, for their lengths may differ before it."""
    sides = [dialogue.rpartition("\n\nAssistant:") for dialogue in (chosen, rejected)]
    if not all(marker for _, marker, _ in sides):
        raise BadRow("not a Human/Assistant transcript")
    prompts, _, answers = zip(*sides, strict=True)
    prompt = parse_transcript(prompts[0])
    if prompts[0] != prompts[1] and parse_transcript(prompts[1]) != prompt:
        raise BadRow("chosen and rejected answer different prompts")
    if any("\n\nHuman:" in answer for answer in answers):
        raise BadRow("answer does not end with the assistant")
    return {"prompt": prompt, "chosen": [assistant(answers[0])], "rejected": [assistant(answers[1])]}


@layout(f"{TALK}|{ANSWERED}", "rejected_response|rejected_messages")
def answer_and_worse(row) -> Preference:
    """A conversation, or a question and its answer, and a worse answer to the same."""
    if has(row, TALK):
        talk = as_messages(pick(row, TALK))
        prompt, chosen = talk[:-1], talk[-1:]
    else:
        prompt, chosen = question(row), as_messages(pick(row, ANSWERED), "assistant")
    rejected = as_messages(pick(row, "rejected_response|rejected_messages"), "assistant")
    if len(rejected) > 1 and rejected[:-1] != prompt:
        raise BadRow("chosen and rejected answer different prompts")
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected[-1:]}


@layout(TALK)
def conversation(row) -> Demonstration:
    """A conversation whose answers are all worth imitating (OpenAI's keys, or ShareGPT's `from` and `value`)."""
    return demonstration(pick(row, TALK))


@layout("instruction", "instances")
def seed_task(row) -> list[Demonstration]:
    """Self-Instruct's seed tasks: one instruction with several inputs and outputs."""
    ask = row["instruction"]
    return [
        instruction({"instruction": ask, "input": instance.get("input"), "output": instance["output"]})
        for instance in a_list(row["instances"])
    ]


@layout(ASKED, ANSWERED)
def instruction(row) -> Demonstration:
    """A question, below it `input` or `context` if there is one, and the answer."""
    answer = pick(row, ANSWERED)
    if not isinstance(answer, str) and not has(row, ANSWERED.removesuffix("|label")):
        raise BadRow("'label' is a mark, and no column holds the answer")
    return {"prompt": question(row), "completion": as_messages(answer, "assistant")}


@layout("text")
def plain_text(row) -> Demonstration:
    """A text to imitate as it stands, with no turn around it, unless it is a transcript ("Human:", "### Human:")."""
    text = row["text"]
    if text.lstrip().startswith("### Human:"):
        text = text.replace("### Human:", "\n\nHuman:").replace("### Assistant:", "\n\nAssistant:")
    return demonstration(text, "text")


@layout(ASKED, when=only_asks)
def prompt_only(row) -> Prompt:
    """A prompt, perhaps with the `reference` that the data answered."""
    return {"prompt": question(row), "reference": row["reference"] if has(row, "reference") else ""}
