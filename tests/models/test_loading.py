"""Names to models: adapters continued, heads kept, stages that fit together: `pytest tests/models/test_loading.py`."""

import json
import shutil
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertLMHeadModel,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
)

from rlhf.models.loading import (
    load_frozen_policy,
    load_policy,
    load_reward_model,
    load_tokenizer,
    new_reward_model,
    read_tokenizer,
    resolve_model,
)
from rlhf.models.rewards import load_reward
from rlhf.runs.arguments import ModelArguments
from rlhf.user_error import UserError
from tests.conftest import make_tokenizer


def arguments(name, **kwargs):
    return ModelArguments(model_name_or_path=str(name), **kwargs)


def logits(model, ids=(5, 6, 7, 8)):
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor([ids])).logits


@pytest.fixture
def copied(saved, tmp_path):
    """A copy of a stage's folder that a test may spoil."""
    return lambda stage: shutil.copytree(saved[stage], tmp_path / stage)


def test_an_adapter_folder_is_one_lora_on_a_base_that_is_no_adapter(saved, base):
    for stage in ("sft", "reward", "dpo", "ppo"):
        assert resolve_model(saved[stage]) == (base, saved[stage])


def test_a_policy_stage_continues_the_adapter_and_a_full_model_gets_a_new_one(saved, base):
    tokenizer = load_tokenizer(saved["sft"])
    policy, config = load_policy(arguments(saved["sft"]), tokenizer, 0)
    assert config is None and all("default" in n for n, p in policy.named_parameters() if p.requires_grad)
    torch.testing.assert_close(logits(policy), logits(load_frozen_policy(saved["sft"], tokenizer)))
    plain, config = load_policy(arguments(base), tokenizer, 0)
    assert config.target_modules == "all-linear" and config.task_type == "CAUSAL_LM"
    assert (logits(plain) - logits(policy)).abs().max() > 1e-3


def test_a_reward_model_starts_from_the_sft_trunk_with_a_seeded_head(saved, base):
    tokenizer = load_tokenizer(saved["sft"])
    models = [new_reward_model(arguments(saved["sft"]), tokenizer, seed)[0] for seed in (1, 1, 2)]
    heads = [model.get_base_model().score.modules_to_save["default"].weight for model in models]
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])
    policy, _ = load_policy(arguments(saved["sft"]), tokenizer, 0)
    ids = {"input_ids": torch.tensor([[5, 6, 7]])}
    with torch.no_grad():
        ours = models[0].eval().get_base_model().transformer(**ids).last_hidden_state
        theirs = policy.eval().get_base_model().transformer(**ids).last_hidden_state
    torch.testing.assert_close(ours, theirs)


def test_a_trained_head_is_loaded_and_a_missing_one_is_refused(saved, base, copied):
    tokenizer = load_tokenizer(saved["sft"])
    assert load_reward_model(saved["reward"], tokenizer).config.num_labels == 1
    with pytest.raises(UserError, match="no trained `score` head"):
        load_reward_model(saved["sft"], tokenizer)
    with pytest.raises(UserError, match="labels|no trained head"):
        load_reward_model(base, load_tokenizer(base))
    headless = copied("reward")
    weights = {k: v for k, v in load_file(headless / "adapter_model.safetensors").items() if "score" not in k}
    save_file(weights, headless / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="no trained `score` head"):
        load_reward_model(str(headless), tokenizer)


def test_a_reward_model_of_another_template_gets_the_text(saved, copied):
    other = copied("reward")
    (other / "chat_template.jinja").write_text((other / "chat_template.jinja").read_text().replace("Human", "User"))
    assert not load_reward(str(other), load_tokenizer(saved["sft"])).same_tokens


def test_a_reward_model_is_no_policy(saved):
    with pytest.raises(UserError, match="is a reward model"):
        load_policy(arguments(saved["reward"]), load_tokenizer(saved["sft"]), 0)


def test_what_only_loads_as_a_policy_is_none(tmp_path):
    """Encoders see the words that follow; a reward model has another head."""
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    made = {
        "is an encoder": BertLMHeadModel(BertConfig(vocab_size=400, **shape)),
        "a head of its own, score.weight": GPT2ForSequenceClassification(
            GPT2Config(vocab_size=400, n_embd=16, n_layer=1, n_head=2, num_labels=1)
        ),
        None: BertLMHeadModel(BertConfig(vocab_size=400, is_decoder=True, **shape)),
    }
    for i, (says, model) in enumerate(made.items()):
        make_tokenizer(tmp_path / str(i))
        model.save_pretrained(tmp_path / str(i))
        tokenizer = load_tokenizer(str(tmp_path / str(i)))
        for load in (load_frozen_policy, lambda name, t: load_policy(arguments(name), t, 0)):
            with pytest.raises(UserError, match=says) if says else nullcontext():
                load(str(tmp_path / str(i)), tokenizer)
    with pytest.raises(UserError, match="BertForSequenceClassification. has no `score`"):
        new_reward_model(arguments(tmp_path / "0"), tokenizer, 0)


@pytest.mark.parametrize(("flags", "says"), [({"lora_r": 4}, "--lora_r 4"), ({"use_peft": False}, "merge it before")])
def test_lora_flags_that_contradict_the_adapter_are_refused(saved, flags, says):
    with pytest.raises(UserError, match=says):
        load_policy(arguments(saved["sft"], **flags), load_tokenizer(saved["sft"]), 0)


def test_a_chain_of_adapters_is_refused_with_the_command_that_merges_it(saved, copied):
    second = copied("dpo")
    config = json.loads((second / "adapter_config.json").read_text())
    (second / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": saved["sft"]}))
    with pytest.raises(UserError, match="python merge_peft_adapter.py --adapter_model_name="):
        load_policy(arguments(second), load_tokenizer(saved["sft"]), 0)


def test_a_base_that_is_not_there_is_named(copied):
    orphan = copied("sft")
    config = json.loads((orphan / "adapter_config.json").read_text())
    (orphan / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "/nowhere/base"}))
    with pytest.raises(UserError, match="/nowhere/base, the base of .*: no such model folder"):
        load_policy(arguments(orphan), load_tokenizer(str(orphan)), 0)


def test_the_tokenizer_of_an_adapter_folder_is_its_own(saved, base):
    ours = load_tokenizer(saved["dpo"])
    assert read_tokenizer(base).chat_template is None and ours.chat_template
    assert ours.pad_token_id == load_tokenizer(saved["sft"]).pad_token_id != ours.eos_token_id


ELSEWHERE = """
import sys, torch
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM
folder, base, out = sys.argv[1:]
models = (
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder),
    AutoPeftModelForCausalLM.from_pretrained(folder),
    AutoModelForCausalLM.from_pretrained(folder),
)
with torch.no_grad():
    torch.save([model.eval()(input_ids=torch.tensor([[5, 6, 7, 8]])).logits for model in models], out)
"""


def test_other_libraries_load_our_folders_with_the_same_logits_in_another_process(saved, base, tmp_path):
    """Plain PEFT and plain transformers, as a user would call them, without a line of ours."""
    subprocess.run([sys.executable, "-c", ELSEWHERE, saved["ppo"], base, tmp_path / "logits.pt"], check=True)
    ours = logits(load_frozen_policy(saved["ppo"], load_tokenizer(saved["ppo"])))
    for theirs in torch.load(tmp_path / "logits.pt"):
        torch.testing.assert_close(theirs, ours)


def test_4_bit_training_has_the_same_gradients_after_an_evaluation(base, tmp_path):
    """bitsandbytes repacks weights for a CPU with AVX512-BF16 at a forward in eval mode; gradients ended there."""
    torch.manual_seed(0)
    tokenizer = load_tokenizer(base)
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    policy, peft_config = load_policy(
        ModelArguments(model_name_or_path=str(tmp_path), load_in_4bit=True), tokenizer, 0
    )
    model = get_peft_model(policy, peft_config)
    ids, gradients = torch.arange(12)[None], []
    for parameter in (p for p in model.parameters() if p.requires_grad):
        parameter.data += 0.01
    for _ in range(2):
        torch.manual_seed(1)  # dropout's
        model.train().zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
        with torch.no_grad():
            model.eval()(input_ids=ids)
    assert len(gradients[0]) == 28 and all(torch.equal(*pair) for pair in zip(*gradients, strict=True))
