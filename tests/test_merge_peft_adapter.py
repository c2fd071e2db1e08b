"""Merging is exact, of the right class, on the right base, or not done: `pytest tests/test_merge_peft_adapter.py`."""

import json
import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.utils import find_adapter_config_file

import merge_peft_adapter
from merge_peft_adapter import main, make_parser
from rlhf.models import adapters
from rlhf.models.loading import (
    load_frozen_policy,
    load_policy,
    load_reward_model,
    load_tokenizer,
    new_reward_model,
)
from rlhf.runs.arguments import ModelArguments
from rlhf.user_error import UserError
from tests.conftest import make_tokenizer, run_script

IDS = torch.tensor([[5, 6, 7, 8, 9]])


def merge(**flags):
    main(make_parser().parse_args([f"--{key}={value}" for key, value in flags.items()]))
    return flags["output_name"]


def logits(model, ids=IDS):
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


@pytest.mark.parametrize("stage", ["sft", "dpo", "ppo"])
def test_a_merged_policy_is_its_adapter_model(saved, base, tmp_path, stage):
    merged = merge(base_model_name=base, adapter_model_name=saved[stage], output_name=tmp_path / "merged")
    ours = logits(AutoModelForCausalLM.from_pretrained(merged))
    tokenizer = load_tokenizer(saved[stage])
    torch.testing.assert_close(ours, logits(load_frozen_policy(saved[stage], tokenizer)), atol=1e-4, rtol=0)
    assert (ours - logits(AutoModelForCausalLM.from_pretrained(base))).abs().max() > 1e-2
    theirs = AutoTokenizer.from_pretrained(merged)
    assert theirs.chat_template == tokenizer.chat_template and theirs.pad_token_id == tokenizer.pad_token_id
    proof = json.loads((tmp_path / "merged" / "merge.json").read_text())
    assert proof["base"] == base and proof["max_logit_difference"] < 1e-6 * max(1, proof["max_logit"])


def test_the_dpo_result_holds_sft_too(saved, base, tmp_path):
    """The old way, DPO's own change merged onto the raw base without SFT, is another model."""
    merged = logits(
        AutoModelForCausalLM.from_pretrained(merge(adapter_model_name=saved["dpo"], output_name=tmp_path / "m"))
    )
    tokenizer = load_tokenizer(saved["sft"])
    raw, sft = logits(AutoModelForCausalLM.from_pretrained(base)), logits(load_frozen_policy(saved["sft"], tokenizer))
    without_sft = raw + merged - sft
    assert (merged - without_sft).abs().max() > 1e-2 and (merged - sft).abs().max() > 1e-3


def test_a_merged_reward_model_keeps_its_head(saved, tmp_path):
    merged = merge(adapter_model_name=saved["reward"], output_name=tmp_path / "merged")
    model = AutoModelForSequenceClassification.from_pretrained(merged)
    tokenizer = load_tokenizer(saved["reward"])
    assert model.config.num_labels == 1 and model.config.pad_token_id == tokenizer.pad_token_id
    torch.testing.assert_close(logits(model), logits(load_reward_model(saved["reward"], tokenizer)))
    torch.testing.assert_close(logits(load_reward_model(str(merged), tokenizer)), logits(model))


def test_a_sum_of_adapters_is_the_weighted_sum_of_their_changes(saved, base, tmp_path):
    merged = merge(
        adapter_model_name=f"{saved['sft']},{saved['dpo']}", weights="0.25,0.75", output_name=tmp_path / "sum"
    )
    name = "transformer.h.0.attn.c_attn.weight"
    state = AutoModelForCausalLM.from_pretrained(merged).state_dict()
    parts = {}
    for stage in ("sft", "dpo"):
        folder = merge(adapter_model_name=saved[stage], output_name=tmp_path / stage)
        parts[stage] = AutoModelForCausalLM.from_pretrained(folder).state_dict()[name]
    torch.testing.assert_close(state[name], 0.25 * parts["sft"] + 0.75 * parts["dpo"], atol=1e-5, rtol=1e-5)


def test_another_base_is_refused_and_a_copy_of_the_same_is_not(saved, base, tmp_path):
    copy = shutil.copytree(base, tmp_path / "copy")
    merge(base_model_name=copy, adapter_model_name=saved["sft"], output_name=tmp_path / "merged")
    other = tmp_path / "other"
    AutoModelForCausalLM.from_config(AutoModelForCausalLM.from_pretrained(base).config).save_pretrained(other)
    with pytest.raises(UserError, match="is not the base of"):
        merge(base_model_name=other, adapter_model_name=saved["sft"], output_name=tmp_path / "wrong")
    with pytest.raises(UserError, match="is an adapter itself"):
        merge(base_model_name=saved["sft"], adapter_model_name=saved["dpo"], output_name=tmp_path / "wrong")
    assert not (tmp_path / "wrong").exists()


def test_an_existing_folder_is_kept_unless_told_otherwise(saved, tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_text("mine")
    with pytest.raises(UserError, match="--overwrite"):
        merge(adapter_model_name=saved["sft"], output_name=tmp_path / "precious")
    assert (tmp_path / "precious" / "file").read_text() == "mine"


def test_a_merge_that_cannot_prove_itself_leaves_nothing(saved, tmp_path, monkeypatch):
    monkeypatch.setattr(merge_peft_adapter, "TOLERANCE", -1.0)
    with pytest.raises(SystemExit, match="nothing was kept"):
        merge(adapter_model_name=saved["sft"], output_name=tmp_path / "merged")
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_is_no_adapter_is_refused(base, tmp_path):
    with pytest.raises(UserError, match="is no adapter"):
        merge(adapter_model_name=base, output_name=tmp_path / "merged")


# Adapters that others made, with plain PEFT


def randomise(model):
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)


def foreign(base, folder, extra_tokens=0, task="CAUSAL_LM", **settings):
    """An adapter folder of random weights, and the logits of the model that it was saved from."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    model_class = AutoModelForSequenceClassification if task == "SEQ_CLS" else AutoModelForCausalLM
    model = model_class.from_pretrained(base, **({"num_labels": 1} if task == "SEQ_CLS" else {}))
    if extra_tokens:
        tokenizer.add_tokens([f"<{i}>" for i in range(extra_tokens)])
        model.resize_token_embeddings(len(tokenizer))
    config = LoraConfig(task_type=task, **({"r": 4, "target_modules": "all-linear"} | settings))
    model = get_peft_model(model, config)
    randomise(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder), logits(model)


KINDS = {
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True, "lora_alpha": 32},
    "bias": {"bias": "all"},
    "head saved": {"modules_to_save": ["lm_head"]},
    "embeddings saved": {"modules_to_save": ["wte"]},
    "both saved": {"modules_to_save": ["wte", "lm_head"]},
    "both saved and tied": {"modules_to_save": ["wte"], "ensure_weight_tying": True},
    "lora on the head": {"target_modules": ["c_attn", "lm_head"]},
    "lora on the embeddings": {"target_modules": ["c_attn", "wte"]},
    "lora on both": {"target_modules": ["wte", "lm_head"]},
    "lora on both, tied": {"target_modules": ["c_attn", "wte"], "ensure_weight_tying": True},
    "some tokens": {"trainable_token_indices": [5, 6]},
    "resized": {"extra_tokens": 3},
    "resized, some tokens": {"extra_tokens": 3, "trainable_token_indices": [5, 287]},
    "resized, embeddings saved": {"extra_tokens": 3, "modules_to_save": ["wte", "lm_head"]},
}


@pytest.fixture(scope="module")
def untied(base, tmp_path_factory):
    """The tiny base with an output layer of its own."""
    folder = shutil.copytree(base, tmp_path_factory.mktemp("untied") / "base")
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(base)
    config = model.config
    config.tie_word_embeddings = False
    other = AutoModelForCausalLM.from_config(config)
    other.transformer.load_state_dict(model.transformer.state_dict())
    other.save_pretrained(folder)
    return str(folder)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_foreign_adapter_merges_into_what_it_was(base, untied, tmp_path, kind, tied):
    adapter, expected = foreign(base if tied else untied, tmp_path / "adapter", **KINDS[kind])
    merged = AutoModelForCausalLM.from_pretrained(merge(adapter_model_name=adapter, output_name=tmp_path / "merged"))
    torch.testing.assert_close(logits(merged), expected, atol=1e-4, rtol=1e-4)
    proof = json.loads((tmp_path / "merged" / "merge.json").read_text())
    assert proof["adapter_effect"] > 1000 * proof["max_logit_difference"]


def test_a_chain_of_two_adapters_is_merged_from_the_base_up(base, tmp_path):
    first, _ = foreign(base, tmp_path / "first", use_rslora=True)
    merge(adapter_model_name=first, output_name=tmp_path / "middle")
    second, expected = foreign(tmp_path / "middle", tmp_path / "second")
    name_base(second, first)
    merged = merge(adapter_model_name=second, output_name=tmp_path / "merged")
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(merged)), expected, atol=1e-4, rtol=1e-4)


def test_a_reward_adapter_on_a_policys_is_merged_with_its_head(base, tmp_path):
    first, _ = foreign(base, tmp_path / "first")
    merge(adapter_model_name=first, output_name=tmp_path / "middle")
    second, expected = foreign(tmp_path / "middle", tmp_path / "second", task="SEQ_CLS")
    name_base(second, first)
    merged = merge(adapter_model_name=second, output_name=tmp_path / "merged")
    model = AutoModelForSequenceClassification.from_pretrained(merged)
    torch.testing.assert_close(logits(model), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("task", ["SEQ_CLS", "CAUSAL_LM", None])
@pytest.mark.parametrize("named", [True, False])
def test_a_reward_adapter_is_one_by_its_tensors_whatever_its_label(base, tmp_path, task, named):
    adapter, expected = foreign(base, tmp_path / "adapter", task="SEQ_CLS")
    edit_json(Path(adapter) / "adapter_config.json", task_type=task, **({} if named else {"modules_to_save": None}))
    tokenizer = load_tokenizer(adapter)
    for load in (load_frozen_policy, lambda name, t: load_policy(ModelArguments(model_name_or_path=name), t, 0)):
        with pytest.raises(UserError, match="is a reward model, not a policy"):
            load(adapter, tokenizer)
    torch.testing.assert_close(logits(load_reward_model(adapter, tokenizer)), expected, atol=1e-5, rtol=0)
    continued, _ = new_reward_model(ModelArguments(model_name_or_path=adapter), tokenizer, 0)
    torch.testing.assert_close(logits(continued), expected, atol=1e-5, rtol=0)
    model = AutoModelForSequenceClassification.from_pretrained(
        merge(adapter_model_name=adapter, output_name=tmp_path / "merged")
    )
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=0)


def test_a_policys_adapter_without_a_label_is_one(base, tmp_path):
    adapter, expected = foreign(base, tmp_path / "adapter")
    edit_json(Path(adapter) / "adapter_config.json", task_type=None)
    torch.testing.assert_close(logits(load_frozen_policy(adapter, load_tokenizer(adapter))), expected)
    merged = merge(adapter_model_name=adapter, output_name=tmp_path / "merged")
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(merged)), expected, atol=1e-5, rtol=0)


def add_stray(adapter):
    weights = load_file(adapter / "adapter_model.safetensors")
    weights["base_model.model.v_head.summary.weight"] = torch.zeros(1, 32)
    save_file(weights, adapter / "adapter_model.safetensors")


def add_value_head(adapter):
    heads = {"v_head.summary.weight": torch.zeros(1, 32), "v_head.summary.bias": torch.zeros(1)}
    save_file(heads, adapter / "value_head.safetensors")


def label(task):
    return lambda adapter: edit_json(adapter / "adapter_config.json", task_type=task)


def of_4_bit(adapter):
    name_base(adapter, "unsloth/llama-3-8b-bnb-4bit")


@pytest.mark.parametrize(
    ("spoil", "merging", "training"),
    [
        (add_stray, "it has base_model.model.v_head.summary.weight, which the base has not", None),
        (add_value_head, "LLaMA-Factory's value head beside its LoRA, value_head.safetensors", None),
        (label("FEATURE_EXTRACTION"), "is an adapter for FEATURE_EXTRACTION: neither", None),
        (label("SEQ_CLS"), "has score.weight: the merged model's would be random", "is a reward model"),
        (of_4_bit, "merge_peft_adapter.py .*--base_model_name=FULL_PRECISION_MODEL", None),
    ],
)
def test_what_has_no_place_in_a_policy_is_named_in_every_script(base, tmp_path, spoil, merging, training):
    adapter, _ = foreign(base, tmp_path / "adapter")
    tokenizer = load_tokenizer(adapter)
    spoil(Path(adapter))
    with pytest.raises(UserError, match=merging):
        merge(adapter_model_name=adapter, output_name=tmp_path / "merged")
    for load in (load_frozen_policy, lambda name, t: load_policy(ModelArguments(model_name_or_path=name), t, 0)):
        with pytest.raises(UserError, match=training or merging):
            load(adapter, tokenizer)
    assert not (tmp_path / "merged").exists()
    if spoil is of_4_bit:  # the base's own config is not here to compare the other's with
        with pytest.raises(UserError, match="hf download unsloth/llama-3-8b-bnb-4bit config.json"):
            merge(base_model_name=base, adapter_model_name=adapter, output_name=tmp_path / "merged")


def test_added_tokens_are_merged_before_training_goes_on(base, tmp_path):
    adapter, _ = foreign(base, tmp_path / "adapter", **KINDS["resized, embeddings saved"])
    tokenizer = load_tokenizer(adapter)
    for load in (load_policy, new_reward_model):
        with pytest.raises(UserError, match=f"merge it first,\n  python merge_peft_adapter.py .*={adapter} "):
            load(ModelArguments(model_name_or_path=adapter), tokenizer, 0)
    merged = merge(adapter_model_name=adapter, output_name=tmp_path / "merged")
    assert load_policy(ModelArguments(model_name_or_path=str(merged)), load_tokenizer(str(merged)), 0)


def test_biases_that_the_base_has_no_place_for_are_refused(tmp_path):
    tokenizer = make_tokenizer(tmp_path / "base")
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape)).save_pretrained(tmp_path / "base")
    adapter, _ = foreign(tmp_path / "base", tmp_path / "adapter", lora_bias=True)
    with pytest.raises(UserError, match="has biases .lora_bias. where its base has none"):
        merge(adapter_model_name=adapter, output_name=tmp_path / "merged")


def test_a_sum_is_exact_for_rslora_too(base, tmp_path):
    """PEFT would scale the sum once more."""
    folders = [foreign(base, tmp_path / str(r), r=r, use_rslora=True, lora_alpha=7)[0] for r in (2, 8)]
    merged = merge(adapter_model_name=",".join(folders), weights="2,-0.5", output_name=tmp_path / "sum")
    name = "transformer.h.1.mlp.c_fc.weight"
    start = AutoModelForCausalLM.from_pretrained(base).state_dict()[name]
    parts = [merge(adapter_model_name=folder, output_name=f"{folder}_merged") for folder in folders]
    one, two, both = (AutoModelForCausalLM.from_pretrained(p).state_dict()[name] - start for p in (*parts, merged))
    torch.testing.assert_close(both, 2 * one - 0.5 * two, atol=1e-4, rtol=1e-4)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["dora", "head saved", "some tokens", "resized", "lora on the embeddings", "bias"])
def test_adapters_that_are_more_than_a_lora_have_no_sum(base, tmp_path, kind):
    folder, _ = foreign(base, tmp_path / "a", **KINDS[kind])
    with pytest.raises(UserError, match="more than a plain LoRA"):
        merge(adapter_model_name=f"{folder},{folder}", weights="0.5,0.5", output_name=tmp_path / "sum")
    assert not (tmp_path / "sum").exists()


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def name_base(adapter, base):
    edit_json(Path(adapter) / "adapter_config.json", base_model_name_or_path=str(base))


def lose_head(adapter):
    weights = {k: v for k, v in load_file(adapter / "adapter_model.safetensors").items() if "score" not in k}
    save_file(weights, adapter / "adapter_model.safetensors")


def lose_layer(adapter):
    weights = {k: v for k, v in load_file(adapter / "adapter_model.safetensors").items() if "h.1.attn" not in k}
    save_file(weights, adapter / "adapter_model.safetensors")


def add_layer(adapter):
    weights = load_file(adapter / "adapter_model.safetensors")
    weights |= {k.replace("h.1.", "h.2."): v.clone() for k, v in weights.items() if "h.1." in k}
    save_file(weights, adapter / "adapter_model.safetensors")


def widen(adapter):
    weights = load_file(adapter / "adapter_model.safetensors")
    weights = {k: torch.cat([v, v]) if "lora_B" in k else v for k, v in weights.items()}
    save_file(weights, adapter / "adapter_model.safetensors")


def not_a_number(adapter):
    weights = load_file(adapter / "adapter_model.safetensors")
    next(iter(weights.values()))[0, 0] = float("nan")
    save_file(weights, adapter / "adapter_model.safetensors")


def truncate(adapter):
    path = adapter / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def empty(adapter):
    (adapter / "adapter_model.safetensors").write_bytes(b"")


def add_token(adapter):
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(adapter)


@pytest.mark.parametrize(
    ("stage", "spoil", "says"),
    [
        ("reward", lose_head, "random"),
        ("sft", lose_layer, "has no base_model.model.transformer.h.1.attn"),
        ("sft", add_layer, "which the base has not"),
        ("sft", widen, "size mismatch"),
        ("sft", not_a_number, "holds values that are not finite"),
        ("sft", truncate, "cannot load"),
        ("sft", empty, "cannot load"),
        ("sft", add_token, "but embeddings for"),
        ("sft", lambda adapter: (adapter / "adapter_model.safetensors").unlink(), "cannot load"),
        ("sft", lambda adapter: name_base(adapter, "/nowhere/base"), "/nowhere/base, the base of .*: no such"),
        ("sft", lambda adapter: name_base(adapter, ""), "names no base model"),
        ("sft", lambda adapter: name_base(adapter, adapter), "name each other"),
        ("sft", lambda adapter: (adapter / "adapter_config.json").write_text("{"), "cannot load"),
    ],
)
def test_a_broken_adapter_is_refused_and_nothing_is_left(saved, tmp_path, stage, spoil, says):
    adapter = shutil.copytree(saved[stage], tmp_path / "adapter")
    spoil(adapter)
    with pytest.raises((UserError, SystemExit), match=says):
        merge(adapter_model_name=adapter, output_name=tmp_path / "new" / "merged")
    assert list(tmp_path.iterdir()) == [adapter]


def test_prompt_tuning_is_refused_since_it_changes_no_weights(base, tmp_path):
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    )
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(UserError, match="PROMPT_TUNING adapter cannot be merged"):
        merge(adapter_model_name=tmp_path / "adapter", output_name=tmp_path / "merged")


@pytest.mark.parametrize("spoil", [lambda b: (b / "model.safetensors").write_bytes(b"broken"), None])
def test_a_broken_or_headless_base_is_refused(base, tmp_path, spoil):
    other = shutil.copytree(base, tmp_path / "base")
    adapter, _ = foreign(other, tmp_path / "adapter")
    if spoil:
        spoil(other)
    else:
        weights = {k: v for k, v in load_file(other / "model.safetensors").items() if "ln_f" not in k}
        save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="cannot load|random"):
        merge(adapter_model_name=adapter, output_name=tmp_path / "merged")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base"]


def test_a_base_that_moved_is_known_and_one_that_changed_is_refused(saved, base, tmp_path, monkeypatch):
    adapter, moved = shutil.copytree(saved["sft"], tmp_path / "adapter"), shutil.copytree(base, tmp_path / "moved")

    def not_of_the_hub(name, **kwargs):
        assert Path(name).exists(), f"the hub is asked for {name}"
        return find_adapter_config_file(name, **kwargs)

    monkeypatch.setattr(adapters, "find_adapter_config_file", not_of_the_hub)
    for name in ("/nowhere/base", "nowhere"):
        name_base(adapter, name)
        merge(base_model_name=moved, adapter_model_name=adapter, output_name=tmp_path / f"merged{len(name)}")
    name_base(adapter, moved)
    weights = load_file(moved / "model.safetensors")
    weights["transformer.wte.weight"][7, 3] += 1e-3
    save_file(weights, moved / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="has changed since"):
        merge(adapter_model_name=adapter, output_name=tmp_path / "wrong")
    with pytest.raises(UserError, match="has changed since"):
        load_frozen_policy(str(adapter), load_tokenizer(saved["sft"]))
    name_base(adapter, "/nowhere/base")
    (adapter / "run.json").unlink()
    with pytest.raises(UserError, match="not here to compare"):
        merge(base_model_name=moved, adapter_model_name=adapter, output_name=tmp_path / "wrong")


def test_an_adapter_of_a_quantised_base_is_merged_into_the_full_one(base, tmp_path):
    """As adapters of ready-made 4-bit copies name their base; its config is all that there is to compare."""
    adapter, expected = foreign(base, tmp_path / "adapter")
    quantised = shutil.copytree(base, tmp_path / "base-4bit")
    edit_json(quantised / "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    name_base(adapter, quantised)
    with pytest.raises(UserError, match="stored quantised: give the full-precision model"):
        merge(adapter_model_name=adapter, output_name=tmp_path / "merged")
    merged = merge(base_model_name=base, adapter_model_name=adapter, output_name=tmp_path / "merged")
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(merged)), expected, atol=1e-4, rtol=1e-4)
    other = shutil.copytree(base, tmp_path / "other")
    edit_json(other / "config.json", n_head=4)
    with pytest.raises(UserError, match="another config.json"):
        merge(base_model_name=other, adapter_model_name=adapter, output_name=tmp_path / "wrong")


def test_training_in_4_bit_is_merged_into_the_full_base(data, tmp_path):
    """QLoRA: its adapter learned around the rounded weights, and what is merged is base + its change, not those."""
    base = tmp_path / "base"
    tokenizer = make_tokenizer(base)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(base)
    flags = {"model_name_or_path": base, "dataset_names": data, "learning_rate": 1e-2, "load_in_4bit": True}
    adapter = run_script("sft_training", output_dir=tmp_path / "sft", **flags)
    weights = load_file(Path(adapter) / "adapter_model.safetensors")
    merged = load_file(Path(merge(adapter_model_name=adapter, output_name=tmp_path / "merged")) / "model.safetensors")
    settings = json.loads((Path(adapter) / "adapter_config.json").read_text())
    for name, weight in load_file(base / "model.safetensors").items():
        key = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{key}.lora_A.weight" in weights:
            a, b = (weights[f"{key}.lora_{side}.weight"].float() for side in "AB")
            assert b.abs().max() > 0
            weight = weight + b @ a * settings["lora_alpha"] / settings["r"]
        torch.testing.assert_close(merged[name], weight)
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=BitsAndBytesConfig(load_in_4bit=True))
    raw = logits(AutoModelForCausalLM.from_pretrained(base))
    rounding = (logits(model) - raw).abs().max()
    ours = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    difference = (ours - logits(PeftModel.from_pretrained(model, adapter))).abs().max()
    assert difference < 2 * rounding and rounding > 1e-3  # what 4 bits round away, and it was 4 bits


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_other_dtypes_are_merged_in_float32_and_rounded_once(saved, tmp_path, dtype, capsys):
    exact, half = (
        AutoModelForCausalLM.from_pretrained(
            merge(adapter_model_name=saved["sft"], output_name=tmp_path / d, dtype=d)
        ).state_dict()
        for d in ("float32", dtype)
    )
    assert all(torch.equal(half[name], exact[name].to(getattr(torch, dtype))) for name in exact)
    proof = json.loads((tmp_path / dtype / "merge.json").read_text())
    assert 1e-5 < proof["max_logit_difference"] < proof["adapter_effect"]


def test_a_change_that_the_dtype_rounds_away_is_said(base, tmp_path, capsys):
    adapter, _ = foreign(base, tmp_path / "adapter", r=1, lora_alpha=0.01)
    merge(adapter_model_name=adapter, output_name=tmp_path / "merged", dtype="bfloat16")
    assert "bfloat16 rounds away" in capsys.readouterr().out
    merge(adapter_model_name=adapter, output_name=tmp_path / "exact")
    assert "rounds away" not in capsys.readouterr().out


def test_only_an_earlier_merge_is_ever_replaced(saved, tmp_path):
    out = tmp_path / "merged"
    merge(adapter_model_name=saved["sft"], output_name=out)
    first = (out / "model.safetensors").read_bytes()
    main(make_parser().parse_args([f"--adapter_model_name={saved['dpo']}", f"--output_name={out}", "--overwrite"]))
    assert (out / "model.safetensors").read_bytes() != first and list(tmp_path.iterdir()) == [out]
    mine = shutil.copytree(saved["sft"], tmp_path / "mine")
    with pytest.raises(UserError, match="was not written by this script"):
        main(make_parser().parse_args([f"--adapter_model_name={mine}", f"--output_name={mine}", "--overwrite"]))


def test_what_a_killed_merge_left_is_removed_and_what_is_at_work_is_not(saved, tmp_path):
    dead = subprocess.Popen(["true"])
    dead.wait()
    prefix = f".merged.merging-{platform.node()}-"
    for name in (f"{prefix}{dead.pid}", f"{prefix}{os.getppid()}", ".merged.merging-elsewhere-1", ".merged.mine"):
        (tmp_path / name / "new").mkdir(parents=True)
    merge(adapter_model_name=saved["sft"], output_name=tmp_path / "merged")
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"merged", f"{prefix}{os.getppid()}", ".merged.merging-elsewhere-1", ".merged.mine"}


def test_a_place_that_cannot_be_written_is_said(saved, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write .*file/merged"):
        merge(adapter_model_name=saved["sft"], output_name=tmp_path / "file" / "merged")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_the_bases_generation_config_is_carried_over(base, tmp_path):
    """Even one that transformers finds inconsistent, as Llama 2's was."""
    other = shutil.copytree(base, tmp_path / "base")
    adapter, _ = foreign(other, tmp_path / "adapter")
    edit_json(other / "generation_config.json", temperature=0.6, top_p=0.9, do_sample=False, eos_token_id=[0, 7])
    merge(adapter_model_name=adapter, output_name=tmp_path / "merged")
    theirs = json.loads((tmp_path / "merged" / "generation_config.json").read_text())
    assert theirs["temperature"] == 0.6 and theirs["eos_token_id"] == [0, 7]


def test_a_merge_does_not_replace_what_it_reads(saved, tmp_path):
    merged = tmp_path / "merged"
    main(make_parser().parse_args(["--adapter_model_name", saved["sft"], "--output_name", str(merged)]))
    inside = shutil.copytree(saved["sft"], merged / "mine")
    again = ["--adapter_model_name", str(inside), "--output_name", str(merged), "--overwrite"]
    with pytest.raises(UserError, match="--output_name .* would write into .*mine, which is read"):
        main(make_parser().parse_args(again))
    assert (inside / "adapter_model.safetensors").exists()
