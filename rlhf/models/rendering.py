"""From messages to tokens: which tokens carry the loss, and what happens when a row is too long or cannot be rendered.

One place for all stages, so that SFT, reward model, DPO and PPO see the same tokens for the same text. Two things hold
by construction, and are checked on each row: tokens(prompt) is a prefix of tokens(prompt + answer), so that generation
starts where training did; and an answer ends with its end-of-turn token (EOS), which carries loss, so that the model
learns to stop.
"""

from rlhf.models.templates import (
    PLAIN_TEMPLATE,
    PROBE,
    Unrenderable,
    adds_bos,
    check_texts,
    render,
    shorten_prompt,
    text_ids,
    token_ids,
    with_system_prompt,
)
from rlhf.user_error import UserError

NO_SYSTEM = (
    "  give plain text; a model without a system turn needs it at the start of each row's prompt, or a turn for it in"
    " its chat_template.jinja"
)
SAME = "chosen and rejected are the same tokens"  # speaks of a pair's annotators, not of a broken row


def install_template(tokenizer) -> None:
    """Give a tokenizer without chat template the plain one, and make the end-of-turn token its `eos_token`.

    A model's own template is kept and checked for being trainable.

    Raises:
        UserError: if the template refuses a question and its answer, does not end an answer with a special token, or
            has a prompt that is not a prefix of prompt + answer.
    """
    if tokenizer.eos_token is None:
        raise UserError(
            "the tokenizer has no eos_token, so no answer could ever end; set one in tokenizer_config.json"
        )
    if tokenizer.chat_template is None:
        tokenizer.chat_template = ("{{ bos_token }}" if adds_bos(tokenizer) else "") + PLAIN_TEMPLATE
    try:
        ids = tokenizer(render(tokenizer, PROBE).rstrip(), add_special_tokens=False)["input_ids"]
        if not ids or ids[-1] not in tokenizer.all_special_ids + list(tokenizer.added_tokens_decoder):
            raise UserError(
                "the chat template does not end an answer with an end-of-turn token: the model would never learn to "
                "stop\n  edit chat_template.jinja so that an assistant's message ends with eos_token"
            )
        if ids[-1] != tokenizer.eos_token_id:  # e.g. ChatML on a base model whose eos_token is <|endoftext|>
            tokenizer.eos_token = tokenizer.convert_ids_to_tokens(ids[-1])
        encode_dialogue(tokenizer, PROBE[:1], PROBE[1:])
    except Unrenderable as error:
        raise UserError(f"the chat template cannot be trained on: {error}") from error


def set_system_prompt(tokenizer, text: str) -> None:
    """Give conversations without a system turn this one, by the template; an empty text takes an earlier one out.

    Raises:
        UserError: if it holds chat markup, or the template has no system turn.
    """
    text = text.strip()
    try:
        check_texts(tokenizer, [{"role": "text", "content": text}])
        tokenizer.chat_template = with_system_prompt(tokenizer.chat_template, text)
        shown = text in render(tokenizer, PROBE)
    except Unrenderable as error:
        raise UserError(f"--system_prompt: {error}\n{NO_SYSTEM}") from error
    if not shown:
        raise UserError(f"--system_prompt: the model's chat template leaves it out\n{NO_SYSTEM}")


class PromptChanges(Unrenderable):
    """A template that writes what stands already otherwise when more follows."""


def encode_dialogue(tokenizer, prompt: list[dict], completion: list[dict]) -> tuple[list[int], list[int], list[int]]:
    """Tokens of a prompt and of the turns after it: (prompt_ids, completion_ids, completion_labels).

    Labels are the ids of the assistant's turns in the completion, each with its EOS, and -100 on the turns between;
    the completion ends with the last answer's EOS.

    Raises:
        Unrenderable: if the prompt's tokens are not a prefix of the whole, or an answer does not end with EOS.
    """
    prompt_ids = token_ids(tokenizer, prompt, add_generation_prompt=True)
    ids, labels, messages = list(prompt_ids), [], list(prompt)
    for message in completion:
        if message["role"] == "assistant":
            before = token_ids(tokenizer, messages, add_generation_prompt=True)
            after = token_ids(tokenizer, [*messages, message])
            if before[: len(ids)] != ids or after[: len(before)] != before:
                raise PromptChanges("prompt's tokens change when the answer follows")
            answer = after[len(before) :]
            if tokenizer.eos_token_id not in answer:
                raise Unrenderable("answer does not end with the end-of-turn token")
            answer = answer[: len(answer) - answer[::-1].index(tokenizer.eos_token_id)]
            labels += [-100] * (len(before) - len(ids)) + answer
            ids = before + answer
        messages.append(message)
    if not labels:
        raise Unrenderable("no answer to learn from")
    return prompt_ids, ids[len(prompt_ids) :], labels


def _fit_prompt(tokenizer, prompt, prompt_ids, answer_length, max_length, max_prompt_length) -> tuple[list[int], bool]:
    """The prompt's tokens within the room beside the answer, and whether it was shortened for that."""
    if answer_length >= max_length:
        raise Unrenderable("answer alone is longer than max_length")
    room = max_length - answer_length
    if max_prompt_length is not None:
        room = min(room, max_prompt_length)
    if len(prompt_ids) <= room:
        return prompt_ids, False
    return token_ids(tokenizer, shorten_prompt(tokenizer, prompt, room), add_generation_prompt=True), True


def encode_demonstration(
    row, tokenizer, max_length: int, max_prompt_length: int | None = None, completion_only: bool = True
) -> dict:
    """SFT: `input_ids` and `labels` (-100 where there is no loss), both of length <= max_length.

    A dialogue that is too long ends after the last answer that fits whole. Without `completion_only` all tokens are
    learned, the user's too.
    """
    prompt, completion = row["prompt"], row["completion"]
    check_texts(tokenizer, prompt + completion)
    prompt_ids, completion_ids, labels = encode_dialogue(tokenizer, prompt, completion)
    answers = [i for i, m in enumerate(completion) if m["role"] == "assistant"]
    while len(completion_ids) + len(prompt_ids) > max_length and len(answers) > 1:
        answers.pop()
        prompt_ids, completion_ids, labels = encode_dialogue(tokenizer, prompt, completion[: answers[-1] + 1])
    limits = max_length, max_prompt_length
    prompt_ids, shortened = _fit_prompt(tokenizer, prompt, prompt_ids, len(completion_ids), *limits)
    assert labels[-1] == tokenizer.eos_token_id, "the EOS of an answer must carry loss"
    input_ids = prompt_ids + completion_ids
    return {
        "input_ids": input_ids,
        "labels": [-100] * len(prompt_ids) + labels if completion_only else list(input_ids),
        "shortened": shortened or len(answers) < sum(m["role"] == "assistant" for m in completion),
    }


def encode_text(text: str, tokenizer, max_length: int) -> list[dict]:
    """SFT on a plain text, without a template: its tokens as they stand, and the EOS at its end.

    What is longer than max_length comes in even pieces, so that nothing is left out. Each starts with the BOS that the
    tokenizer gives a text, which carries no loss.
    """
    check_texts(tokenizer, [{"role": "text", "content": text}])
    ids = [*text_ids(tokenizer, text), tokenizer.eos_token_id]
    bos = [tokenizer.bos_token_id] if adds_bos(tokenizer) else []
    pieces = -(-len(ids) // (max_length - len(bos)))
    size = -(-len(ids) // pieces)
    parts = [ids[start : start + size] for start in range(0, len(ids), size)]
    return [{"input_ids": bos + part, "labels": [-100] * len(bos) + part, "shortened": False} for part in parts]


def encode_demonstrations(row, tokenizer, **limits) -> list[dict]:
    """The examples of one row of SFT: one, or the pieces of a long text, or as many as a dialogue has answers.

    The last is for templates that write earlier turns otherwise when later ones follow (Qwen3's leaves out what was
    thought): each answer follows its own prompt then, as it would at inference, and alone carries loss.

    Raises:
        Unrenderable: if there is none, with the first answer's reason.
    """
    prompt, completion = row["prompt"], row["completion"]
    if completion[0]["role"] == "text":
        return encode_text(completion[0]["content"], tokenizer, limits["max_length"])
    answers = [i for i, message in enumerate(completion) if message["role"] == "assistant"]
    try:
        return [encode_demonstration(row, tokenizer, **limits)]
    except PromptChanges:
        if len(answers) == 1:
            raise
    examples, reasons = [], []
    for i in answers:
        one = {"prompt": prompt + completion[:i], "completion": completion[i : i + 1]}
        try:
            examples.append(encode_demonstration(one, tokenizer, **limits))
        except Unrenderable as reason:
            reasons.append(reason)
    if not examples:
        raise reasons[0]
    return [example | {"shortened": example["shortened"] or bool(reasons)} for example in examples]


def encode_preference(row, tokenizer, max_length: int, max_prompt_length: int | None = None) -> dict:
    """Pairs: `prompt_ids`, and `chosen_ids` and `rejected_ids`, which end with an answer and its EOS.

    `chosen_mask` and `rejected_mask` are 1 on the answers' tokens and 0 on what the user says between them. The turns
    that both sides share are the prompt's.
    """
    prompt, chosen, rejected = row["prompt"], row["chosen"], row["rejected"]
    check_texts(tokenizer, prompt + chosen + rejected)
    while len(chosen) > 2 and len(rejected) > 2 and chosen[:2] == rejected[:2]:
        prompt, chosen, rejected = prompt + chosen[:2], chosen[2:], rejected[2:]
    prompt_ids, chosen_ids, chosen_labels = encode_dialogue(tokenizer, prompt, chosen)
    _, rejected_ids, rejected_labels = encode_dialogue(tokenizer, prompt, rejected)
    if chosen_ids == rejected_ids:
        raise Unrenderable(SAME)
    longest, limits = max(len(chosen_ids), len(rejected_ids)), (max_length, max_prompt_length)
    prompt_ids, shortened = _fit_prompt(tokenizer, prompt, prompt_ids, longest, *limits)
    encoded = {
        "prompt_ids": prompt_ids,
        "chosen_ids": chosen_ids,
        "rejected_ids": rejected_ids,
        "chosen_mask": [int(label != -100) for label in chosen_labels],
        "rejected_mask": [int(label != -100) for label in rejected_labels],
        "shortened": shortened,
    }
    return encoded | ({"margin": float(row["margin"])} if row.get("margin") is not None else {})


def encode_prompt(row, tokenizer, max_prompt_length: int) -> dict:
    """PPO: `prompt_ids`, ready for the answer's first token, the `prompt` that they are, the data's `reference`."""
    check_texts(tokenizer, row["prompt"])
    prompt = shorten_prompt(tokenizer, row["prompt"], max_prompt_length)
    return {
        "prompt_ids": token_ids(tokenizer, prompt, add_generation_prompt=True),
        "prompt": prompt,
        "reference": row.get("reference") or "",
        "shortened": prompt != row["prompt"],
    }
