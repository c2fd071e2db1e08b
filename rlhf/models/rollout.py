"""Answers: sampling them from a policy, reading what a policy thinks of them, scoring them with a reward model.

Prompts and answers are lists of token ids. Rows go through a model end to end without padding where it can
(flat_rows.py), and right-padded and masked by length elsewhere, never by token id: nothing depends on the padding or
on the neighbours in a batch.
"""

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from rlhf.models.fast_linear import product
from rlhf.models.flat_rows import flat_inputs, is_flat, plain, trunk_of
from rlhf.models.token_logprobs import parts, token_logprobs

TINY = torch.finfo(torch.float32).tiny  # a token less likely than e^-87 counts as that


def stop_ids(policy, tokenizer) -> list[int]:
    """The tokens that end an answer: the tokenizer's EOS, and what the model itself stops with."""
    own = policy.generation_config.eos_token_id
    own = own if isinstance(own, list) else [own]
    return [token for token in dict.fromkeys([tokenizer.eos_token_id, *own]) if token is not None]


def right_padded(rows: list[list[int]], pad_id: int, device) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask, (rows, longest)."""
    ids = pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=pad_id)
    lengths = torch.tensor([len(row) for row in rows])
    return ids.to(device), (torch.arange(ids.shape[1]) < lengths[:, None]).long().to(device)


def end_to_end(rows: list[list[int]], device) -> dict:
    return flat_inputs(
        torch.tensor([token for row in rows for token in row], device=device), [len(row) for row in rows]
    )


def last_states(model, rows: list[list[int]], pad_id: int) -> torch.Tensor:
    """The transformer's last hidden states of rows of tokens, row after row without padding: (tokens, hidden)."""
    trunk = trunk_of(model)
    if is_flat(plain(model)):
        return trunk(**end_to_end(rows, model.device), use_cache=False).last_hidden_state[0]
    ids, mask = right_padded(rows, pad_id, model.device)
    return trunk(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state[mask.bool()]


def padded(values: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """What belongs to tokens row after row, (tokens,), as right-padded rows with 0 in the padding: (rows, longest)."""
    return pad_sequence(list(values.split(lengths)), batch_first=True)


def length_mask(lengths: list[int], device) -> torch.Tensor:
    return padded(torch.ones(sum(lengths), device=device), lengths)


def is_plain_head(policy) -> bool:
    """Whether a state's logits are what the output layer alone makes of it, as far as the layer and config say."""
    capped = getattr(policy.config.get_text_config(), "final_logit_softcapping", None) is not None
    return type(policy.get_output_embeddings()) is torch.nn.Linear and not capped


def logits_of(policy, states, temperature: float):
    """The logits of states divided by the temperature, in float32: (tokens, vocabulary)."""
    head = policy.get_output_embeddings()
    cap = getattr(policy.config.get_text_config(), "final_logit_softcapping", None)
    if cap is not None:
        return torch.tanh(head(states).float() / cap) * (cap / temperature)
    packed = getattr(head, "packed_weight", None)
    if packed is None or torch.is_grad_enabled():
        return head(states).float() / temperature
    return product(states, packed, head.bias) / temperature


def answer_states(model, prompts, answers, pad_id: int) -> torch.Tensor:
    """The last hidden states from which the answers' tokens are predicted, answer after answer: (tokens, hidden)."""
    rows = [prompt + answer[:-1] for prompt, answer in zip(prompts, answers, strict=True)]  # nothing follows the last
    hidden = last_states(model, rows, pad_id)
    start, before = 0, []
    for prompt, row in zip(prompts, rows, strict=True):
        before += range(start + len(prompt) - 1, start + len(row))
        start += len(row)
    return hidden[torch.tensor(before, device=hidden.device)]


def read_answers(policy, prompts, answers, pad_id: int, temperature: float, entropy_grad: bool = False):
    """What a policy thinks of answers that are there already, from one forward pass.

    Returns:
        logprobs and entropies of the answers' tokens, mask, all (rows, tokens); and `answer_states`.
    """
    lengths = [len(answer) for answer in answers]
    states = answer_states(policy, prompts, answers, pad_id)
    tokens = torch.tensor([token for answer in answers for token in answer], device=states.device)
    head = policy.get_output_embeddings()
    if is_plain_head(policy) and not entropy_grad:
        logprobs, entropy, _ = token_logprobs(head, states, tokens, temperature)
    else:
        found = []
        for part in [slice(None)] if torch.is_grad_enabled() else parts(states, head.weight):
            every = F.log_softmax(logits_of(policy, states[part], temperature), dim=-1)
            found.append((every.gather(-1, tokens[part, None])[:, 0], -(every.exp() * every).sum(-1)))
        logprobs, entropy = map(torch.cat, zip(*found, strict=True))
    logprobs, entropy = padded(logprobs, lengths), padded(entropy, lengths)
    return logprobs, entropy, length_mask(lengths, states.device), states


class RoomyLayer(DynamicLayer):
    """A layer of a cache that makes room for many tokens at once, instead of copying all it holds for each."""

    ROOM = 64  # tokens
    room = None  # keys and values, (rows, heads, tokens held and to come, width)

    def update(self, key_states, value_states, *args, **kwargs):
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        held = self.get_seq_length()
        length = held + key_states.shape[-2]
        if self.room is None or length > self.room[0].shape[-2]:
            new = [s.new_empty(*s.shape[:2], length + self.ROOM, s.shape[-1]) for s in (key_states, value_states)]
            for room, states in zip(new, (self.keys, self.values), strict=True):
                if held:
                    room[:, :, :held] = states
            self.room = new
        self.room[0][:, :, held:length], self.room[1][:, :, held:length] = key_states, value_states
        self.keys, self.values = (room[:, :, :length] for room in self.room)
        return self.keys, self.values

    def batch_select_indices(self, indices):
        super().batch_select_indices(indices)
        self.room = None


def read_prompts(policy, prompts, pad_id: int):
    """The prompts' last states (rows, hidden), their mask (rows, longest) and a cache of them, left-padded."""
    device, lengths = policy.device, torch.tensor([len(prompt) for prompt in prompts])
    cache, trunk = DynamicCache(config=policy.config), trunk_of(policy)
    longest, grows = int(lengths.max()), all(type(layer) is DynamicLayer for layer in cache.layers)
    cache.layers = [RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    mask = (torch.arange(longest) >= longest - lengths[:, None]).long().to(device)
    if is_flat(plain(policy)) and grows:
        inputs = end_to_end(prompts, device)
        hidden = trunk(**inputs, past_key_values=cache, use_cache=True).last_hidden_state[0, lengths.cumsum(0) - 1]
        places = torch.zeros_like(mask)
        places[mask.bool()] = torch.arange(int(lengths.sum()), device=device)
        for layer in cache.layers:  # (1, heads, tokens, width) -> (rows, heads, longest, width)
            layer.keys, layer.values = (s[0][:, places].transpose(0, 1) for s in (layer.keys, layer.values))
            layer.room = None
        return hidden, mask, cache
    ids = torch.tensor([[pad_id] * (longest - len(prompt)) + prompt for prompt in prompts], device=device)
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    return trunk(**inputs, past_key_values=cache, use_cache=True).last_hidden_state[:, -1], mask, cache


def draw(probabilities, quantile, top_p: float, top_k: int | None):
    """A token a row at the quantile (rows, 1) of its top_k likeliest, and of these the fewest that hold top_p."""
    likeliest, order = probabilities.sort(dim=-1, descending=True, stable=True)
    likeliest = likeliest[:, :top_k]
    cumulative = likeliest.cumsum(-1)
    last = (cumulative - likeliest < top_p * cumulative[:, -1:]).sum(-1, keepdim=True) - 1
    place = torch.searchsorted(cumulative, quantile * cumulative.gather(-1, last), right=True)
    return order.gather(-1, torch.minimum(place, last))


@torch.no_grad()
def generate(
    policy, prompts, noise, *, stop_ids, pad_id: int, temperature: float, top_p=1.0, top_k=None, value_head=None
):
    """Sample an answer to each prompt; an answer ends with a stop token, or at full length without one.

    The sampling depends on nothing but the policy's logits, the temperature and the noise: no generation config.

    Args:
        prompts: token ids, a list for each prompt.
        noise: (prompts, response_length) uniform on [0, 1): the quantile that is drawn at each step.
        temperature: divides the logits; 0 takes the likeliest token.
        top_p, top_k: draw of the likeliest tokens alone, as `draw` says; not for PPO, whose ratios and KL are of the
            whole distribution, as the logprobs are that this returns.
        value_head: gives the values of the states from which tokens are drawn.
    Returns:
        answers (token ids, a list for each prompt), their logprobs and values, (rows, tokens), right-padded with 0.
    """
    narrow = top_p < 1 or top_k is not None
    assert value_head is None or not narrow, "PPO draws from the whole distribution"
    trunk, device = trunk_of(policy), policy.device
    stops = torch.tensor(sorted(stop_ids), device=device)
    noise = noise.to(device)
    answers = [[] for _ in prompts]
    logprobs, values = torch.zeros(2, *noise.shape, device=device)
    rows = torch.arange(len(prompts), device=device)  # the prompts whose answers are not finished
    hidden, mask, cache = read_prompts(policy, prompts, pad_id)
    positions, tokens = mask.sum(1, keepdim=True), None
    for step in range(noise.shape[1]):
        if step > 0:
            mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
            inputs = {"input_ids": tokens, "attention_mask": mask, "position_ids": positions}
            hidden = trunk(**inputs, past_key_values=cache, use_cache=True).last_hidden_state[:, -1]
            positions = positions + 1
        probabilities = logits_of(policy, hidden, temperature or 1.0).softmax(-1)
        if temperature and narrow:
            tokens = draw(probabilities, noise[rows, step, None], top_p, top_k)
        elif temperature:
            cumulative = probabilities.cumsum(-1)
            # inverse transform sampling; times the total, which float32 leaves slightly off 1
            quantile = noise[rows, step, None] * cumulative[:, -1:]
            tokens = torch.searchsorted(cumulative, quantile, right=True).clamp(max=probabilities.shape[-1] - 1)
        else:
            tokens = probabilities.argmax(-1, keepdim=True)
        logprobs[rows, step] = probabilities.gather(-1, tokens)[:, 0].clamp(min=TINY).log()
        if value_head is not None:
            values[rows, step] = value_head(hidden.float())[:, 0].float()
        for row, token in zip(rows.tolist(), tokens[:, 0].tolist(), strict=True):
            answers[row].append(token)
        going = (~torch.isin(tokens[:, 0], stops)).nonzero()[:, 0]
        if len(going) == 0:
            break
        if len(going) < len(rows):  # finished rows leave the batch
            cache.batch_select_indices(going)
            rows, tokens, mask, positions = rows[going], tokens[going], mask[going], positions[going]
    width = max(map(len, answers))
    return answers, logprobs[:, :width], values[:, :width]


@torch.no_grad()
def read_scores(model, head, rows: list[list[int]], pad_id: int, batch_size: int = 64) -> torch.Tensor:
    """A head (hidden -> 1) on a model's last hidden state of each row of tokens, wherever the padding is: (rows,)."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))  # rows of a length need little padding
    scores = torch.empty(len(rows), device=model.device)
    for i in range(0, len(rows), batch_size):
        chosen = order[i : i + batch_size]
        ends = torch.tensor([len(rows[j]) for j in chosen], device=model.device).cumsum(0) - 1
        last = last_states(model, [rows[j] for j in chosen], pad_id)[ends]
        scores[chosen] = head(last.to(head.weight.dtype)).float().squeeze(-1)
    return scores
