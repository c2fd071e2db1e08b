"""Real templates and what they may do: `pytest tests/models/test_templates.py`."""

import json
import re
from pathlib import Path

import pytest
import torch
import trl
from datasets import Dataset
from tokenizers import SentencePieceBPETokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from rlhf.models.loading import load_tokenizer, read_tokenizer
from rlhf.models.rendering import (
    encode_demonstration,
    encode_demonstrations,
    encode_dialogue,
    encode_preference,
    encode_prompt,
    install_template,
)
from rlhf.models.templates import PLAIN_TEMPLATE, Unrenderable, render, token_ids
from rlhf.models.tokenizing import tokenize_all
from rlhf.runs.trainers import score_answers_only
from rlhf.user_error import UserError
from tests.conftest import SENTENCES, run_script

QUICK = {"eval_strategy": "no", "eval_on_start": False}
SHIPPED = Path(trl.__file__).parent / "chat_templates"
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user/assistant/...') }}{% endif %}{% if m['role'] == 'user' %}"
    "{{ '[INST] ' + m['content'] + ' [/INST]' }}{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
# name: (template, the start of a user's turn, what an answer "Ho." is trained on as)
SHAPES = {
    "plain": (PLAIN_TEMPLATE, "### Human:", " Ho.<|endoftext|>"),
    "qwen3": ("qwen3", "<|im_start|>user", "<think>\n\n</think>\n\nHo.<|im_end|>"),
    "qwen2_5": ("qwen2_5", "<|im_start|>user", "Ho.<|im_end|>"),
    "llama3": ("llama3", "<|start_header_id|>user<|end_header_id|>", "Ho.<|eot_id|>"),
    "gemma": ("gemma", "<start_of_turn>user", "Ho.<end_of_turn>"),
    "phi3": ("phi3", "<|user|>", "Ho.<|end|>\n<|endoftext|>"),
    "gptoss": ("gptoss", "<|end|><|start|>user<|message|>", "<|channel|>final<|message|>Ho.<|return|>"),
    "mistral": (MISTRAL, "[INST]", " Ho.</s>"),
    "zephyr": (ZEPHYR, "<|user|>", "Ho.</s>"),
}


def system(text):
    return {"role": "system", "content": text}


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def with_template(base, template):
    """The tiny tokenizer with a template that is shipped with TRL, or given, and the tokens that its markers are."""
    tokenizer = read_tokenizer(base)
    text = (SHIPPED / f"{template}.jinja").read_text() if "{" not in template else template
    markers = sorted(set(re.findall(r"<\|[a-z_0-9]+\|>|<(?:start|end)_of_turn>", text)))
    tokenizer.add_special_tokens({"additional_special_tokens": markers})
    if "bos_token" in text:
        tokenizer.add_special_tokens({"bos_token": "<s>"})
    if template in (MISTRAL, ZEPHYR):
        tokenizer.add_special_tokens({"eos_token": "</s>"})
    tokenizer.chat_template = text
    install_template(tokenizer)
    return tokenizer


@pytest.fixture(scope="module")
def tokenizers(base):
    return {name: with_template(base, template) for name, (template, _, _) in SHAPES.items()}


def trained(tokenizer, example):
    return tokenizer.decode([label for label in example["labels"] if label != -100])


def context(tokenizer, example):
    pairs = zip(example["input_ids"], example["labels"], strict=True)
    return tokenizer.decode([token for token, label in pairs if label == -100])


@pytest.mark.parametrize("name", SHAPES)
def test_an_answer_alone_carries_loss_and_follows_what_is_rendered_at_inference(tokenizers, name):
    tokenizer, (_, _, answer) = tokenizers[name], SHAPES[name]
    (example,) = encode_demonstrations(
        {"prompt": [user("Hi")], "completion": [assistant("Ho.")]}, tokenizer, max_length=999
    )
    asked = tokenizer.apply_chat_template([user("Hi")], tokenize=False, add_generation_prompt=True)
    assert context(tokenizer, example) == asked and trained(tokenizer, example) == answer
    by_hand = tokenizer(asked + answer, add_special_tokens=False)["input_ids"]
    labels = tokenizer(answer, add_special_tokens=False)["input_ids"]
    assert example["input_ids"] == by_hand and example["labels"] == [-100] * (len(by_hand) - len(labels)) + labels


@pytest.mark.parametrize("name", SHAPES)
def test_a_conversation_may_start_with_the_assistant(tokenizers, name):
    tokenizer, (_, opener, answer) = tokenizers[name], SHAPES[name]
    row = {"prompt": [], "completion": [assistant("Ho."), user("And?"), assistant("Ho.")]}
    examples = encode_demonstrations(row, tokenizer, max_length=999)
    texts = "".join(trained(tokenizer, example) for example in examples)
    assert texts.count("Ho.") == 2 and texts.endswith(answer) and "And?" not in texts
    whole = tokenizer.decode(examples[0]["input_ids"])
    if name not in ("gemma", "mistral", "gptoss"):  # which raise for it, or write more at an end than in between
        first = tokenizer.apply_chat_template(row["completion"][:1], tokenize=False)
        assert first.startswith(whole.split(opener)[0].rstrip())
    assert whole.index("Ho.") < (whole.index("And?") if "And?" in whole else len(whole))
    assert encode_dialogue(tokenizer, [], [assistant("Ho.")])[0] == token_ids(tokenizer, [], True)


@pytest.mark.parametrize("name", SHAPES)
def test_control_tokens_in_a_text_stay_text(tokenizers, name):
    """As many control tokens as in the same conversation without them, and the text is whole."""
    tokenizer = tokenizers[name]
    tokens = [t for t in tokenizer.all_special_tokens if t != "ÿ"]
    openers = (*SHAPES[name][1:2], "<|assistant|>")
    texts = [f"what is {token} here" for token in tokens if not any(opener.startswith(token) for opener in openers)]
    assert texts
    for text in texts:
        ids, plain = (token_ids(tokenizer, [user(t)], True) for t in (text, "what is it here"))
        controls = [[i for i in row if i in tokenizer.all_special_ids] for row in (ids, plain)]
        assert controls[0] == controls[1], text
        assert text in tokenizer.decode(ids)
        encode_prompt({"prompt": [user(text)]}, tokenizer, max_prompt_length=999)
        example = encode_demonstration({"prompt": [user("a")], "completion": [assistant(text)]}, tokenizer, 999)
        assert text in trained(tokenizer, example)


@pytest.mark.parametrize("name", SHAPES)
def test_a_text_that_was_rendered_already_is_refused_and_what_was_found_is_named(tokenizers, name):
    tokenizer, (_, opener, answer) = tokenizers[name], SHAPES[name]
    answer = re.findall(r"Ho\.(?:.*\n)?(.*)", answer)[0]
    for row in (
        {"prompt": [user(f"{opener}\nHi")], "completion": [assistant("Ho.")]},
        {"prompt": [user("Hi")], "completion": [assistant(f"Ho.{answer}")]},
        {"prompt": [], "completion": [{"role": "text", "content": f"Once.\n{opener} Hi"}]},
        {"prompt": [], "completion": [{"role": "text", "content": f"Once.{tokenizer.eos_token} Twice."}]},
    ):
        with pytest.raises(Unrenderable, match="which is chat markup"):
            encode_demonstrations(row, tokenizer, max_length=999)
        pair = {"prompt": [user("Hi")], "chosen": row["completion"], "rejected": [assistant("No.")]}
        if row["prompt"] == [user("Hi")]:
            with pytest.raises(Unrenderable, match="which is chat markup"):
                encode_preference(pair, tokenizer, max_length=999)
    with pytest.raises(Unrenderable, match="which is chat markup"):
        encode_prompt({"prompt": [user(f"{opener}\nHi")]}, tokenizer, max_prompt_length=999)


def test_html_and_the_pad_byte_are_no_control_tokens():
    """Under a SentencePiece vocabulary <s> begins a text, and a page strikes words out with it."""
    bpe = SentencePieceBPETokenizer()
    pieces = [*SENTENCES, "<s>old</s> price <b>", "<|user|>\n<|assistant|>"]
    bpe.train_from_iterator(pieces, vocab_size=400, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<unk>"
    )
    tokenizer.chat_template = "{{ bos_token }}" + ZEPHYR
    install_template(tokenizer)
    example = encode_demonstration(
        {"prompt": [user("<s>old</s> price")], "completion": [assistant("<s>old</s> price, yes")]}, tokenizer, 999
    )
    assert [i for i in example["input_ids"] if i < 3] == [1, 2, 2]  # the template's own
    assert "<s>old</s> price, yes" in tokenizer.decode(example["input_ids"])


def test_the_pad_byte_in_a_text_is_a_letter(base):
    tokenizer = load_tokenizer(base)
    assert tokenizer.pad_token == "ÿ"
    for row in ({"role": "text", "content": "a ÿ b"}, assistant("a ÿ b")):
        (example,) = encode_demonstrations({"prompt": [], "completion": [row]}, tokenizer, max_length=99)
        assert tokenizer.pad_token_id not in example["input_ids"] and "a ÿ b" in trained(tokenizer, example)


def test_thoughts_are_an_answers_own_words(base):
    tokenizer = with_template(base, "qwen3")
    tokenizer.add_tokens(["<think>", "</think>"])
    row = {"prompt": [user("Hi")], "completion": [assistant("<think>\nwhy\n</think>\n\nHo.")]}
    example = encode_demonstration(row, tokenizer, 999)
    assert trained(tokenizer, example) == "<think>\nwhy\n</think>\n\nHo.<|im_end|>"
    assert tokenizer.convert_tokens_to_ids("<think>") in example["labels"]


@pytest.mark.parametrize("name", ["qwen3", "phi3", "gptoss"])
def test_a_template_that_changes_earlier_turns_gives_one_example_an_answer(tokenizers, name):
    tokenizer, answer = tokenizers[name], SHAPES[name][2]
    turns = [user("Hi"), assistant("Ho."), user("And?"), assistant("No."), user("Why?"), assistant("So.")]
    examples = encode_demonstrations({"prompt": turns[:1], "completion": turns[1:]}, tokenizer, max_length=999)
    assert len(examples) == 3
    for i, example in enumerate(examples):
        asked = tokenizer.apply_chat_template(turns[: 2 * i + 1], tokenize=False, add_generation_prompt=True)
        said = answer.replace("Ho.", ("Ho.", "No.", "So.")[i])
        parts = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (asked, said)]
        assert example["input_ids"] == parts[0] + parts[1]
        assert example["labels"] == [-100] * len(parts[0]) + parts[1]


def test_examples_that_do_not_fit_leave_the_others(tokenizers):
    tokenizer = tokenizers["phi3"]
    row = {"prompt": [user("Hi")], "completion": [assistant("Ho."), user("And?"), assistant("so on " * 50)]}
    (example,) = encode_demonstrations(row, tokenizer, max_length=64)
    assert "Ho." in trained(tokenizer, example) and example["shortened"]
    with pytest.raises(Unrenderable, match="longer than max_length"):
        encode_demonstrations({**row, "completion": row["completion"][2:]}, tokenizer, max_length=64)


@pytest.mark.parametrize("bos", [True, False])
def test_a_plain_text_is_trained_on_as_it_stands(base, bos):
    tokenizer = load_tokenizer(base)
    if bos:
        from tokenizers.processors import TemplateProcessing

        tokenizer.add_special_tokens({"bos_token": "<s>"})
        start = [("<s>", tokenizer.bos_token_id)]
        tokenizer._tokenizer.post_processor = TemplateProcessing("<s> $A", special_tokens=start)
    text, start = "  Once upon a time.\n\n Twice. ", [tokenizer.bos_token_id] * bos
    row = {"prompt": [], "completion": [{"role": "text", "content": text}]}
    ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    (example,) = encode_demonstrations(row, tokenizer, max_length=999)
    assert example["input_ids"] == start + ids and example["labels"] == [-100] * bos + ids
    pieces = encode_demonstrations(row, tokenizer, max_length=10)
    assert len(pieces) > 1 and {len(piece["input_ids"]) <= 10 for piece in pieces} == {True}
    assert min(len(piece["input_ids"]) for piece in pieces) > 3  # an EOS alone has nothing to be learned from
    assert [i for piece in pieces for i in piece["labels"] if i != -100] == ids


def test_only_the_assistants_turns_of_a_pair_are_scored(base):
    tokenizer = load_tokenizer(base)
    chosen = [assistant("Ho."), user("And then?"), assistant("No.")]
    pair = {"prompt": [user("Hi")], "chosen": chosen, "rejected": [*chosen[:2], assistant("Yes.")]}
    encoded = encode_preference(pair, tokenizer, 999)
    asked = tokenizer.apply_chat_template([user("Hi"), *chosen[:2]], tokenize=False, add_generation_prompt=True)
    assert tokenizer.decode(encoded["prompt_ids"]) == asked
    assert [tokenizer.decode(encoded[s]) for s in ("chosen_ids", "rejected_ids")] == [
        " No.<|endoftext|>",
        " Yes.<|endoftext|>",
    ]
    other = [assistant("Ha."), user("What?"), assistant("No.")]
    encoded = encode_preference({**pair, "rejected": other}, tokenizer, 999)
    for side, said in (
        ("chosen", " Ho.<|endoftext|> No.<|endoftext|>"),
        ("rejected", " Ha.<|endoftext|> No.<|endoftext|>"),
    ):
        pairs = zip(encoded[f"{side}_ids"], encoded[f"{side}_mask"], strict=True)
        assert tokenizer.decode([i for i, mask in pairs if mask]) == said


HOSTILE = {
    "takes more than .* s": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "takes more than .* GiB": "{{ 'a' * 20000000000 }}",
    "takes more than": "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "2,000,.* characters": "{% for m in messages %}{{ m.content + eos_token }}{% endfor %}{{ 'a' * 2000000 }}",
    "maximum recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "division by zero": "{{ 1 / 0 }}",
    "Expected an expression": "{% if %}",
    "leaves out what is said": "{{ messages[-1].role + eos_token }}",
}


@pytest.mark.parametrize("says", HOSTILE)
def test_a_template_that_does_not_end_or_fails_is_one_message(base, says, monkeypatch):
    monkeypatch.setattr("rlhf.models.templates.SECONDS", 0.5)
    tokenizer = read_tokenizer(base)
    tokenizer.chat_template = HOSTILE[says]
    with pytest.raises(UserError, match=says):
        install_template(tokenizer)


LIMITS = {"max_bad_percentage": 5.0, "evaluate": True, "max_length": 64}


def report(train, evals=()):
    entry = {"read": 10, "extra": 0, "bad": 0, "dropped": {}, "set_aside": {}}
    return {
        "datasets": {"rows": entry | {"kept": len(train), "share": 1.0}},
        "evaluation": {name: entry | {"kept": len(rows)} for name, rows in dict(evals).items()},
        "notes": [],
    }


def rows_of(*prompts):
    return Dataset.from_list([{"prompt": p, "completion": [assistant("Ho.")], "dataset": "rows"} for p in prompts])


def test_what_a_template_refuses_costs_the_row_and_counts(tokenizers):
    refused, sound = [system("Be kind."), user("Hi")], [user("Hi")]
    rows = rows_of(*[sound] * 39, refused)
    data = report(rows)
    train, _ = tokenize_all(rows, {}, data, encode_demonstrations, tokenizers["gemma"], **LIMITS)
    reason = "chat template: System role not supported"
    assert len(train) == data["datasets"]["rows"]["kept"] == data["tokenized"]["kept"] == 39
    assert data["datasets"]["rows"]["dropped"] == {reason: 1}
    rows = rows_of(*[sound] * 9, refused)
    with pytest.raises(UserError, match=f"rows: 1 of 10 rows cannot be rendered: {reason} .*\n.*--max_bad_percentage"):
        tokenize_all(rows, {}, report(rows), encode_demonstrations, tokenizers["gemma"], **LIMITS)
    data = report(rows)
    data["datasets"]["rows"] |= {"bad": 1}  # what loading found is part of the same share
    with pytest.raises(UserError, match="cannot be rendered"):
        limits = LIMITS | {"max_bad_percentage": 15}
        tokenize_all(rows, {}, data, encode_demonstrations, tokenizers["gemma"], **limits)


def test_held_out_rows_that_cannot_be_rendered_stop_only_an_evaluation(tokenizers):
    rows, evals = rows_of([user("Hi")]), {"rows": rows_of([system("Be kind."), user("Hi")])}
    with pytest.raises(UserError, match="no held-out row of rows .*System role not supported.*\n.*--eval_strategy no"):
        tokenize_all(rows, evals, report(rows, evals), encode_demonstrations, tokenizers["gemma"], **LIMITS)
    data, limits = report(rows, evals), LIMITS | {"evaluate": False}
    train, kept = tokenize_all(rows, evals, data, encode_demonstrations, tokenizers["gemma"], **limits)
    assert len(train) == 1 and kept == {} and data["evaluation"]["rows"]["kept"] == 0
    assert "System role not supported" in data["notes"][0]


def test_rows_and_examples_are_counted_apart(tokenizers):
    turns = [assistant("Ho."), user("And?"), assistant("No.")]
    rows = Dataset.from_list([{"prompt": [user("Hi")], "completion": turns, "dataset": "rows"}] * 3)
    data = report(rows)
    train, _ = tokenize_all(rows, {}, data, encode_demonstrations, tokenizers["phi3"], **LIMITS)
    assert (data["tokenized"]["kept"], data["tokenized"]["examples"], len(train)) == (3, 6, 6)


def test_a_whole_batch_of_refused_rows_does_not_confuse_the_columns(tokenizers):
    refused, sound = [system("Be kind."), user("Hi")], [user("Hi")]
    rows = rows_of(*[refused] * 1100, *[sound] * 5)
    limits = LIMITS | {"max_bad_percentage": 100}
    train, _ = tokenize_all(rows, {}, report(rows), encode_demonstrations, tokenizers["gemma"], **limits)
    assert len(train) == 5 and render(tokenizers["gemma"], sound).startswith("<s>")


def make_model(base, folder, template):
    tokenizer = with_template(base, template)
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=512,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize(
    ("template", "rows", "examples_a_row", "dropped"),
    [
        ("qwen3", lambda i: [user(f"Question {i}?"), assistant("Ho."), user("And?"), assistant(f"No {i}.")], 2, {}),
        ("llama3", lambda i: [user(f"Question {i}?"), assistant("Ho."), user("And?"), assistant(f"No {i}.")], 1, {}),
        ("gemma", lambda i: [assistant(f"Hello {i}."), user("And?"), assistant("Ho.")], 1, {}),
        (
            "gemma",
            lambda i: [*[system("Be kind.")] * (i in (2, 3)), user(f"Question {i}?"), assistant("Ho.")],
            1,
            {"chat template: System role not supported": 2},
        ),
    ],
)
def test_to_trained_steps_with_the_tables_counts(base, tmp_path, capsys, template, rows, examples_a_row, dropped):
    model = make_model(base, tmp_path / "base", template)
    file = write(tmp_path / "rows.jsonl", [{"messages": rows(i)} for i in range(100)])
    seen, collate = [], DataCollatorForLanguageModeling.__call__

    def watched(self, examples, *args, **kwargs):
        seen.extend(examples)
        return collate(self, examples, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DataCollatorForLanguageModeling, "__call__", watched)
        out = run_script(
            "sft_training", model_name_or_path=model, output_dir=str(tmp_path / "sft"), dataset_names=file
        )
    data = json.loads((Path(out) / "run.json").read_text())["data"]
    entry, counts = data["datasets"]["rows"], data["tokenized"]
    assert entry["dropped"] == dropped == counts["dropped"]
    assert entry["kept"] == counts["kept"] == 100 - sum(dropped.values()) - sum(entry["set_aside"].values())
    assert counts["examples"] == examples_a_row * counts["kept"]
    assert re.search(rf"^rows +100 +{counts['kept']} ", capsys.readouterr().out, re.M)
    tokenizer = load_tokenizer(out)
    for example in seen:  # what the trainer was given: each answer with its end, and nothing else
        said = trained(tokenizer, example)
        for part in re.split(r"(?<=<\|im_end\|>)|(?<=<\|eot_id\|>)|(?<=<end_of_turn>)", said)[:-1]:
            assert re.fullmatch(r"(<think>\n\n</think>\n\n)?(Ho\.|No \d+\.|Hello \d+\.)<.*>", part), said
        assert "And?" not in said and "Question" not in said
    assert len(seen) >= 8


def test_dpo_scores_the_answers_and_not_the_user_between_them(base, tmp_path):
    tokenizer = load_tokenizer(base)
    pair = {
        "prompt": [user("Hi")],
        "chosen": [assistant("Ho."), user("And then?"), assistant("No.")],
        "rejected": [assistant("Ha."), user("What?"), assistant("Not at all.")],
    }
    short = {"prompt": [user("Hi there")], "chosen": [assistant("Ho.")], "rejected": [assistant("Ha ha.")]}
    rows = [encode_preference(row, tokenizer, 999) for row in (pair, short)]
    batch = score_answers_only(DataCollatorForPreference(pad_token_id=tokenizer.pad_token_id), rows)
    pairs = zip(batch["input_ids"], batch["completion_mask"], strict=True)
    said = [tokenizer.decode(ids[mask == 1]) for ids, mask in pairs]
    end = "<|endoftext|>"
    assert said == [f" Ho.{end} No.{end}", f" Ho.{end}", f" Ha.{end} Not at all.{end}", f" Ha ha.{end}"]
    file = write(tmp_path / "pairs.jsonl", [{**pair, "prompt": [user(f"Hi {i}")]} for i in range(40)])
    flags = {"model_name_or_path": base, "dataset_names": file, **QUICK}
    masks, collate = [], DataCollatorForPreference.torch_call
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            DataCollatorForPreference, "torch_call", lambda self, rows: masks.extend(rows) or collate(self, rows)
        )
        run_script("dpo_training", output_dir=str(tmp_path / "dpo"), **flags)
    assert masks and all(0 in row["chosen_mask"] and row["chosen_mask"][-1] for row in masks)
    run_script("reward_modeling", output_dir=str(tmp_path / "reward"), **flags)
