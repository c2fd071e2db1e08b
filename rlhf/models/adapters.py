"""Adapter folders: what base they stand on, and loading them so that nothing is left out silently."""

import json
import re
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.utils import load_peft_weights
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers.utils import cached_file, find_adapter_config_file, logging

from rlhf.models.fingerprints import weights_sha256
from rlhf.models.shards import part_of, shape_of
from rlhf.user_error import UserError, only_local

IF_THERE = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
FULL_PRECISION = (
    "merge the adapter into the model that it is a copy of,\n  python merge_peft_adapter.py "
    "--adapter_model_name=ADAPTER --base_model_name=FULL_PRECISION_MODEL --output_name=MERGED"
)
QUANTISED = re.compile("4-?bit|gptq|awq", re.IGNORECASE)  # in the name of a copy
# what such a copy's config may say otherwise than the model's own
LOOSE = "dtype torch_dtype transformers_version _name_or_path use_cache unsloth_fixed unsloth_version".split()


@contextmanager
def explain_load(name):
    """Turn what transformers and PEFT raise for a missing or broken model into a UserError."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # the load report; what it would say is checked by the callers
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        if isinstance(error, RuntimeError) and "size mismatch" not in str(error):
            raise
        lines = str(error).strip().split("\n")
        reason = next((line for line in lines if "mismatch" in line), lines[0])
        missing = "" if Path(name).exists() else "no such folder here, and not loadable from the hub\n  "
        if missing and QUANTISED.search(name):
            raise UserError(f"{name}, a quantised copy, is not here: {FULL_PRECISION}") from error
        raise UserError(f"cannot load a model from {name}: {missing}{reason.strip()[:300]}") from error
    finally:
        logging.set_verbosity(verbosity)


def resolve_adapters(name: str, moved: bool = False) -> tuple[str, list[str]]:
    """What a model name stands for: (base model that is no adapter, adapters on it from the last to the first).

    With `moved`, an adapter's base need not be where the adapter says.
    """
    adapters = []
    while True:
        gone = not Path(name).is_dir()
        if moved and adapters and gone and (only_local(name) or "/" not in name):
            return name, adapters
        if gone and only_local(name):  # the hub need not be asked
            needs = f", the base of {adapters[-1]}" if adapters else ""
            raise UserError(f"{name}{needs}: no such model folder")
        with explain_load(name):
            if not find_adapter_config_file(name):
                return name, adapters
            if name in adapters:
                raise UserError(f"the adapters {' and '.join(adapters)} name each other as base model")
            adapters.append(name)
            name = PeftConfig.from_pretrained(name).base_model_name_or_path or ""
            if not name and not moved:
                raise UserError(f"{adapters[-1]} names no base model: merge it with --base_model_name")


def adapter_settings(adapter: str) -> dict:
    with explain_load(adapter):
        return json.loads(Path(find_adapter_config_file(adapter)).read_text())


def adapter_weights(adapter: str) -> dict[str, torch.Tensor]:
    """What is stored in an adapter's folder.

    Raises:
        UserError: if it cannot be read, or naming the first tensor that is not finite.
    """
    with explain_load(adapter):
        weights = load_peft_weights(adapter, device="cpu")
    check_finite(weights.items(), adapter)
    return weights


def check_finite(weights, name: str) -> None:
    """Raises a UserError for the first of (key, tensor) that holds what is not finite, which no training mends."""
    for key, weight in weights:
        # a sum shows it in one pass over the memory; 8 and 4 bits hold codes, which are always finite
        wide = weight.is_floating_point() and weight.element_size() > 1
        if wide and not part_of(weight).sum(dtype=torch.float32).isfinite():
            raise UserError(f"{name} is damaged: {key} holds values that are not finite\n  bring back a whole copy")


def check_apart(flag: str, output, inputs) -> None:
    """Raises a UserError for an output that is, holds or lies in what is read: writing it would change or remove that.

    Args:
        inputs: models and adapters by name; their bases count, a reward function's file does not.
    """
    place, read = Path(output).resolve(), set()
    for name in inputs:
        if name and ".py:" not in name and Path(name).is_dir():
            base, adapters = resolve_adapters(name, moved=True)
            read |= {name, base, *adapters}
    for other in sorted(Path(name).resolve() for name in read if Path(name).is_dir()):
        if place == other or place in other.parents or other in place.parents:
            raise UserError(f"{flag} {output} would write into {other}, which is read: give another folder")


def merge_command(adapter: str) -> str:
    return f"python merge_peft_adapter.py --adapter_model_name={adapter} --output_name={adapter.rstrip('/')}_merged"


def task_of(adapter: str) -> str:
    """What an adapter is for, by its tensors: "SEQ_CLS" (a reward model: it holds a `score` head) or "CAUSAL_LM".

    The label in its config is missing or wrong in many folders. Only where it says SEQ_CLS and the head is not there
    is it believed, so that a reward model without its head is never taken for a policy.

    Raises:
        UserError: if it is for neither.
    """
    label, weights = adapter_settings(adapter).get("task_type"), adapter_weights(adapter)
    if label not in (None, "", "CAUSAL_LM", "SEQ_CLS"):
        raise UserError(f"{adapter} is an adapter for {label}: neither a policy nor a reward model")
    for path in Path(adapter).glob("value_head.*"):  # our PPO's critic is named otherwise inside, and no .bin
        with explain_load(adapter):
            foreign = path.suffix != ".safetensors" or any(key.startswith("v_head.") for key in load_file(path))
        if foreign:
            raise UserError(
                f"{adapter} has LLaMA-Factory's value head beside its LoRA, {path.name}: no plain model can hold it\n"
                "  of a reward model it is the head: train one with reward_modeling.py instead\n"
                "  of a PPO policy it is the critic, of no more use: remove the file"
            )
    has_head = any(key.removeprefix("base_model.model.").startswith("score.") for key in weights)
    return "SEQ_CLS" if has_head or label == "SEQ_CLS" else "CAUSAL_LM"


def base_revision(adapter: str) -> str:
    """The revision of the base that an adapter was trained on, as its config records it."""
    return adapter_settings(adapter).get("revision") or "main"


def load_adapter(model, adapter: str, trainable: bool = False, task: bool = True):
    """The PeftModel of a model and an adapter folder, of which every weight has found its place.

    Without `task`, whatever the model is for, and without generation.
    """
    with explain_load(adapter):
        config = PeftConfig.from_pretrained(adapter)
        config.task_type = task_of(adapter) if task else None
        peft_model = PeftModel.from_pretrained(
            model,
            adapter,
            is_trainable=trainable,
            config=config,
            low_cpu_mem_usage=not trainable,  # draws no random weights to overwrite them
        )
        check_loaded(peft_model, adapter)
    return peft_model


def check_loaded(peft_model, adapter: str, name: str = "default") -> None:
    """PEFT itself only warns of weights that it did not find, and says nothing of those that it could not place."""
    stored = adapter_weights(adapter)
    placed = get_peft_model_state_dict(peft_model, adapter_name=name, save_embedding_layers=False).keys()
    # embeddings that were resized are stored whole, and go to the base's own
    own = {key.replace(f".{name}", ""): value for key, value in peft_model.state_dict().items()}
    for key in sorted(placed ^ stored.keys()):
        at = own.get(key)
        if key in placed or at is None or not torch.equal(at.cpu(), stored[key].to(at.dtype)):
            lacks = f"has no {key}" if key in placed else f"has {key}, which the base has not"
            raise UserError(f"the adapter {adapter} does not fit its base: it {lacks}")


def resize_for(model, adapter: str) -> int:
    """Give a model as many embeddings as an adapter was trained with, where it carries whole embeddings; how many."""
    layers = model.get_input_embeddings(), model.get_output_embeddings()
    names = [name for name, module in model.named_modules() if any(module is layer for layer in layers)]
    rows = {
        weight.shape[0]
        for key, weight in adapter_weights(adapter).items()
        if key.endswith(".weight") and ".lora_" not in key and any(f".{name}." in key for name in names)
    }
    if rows and rows != {shape_of(layers[0].weight)[0]}:
        model.resize_token_embeddings(max(rows), mean_resizing=False)
    return shape_of(layers[0].weight)[0]


def load_sum(model, adapters: list[str], weights: list[float]):
    """A PeftModel whose active adapter is the exact weighted sum of the adapters' changes, whatever their ranks."""
    names = [f"adapter_{i}" for i in range(len(adapters))]
    for name, adapter in zip(names, adapters, strict=True):
        with explain_load(adapter):
            for key in adapter_weights(adapter):
                if ".lora_A." not in key and ".lora_B." not in key:
                    raise UserError(f"{adapter} holds {key}, more than a plain LoRA: such adapters have no sum")
            if name == names[0]:
                model = PeftModel.from_pretrained(model, adapter, adapter_name=name)
            else:
                model.load_adapter(adapter, name)
            check_loaded(model, adapter, name)
        if adapter_settings(adapter).get("target_parameters"):
            raise UserError(f"{adapter} adapts parameters, not layers: such adapters have no sum")
    model.add_weighted_adapter(names, weights, "sum", combination_type="cat")
    model.set_adapter("sum")
    for layer in (module for module in model.modules() if isinstance(module, LoraLayer)):
        layer.scaling["sum"] = 1.0  # "cat" has scaled already; PEFT scales again when the first adapter is an rsLoRA
        parts = [w * layer.get_delta_weight(n) for n, w in zip(names, weights, strict=True) if n in layer.lora_A]
        assert torch.allclose(layer.get_delta_weight("sum"), sum(parts), atol=1e-5), "the sum is not the sum"
    return model


def read_config(name: str) -> dict:
    """A model's config.json; empty if it is not there."""
    try:
        path = cached_file(name, "config.json", **IF_THERE)
    except OSError:  # not a name that the hub could have
        path = None
    return json.loads(Path(path).read_text()) if path else {}


def recorded_base(adapter: str) -> str | None:
    """The hash of the base's weights that the run of an adapter wrote down, if it is one of ours."""
    run = Path(adapter) / "run.json"
    return json.loads(run.read_text()).get("base_sha256") if run.exists() else None


def check_unchanged(base: str, adapter: str) -> None:
    """Refuse a base that holds other weights than when the adapter was trained on it, where that was recorded."""
    trained_on = recorded_base(adapter)
    if trained_on and weights_sha256(base, base_revision(adapter)) not in (trained_on, None):
        raise UserError(f"{base}, the base of {adapter}, has changed since the adapter was trained on it")


def check_base(given: str | None, named: str, adapter: str) -> str:
    """The base to merge an adapter onto: the one that it was trained on, wherever it is now.

    Raises:
        UserError: if it is another model, or the same one changed since, or stored quantised.
    """
    base = given or named
    if resolve_adapters(base)[1]:
        raise UserError(f"--base_model_name {given} is an adapter itself: the base of {adapter} is {named}")
    config, trained = read_config(base), read_config(named)
    if base != named and not trained and QUANTISED.search(named):
        raise UserError(
            f"{named}, the base of {adapter}, is not here to compare: its config.json is enough\n"
            f"  hf download {named} config.json, and the same command again"
        )
    if "quantization_config" in config:
        raise UserError(f"{base} is stored quantised: give the full-precision model with --base_model_name")
    if base == named or (named and Path(base).resolve() == Path(named).resolve()):
        check_unchanged(base, adapter)
        return base
    if trained.pop("quantization_config", None):  # its weights are no guide, its shapes are
        if any(config.get(key) != value for key, value in trained.items() if key not in LOOSE):
            raise UserError(f"--base_model_name {base} has another config.json than {named}, the base of {adapter}")
        return base
    trained_on = recorded_base(adapter) or (weights_sha256(named, base_revision(adapter)) if named else None)
    if trained_on is None or weights_sha256(base) != trained_on:
        why = "its weights are others" if trained_on else "its weights are not here to compare"
        raise UserError(
            f"--base_model_name {base} is not the base of {adapter}: it was trained on {named or 'a nameless model'}, "
            f"and {why}\n  leave --base_model_name out, or give a copy of that model"
        )
    return base
