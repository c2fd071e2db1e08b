"""Answers: sampling them from a policy, reading what a policy thinks of them, scoring them with a reward model.

Prompts and answers are lists of token ids. Rows go through a model end to end without padding where it can
(flat_rows.py), and right-padded and masked by length elsewhere, never by token id: nothing depends on the padding or
on the neighbours in a batch.
"""

from contextlib import contextmanager

from flat_rows import flat_inputs, is_flat

import torch
import torch.nn.functional as F
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache

CHUNK = 2**25  # logits held at a time where no gradient needs them: 128 MB


def plain(model):
    """The transformers model inside a PeftModel, its adapters in place."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def trunk_of(model):
    """The transformer without its head, of a causal model or a sequence classifier, with its adapters."""
    model = plain(model)
    return getattr(model, model.base_model_prefix)


def right_padded(rows: list[list[int]], pad_id: int, device) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask, (rows, longest)."""
    ids = pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=pad_id)
    lengths = torch.tensor([len(row) for row in rows])
    return ids.to(device), (torch.arange(ids.shape[1]) < lengths[:, None]).long().to(device)


def last_states(model, rows: list[list[int]], pad_id: int) -> torch.Tensor:
    """The transformer's last hidden states of rows of tokens, row after row without padding: (tokens, hidden)."""
    trunk = trunk_of(model)
    if is_flat(plain(model)):
        return trunk(**flat_inputs(rows, model.device), use_cache=False).last_hidden_state[0]
    ids, mask = right_padded(rows, pad_id, model.device)
    return trunk(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state[mask.bool()]


def padded(values: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """What belongs to tokens row after row, (tokens,), as right-padded rows with 0 in the padding: (rows, longest)."""
    return pad_sequence(list(values.split(lengths)), batch_first=True)


def length_mask(lengths: list[int], device) -> torch.Tensor:
    return padded(torch.ones(sum(lengths), device=device), lengths)


def logits_of(policy, states):
    """The logits of states, in float32: (tokens, vocabulary)."""
    head = policy.get_output_embeddings()
    if type(head) is torch.nn.Linear and head.bias is None and states.device.type == "cpu":
        logits = (head.weight @ states.T).T.float()  # faster, the vocabulary being larger than the rows
    else:
        logits = head(states).float()
    cap = getattr(policy.config.get_text_config(), "final_logit_softcapping", None)
    return logits if cap is None else torch.tanh(logits / cap) * cap


def answer_states(model, prompts, answers, pad_id: int) -> torch.Tensor:
    """The last hidden states from which the answers' tokens are predicted, answer after answer: (tokens, hidden)."""
    hidden = last_states(model, [p + a for p, a in zip(prompts, answers, strict=True)], pad_id)
    start, before = 0, []
    for prompt, answer in zip(prompts, answers, strict=True):
        before += range(start + len(prompt) - 1, start + len(prompt) + len(answer) - 1)
        start += len(prompt) + len(answer)
    return hidden[torch.tensor(before, device=hidden.device)]


def read_answers(policy, prompts, answers, pad_id: int, temperature: float):
    """What a policy thinks of answers that are there already, from one forward pass.

    Returns:
        logprobs and entropies of the answers' tokens, mask, all (rows, tokens); and `answer_states`.
    """
    lengths = [len(answer) for answer in answers]
    states = answer_states(policy, prompts, answers, pad_id)
    tokens = torch.tensor([token for answer in answers for token in answer], device=states.device)
    size = len(tokens) if torch.is_grad_enabled() else max(1, CHUNK // policy.get_output_embeddings().weight.shape[0])
    parts = [
        _logprobs(logits_of(policy, some) / temperature, ids)
        for some, ids in zip(states.split(size), tokens.split(size), strict=True)
    ]
    logprobs, entropy = (padded(torch.cat(part), lengths) for part in zip(*parts, strict=True))
    return logprobs, entropy, length_mask(lengths, states.device), states


def _logprobs(logits, tokens):
    every = F.log_softmax(logits, dim=-1)
    return every.gather(-1, tokens[:, None]).squeeze(-1), -(every.exp() * every).sum(-1)


@torch.no_grad()
def generate(policy, prompts, noise, *, stop_ids, pad_id: int, temperature: float, value_head=None):
    """Sample an answer to each prompt; an answer ends with a stop token, or at full length without one.

    The sampling depends on nothing but the policy's logits, the temperature and the noise: no generation config.

    Args:
        prompts: token ids, a list for each prompt.
        noise: (prompts, response_length) uniform on [0, 1): the quantile that is drawn at each step.
        temperature: divides the logits; 0 takes the likeliest token.
        value_head: gives the values of the states from which tokens are drawn.
    Returns:
        answers (token ids, a list for each prompt), their logprobs and values, (rows, tokens), right-padded with 0.
    """
    trunk, device = trunk_of(policy), policy.device
    longest = max(map(len, prompts))
    ids = torch.tensor([[pad_id] * (longest - len(p)) + p for p in prompts], device=device)  # left-padded
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
    stops = torch.tensor(sorted(stop_ids), device=device)
    noise = noise.to(device)
    answers = [[] for _ in prompts]
    logprobs, values = torch.zeros(2, *noise.shape, device=device)
    rows = torch.arange(len(prompts), device=device)  # the prompts whose answers are not finished
    cache = DynamicCache(config=policy.config)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    for step in range(noise.shape[1]):
        hidden = trunk(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
        ).last_hidden_state[:, -1]
        every = F.log_softmax(logits_of(policy, hidden) / (temperature or 1), dim=-1)
        if temperature:
            cumulative = every.exp().cumsum(-1)
            # inverse transform sampling; times the total, which float32 leaves slightly off 1
            quantile = noise[rows, step, None] * cumulative[:, -1:]
            tokens = torch.searchsorted(cumulative, quantile, right=True).clamp(max=every.shape[-1] - 1)
        else:
            tokens = every.argmax(-1, keepdim=True)
        logprobs[rows, step] = every.gather(-1, tokens)[:, 0]
        if value_head is not None:
            values[rows, step] = value_head(hidden.float())[:, 0]
        for row, token in zip(rows.tolist(), tokens[:, 0].tolist(), strict=True):
            answers[row].append(token)
        going = (~torch.isin(tokens[:, 0], stops)).nonzero()[:, 0]
        if len(going) == 0:
            break
        if len(going) < len(rows):  # finished rows leave the batch
            cache.batch_select_indices(going)
            rows, tokens, mask, positions = rows[going], tokens[going], mask[going], positions[going]
        ids, positions = tokens, positions[:, -1:] + 1
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
    width = max(map(len, answers))
    return answers, logprobs[:, :width], values[:, :width]


@contextmanager
def merged_weights(policy):
    """The active LoRA of a PeftModel added into new tensors meanwhile: half of the small products of each step less.

    The old tensors are put back as they were: adding and subtracting would drift.
    """
    layers = [m for m in policy.modules() if isinstance(m, BaseTunerLayer)]
    before = [(layer.get_base_layer(), layer.get_base_layer().weight) for layer in layers]
    for base, weight in before:
        base.weight = torch.nn.Parameter(weight.detach().clone(), requires_grad=False)
    for layer in layers:
        layer.merge()
    try:
        yield
    finally:
        for layer, (base, weight) in zip(layers, before, strict=True):
            layer.merged_adapters.clear()
            base.weight = weight


@torch.no_grad()
def score(reward_model, rows: list[list[int]], pad_id: int) -> torch.Tensor:
    """The reward of each row of tokens by a sequence classifier, read at its last token: (rows,)."""
    return read_scores(reward_model, plain(reward_model).score, rows, pad_id)


@torch.no_grad()
def read_scores(model, head, rows: list[list[int]], pad_id: int) -> torch.Tensor:
    """The same of any model and a head (hidden -> 1) on its last hidden state."""
    ends = torch.tensor([len(row) for row in rows]).cumsum(0) - 1
    last = last_states(model, rows, pad_id)[ends.to(model.device)]
    return head(last.to(next(head.parameters()).dtype)).float().squeeze(-1)
