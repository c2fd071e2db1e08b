"""Several adapters on one base model: which one computes, copies of one, and one read from a folder.

PEFT's own `set_adapter()` and `disable_adapter()` also switch `requires_grad` of the adapters that they leave, so a
critic that is trained beside the policy would get no gradients, without an error.
"""

import re
from contextlib import contextmanager, nullcontext

from peft import LoraConfig, PeftModel, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper

from rlhf.models.adapters import adapter_weights, explain_load
from rlhf.user_error import UserError


def switches(model) -> list:
    """The modules that know which adapter is active."""
    return [module for module in model.modules() if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))]


@contextmanager
def active_adapter(model, name: str | None):
    """Inside, the adapter of this name computes (None: the base alone); nobody's requires_grad changes."""
    before = [(module, module._active_adapter, module._disable_adapters) for module in switches(model)]
    for module, active, _ in before:
        module._active_adapter, module._disable_adapters = name or active, name is None
    try:
        yield
    finally:
        for module, active, disabled in before:
            module._active_adapter, module._disable_adapters = active, disabled


def recompute_with_same_adapter(model):
    """A `context_fn` of gradient checkpointing: backward would recompute with whatever adapter is active then."""
    some = switches(model)[0]

    def context_fn():
        active = None if some._disable_adapters else some._active_adapter
        return nullcontext(), active_adapter(model, active)

    return context_fn


def parameters_of(model, adapter: str) -> dict:
    """An adapter's own parameters by name; a model may have layers called `value` or `reward` too."""
    own = re.compile(rf"(lora_\w+|modules_to_save|trainable_tokens_\w+)\.{re.escape(adapter)}(\.|$)")
    return {name: parameter for name, parameter in model.named_parameters() if own.search(name)}


def copy_adapter(model, source: str, name: str) -> None:
    """Add a frozen copy of an adapter."""
    model.add_adapter(name, model.peft_config[source])
    copies = parameters_of(model, name)
    for key, parameter in parameters_of(model, source).items():
        copies[key.replace(f".{source}", f".{name}")].requires_grad_(False).copy_(parameter.data)


def attach_adapter(model: PeftModel, folder: str, name: str) -> None:
    """Add the frozen LoRA of a folder, whatever head it was trained with.

    Raises:
        UserError: if a weight of it finds no place.
    """
    with explain_load(folder):
        config = LoraConfig.from_pretrained(folder)
        config.task_type, config.modules_to_save = model.peft_config["default"].task_type, None
        model.add_adapter(name, config)
        for parameter in parameters_of(model, name).values():
            parameter.requires_grad_(False)
        weights = {key: value for key, value in adapter_weights(folder).items() if ".lora_" in key}
        place_lora(model, weights, name, f"the adapter {folder} does not fit the policy's base")


def place_lora(model, weights: dict, name: str, misfit: str) -> None:
    """Load stored weights into an adapter that a PeftModel has.

    Raises:
        UserError: if one finds no place, or the adapter has a LoRA that is not among them.
    """
    loaded = set_peft_model_state_dict(model, weights, adapter_name=name)
    lost = [key for key in parameters_of(model, name) if "lora_" in key and key in loaded.missing_keys]
    if lost := lost + list(loaded.unexpected_keys):
        raise UserError(f"{misfit}: {lost[0]} has no place in it")


def is_new(model, adapter: str) -> bool:
    """Whether a PeftModel's adapter changes nothing yet: the base alone is the policy's starting point."""
    parameters = parameters_of(model, adapter)
    return not any(p.any() for name, p in parameters.items() if "lora_B" in name or "lora_" not in name)
