"""Answers do not depend on padding, neighbours or the way they are computed: `pytest tests/models/test_rollout.py`."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Gemma2Config, Gemma2ForCausalLM, Lfm2Config, Lfm2ForCausalLM, LlamaConfig, LlamaForCausalLM

from rlhf.models import fast_linear, rollout, token_logprobs
from rlhf.models.fast_linear import use_fast_linear
from rlhf.models.flat_rows import is_flat, use_flat_rows
from rlhf.models.loading import load_frozen_policy, load_tokenizer
from rlhf.models.rewards import load_reward
from rlhf.models.rollout import draw, generate, last_states, logits_of, read_answers


@pytest.fixture(scope="module")
def policy(saved):
    tokenizer = load_tokenizer(saved["sft"])
    return load_frozen_policy(saved["sft"], tokenizer), tokenizer


PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13]]


def test_an_answer_depends_neither_on_its_neighbours_nor_on_its_padding(policy):
    model, tokenizer = policy
    noise = torch.rand(3, 12, generator=torch.Generator().manual_seed(0))
    options = {"stop_ids": set(range(0, 400, 7)), "pad_id": tokenizer.pad_token_id, "temperature": 1.0}
    together, logprobs, _ = generate(model, PROMPTS, noise, **options)
    alone = [generate(model, [p], noise[i : i + 1], **options)[0][0] for i, p in enumerate(PROMPTS)]
    assert together == alone
    assert len({len(a) for a in together}) > 1  # so that rows did leave the batch
    for answer in together:
        assert not set(answer[:-1]) & options["stop_ids"]


def test_sampling_draws_the_quantile_of_the_models_own_distribution(policy):
    model, tokenizer = policy
    with torch.no_grad():
        cumulative = model(input_ids=torch.tensor([PROMPTS[0]])).logits[0, -1].div(0.7).softmax(-1).cumsum(-1)
    for quantile in (0.0, 0.3, 0.999):
        noise = torch.full((1, 1), quantile)
        options = {"stop_ids": set(), "pad_id": tokenizer.pad_token_id, "temperature": 0.7}
        [[token]], _, _ = generate(model, PROMPTS[:1], noise, **options)
        assert cumulative[token] > quantile >= (cumulative[token - 1] if token else 0)


def test_answers_are_read_as_a_plain_forward_pass_would(policy):
    model, tokenizer = policy
    answers = [[20, 21], [22], [23, 24, 25]]
    logprobs, entropy, mask, _ = read_answers(model, PROMPTS, answers, tokenizer.pad_token_id, 0.5)
    for row, (prompt, answer) in enumerate(zip(PROMPTS, answers, strict=True)):
        with torch.no_grad():
            every = (model(input_ids=torch.tensor([prompt + answer])).logits[0] / 0.5).log_softmax(-1)
        before = every[len(prompt) - 1 : -1]
        torch.testing.assert_close(logprobs[row, : len(answer)], before[range(len(answer)), answer])
        torch.testing.assert_close(entropy[row, : len(answer)], -(before.exp() * before).sum(-1))
        assert mask[row].sum() == len(answer) and not logprobs[row, len(answer) :].any()


def test_scores_do_not_depend_on_padding_and_are_read_at_the_eos(saved, policy):
    _, tokenizer = policy
    reward = load_reward(saved["reward"])
    eos = tokenizer.eos_token_id
    rows = [[5, 6, eos], [7, eos], [8, 9, 10, 11, eos]]
    together = reward.score_tokens(rows)
    alone = torch.cat([reward.score_tokens([row]) for row in rows])
    torch.testing.assert_close(together, alone)
    with torch.no_grad():  # what any other library computes with the same folder, on either padding side
        for side in ("right", "left"):
            tokenizer.padding_side = side
            batch = tokenizer.pad({"input_ids": rows}, return_tensors="pt")
            positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
            theirs = reward.model(**batch, position_ids=positions).logits[:, 0]
            torch.testing.assert_close(theirs, together)
    tokenizer.padding_side = "right"
    assert not torch.allclose(reward.score_tokens([[5, 6]]), together[:1])


def test_flat_rows_give_what_padded_rows_give(policy):
    """And a row's neighbours do not reach it: with a changed neighbour its states stay the same to the last bit."""
    model, tokenizer = policy
    flat = copy.deepcopy(model)
    use_flat_rows(flat)
    assert is_flat(flat.get_base_model()) and not is_flat(model.get_base_model())
    with torch.no_grad():
        padded, states = (last_states(m, PROMPTS, tokenizer.pad_token_id) for m in (model, flat))
        torch.testing.assert_close(states, padded, atol=1e-5, rtol=1e-5)
        changed = last_states(flat, [PROMPTS[0], [99], PROMPTS[2]], tokenizer.pad_token_id)
    assert torch.equal(changed[:3], states[:3]) and torch.equal(changed[4:], states[4:])
    assert not torch.allclose(changed[3], states[3])
    noise = torch.rand(3, 12, generator=torch.Generator().manual_seed(0))
    options = {"stop_ids": {0}, "pad_id": tokenizer.pad_token_id, "temperature": 1.0}
    (ours, logprobs, _), (theirs, others, _) = (generate(m, PROMPTS, noise, **options) for m in (flat, model))
    assert ours == theirs
    torch.testing.assert_close(logprobs, others, atol=1e-5, rtol=1e-5)


def test_a_model_that_mixes_neighbours_is_padded():
    config = Lfm2Config(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64, layer_types=["conv", "full_attention"],
    )  # fmt: skip
    model = Lfm2ForCausalLM(config)
    use_flat_rows(model)
    assert not is_flat(model)


def test_flat_rows_keep_to_a_sliding_window():
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=64
    )
    model = LlamaForCausalLM(config).eval()
    use_flat_rows(model)
    rows = [list(range(20)), list(range(5))]
    with torch.no_grad():
        whole = last_states(model, rows, 0)
        for layer in model.model.layers:
            handed = layer.self_attn.forward
            layer.self_attn.forward = lambda *a, handed=handed, **k: handed(*a, **{**k, "sliding_window": 4})
        near = last_states(model, rows, 0)
        far = last_states(model, [[63, *range(1, 20)], list(range(5))], 0)
    assert torch.allclose(near[:4], whole[:4], atol=1e-6) and not torch.allclose(near[19], whole[19], atol=1e-3)
    # two layers of a window of 4 see 6 tokens back
    assert torch.equal(far[7:20], near[7:20]) and not torch.allclose(far[6], near[6])


def test_the_decoders_logprobs_are_those_of_reading_the_answers_again(policy):
    model, tokenizer = policy
    noise = torch.rand(3, 12, generator=torch.Generator().manual_seed(1))
    options = {"pad_id": tokenizer.pad_token_id, "temperature": 0.6}
    answers, logprobs, _ = generate(model, PROMPTS, noise, stop_ids=set(range(0, 400, 7)), **options)
    with torch.no_grad():
        again = read_answers(model, PROMPTS, answers, **options)[0]
    torch.testing.assert_close(logprobs * (again != 0), again, atol=1e-5, rtol=1e-5)


def test_greedy_takes_the_likeliest_token(policy):
    model, tokenizer = policy
    options = {"stop_ids": set(), "pad_id": tokenizer.pad_token_id, "temperature": 0}
    [answer], _, _ = generate(model, PROMPTS[:1], torch.rand(1, 3), **options)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([PROMPTS[0] + answer])).logits[0]
    assert answer == logits[2:5].argmax(-1).tolist()


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("at_a_time", [2**23, 150])
def test_token_logprobs_have_the_plain_formulas_values_and_gradients(monkeypatch, at_a_time, trained):
    """Of a frozen head and of one that is trained, with a bias and without, many states at a time and three."""
    monkeypatch.setattr(token_logprobs, "AT_A_TIME", at_a_time)
    torch.manual_seed(0)
    for bias in (False, True):
        head = torch.nn.Linear(16, 50, bias=bias).requires_grad_(trained)
        torch.nn.init.normal_(head.weight)
        states, tokens = torch.randn(7, 16, requires_grad=True), torch.arange(7) * 3
        every = (head(states) / 0.7).log_softmax(-1)
        plain = every.gather(-1, tokens[:, None])[:, 0], -(every.exp() * every).sum(-1), every.argmax(-1) == tokens
        ours = token_logprobs.token_logprobs(head, states, tokens, 0.7)
        at, weights = [states, *(p for p in head.parameters() if trained)], torch.linspace(-1, 1, 7)
        grads = [torch.autograd.grad((logprobs * weights).sum(), at) for logprobs in (plain[0], ours.logprobs)]
        for a, b in zip((*plain, *grads[0]), (*ours, *grads[1]), strict=True):
            torch.testing.assert_close(b, a)
        with torch.no_grad():
            assert torch.equal(token_logprobs.token_logprobs(head, states, tokens, 0.7).logprobs, ours.logprobs)


@pytest.mark.parametrize("products", ["packed", "oneDNN", "plain"])
@pytest.mark.parametrize("dora", [False, True])
def test_fast_lora_is_pefts_lora(policy, dora, products, monkeypatch):
    """Values and gradients of a GPT-2 (Conv1D) and a Llama (Linear, no biases), with the adapter on and off, with and
    without copies of the weights, where torch has oneDNN's products and where it has not; DoRA is left to PEFT."""
    if products != "plain" and not fast_linear.ONEDNN:
        pytest.skip("torch has no oneDNN here")
    monkeypatch.setattr(fast_linear, "ONEDNN", products != "plain")
    torch.manual_seed(0)
    llama = LlamaForCausalLM(
        LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=64)
    )
    for base in (llama, copy.deepcopy(policy[0]).merge_and_unload()):
        config = LoraConfig(target_modules="all-linear", init_lora_weights=False, use_dora=dora, use_rslora=True)
        model = get_peft_model(base, config)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        ids, results = torch.arange(12).view(2, 6), []
        states = torch.randn(5, 32, requires_grad=True)
        for _ in range(2):
            model.zero_grad()
            logits = model(input_ids=ids).logits
            logits.square().mean().backward()
            with torch.no_grad():
                unread = model(input_ids=ids).logits
                with model.disable_adapter():
                    off = model(input_ids=ids).logits
            head = logits_of(model, states, 0.7)
            (head_grad,) = torch.autograd.grad(head.square().mean(), states)
            grads = [p.grad for p in model.parameters() if p.requires_grad]
            results.append([logits.detach(), unread, off, head.detach(), head_grad, *grads])
            use_fast_linear(model, pack=products == "packed")
        for theirs, ours in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_B" in name)
            parameter.grad = None
        model(input_ids=ids).logits.square().mean().backward()
        assert all((p.grad is not None) == ("lora_B" in name) for name, p in model.named_parameters())
        assert not torch.allclose(results[1][1], results[1][2], atol=1e-3)
        fast = [m for m in model.modules() if "forward" in vars(m)]
        assert bool(fast) != dora and hasattr(model.get_output_embeddings(), "packed_weight") == (products == "packed")
        after = model.state_dict()
        assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in after)


def test_only_the_likeliest_tokens_are_drawn():
    probabilities, every = torch.tensor([[0.1, 0.4, 0.2, 0.3]]).expand(100, 4), (torch.arange(100) / 100)[:, None]
    wanted = {(0.6, None): {1, 3}, (1.0, 3): {1, 2, 3}, (0.01, None): {1}, (0.7, 2): {1, 3}}
    for (top_p, top_k), kept in wanted.items():
        assert set(draw(probabilities, every, top_p, top_k)[:, 0].tolist()) == kept


def test_capped_logits_are_few_at_a_time_where_nothing_is_trained(monkeypatch):
    """A large vocabulary times all answers of a batch would not fit; the values are those of all at once."""
    config = Gemma2Config(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, vocab_size=64, final_logit_softcapping=1.0,
    )  # fmt: skip
    model = Gemma2ForCausalLM(config).eval()
    asked = model, [[3, 4, 5], [6]], [[7, 8, 9], [10, 11]], 0, 0.7
    whole, most, capped = read_answers(*asked), [], rollout.logits_of
    monkeypatch.setattr(
        rollout, "logits_of", lambda policy, some, t: most.append(len(some)) or capped(policy, some, t)
    )
    monkeypatch.setattr(token_logprobs, "AT_A_TIME", 128)
    with torch.no_grad():
        few = read_answers(*asked)
    assert most == [2, 2, 1]
    for a, b in zip(whole, few, strict=True):
        torch.testing.assert_close(a, b)
