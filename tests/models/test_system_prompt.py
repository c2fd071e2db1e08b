"""--system_prompt: part of the template, and so of the model: `pytest tests/models/test_system_prompt.py`."""

import json
from pathlib import Path

import pytest

import evaluate_model
import prepare_data
from rlhf.models.loading import load_tokenizer
from rlhf.models.rendering import (
    encode_demonstration,
    encode_preference,
    encode_prompt,
    install_template,
    set_system_prompt,
)
from rlhf.models.templates import patterns, render, split_template
from rlhf.models.tokenizing import encode_rows
from rlhf.user_error import UserError
from tests.conftest import run_script

QUESTION, ANSWER = {"role": "user", "content": "Is it late?"}, {"role": "assistant", "content": "Not yet."}
SYSTEM = "You are a harbour pilot."
HARD = "Say \"no\" and 'yes',\n\\n {{ bos_token }} {% endif %} %} {# x #} é 🚢"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] + '\\n' + m['content'] }}<|endoftext|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MERGING = (  # as Llama 2's and Mistral's: the system prompt lies in the first user's turn, and a user begins
    "{% if messages[0]['role'] == 'system' %}{% set first = messages[0]['content'] + '\\n\\n' %}"
    "{% set messages = messages[1:] %}{% else %}{% set first = '' %}{% endif %}{% for m in messages %}"
    "{% if loop.first and m['role'] != 'user' %}{{ raise_exception('a user begins') }}{% endif %}"
    "{% if m['role'] == 'user' %}[INST] {{ (first if loop.first else '') + m['content'] }} [/INST]"
    "{% else %} {{ m['content'] + eos_token }}{% endif %}{% endfor %}"
)
SILENT = (
    "{% for m in messages if m['role'] != 'system' %}[{{ m['role'] }}] {{ m['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
REFUSING = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + SILENT


def tokenizer_with(base, template):
    tokenizer = load_tokenizer(base)
    if template:
        tokenizer.chat_template = template
        install_template(tokenizer)
    return tokenizer


@pytest.mark.parametrize("text", [SYSTEM, HARD])
@pytest.mark.parametrize("template", [None, CHATML, MERGING])
def test_rows_without_a_system_turn_are_as_if_they_had_it(base, template, text, tmp_path):
    plain, tokenizer = tokenizer_with(base, template), tokenizer_with(base, template)
    set_system_prompt(tokenizer, text)
    tokenizer.save_pretrained(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    turn, other = {"role": "system", "content": text}, {"role": "system", "content": "Another."}
    for messages in ([QUESTION], [QUESTION, ANSWER], [QUESTION, ANSWER, QUESTION]):
        assert render(tokenizer, messages, True) == render(plain, [turn, *messages], True)
        assert render(tokenizer, [other, *messages]) == render(plain, [other, *messages])
    assert patterns(tokenizer) == patterns(plain)  # the marks of turns are the template's own
    assert split_template(tokenizer.chat_template) == (text, plain.chat_template)
    set_system_prompt(tokenizer, SYSTEM)
    assert split_template(tokenizer.chat_template) == (SYSTEM, plain.chat_template)
    set_system_prompt(tokenizer, "")
    assert tokenizer.chat_template == plain.chat_template


def test_all_encoders_have_it_and_no_tokenised_rows_are_taken_for_others(base):
    import datasets

    plain, tokenizer = load_tokenizer(base), load_tokenizer(base, system_prompt=SYSTEM)
    row = {
        "prompt": [QUESTION],
        "completion": [ANSWER],
        "chosen": [ANSWER],
        "rejected": [ANSWER | {"content": "Yes."}],
    }
    long = {"max_length": 200}
    for encode, ids, limits in (
        (encode_demonstration, "input_ids", long),
        (encode_preference, "prompt_ids", long),
        (encode_prompt, "prompt_ids", {"max_prompt_length": 200}),
    ):
        assert SYSTEM in tokenizer.decode(encode(row, tokenizer, **limits)[ids])
        assert SYSTEM not in plain.decode(encode(row, plain, **limits)[ids])
    rows = datasets.Dataset.from_list([{"prompt": [QUESTION]}])
    both = [encode_rows(rows, encode_prompt, t, "rows", max_prompt_length=200)[0] for t in (plain, tokenizer, plain)]
    assert both[0]._fingerprint == both[2]._fingerprint != both[1]._fingerprint
    assert len(both[0][0]["prompt_ids"]) < len(both[1][0]["prompt_ids"])


@pytest.mark.parametrize(
    ("template", "text", "says"),
    [
        (SILENT, SYSTEM, "the model's chat template leaves it out"),
        (REFUSING, SYSTEM, "no system role"),
        (None, "Stop.<|endoftext|>", "chat markup"),
        (None, "Hi\n### Human: Who?", "chat markup"),
    ],
)
def test_what_no_template_could_write_is_refused(base, template, text, says):
    with pytest.raises(UserError, match=f"--system_prompt: .*{says}(.|\n)*start of each row's prompt"):
        set_system_prompt(tokenizer_with(base, template), text)


def test_a_conversation_that_the_assistant_opens_has_it_or_is_dropped(base):
    tokenizer = load_tokenizer(base, system_prompt=SYSTEM)
    assert SYSTEM in render(tokenizer, [ANSWER]) and SYSTEM in render(tokenizer, [], True)
    merging = tokenizer_with(base, MERGING)
    set_system_prompt(merging, SYSTEM)
    with pytest.raises(Exception, match="no conversation that starts with the assistant"):
        render(merging, [ANSWER])


def test_a_model_keeps_the_system_prompt_that_it_was_trained_with(base, data, tmp_path, capsys):
    """By the next stage and by evaluation, without the flag; a resumed run must not change it."""
    flags = {"dataset_names": data, "model_name_or_path": base, "output_dir": tmp_path / "sft", "save_steps": 1}
    run_script("sft_training", **flags, system_prompt=SYSTEM)
    run = json.loads((tmp_path / "sft" / "run.json").read_text())
    assert run["system_prompt"] == run["arguments"]["system_prompt"] == SYSTEM
    (tmp_path / "sft" / "run.json").unlink()  # as if it had been killed
    with pytest.raises(UserError, match=f"system_prompt: {SYSTEM}, and now Another."):
        run_script("sft_training", **flags, system_prompt="Another.")
    capsys.readouterr()
    flags |= {"model_name_or_path": tmp_path / "sft", "output_dir": tmp_path / "dpo"}
    run_script("dpo_training", **flags)
    assert f"system prompt of rows without one: {SYSTEM!r}" in capsys.readouterr().out
    assert SYSTEM in (tmp_path / "dpo" / "chat_template.jinja").read_text()
    assert json.loads((tmp_path / "dpo" / "run.json").read_text())["system_prompt"] == SYSTEM
    words = f"--model_name_or_path={tmp_path / 'dpo'} --baseline={base} --dataset_names={data} --max_eval_samples=2"
    words += f" --response_length=4 --output_dir={tmp_path / 'report'}"
    evaluate_model.main(evaluate_model.make_parser().parse_args(words.split()))
    assert f"dpo: system prompt of rows without one: {SYSTEM!r}" in (said := capsys.readouterr().out)
    assert "base: system prompt" not in said
    evaluate_model.main(evaluate_model.make_parser().parse_args([*words.split(), "--system_prompt", "Be kind."]))
    assert capsys.readouterr().out.count("system prompt of rows without one: 'Be kind.'") == 2
    assert len(list(Path(tmp_path / "report" / "answers").iterdir())) == 4  # none is taken for another's


def test_rows_are_shown_with_it_where_a_model_writes_them(base, data, capsys):
    words = ["--dataset_names", data, "--preview=1", "--system_prompt", SYSTEM]
    with pytest.raises(UserError, match="--system_prompt needs --model_name_or_path"):
        prepare_data.main(prepare_data.make_parser().parse_args(words))
    prepare_data.main(prepare_data.make_parser().parse_args([*words, "--model_name_or_path", base]))
    assert SYSTEM in capsys.readouterr().out
