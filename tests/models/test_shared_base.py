"""Which parameters are an adapter's own: `pytest tests/models/test_shared_base.py`."""

from peft import LoraConfig, get_peft_model
from torch import nn

from rlhf.models.shared_base import parameters_of


def test_a_layer_that_is_called_value_is_not_the_critics():
    """Catches a base's frozen layer that is trained because an adapter has its name."""
    model = nn.Sequential()
    model.value, model.key = nn.Linear(2, 2), nn.Linear(2, 2)
    model = get_peft_model(model, LoraConfig(target_modules=["value", "key"]))
    model.add_adapter("value", LoraConfig(target_modules=["value", "key"]))
    names = parameters_of(model, "value")
    assert len(names) == 4 and all("lora_" in name and name.endswith(".value.weight") for name in names)
    assert len(parameters_of(model, "default")) == 4 and not parameters_of(model, "reward")
