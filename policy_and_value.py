"""The policy and its critic in one module, and what the two need of the policy's base."""

from contextlib import nullcontext

from rollout import answer_states, padded, read_answers, trunk_of
from shared_base import active_adapter, parameters_of, recompute_with_same_adapter

import torch
from peft import PeftModel
from torch import nn


class PolicyAndValue(nn.Module):
    """The policy with a scalar value head on its last hidden state, or on that of an adapter of the critic's own."""

    def __init__(self, policy, adapter: str, value_adapter: bool, score_weight=None):
        super().__init__()
        self.policy, self.config = policy, policy.config
        self.adapter, self.value_adapter = adapter, value_adapter
        hidden_size = trunk_of(policy)(torch.zeros(1, 1, dtype=torch.long, device=policy.device))[0].shape[-1]
        self.value_head = nn.Linear(hidden_size, 1, bias=False)
        # a reward model's head already points to what makes an answer good
        fits = score_weight is not None and score_weight.shape == self.value_head.weight.shape
        self.value_head.weight.data = score_weight.float().clone() if fits else torch.zeros(1, hidden_size)

    # asked by TRL's unwrap_model_for_generation; layers do not checkpoint in eval mode anyway
    is_gradient_checkpointing = False

    def value_parameters(self) -> dict:
        own = parameters_of(self.policy, "value") if self.value_adapter else {}
        return {"value_head.weight": self.value_head.weight} | {f"policy.{name}": p for name, p in own.items()}

    def drop_policy_gradients(self) -> None:
        critics = {id(p) for p in self.value_parameters().values()}
        for parameter in self.parameters():
            if id(parameter) not in critics:
                parameter.grad = None

    def forward(self, prompts, answers, pad_id: int, temperature: float, policy_trains: bool = True, **options):
        """Log-probabilities and entropies of the answers' tokens, mask, and values of the states before them, all
        (rows, tokens)."""
        logprobs, entropy, mask, states = read_answers(self.policy, prompts, answers, pad_id, temperature, **options)
        if not policy_trains:
            logprobs, entropy, states = logprobs * 0, entropy * 0, states.detach()
        return logprobs, entropy, mask, self.values(prompts, answers, pad_id, states)

    def values(self, prompts, answers, pad_id: int, states=None):
        """The values alone; `states` are the policy's, where they are there already."""
        if self.value_adapter or states is None:
            with active_adapter(self.policy, "value") if self.value_adapter else nullcontext():
                states = answer_states(self.policy, prompts, answers, pad_id)
        return padded(self.value_head(states.float())[:, 0].float(), [len(answer) for answer in answers])

    def activation_checkpointing_enable(self, activation_checkpointing_kwargs=None, **layers):
        kwargs = {**(activation_checkpointing_kwargs or {}), "use_reentrant": False}
        if isinstance(self.policy, PeftModel):
            kwargs["context_fn"] = recompute_with_same_adapter(self.policy)
            self.policy.enable_input_require_grads()
        self.policy.activation_checkpointing_enable(kwargs, **layers)
