"""Every stage on every family of models, as it comes from the hub: `pytest tests/models/test_architectures.py`."""

from pathlib import Path

import pytest
import torch
import transformers
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from transformers.pytorch_utils import Conv1D

from merge_peft_adapter import main, make_parser
from rlhf.models.loading import load_frozen_policy, load_tokenizer, resolve_adapters
from rlhf.models.rewards import load_reward
from rlhf.models.rollout import generate, read_answers
from rlhf.user_error import UserError
from tests.conftest import make_tokenizer, run_script

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}{{ '<start_of_turn>' + m['role'] + '\\n' + m['content'] }}"
    "{{ '<end_of_turn>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>assistant\\n' }}{% endif %}"
)
LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
}
# name: (config class, settings, special tokens, chat template); embeddings tied or not, as the family's models are
FAMILIES = {
    "gpt2": ("GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 128}, {}, None),
    "opt": (  # as opt-350m: embeddings narrower than the layers, a pad token of its own; dropout by a number
        "OPTConfig",
        {**LLAMA, "ffn_dim": 48, "word_embed_proj_dim": 16, "do_layer_norm_before": False},
        {"pad_token": "<pad>", "bos_token": "</s>", "eos_token": "</s>"},
        None,
    ),
    "pythia": ("GPTNeoXConfig", {**LLAMA, "tie_word_embeddings": False, "vocab_size": 448}, {}, None),
    "llama": (
        "LlamaConfig",
        {**LLAMA, "tie_word_embeddings": False},
        {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
        None,
    ),
    "qwen3": (
        "Qwen3Config",
        {**LLAMA, "tie_word_embeddings": True},
        {"additional_special_tokens": ["<|im_start|>", "<|im_end|>"], "pad_token": "<|endoftext|>"},
        CHATML,
    ),
    "smollm": (  # pad is the end of a turn, as SmolLM2-Instruct ships it
        "LlamaConfig",
        {**LLAMA, "tie_word_embeddings": True},
        {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"},
        CHATML,
    ),
    "gemma3": (
        "Gemma3TextConfig",
        {
            **LLAMA,
            "tie_word_embeddings": True,
            "sliding_window": 16,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        {
            "bos_token": "<bos>",
            "eos_token": "<eos>",
            "pad_token": "<pad>",
            "additional_special_tokens": ["<start_of_turn>", "<end_of_turn>"],
        },
        GEMMA,
    ),
    "gemma2": (  # soft-caps its logits
        "Gemma2Config",
        {**LLAMA, "tie_word_embeddings": True, "sliding_window": 16, "final_logit_softcapping": 1.0},
        {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"},
        None,
    ),
    "granite": ("GraniteConfig", {**LLAMA, "logits_scaling": 8.0}, {}, None),
}

QUICK = {"max_steps": 1, "eval_strategy": "no", "eval_on_start": False}


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Without what each run does beside training, which takes longer than that here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rlhf.runs.log.draw_curves", lambda *paths: None)
        patch.setattr("gc.collect", lambda *generation: 0)
        yield


def make_base(folder, family):
    """A random model of a family, as it would come from the hub."""
    config_class, settings, special, template = FAMILIES[family]
    tokenizer = make_tokenizer(folder)
    tokenizer.add_special_tokens(special)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    config = getattr(transformers, config_class)(
        **{"vocab_size": len(tokenizer), **settings},
        initializer_range=0.2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module", params=[name for name in FAMILIES if name != "granite"])
def stages(request, tmp_path_factory, data):
    """The folders of one run of each stage on a family's model, and its base."""
    root = tmp_path_factory.mktemp(request.param)
    flags = {
        "dataset_names": data,
        "learning_rate": 1e-2,
        "max_steps": 1,
        "eval_strategy": "no",
        "eval_on_start": False,
    }
    folders = {stage: str(root / stage) for stage in ("base", "sft", "reward", "dpo", "ppo")}
    make_base(Path(folders["base"]), request.param)
    run_script("sft_training", model_name_or_path=folders["base"], output_dir=folders["sft"], **flags)
    flags["model_name_or_path"] = folders["sft"]
    run_script("reward_modeling", output_dir=folders["reward"], **flags)
    run_script("dpo_training", output_dir=folders["dpo"], **flags)
    ppo = {"reward_model_name_or_path": folders["reward"], "response_length": 8}
    run_script("ppo_training", output_dir=folders["ppo"], **ppo, **flags)
    return folders


def load_plain(folder, stage):
    """A full model with plain transformers."""
    if stage == "reward":
        return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
    return AutoModelForCausalLM.from_pretrained(folder)


def logits(model, length=24):
    ids = torch.arange(3, 3 + length)[None]
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


def merge(**flags):
    main(make_parser().parse_args([f"--{key}={value}" for key, value in flags.items()]))
    return flags["output_name"]


def test_each_stage_adapts_all_linear_layers_but_the_head(stages):
    linear = {
        name
        for name, module in AutoModelForCausalLM.from_pretrained(stages["base"]).named_modules()
        if isinstance(module, (torch.nn.Linear, Conv1D)) and not name.endswith(("lm_head", "embed_out"))
    }
    for stage in ("sft", "reward", "dpo", "ppo"):
        model = PeftModel.from_pretrained(load_plain(stages["base"], stage), stages[stage])
        adapted = {
            n.removesuffix(".lora_A") for n, _ in model.base_model.model.named_modules() if n.endswith("lora_A")
        }
        assert adapted == linear, stage
        assert resolve_adapters(stages[stage]) == (stages["base"], [stages[stage]])


@pytest.mark.parametrize("stage", ["sft", "dpo", "ppo", "reward"])
def test_a_merged_stage_is_its_adapter_model_as_plain_peft_loads_it(stages, stage, tmp_path):
    merged = merge(adapter_model_name=stages[stage], output_name=tmp_path / "merged")
    base, model = load_plain(stages["base"], stage), load_plain(merged, stage)
    before = logits(base)
    theirs = logits(PeftModel.from_pretrained(base, stages[stage]))
    torch.testing.assert_close(logits(model), theirs, atol=1e-4, rtol=1e-4)
    assert (theirs - before).abs().max() > 1e-3
    assert model.config.tie_word_embeddings == base.config.tie_word_embeddings
    tokenizer, ours = AutoTokenizer.from_pretrained(merged), load_tokenizer(stages["sft"])
    assert tokenizer.chat_template == ours.chat_template is not None
    assert model.config.pad_token_id == tokenizer.pad_token_id == ours.pad_token_id
    assert tokenizer.pad_token_id not in (tokenizer.eos_token_id, tokenizer.bos_token_id)
    if stage != "reward":
        stops = model.generation_config.eos_token_id
        assert tokenizer.eos_token_id in (stops if isinstance(stops, list) else [stops])


def test_a_merge_that_rounds_its_weights_proves_itself_too(stages, tmp_path):
    """What is computed at each load, as rotary frequencies are, is not rounded with them."""
    merge(adapter_model_name=stages["sft"], output_name=tmp_path / "merged", dtype="bfloat16")


def test_scores_and_logprobs_do_not_depend_on_batch_or_padding_side(stages):
    tokenizer = load_tokenizer(stages["sft"])
    reward, policy = load_reward(stages["reward"]), load_frozen_policy(stages["ppo"], tokenizer)
    pad, rows = tokenizer.pad_token_id, [[5, 6, 7, 8, 9, 10, 11, 12], [20, 21, 22], [30, 31, 32, 33, 34]]
    alone = torch.cat([reward.score_tokens([row]) for row in rows])
    torch.testing.assert_close(reward.score_tokens(rows), alone, atol=1e-5, rtol=1e-4)
    for side in ("right", "left"):  # as any user of transformers would score
        batch = tokenizer.pad({"input_ids": rows}, padding_side=side, return_tensors="pt")
        if side == "left":
            batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
        with torch.no_grad():
            torch.testing.assert_close(reward.model(**batch).logits[:, 0].float(), alone, atol=1e-5, rtol=1e-4)
    with torch.no_grad():
        together = read_answers(policy, rows, [row[::-1] for row in rows], pad, 1.0)[0]
        for i, row in enumerate(rows):
            one = read_answers(policy, [row], [row[::-1]], pad, 1.0)[0][0]
            torch.testing.assert_close(together[i, : len(row)], one, atol=1e-4, rtol=1e-4)


def test_left_padded_sampling_draws_what_each_prompt_would_draw_alone(stages):
    tokenizer = load_tokenizer(stages["sft"])
    policy = load_frozen_policy(stages["ppo"], tokenizer)
    prompts = [[5, 6, 7, 8, 9, 10, 11, 12], [20, 21], [30, 31, 32, 33, 34]]
    noise = torch.rand(3, 24, generator=torch.Generator().manual_seed(1))  # beyond the sliding window of 16
    options = {"stop_ids": {tokenizer.eos_token_id}, "pad_id": tokenizer.pad_token_id, "temperature": 1.0}
    together, _, _ = generate(policy, prompts, noise, **options)
    assert together == [generate(policy, [p], noise[i, None], **options)[0][0] for i, p in enumerate(prompts)]
    for prompt, answer, quantiles in zip(prompts, together, noise, strict=True):
        with torch.no_grad():  # the whole model, without cache and padding
            probabilities = policy(input_ids=torch.tensor([prompt + answer])).logits[0].float().softmax(-1).cumsum(-1)
        for step, token in enumerate(answer):
            upto = probabilities[len(prompt) + step - 1]
            assert upto[token] >= quantiles[step] - 1e-4 and (token == 0 or upto[token - 1] <= quantiles[step] + 1e-4)


def test_ppo_refuses_logits_that_it_would_get_wrong(tmp_path, data):
    """Granite divides its logits after the head."""
    base = make_base(tmp_path / "granite", "granite")
    (tmp_path / "rewards.py").write_text("def nothing(prompts, **_):\n    return [0.0] * len(prompts)\n")
    flags = {"dataset_names": data, "model_name_or_path": base, **QUICK}
    with pytest.raises(UserError, match="granite changes its logits after the output layer"):
        run_script(
            "ppo_training",
            output_dir=tmp_path / "ppo",
            reward_model_name_or_path=f"{tmp_path}/rewards.py:nothing",
            response_length=8,
            **flags,
        )
