"""Merging is exact, of the right class, onto the right base, or not at all: `pytest tests/test_merge_peft_adapter.py`."""

import json
import shutil

import merge_peft_adapter
from merge_peft_adapter import main, make_parser
from modeling import load_frozen_policy, load_reward_model, load_tokenizer
from user_error import UserError

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

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
    assert proof["base"] == base and proof["max_logit_difference"] < 1e-4 * max(1, proof["max_logit"])


def test_the_dpo_result_holds_sft_too(saved, base, tmp_path):
    """The old way, DPO's own change merged onto the raw base without SFT, is another model."""
    merged = logits(AutoModelForCausalLM.from_pretrained(merge(adapter_model_name=saved["dpo"], output_name=tmp_path / "m")))
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
    merged = merge(adapter_model_name=f"{saved['sft']},{saved['dpo']}", weights="0.25,0.75", output_name=tmp_path / "sum")
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
    monkeypatch.setattr(merge_peft_adapter, "TOLERANCE", {"float32": -1.0})
    with pytest.raises(UserError, match="not the adapter model"):
        merge(adapter_model_name=saved["sft"], output_name=tmp_path / "merged")
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_is_no_adapter_is_refused(base, tmp_path):
    with pytest.raises(UserError, match="is no adapter"):
        merge(adapter_model_name=base, output_name=tmp_path / "merged")
