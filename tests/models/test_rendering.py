"""Which tokens a model sees and which of them carry loss: `pytest tests/models/test_rendering.py`."""

import pytest
from datasets import Dataset

from rlhf.models.loading import load_tokenizer, read_tokenizer
from rlhf.models.rendering import (
    Unrenderable,
    encode_demonstration,
    encode_demonstrations,
    encode_dialogue,
    encode_preference,
    encode_prompt,
    install_template,
    render,
    shorten_prompt,
    token_ids,
)
from rlhf.models.tokenizing import tokenize
from rlhf.user_error import UserError

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


@pytest.fixture(scope="module")
def tokenizer(base):
    return load_tokenizer(base)


def test_plain_template_uses_role_markers_and_no_new_token(tokenizer, base):
    text = render(
        tokenizer, [{"role": "system", "content": "Be kind."}, user(" Hi "), assistant("Ho."), user("And?")], True
    )
    assert (
        text == "### System: Be kind.\n### Human: Hi\n### Assistant: Ho.<|endoftext|>\n### Human: And?\n### Assistant:"
    )
    assert len(tokenizer) == len(read_tokenizer(base))


def test_prompt_tokens_are_a_prefix_and_each_answer_ends_with_a_trained_eos(tokenizer):
    prompt_ids, completion_ids, labels = encode_dialogue(
        tokenizer, [user("Hi")], [assistant("Ho."), user("And then?"), assistant("No more.")]
    )
    assert prompt_ids == token_ids(tokenizer, [user("Hi")], add_generation_prompt=True)
    trained = [label for label in labels if label != -100]
    assert tokenizer.decode(trained) == " Ho.<|endoftext|> No more.<|endoftext|>"
    assert completion_ids[-1] == tokenizer.eos_token_id and labels[-1] == tokenizer.eos_token_id
    assert tokenizer.decode([i for i, label in zip(completion_ids, labels, strict=True) if label == -100]) == (
        "\n### Human: And then?\n### Assistant:"
    )


def test_padding_is_no_stop_token_and_not_in_any_text(tokenizer):
    """The pad token is the byte 0xff, which UTF-8 never uses; its name, the letter, must not be mistaken for it."""
    assert tokenizer.pad_token_id not in (tokenizer.eos_token_id, tokenizer.bos_token_id)
    for text in ("L'Haÿ-les-Roses", "café ÿÿ", "naïveÿ"):
        assert tokenizer.pad_token_id not in tokenizer(text)["input_ids"], text


def test_template_and_padding_survive_saving(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    again = (
        load_tokenizer(str(tmp_path))
        if (tmp_path / "config.json").exists()
        else type(tokenizer).from_pretrained(tmp_path)
    )
    assert again.chat_template == tokenizer.chat_template and again.pad_token_id == tokenizer.pad_token_id
    assert again("Haÿ ÿ")["input_ids"] == tokenizer("Haÿ ÿ")["input_ids"]


def test_chatml_on_a_base_makes_its_end_of_turn_the_eos(base):
    tokenizer = read_tokenizer(base)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    install_template(tokenizer)
    assert tokenizer.eos_token == "<|im_end|>"
    _, completion_ids, labels = encode_dialogue(tokenizer, [user("Hi")], [assistant("Ho.")])
    assert tokenizer.decode(completion_ids) == "Ho.<|im_end|>" and labels == completion_ids


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{% for m in messages %}{{ m['content'] }}\n{% endfor %}", "end-of-turn"),
        ("{# nothing #}", "end-of-turn"),
        (
            "{{ messages | length }}{% for m in messages %}{{ m['content'] + eos_token }}{% endfor %}",
            "cannot be trained on",
        ),
    ],
)
def test_untrainable_templates_are_refused(base, template, says):
    tokenizer = read_tokenizer(base)
    tokenizer.chat_template = template
    with pytest.raises(UserError, match=says):
        install_template(tokenizer)


def test_long_prompts_lose_their_oldest_turns_first_then_their_start(tokenizer):
    system = {"role": "system", "content": "Be kind."}
    prompt = [system, user("first " * 20), assistant("one"), user("second " * 20 + "the end?")]
    whole = len(token_ids(tokenizer, prompt, add_generation_prompt=True))
    assert shorten_prompt(tokenizer, prompt, whole) == prompt
    without_oldest = shorten_prompt(tokenizer, prompt, whole - 1)
    assert without_oldest == [system, prompt[-1]]
    cut = shorten_prompt(tokenizer, prompt, 70)
    assert cut[0] == system and cut[1]["content"].endswith("the end?") and len(cut) == 2
    length = len(token_ids(tokenizer, cut, add_generation_prompt=True))
    assert 65 <= length <= 70  # as much as fits, not less
    with pytest.raises(Unrenderable, match="no room"):
        shorten_prompt(tokenizer, prompt, 5)


def test_the_answer_is_never_cut(tokenizer):
    row = {"prompt": [user("why " * 100)], "completion": [assistant("Because of the wind.")]}
    encoded = encode_demonstration(row, tokenizer, max_length=48)
    assert len(encoded["input_ids"]) == len(encoded["labels"]) <= 48 and encoded["shortened"]
    assert tokenizer.decode([t for t in encoded["labels"] if t != -100]) == " Because of the wind.<|endoftext|>"
    pair = {"prompt": row["prompt"], "chosen": [assistant("Because of the wind.")], "rejected": [assistant("No.")]}
    encoded = encode_preference(pair, tokenizer, max_length=48)
    assert len(encoded["prompt_ids"]) + len(encoded["chosen_ids"]) <= 48
    assert tokenizer.decode(encoded["chosen_ids"]) == " Because of the wind.<|endoftext|>"


def test_a_long_dialogue_ends_after_the_last_answer_that_fits(tokenizer):
    row = {"prompt": [user("Hi")], "completion": [assistant("Ho."), user("And?"), assistant("so on " * 50)]}
    encoded = encode_demonstration(row, tokenizer, max_length=48)
    assert (
        tokenizer.decode([t for t in encoded["labels"] if t != -100]) == " Ho.<|endoftext|>" and encoded["shortened"]
    )


def test_rows_that_cannot_be_trained_on_are_dropped_and_counted(tokenizer):
    rows = Dataset.from_list(
        [
            {"prompt": [user("Hi")], "completion": [assistant("Ho.")]},
            {"prompt": [user("Hi")], "completion": [assistant("so on " * 100)]},
        ]
    )
    kept, counts = tokenize(rows, encode_demonstrations, tokenizer, max_length=48)
    assert len(kept) == counts["kept"] == 1 and counts["dropped"] == {"answer alone is longer than max_length": 1}
    with pytest.raises(UserError, match="no row of train"):
        tokenize(rows.select([1]), encode_demonstrations, tokenizer, max_length=48)


def test_equal_answers_are_no_preference(tokenizer):
    row = {"prompt": [user("Hi")], "chosen": [assistant("Ho.")], "rejected": [assistant(" Ho. ")]}
    with pytest.raises(Unrenderable, match="same tokens"):
        encode_preference(row, tokenizer, max_length=48)


def test_prompts_end_where_the_answer_begins(tokenizer):
    encoded = encode_prompt({"prompt": [user("Hi there")]}, tokenizer, max_prompt_length=32)
    assert (
        tokenizer.decode(encoded["prompt_ids"]) == "### Human: Hi there\n### Assistant:" and not encoded["shortened"]
    )
