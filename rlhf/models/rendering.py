"""From messages to tokens: the chat template, which tokens carry the loss, and what happens when a row is too long.

One place for all stages, so that SFT, reward model, DPO and PPO see the same tokens for the same text. Two things hold
by construction, and are checked on each row: tokens(prompt) is a prefix of tokens(prompt + answer), so that generation
starts where training did; and an answer ends with its end-of-turn token (EOS), which carries loss, so that the model
learns to stop.
"""

from collections import Counter

from rlhf.user_error import UserError

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


class Unrenderable(Exception):
    """A row that cannot be trained on; the message is the reason it is counted under."""


def render(tokenizer, messages: list[dict], add_generation_prompt: bool = False) -> str:
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)


def token_ids(tokenizer, messages: list[dict], add_generation_prompt: bool = False) -> list[int]:
    # the template writes the BOS where the model wants one; the tokenizer must not add a second
    return tokenizer(render(tokenizer, messages, add_generation_prompt), add_special_tokens=False)["input_ids"]


def install_template(tokenizer) -> None:
    """Give a tokenizer without chat template the plain one, and make the end-of-turn token its `eos_token`.

    A model's own template is kept and checked for being trainable.

    Raises:
        UserError: if the template does not end an answer with a special token, or if its prompt is not a prefix of
            prompt + answer.
    """
    if tokenizer.eos_token is None:
        raise UserError(
            "the tokenizer has no eos_token, so no answer could ever end; set one in tokenizer_config.json"
        )
    if tokenizer.chat_template is None:
        adds_bos = tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
        tokenizer.chat_template = ("{{ bos_token }}" if adds_bos else "") + PLAIN_TEMPLATE
    ids = tokenizer(render(tokenizer, PROBE).rstrip(), add_special_tokens=False)["input_ids"]
    if ids[-1] not in tokenizer.all_special_ids + list(tokenizer.added_tokens_decoder):
        raise UserError(
            "the chat template does not end an answer with an end-of-turn token: the model would never learn to stop\n"
            "  edit chat_template.jinja so that an assistant's message ends with eos_token"
        )
    if ids[-1] != tokenizer.eos_token_id:  # e.g. ChatML on a base model whose eos_token is <|endoftext|>
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(ids[-1])
    try:
        encode_dialogue(tokenizer, PROBE[:1], PROBE[1:])
    except Unrenderable as error:
        raise UserError(f"the chat template cannot be trained on: {error}") from error


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
                raise Unrenderable("prompt's tokens change when the answer follows")
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


def _prompt_room(max_length, max_prompt_length, answer_length):
    if answer_length >= max_length:
        raise Unrenderable("answer alone is longer than max_length")
    room = max_length - answer_length
    return room if max_prompt_length is None else min(room, max_prompt_length)


def encode_demonstration(
    row, tokenizer, max_length: int, max_prompt_length: int | None = None, completion_only: bool = True
) -> dict:
    """SFT: `input_ids` and `labels` (-100 where there is no loss), both of length <= max_length.

    A dialogue that is too long ends after the last answer that fits whole. Without `completion_only` all tokens are
    learned, the user's too.
    """
    prompt, completion = row["prompt"], row["completion"]
    prompt_ids, completion_ids, labels = encode_dialogue(tokenizer, prompt, completion)
    answers = [i for i, m in enumerate(completion) if m["role"] == "assistant"]
    while len(completion_ids) + len(prompt_ids) > max_length and len(answers) > 1:
        answers.pop()
        prompt_ids, completion_ids, labels = encode_dialogue(tokenizer, prompt, completion[: answers[-1] + 1])
    room = _prompt_room(max_length, max_prompt_length, len(completion_ids))
    shortened = len(answers) < sum(m["role"] == "assistant" for m in completion)
    if len(prompt_ids) > room:
        prompt_ids = token_ids(tokenizer, shorten_prompt(tokenizer, prompt, room), add_generation_prompt=True)
        shortened = True
    assert labels[-1] == tokenizer.eos_token_id, "the EOS of an answer must carry loss"
    input_ids = prompt_ids + completion_ids
    return {
        "input_ids": input_ids,
        "labels": [-100] * len(prompt_ids) + labels if completion_only else list(input_ids),
        "shortened": shortened,
    }


def encode_preference(row, tokenizer, max_length: int, max_prompt_length: int | None = None) -> dict:
    """Pairs: `prompt_ids`, and `chosen_ids` and `rejected_ids`, each an answer with its EOS."""
    prompt_ids, chosen_ids, _ = encode_dialogue(tokenizer, row["prompt"], row["chosen"])
    _, rejected_ids, _ = encode_dialogue(tokenizer, row["prompt"], row["rejected"])
    if chosen_ids == rejected_ids:
        raise Unrenderable("chosen and rejected are the same tokens")
    room = _prompt_room(max_length, max_prompt_length, max(len(chosen_ids), len(rejected_ids)))
    shortened = len(prompt_ids) > room
    if shortened:
        prompt_ids = token_ids(tokenizer, shorten_prompt(tokenizer, row["prompt"], room), add_generation_prompt=True)
    encoded = {
        "prompt_ids": prompt_ids,
        "chosen_ids": chosen_ids,
        "rejected_ids": rejected_ids,
        "shortened": shortened,
    }
    return encoded | ({"margin": float(row["margin"])} if row.get("margin") is not None else {})


def encode_prompt(row, tokenizer, max_prompt_length: int) -> dict:
    """PPO: `prompt_ids`, ready for the answer's first token, the `prompt` that they are, the data's `reference`."""
    prompt = shorten_prompt(tokenizer, row["prompt"], max_prompt_length)
    return {
        "prompt_ids": token_ids(tokenizer, prompt, add_generation_prompt=True),
        "prompt": prompt,
        "reference": row.get("reference") or "",
        "shortened": len(prompt) < len(row["prompt"]) or prompt[-1] != row["prompt"][-1],
    }


# What a dropped row leaves in the columns of its encoder.
EMPTY = {
    encode_demonstration: {"input_ids": [], "labels": []},
    encode_preference: {"prompt_ids": [], "chosen_ids": [], "rejected_ids": []},
    encode_prompt: {"prompt_ids": [], "prompt": [], "reference": ""},
}


def tokenize(dataset, encode, tokenizer, name: str, num_proc: int | None = None, **limits):
    """A dataset's rows through one of the encoders; rows that cannot be trained on are dropped, and all is counted.

    Returns:
        The tokenised dataset, and `{"kept": n, "shortened": n, "dropped": {reason: n}, "tokens": n,
        "tokens_of": {dataset: n}}`.
    Raises:
        UserError: if no row is left.
    """
    from accelerate import PartialState

    def encode_row(row):
        try:
            encoded, problem = encode(row, tokenizer, **limits), ""
        except Unrenderable as reason:
            encoded, problem = {**EMPTY[encode], "shortened": False}, str(reason)
            if "margin" in row and encode is encode_preference:
                encoded["margin"] = 0.0
        size = sum(len(ids) for column, ids in encoded.items() if column.endswith("ids"))
        return {**encoded, "problem": problem, "size": size, "source": row.get("dataset", name)}

    with PartialState().main_process_first():  # one process writes the cache, the others read it
        encoded = dataset.map(
            encode_row, remove_columns=dataset.column_names, num_proc=num_proc, desc=f"Tokenizing {name}"
        )
        dropped = Counter(problem for problem in encoded["problem"] if problem)
        kept = encoded.filter(lambda problem: not problem, input_columns="problem") if dropped else encoded
    if len(kept) == 0:
        reasons = ", ".join(f"{reason} ({count})" for reason, count in dropped.most_common())
        raise UserError(f"no row of {name} can be trained on: {reasons or 'it has none'}")
    tokens_of = Counter()
    for source, size in zip(kept["source"], kept["size"], strict=True):
        tokens_of[source] += size
    counts = {
        "kept": len(kept),
        "shortened": sum(kept["shortened"]),
        "dropped": dict(dropped),
        "tokens": sum(tokens_of.values()),
        "tokens_of": dict(tokens_of),
    }
    return kept.remove_columns(["problem", "shortened", "size", "source"]), counts
