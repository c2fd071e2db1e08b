"""Chat templates: messages to text to tokens, and what a template may not do.

A template is a program that came with a model. It may refuse a conversation, which costs that row, and it may run
for ever, which ends here. A row's own text never becomes one of the tokenizer's control tokens: where it holds the
name of one (HTML's <s>, an <|im_end|>), that is encoded as plain letters, so that no row has to go for a word. A row
that was rendered already is refused: it would be trained on as a turn within a turn.
"""

import json
import os
import re
import signal
import threading
from contextlib import contextmanager
from functools import lru_cache, partial
from os.path import commonprefix

from jinja2 import TemplateError
from transformers.utils.chat_template_utils import encode_marked_chat, mark_control_tokens

from rlhf.user_error import UserError

try:
    import resource
except ImportError:  # Windows, which has no alarm either
    resource = None

# For tokenizers without a template (gpt2, opt, pythia): plain-text markers, no new tokens. The marker before an answer
# ends without a space and the answer starts with one, so that its first token is the one that would be generated. The
# `{% generation %}` marks tell other libraries which tokens an assistant wrote.
PLAIN_TEMPLATE = (
    "{% for message in messages %}"
    "{% if not loop.first %}{{ '\\n' }}{% endif %}"
    "{% if message['role'] == 'assistant' %}"
    "{{ '### Assistant:' }}{% generation %}{{ ' ' + message['content'] | trim + eos_token }}{% endgeneration %}"
    "{% elif message['role'] == 'system' %}{{ '### System: ' + message['content'] | trim }}"
    "{% else %}{{ '### Human: ' + message['content'] | trim }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\n### Assistant:' }}{% endif %}"
)
PROBE = [{"role": "user", "content": "Is it late?"}, {"role": "assistant", "content": "Not yet."}]
# A byte that UTF-8 never uses, as byte-level vocabularies (gpt2's) write it: no text has its token (but one with this
# letter alone as a word, which is encoded as letters are).
UNUSED_BYTE = "ÿ"
# Before a template, on a line of its own: the system turn of conversations that have none. It goes where the tokenizer
# goes, so later stages, evaluation, merged models and other programs have it too.
SYSTEM = "{% if messages[0]['role'] != 'system' %}{% set messages = [{'role': 'system', 'content': ", "}] + messages"
SECONDS, BYTES = 10, 2**32  # a template's, for one conversation; real ones take a millisecond and some kilobytes
RAISED = (TemplateError, ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
STATM = "/proc/self/statm"


class Unrenderable(Exception):
    """A row that cannot be trained on; the message is the reason it is counted under."""


def _too_slow(*_):
    raise TimeoutError


@contextmanager
def bounds():
    """Inside, the process may take SECONDS and BYTES more, where its system can say so (a thread has no alarm)."""
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return
    handler, timer = signal.signal(signal.SIGALRM, _too_slow), signal.setitimer(signal.ITIMER_REAL, SECONDS)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    try:
        if os.path.exists(STATM):
            with open(STATM) as file:
                most = int(file.read().split()[0]) * resource.getpagesize() + BYTES
            resource.setrlimit(resource.RLIMIT_AS, (most if soft < 0 else min(most, soft), hard))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.setitimer(signal.ITIMER_REAL, *timer)
        signal.signal(signal.SIGALRM, handler)


def split_template(template: str) -> tuple[str | None, str]:
    """(the system prompt that `with_system_prompt` put before a template, or None; the template without it)."""
    if not template.startswith(SYSTEM[0]):
        return None, template
    first, _, own = template.partition("\n")
    return json.loads(first[len(SYSTEM[0]) : first.rindex(SYSTEM[1])]), own


def with_system_prompt(template: str, text: str) -> str:
    own = split_template(template)[1]  # the text's own line breaks are escaped
    return f"{SYSTEM[0]}{json.dumps(text, ensure_ascii=False)}{SYSTEM[1]} %}}{{% endif %}}\n{own}" if text else own


def _apply(tokenizer, messages, add_generation_prompt=False, template=None) -> str:
    options = {"add_generation_prompt": add_generation_prompt, "chat_template": template}
    try:
        with bounds():
            text = tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except (TimeoutError, MemoryError) as error:
        limit = f"{SECONDS} s" if isinstance(error, TimeoutError) else f"{BYTES / 2**30:g} GiB"
        raise UserError(f"the chat template takes more than {limit} for a conversation: mend or replace it") from error
    except RAISED as error:
        raise Unrenderable(f"chat template: {' '.join(str(error).split())[:80]}") from error
    if len(text) > 10**6 + 100 * sum(len(message["content"]) for message in messages):
        raise UserError(f"the chat template makes {len(text):,} characters of one conversation: mend or replace it")
    return text


def render(tokenizer, messages: list[dict], add_generation_prompt: bool = False) -> str:
    """The text of a conversation; of none at all, and with the generation prompt, what stands before its first answer.

    Raises:
        Unrenderable: with the template's own reason, if it refuses the conversation.
        UserError: if it does not end.
    """
    if messages:
        try:
            return _apply(tokenizer, messages, add_generation_prompt)
        except Unrenderable:
            if messages[0]["role"] != "assistant":
                raise
        # it wants the user first: what it makes after a user's turn, without that turn
        whole, opening = _apply(tokenizer, [PROBE[0], *messages], add_generation_prompt), _apply(tokenizer, PROBE[:1])
        if not whole.startswith(opening) or split_template(tokenizer.chat_template)[0]:  # which the opening would take
            raise Unrenderable("chat template: has no conversation that starts with the assistant")
        bos = tokenizer.bos_token or ""
        return (bos if bos and opening.startswith(bos) else "") + whole[len(opening) :]
    text = render(tokenizer, PROBE[1:])
    header, head = _headers(tokenizer)[1], text[: text.index(PROBE[1]["content"])]
    end = head.rfind(header.strip()) if header.strip() else -1
    return head if end < 0 else head[: end + len(header.lstrip())]


def _headers(tokenizer) -> tuple[str, str]:
    """What a template writes before a user's text and at the start of an answer."""
    first, second = PROBE[0]["content"], "And there?"
    apply = partial(_apply, tokenizer, template=split_template(tokenizer.chat_template)[1])
    text = apply([*PROBE, {"role": "user", "content": second}])
    answer, ended = PROBE[1]["content"], apply(PROBE)
    if not all(said in text for said in (first, answer, second)):
        raise Unrenderable("chat template: it leaves out what is said")
    between, end = text.partition(answer)[2].partition(second)[0], ended.partition(answer)[2]
    between, before = between[len(commonprefix([between, end])) :], text.partition(first)[0]
    closed, asked = (apply(PROBE[:1], asks).partition(first)[2] for asks in (False, True))
    return commonprefix([before[::-1], between[::-1]])[::-1], asked[len(commonprefix([closed, asked])) :]


@lru_cache
def _patterns(tokenizer, template: str, eos_token: str, pad_token: str | None) -> tuple[re.Pattern, re.Pattern]:
    """What of a message's text would be a control token, and what is the markup of a turn.

    Cached by what decides it. `<think>` and the like, in a vocabulary but not special, are an answer's own words.
    """
    added, headers = tokenizer.added_tokens_decoder.values(), _headers(tokenizer)
    control = [t.content for t in added if t.special or t.content.strip() and t.content in headers[0]]
    control = sorted({*control, *tokenizer.all_special_tokens}, key=len, reverse=True)
    # "User:" is a word, unless it opens a line; a text that ends with the end of a turn was made for another program
    marks = [header.strip().split("\n")[0] for header in headers if header.strip()]
    marks = [("(?m:^)" if mark.endswith(":") else "") + re.escape(mark) for mark in marks]
    marks.append(re.escape(eos_token) + r"\s*\Z")
    return re.compile("|".join(map(re.escape, control))), re.compile("|".join(marks))


def patterns(tokenizer) -> tuple[re.Pattern, re.Pattern]:
    return _patterns(tokenizer, tokenizer.chat_template, tokenizer.eos_token, tokenizer.pad_token)


def check_texts(tokenizer, messages: list[dict]) -> None:
    """Refuse a row that holds the markup of turns already; a plain text, which has none around it, any control token.

    Raises:
        Unrenderable: naming what was found.
    """
    control, markup = patterns(tokenizer)
    for message in messages:
        found = markup.search(message["content"])
        if message["role"] == "text" and not found:
            found = next((m for m in control.finditer(message["content"]) if m[0] != UNUSED_BYTE), None)
        if found:
            raise Unrenderable(f"a text holds {found[0].strip()!r}, which is chat markup")


def token_ids(tokenizer, messages: list[dict], add_generation_prompt: bool = False) -> list[int]:
    """The tokens of a rendered conversation. The template writes the BOS where the model wants one."""
    control, _ = patterns(tokenizer)
    if any(control.search(message["content"]) for message in messages):
        marked = render(tokenizer, mark_control_tokens(messages, control), add_generation_prompt)
        return _encode_marked(tokenizer, marked)
    return tokenizer(render(tokenizer, messages, add_generation_prompt), add_special_tokens=False)["input_ids"]


def text_ids(tokenizer, text: str) -> list[int]:
    """The tokens of a plain text, none of them a control token."""
    return _encode_marked(tokenizer, mark_control_tokens(text, patterns(tokenizer)[0]))


def _encode_marked(tokenizer, marked: str) -> list[int]:
    try:
        return encode_marked_chat(tokenizer, marked)
    except ValueError as error:  # a vocabulary that makes the control token of its letters too
        raise Unrenderable(f"control token in a text: {error}") from error


def adds_bos(tokenizer) -> bool:
    """Whether a text's tokens start with the BOS, where no template writes it."""
    return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id


def shorten_prompt(tokenizer, prompt: list[dict], max_tokens: int) -> list[dict]:
    """The prompt within max_tokens: first without its oldest turns, then without the start of its last message.

    The system message, the template's headers and the end of the question stay.

    Raises:
        Unrenderable: if not even an empty question would fit.
    """

    def fits(messages):
        return len(token_ids(tokenizer, messages, add_generation_prompt=True)) <= max_tokens

    if fits(prompt):
        return prompt
    system, turns = [m for m in prompt if m["role"] == "system"], [m for m in prompt if m["role"] != "system"]
    if not turns:
        raise Unrenderable("no room for the prompt beside the answer")
    while len(turns) > 1:
        turns = turns[1:]
        while turns[0]["role"] == "assistant" and len(turns) > 1:  # a dialogue starts with the user
            turns = turns[1:]
        if fits(system + turns):
            return system + turns
    text = turns[0]["content"]
    too_much, enough = 0, len(text)  # characters to cut: bisect for the fewest
    while enough - too_much > 1:
        middle = (too_much + enough) // 2
        if fits([*system, {**turns[0], "content": text[middle:]}]):
            enough = middle
        else:
            too_much = middle
    if enough == len(text):
        raise Unrenderable("no room for the prompt beside the answer")
    return [*system, {**turns[0], "content": text[enough:]}]
