"""The policy and its critic in one module, the reference policy, and what they need of the policy's base."""

import copy
from contextlib import nullcontext
from typing import NamedTuple

import torch
from peft import PeftModel
from torch import nn

from rlhf.models.fast_linear import use_fast_linear
from rlhf.models.flat_rows import use_flat_rows
from rlhf.models.rollout import answer_states, padded, read_answers, trunk_of
from rlhf.models.shared_base import (
    active_adapter,
    copy_adapter,
    is_new,
    parameters_of,
    recompute_with_same_adapter,
)
from rlhf.user_error import UserError


class PolicyAndValue(nn.Module):
    """The policy with a scalar value head on its last hidden state, or on that of an adapter of the critic's own."""

    def __init__(self, policy, adapter: str, score_weight=None):
        super().__init__()
        self.policy, self.config, self.adapter = policy, policy.config, adapter
        self.value_adapter = "value" in getattr(policy, "peft_config", {})
        hidden_size = trunk_of(policy)(torch.zeros(1, 1, dtype=torch.long, device=policy.device))[0].shape[-1]
        self.value_head = nn.Linear(hidden_size, 1, bias=False)
        # a reward model's head already points to what makes an answer good
        fits = score_weight is not None and score_weight.shape == self.value_head.weight.shape
        self.value_head.weight.data = score_weight.float().clone() if fits else torch.zeros(1, hidden_size)

    # asked by TRL's unwrap_model_for_generation; layers do not checkpoint in eval mode anyway
    is_gradient_checkpointing = False

    def value_parameters(self) -> dict:
        own = {f"policy.{n}": p for n, p in parameters_of(self.policy, "value").items() if p.requires_grad}
        return {"value_head.weight": self.value_head.weight} | own

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


class Reference(NamedTuple):
    """The reference policy: a model of its own, or an adapter on the policy's base (None: the base alone)."""

    model: nn.Module | None
    adapter: str | None


def reference_of(policy, ppo) -> Reference:
    """Where training starts, as it will stay, unless `--ref_adapter_name` says otherwise."""
    known = policy.peft_config if isinstance(policy, PeftModel) else {}
    for flag in ("model_adapter_name", "ref_adapter_name"):
        if (name := getattr(ppo, flag)) and name not in known:
            raise UserError(f"--{flag} {name}: the policy has {' and '.join(known) or 'no adapters'}")
    adapter = ppo.model_adapter_name or "default"
    if not known:
        return Reference(copy.deepcopy(policy).eval().requires_grad_(False), None)
    if policy.active_adapters != [adapter]:
        raise UserError(f"the policy's active adapter is {policy.active_adapters}, not {adapter}: set_adapter()")
    if ppo.ref_adapter_name or is_new(policy, adapter):
        return Reference(None, ppo.ref_adapter_name)
    copy_adapter(policy, adapter, "ref")
    return Reference(None, "ref")


def prepare(policy, reference, reward, ppo, pad_rows: bool = False) -> None:
    """The critic's adapter; and in all models dropout off, and on a CPU the same numbers sooner."""
    if ppo.value_adapter and not isinstance(policy, PeftModel):
        raise UserError("--value_adapter needs a LoRA policy: leave out --no_use_peft")
    if ppo.value_adapter is not False and isinstance(policy, PeftModel):
        copy_adapter(policy, "reward" if "reward" in policy.peft_config else policy.active_adapters[0], "value")
        for name, parameter in parameters_of(trunk_of(policy), "value").items():
            parameter.requires_grad_("lora_" in name)  # an output layer's has no gradient, and embeddings are large
    for model in filter(None, (policy, reference, getattr(reward, "model", None))):
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0  # or the ratio would not be 1 before the first step
        if ppo.device.type == "cpu" and ppo.mixed_precision == "no" and not pad_rows:
            use_flat_rows(model)
            use_fast_linear(model, pack=True)
