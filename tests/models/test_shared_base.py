"""Which parameters are an adapter's own: `pytest tests/models/test_shared_base.py`."""

import pytest
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from torch import nn

from rlhf.models.shared_base import parameters_of, place_lora
from rlhf.user_error import UserError


def test_a_layer_that_is_called_value_is_not_the_critics():
    """Catches a base's frozen layer that is trained because an adapter has its name."""
    model = nn.Sequential()
    model.value, model.key = nn.Linear(2, 2), nn.Linear(2, 2)
    model = get_peft_model(model, LoraConfig(target_modules=["value", "key"]))
    model.add_adapter("value", LoraConfig(target_modules=["value", "key"]))
    names = parameters_of(model, "value")
    assert len(names) == 4 and all("lora_" in name and name.endswith(".value.weight") for name in names)
    assert len(parameters_of(model, "default")) == 4 and not parameters_of(model, "reward")


@pytest.mark.parametrize("lost", ["lora_A", "lora_embedding_B"])
def test_a_lora_that_is_not_stored_whole_is_refused(lost):
    """An embedding's LoRA is named otherwise than a linear layer's, and was passed over."""
    model = nn.Sequential()
    model.words, model.key = nn.Embedding(4, 2), nn.Linear(2, 2)
    model = get_peft_model(model, LoraConfig(target_modules=["words", "key"]), adapter_name="reward")
    weights = get_peft_model_state_dict(model, adapter_name="reward")
    place_lora(model, weights, "reward", "no fit")
    del weights[next(name for name in weights if lost in name)]
    with pytest.raises(UserError, match=f"^no fit: .*{lost}.* has no place in it"):
        place_lora(model, weights, "reward", "no fit")
