"""Answers: sampling them from a policy, reading what a policy thinks of them, scoring them with a reward model.

Prompts and answers are lists of token ids; what is made of them is right-padded and masked by length, never by token
id, so that nothing depends on the padding or on the neighbours in a batch.
"""

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import nn
from transformers import DynamicCache


def trunk_of(model):
    """The transformer without its head, of a causal model or a sequence classifier, with its adapters."""
    model = model.get_base_model() if isinstance(model, PeftModel) else model
    return getattr(model, model.base_model_prefix)


def right_padded(rows: list[list[int]], pad_id: int, device) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask, (rows, longest)."""
    longest = max(map(len, rows))
    ids = torch.tensor([row + [pad_id] * (longest - len(row)) for row in rows], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows], device=device)
    return ids, mask


def read_answers(policy, prompts, answers, pad_id: int, temperature: float):
    """What a policy thinks of answers that are there already, from one forward pass.

    Returns:
        logprobs and entropies of the answers' tokens, mask, all (rows, tokens); and the states from which each token
        was predicted, (rows, tokens, hidden).
    """
    head = policy.get_output_embeddings()
    device = head.weight.device
    ids, attention_mask = right_padded([p + a for p, a in zip(prompts, answers, strict=True)], pad_id, device)
    tokens, mask = right_padded(answers, pad_id, device)
    hidden = trunk_of(policy)(input_ids=ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
    starts = torch.tensor([len(p) - 1 for p in prompts], device=device)
    before = (starts[:, None] + torch.arange(tokens.shape[1], device=device)).clamp(max=ids.shape[1] - 1)
    states = hidden.gather(1, before[..., None].expand(-1, -1, hidden.shape[-1]))
    every = F.log_softmax(head(states).float() / temperature, dim=-1)
    logprobs = every.gather(-1, tokens[..., None]).squeeze(-1)
    entropy = -(every.detach().exp() * every.detach()).sum(-1)
    return logprobs * mask, entropy * mask, mask.float(), states


class PolicyAndValue(nn.Module):
    """The policy with a scalar value head on its last hidden state: one forward pass serves both."""

    def __init__(self, policy, score_weight=None):
        super().__init__()
        self.policy = policy
        self.config = policy.config
        hidden_size = policy.get_output_embeddings().weight.shape[1]
        self.value_head = nn.Linear(hidden_size, 1, bias=False)
        # the reward model's head already points to what makes an answer good
        fits = score_weight is not None and score_weight.shape == self.value_head.weight.shape
        self.value_head.weight.data = score_weight.detach().float().clone() if fits else torch.zeros(1, hidden_size)

    def forward(self, prompts, answers, pad_id: int, temperature: float):
        """Log-probabilities and entropies of the answers' tokens, mask, and values of the states before them."""
        logprobs, entropy, mask, states = read_answers(self.policy, prompts, answers, pad_id, temperature)
        return logprobs, entropy, mask, self.value_head(states.float()).squeeze(-1) * mask

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs=None):
        self.policy.gradient_checkpointing_enable(gradient_checkpointing_kwargs)
        if isinstance(self.policy, PeftModel):
            self.policy.enable_input_require_grads()

    def gradient_checkpointing_disable(self):
        self.policy.gradient_checkpointing_disable()


@torch.no_grad()
def generate(policy, prompts, noise, *, stop_ids, pad_id: int, temperature: float) -> list[list[int]]:
    """Sample an answer to each prompt; an answer ends with a stop token, or at full length without one.

    The sampling depends on nothing but the policy's logits, the temperature and the noise: no generation config.

    Args:
        prompts: token ids, a list for each prompt.
        noise: (prompts, response_length) uniform on [0, 1): the quantile that is drawn at each step.
    """
    trunk, head = trunk_of(policy), policy.get_output_embeddings()
    device = head.weight.device
    longest = max(map(len, prompts))
    ids = torch.tensor([[pad_id] * (longest - len(p)) + p for p in prompts], device=device)  # left-padded
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
    stops = torch.tensor(sorted(stop_ids), device=device)
    noise = noise.to(device)
    answers = [[] for _ in prompts]
    rows = torch.arange(len(prompts), device=device)  # the prompts whose answers are not finished
    cache = DynamicCache(config=policy.config)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    for step in range(noise.shape[1]):
        output = trunk(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
        )
        logits = head(output.last_hidden_state[:, -1]).float() / temperature
        cumulative = logits.softmax(-1).cumsum(-1)
        # inverse transform sampling; times the total, which float32 leaves slightly off 1
        quantile = noise[rows, step, None] * cumulative[:, -1:]
        tokens = torch.searchsorted(cumulative, quantile, right=True).clamp(max=logits.shape[-1] - 1)
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
    return answers


@torch.no_grad()
def score(reward_model, rows: list[list[int]], pad_id: int) -> torch.Tensor:
    """The reward of each row of tokens, read at its last token wherever the padding is: (rows,)."""
    model = reward_model.get_base_model() if isinstance(reward_model, PeftModel) else reward_model
    ids, attention_mask = right_padded(rows, pad_id, model.device)
    hidden = trunk_of(model)(input_ids=ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
    last = hidden[torch.arange(len(rows), device=ids.device), attention_mask.sum(1) - 1]
    return model.score(last.to(model.dtype)).float().squeeze(-1)
