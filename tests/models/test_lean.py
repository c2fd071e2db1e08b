"""The same numbers with less: rows end to end, LoRA and labelled tokens alone, in every family of models."""

import copy

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from trl.trainer.utils import add_fused_lm_head

from rlhf.models import fast_linear, flat_rows
from rlhf.models.flat_rows import RowAttention, is_flat, on_gpu, trunk_of
from rlhf.models.lean import use_lean
from rlhf.models.rollout import plain
from tests.models.test_architectures import FAMILIES

CPU = torch.device("cpu")
LENGTHS = [5, 24, 1, 17]  # beyond the sliding window of 16


def padded_batch():
    torch.manual_seed(1)
    mask = (torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]).long()
    return {"input_ids": torch.randint(3, 60, mask.shape) * mask, "attention_mask": mask}


def model_of(family, auto_class, task):
    config_class, settings, _, _ = FAMILIES[family]
    config = getattr(transformers, config_class)(
        **{"vocab_size": 64, **settings, "initializer_range": 0.2}, pad_token_id=0, num_labels=1
    )
    torch.manual_seed(0)
    model = auto_class.from_config(config)
    if task == "CAUSAL_LM":
        add_fused_lm_head(model, outputs=("log_probs", "entropy", "mean_logits", "is_top1"))
    model = get_peft_model(model, LoraConfig(task_type=task, target_modules="all-linear", init_lora_weights=False))
    return model.eval()  # no dropout, which would be drawn otherwise


CASES = [(family, task) for family in FAMILIES for task in ("CAUSAL_LM", "SEQ_CLS")]


@pytest.mark.parametrize(("family", "task"), [case for case in CASES if case != ("granite", "SEQ_CLS")])
def test_a_lean_model_gives_what_a_padded_one_gives(family, task):
    """Values and gradients to 1e-5; and a row's neighbours do not reach it."""
    auto_class = AutoModelForCausalLM if task == "CAUSAL_LM" else AutoModelForSequenceClassification
    model, batch = model_of(family, auto_class, task), padded_batch()
    lean = copy.deepcopy(model)
    use_lean(lean, CPU, half=False)
    flat = family != "gemma2"  # caps its attention, which torch's kernels do not: rows are padded, LoRA is ours
    assert is_flat(plain(lean)) == flat and not is_flat(plain(model))
    asked = dict(batch)
    if task == "CAUSAL_LM":
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        labels[1, :10] = -100  # a prompt
        asked |= {"labels": labels, "fused_lm_head": True}
    results = []
    for one in (model, lean):
        output = one(**asked)
        of_tokens = output.log_probs if task == "CAUSAL_LM" else output.logits
        (of_tokens * torch.linspace(-1, 1, of_tokens.numel()).view(of_tokens.shape)).sum().backward()
        found = [of_tokens]
        if task == "CAUSAL_LM":
            found += [output.entropy, output.mean_logits * output.label_mask, output.is_top1, output.label_mask]
        results.append([*found, *(p.grad for p in one.parameters() if p.requires_grad and p.grad is not None)])
    for theirs, ours in zip(*results, strict=True):
        scale = max(1.0, theirs.abs().max().item()) if theirs.dtype == torch.float32 else 1.0
        torch.testing.assert_close(ours, theirs, atol=1e-5 * scale, rtol=1e-5)
    with torch.no_grad():
        other = dict(asked, input_ids=asked["input_ids"].clone())
        other["input_ids"][1, 3] += 1
        before, after = (
            output.log_probs if task == "CAUSAL_LM" else output.logits for output in (lean(**asked), lean(**other))
        )
    rest = [0, 2, 3]
    assert (not flat or torch.equal(before[rest], after[rest])) and not torch.allclose(before[1], after[1], atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_bfloat16_on_a_cpu_computes_what_padding_does(family):
    """Autocast leaves rotary queries and keys in float32, and values not."""
    model, batch = model_of(family, AutoModelForSequenceClassification, "SEQ_CLS"), padded_batch()
    lean = copy.deepcopy(model)
    use_lean(lean, CPU, half=True)
    assert is_flat(plain(lean))
    with torch.autocast("cpu", torch.bfloat16):
        theirs, ours = (one(**batch, use_cache=False).logits for one in (model, lean))
    ours.sum().backward()
    torch.testing.assert_close(ours, theirs, atol=0.05 * theirs.abs().max().item(), rtol=0)


MOE = dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4)
MOE |= {"moe_intermediate_size": 16, "num_experts_per_tok": 2}
MLA = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 12}
OTHERS = [  # config class, settings, and whether its rows can lie end to end
    ("Nemotron", {}, False),  # its attention does not hear of the rows
    ("Qwen2Moe", MOE | {"use_sliding_window": True, "sliding_window": 8}, False),  # nor, here, of its window
    ("Doge", {"num_experts": 4}, False),  # a bias of its own in the mask
    ("Bert", {}, True),  # attends to what follows
    ("Phimoe", MOE | {"sliding_window": 8}, False),
    ("Mistral", {"sliding_window": 8}, True),
    ("DeepseekV3", MOE | MLA | {"num_key_value_heads": 4, "n_group": 1, "topk_group": 1}, True),  # narrower values
]


@pytest.mark.parametrize(("family", "settings", "flat"), OTHERS, ids=[case[0] for case in OTHERS])
def test_rows_lie_end_to_end_only_where_a_model_computes_the_same_so(family, settings, flat):
    config_class, llama = getattr(transformers, f"{family}Config"), FAMILIES["llama"][1]
    config = config_class(**{**llama, "vocab_size": 64, "initializer_range": 0.2, "pad_token_id": 0, **settings})
    torch.manual_seed(0)
    model, batch = AutoModelForCausalLM.from_config(config).eval(), padded_batch()
    for name, parameter in model.named_parameters():
        if name.endswith("self_attn.A"):  # Doge's, which trains away from 0
            nn.init.constant_(parameter, 1.0)
    mask, lean = batch["attention_mask"].bool(), copy.deepcopy(model)
    use_lean(lean, CPU, half=False)
    assert is_flat(lean) == flat
    with torch.no_grad():
        theirs, ours = (trunk_of(one)(**batch, use_cache=False).last_hidden_state[mask] for one in (model, lean))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("heads", "drop"), [(4, 0.3), (2, 0.3), (2, 0.0)])
def test_attention_of_rows_has_the_right_gradient(heads, drop):
    """By finite differences in float64, with the same numbers dropped; two heads of keys for four of queries too."""
    torch.manual_seed(0)
    shapes = [(1, 4, sum(LENGTHS), 8)] + [(1, heads, sum(LENGTHS), 8)] * 2
    states = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]

    def attend(*states):
        torch.manual_seed(1)
        return RowAttention.apply(*states, LENGTHS, 8**-0.5, drop)

    assert torch.autograd.gradcheck(attend, states, fast_mode=True)
    plain = torch.cat(
        [
            nn.functional.scaled_dot_product_attention(*row, is_causal=True, enable_gqa=True)
            for row in zip(*(s.split(LENGTHS, dim=2) for s in states), strict=True)
        ],
        dim=2,
    ).transpose(1, 2)
    with torch.no_grad():
        mean = torch.stack([RowAttention.apply(*states, LENGTHS, 8**-0.5, drop) for _ in range(400)]).mean(0)
    assert (mean - plain).abs().max() < (0.25 if drop else 1e-9)


@pytest.mark.parametrize(("heads", "window"), [(4, None), (2, None), (4, 4)])
def test_attention_on_a_gpu_is_asked_for_the_same(heads, window, monkeypatch):
    """torch's kernel by a stand-in that does what its documentation says: no GPU is here to run it."""

    def stand_in(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size, enable_gqa):
        assert query.shape == (sum(LENGTHS), 4, 8) and key.shape == value.shape == (sum(LENGTHS), heads, 8)
        assert cu_seq_q.dtype == torch.int32 and cu_seq_q.tolist() == cu_seq_k.tolist() == [0, 5, 29, 30, 47]
        assert max_q == max_k == 24 and enable_gqa == (heads != 4) and window_size[1] == 0
        rows = []
        for start, end in zip(cu_seq_q, cu_seq_q[1:], strict=False):
            q, k, v = (states[start:end].transpose(0, 1)[None] for states in (query, key, value))
            near = torch.ones(end - start, end - start, dtype=torch.bool).tril()
            near = near if window_size[0] < 0 else near.triu(-window_size[0])
            row = nn.functional.scaled_dot_product_attention(q, k, v, near, scale=scale, enable_gqa=enable_gqa)
            rows.append(row[0].transpose(0, 1))
        return torch.cat(rows)

    monkeypatch.setattr(flat_rows, "varlen_attn", stand_in)
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, n, sum(LENGTHS), 8) for n in (4, heads, heads))
    asked = on_gpu(query, key, value, LENGTHS, window, 0.3)
    module = nn.Module()
    module.num_key_value_groups, module.is_causal = 4 // heads, True
    ours, _ = flat_rows.flat_attention(
        module, query, key, value, None, row_lengths=LENGTHS, sliding_window=window, scaling=0.3
    )
    torch.testing.assert_close(asked, ours)


def test_a_gpus_attention_gets_16_bits_where_rotary_positions_were_float32(monkeypatch):
    kinds = []
    query, value = torch.randn(1, 4, 5, 8), torch.randn(1, 4, 5, 8, dtype=torch.bfloat16)
    monkeypatch.setattr(flat_rows, "varlen_attn", lambda q, k, v, *_, **__: kinds.extend((q.dtype, k.dtype)) or v)
    assert on_gpu(query, query, value, [2, 3], None, 1.0).dtype == torch.bfloat16 and set(kinds) == {torch.bfloat16}


@pytest.mark.parametrize("onednn", [False, True])
def test_lora_with_dropout_drops_what_peft_drops(onednn, monkeypatch):
    if onednn and not fast_linear.ONEDNN:
        pytest.skip("torch has no oneDNN here")
    monkeypatch.setattr(fast_linear, "ONEDNN", onednn)
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 8))
    config = LoraConfig(target_modules=["0", "2"], init_lora_weights=False, lora_dropout=0.4)
    model, results = get_peft_model(base, config).train(), []
    for layer in (None, *(m for m in model.modules() if fast_linear.is_plain_lora(m))):
        if layer is not None:
            layer.forward = fast_linear.MethodType(fast_linear.lora_forward, layer)
        x = torch.randn(32, 16, generator=torch.Generator().manual_seed(3)).requires_grad_()
        model.zero_grad()
        torch.manual_seed(7)
        y = model(x)
        y.square().sum().backward()
        results.append([y.detach(), x.grad, *(p.grad for p in model.parameters() if p.requires_grad)])
    for ours in results[1:]:
        for one, theirs in zip(ours, results[0], strict=True):
            torch.testing.assert_close(one, theirs, rtol=1e-4, atol=1e-4)
    model.eval()
    assert not torch.allclose(model(x), results[0][0], atol=1e-2)


def test_what_dpo_weights_pairs_by_is_scored_as_trl_does():
    """`use_weighting` asks for sums over the vocabulary, which ours does not make."""
    config = transformers.LlamaConfig(**FAMILIES["llama"][1], vocab_size=64)
    model, batch = AutoModelForCausalLM.from_config(config).eval(), padded_batch()
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "mean_logits", "is_top1", "log_sum_sq_probs"))
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    asked = batch | {"labels": labels, "fused_lm_head": True}
    with torch.no_grad():
        theirs = model(**asked).log_sum_sq_probs
        use_lean(model, CPU, half=False)
        torch.testing.assert_close(model(**asked).log_sum_sq_probs, theirs, atol=1e-5, rtol=1e-5)


def test_adapted_embeddings_have_a_size_too():
    config = transformers.LlamaConfig(**FAMILIES["llama"][1], vocab_size=64)
    model = AutoModelForCausalLM.from_config(config)
    add_fused_lm_head(model)
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=["embed_tokens", "q_proj"]))
    use_lean(model, CPU, half=False)
    assert is_flat(plain(model))
