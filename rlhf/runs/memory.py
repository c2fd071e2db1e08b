"""How much memory a run takes on each of its processes, found before it starts, and what to type if that is too much.

What is held throughout follows from the weights in memory, from how many of them are trained and from the optimizer.
Activations are measured: a pass forward and backward over the longest rows, after which all is as it was.
"""

import os
import sys
from typing import NamedTuple

import torch
from accelerate.utils import DistributedType
from torch import nn
from transformers import Trainer
from transformers.pytorch_utils import Conv1D

from rlhf.runs.measured_memory import activations, longest, room_of, tensors_held

FOUR_BIT = 0.5625  # bytes of a weight: half, and a scale for each 64


class Memory(NamedTuple):
    """Bytes of a process."""

    weights: float
    gradients: float
    optimizer: float
    activations: float = 0.0

    @property
    def total(self) -> float:
        return sum(self)


def held(weights: float, trained: float, state: float = 2.0, processes: int = 1, engine: str = "ddp") -> Memory:
    """What a process holds throughout.

    Args:
        weights: bytes of all weights.
        trained: bytes of those that are trained.
        state: of the optimizer, in bytes for each byte that is trained: 2 is Adam's.
        engine: ddp keeps all on each process, zero2 shares out gradients and state, full (FSDP, ZeRO-3) weights too.
    """
    buckets = trained if engine == "ddp" and processes > 1 else 0  # in which DDP sums the gradients
    share = processes if engine != "ddp" else 1
    return Memory(
        weights / (processes if engine == "full" else 1), (trained + buckets) / share, state * trained / share
    )


def engine_of(trainer) -> str:
    """How a trainer's processes will share what they hold: one of the engines of `held`."""
    plugin = trainer.accelerator.state.deepspeed_plugin
    if trainer.accelerator.distributed_type == DistributedType.DEEPSPEED:
        return "full" if plugin.zero_stage == 3 else "zero2"
    return "full" if trainer.is_fsdp_enabled else "ddp"


def optimizer_state(args) -> float:
    """Bytes of state for each byte that is trained: a step of the run's optimizer on a small weight tells."""
    weight = nn.Parameter(torch.zeros(512, 512, device=args.device))
    try:
        optimizer_class, options = Trainer.get_optimizer_cls_and_kwargs(args)
        optimizer = optimizer_class([weight], **options)
        weight.grad = torch.zeros_like(weight)
        optimizer.step()
    except (ValueError, TypeError, RuntimeError, ImportError):  # one that wants to see the whole model
        return 2.0
    return sum(part.nbytes for part in optimizer.state[weight].values() if torch.is_tensor(part)) / weight.nbytes


def estimate(trainer, room: float, checkpointing: bool | None = None):
    """A function of how many rows a process has in a batch: the Memory that it needs.

    One row is measured first; the whole batch only if so many times that would fit, or the process could be killed;
    and nothing where what is held is too much already, or lies in shards (ZeRO-3).

    Args:
        room: what `room_of` says.
        checkpointing: whether activations are computed twice, if not as the trainer's arguments say.
    """
    args, shards = trainer.args, [p for p in trainer.model.parameters() if hasattr(p, "ds_numel")]
    weights = sum(p.ds_numel * p.element_size() for p in shards) or tensors_held()
    trains = [p for p in trainer.model.parameters() if p.requires_grad]
    trained = sum(getattr(p, "ds_numel", p.numel()) * p.element_size() for p in trains)
    fixed = held(weights, trained, optimizer_state(args), args.world_size, engine_of(trainer))
    if shards or fixed.total > room:
        return lambda count: fixed
    checkpointing = bool(args.activation_checkpointing) if checkpointing is None else checkpointing
    batch = args.per_device_train_batch_size
    rows = longest(trainer, batch)
    one, slope = activations(trainer, rows[:1], checkpointing), 0.0
    if batch > 1:
        most = batch if fixed.total + batch * one < room else 2
        slope = (activations(trainer, rows[:most], checkpointing) - one) / (most - 1)
    return lambda count: fixed._replace(activations=one + slope * (count - 1))


def fitted(trainer) -> str:
    """The memory that a run needs of each process, and what to type where that is more than there is."""
    room, batch = room_of(trainer), trainer.args.per_device_train_batch_size
    needs = estimate(trainer, room)
    need = needs(batch)
    kept = f"weights {need.weights / 1e9:.1f}, gradients and optimizer {(need.gradients + need.optimizer) / 1e9:.1f}"
    passing = f"activations {need.activations / 1e9:.1f}" if need.activations else "activations not measured"
    line = f"memory: about {need.total / 1e9:.1f} GB a process ({kept}, {passing}) of {room / 1e9:.1f} GB"
    if need.total > room:
        options = sorted(remedies(trainer, needs, room).items(), key=lambda item: item[1])
        told = [f"{what}: {size / 1e9:.1f}" for what, size in options if size < 0.95 * need.total]
        told = ["it will not fit; GB that it takes with", *told] if told else ["it will not fit: take a smaller model"]
        line += "\n  " + "\n    ".join(told)
    elif 2 * need.total > room and keeps_freed(trainer.args.device):
        line += (
            "\n  what is freed is kept, for speed: up to as much again; MALLOC_MMAP_MAX_=65536 before the command: not"
        )
    return line


def sure_to_fit(trainer, room: float) -> bool:
    """Whether a batch of the longest rows takes so much less than there is that it need not be measured."""
    model, args = getattr(trainer.model, "policy", trainer.model), trainer.args
    config = model.config.get_text_config()
    [row] = longest(trainer, 1)
    sides = [len(ids) for name, ids in row.items() if name.endswith("_ids") and name != "prompt_ids"]
    tokens = len(row.get("prompt_ids", ())) * max(len(sides), 1) + sum(sides) + getattr(args, "response_length", 0)
    each = 4 * (64 * config.hidden_size * config.num_hidden_layers + 4 * config.vocab_size)  # bytes: twice the most
    heads = getattr(config, "num_attention_heads", None) or 0  # Mamba has none
    scores = heads * config.num_hidden_layers * tokens * 16  # of attention, where all are kept
    weights = sum(p.nbytes * (4 if p.requires_grad else 1) for p in trainer.model.parameters())
    return 2 * weights + args.per_device_train_batch_size * tokens * (each + scores) < room


def checkpointing_by_need(trainer) -> str:
    """Has activations computed twice if a step does not fit otherwise, and the user says nothing about it; a line that
    says so."""
    args, device = trainer.args, trainer.args.device
    able = getattr(trainer.model, "policy", trainer.model).supports_gradient_checkpointing
    if not (able and getattr(args, "checkpointing_by_need", False) and engine_of(trainer) == "ddp"):
        return ""
    room = room_of(trainer) * (0.9 if device.type == "cpu" else 0.7)  # what a GPU's allocator leaves unused varies
    if sure_to_fit(trainer, room):
        return ""
    need = estimate(trainer, room)(args.per_device_train_batch_size).total
    if need < room:
        return ""
    args.gradient_checkpointing = args.activation_checkpointing = True
    return f"gradient checkpointing is on: a step without it takes about {need / 1e9:.1f} GB of {room / 1e9:.1f}"


def keeps_freed(device) -> bool:
    """Whether rlhf/__init__.py has told the allocator to keep what is freed."""
    return device.type == "cpu" and sys.platform == "linux" and "MALLOC_MMAP_MAX_" not in os.environ


def remedies(trainer, needs, room: float) -> dict[str, float]:
    """{what to type: bytes that a process needs then}."""
    args, model, found = trainer.args, trainer.model, {}
    batch, steps = args.per_device_train_batch_size, getattr(trainer, "ppo", args).gradient_accumulation_steps
    need = needs(batch)
    if not args.activation_checkpointing:
        found["--gradient_checkpointing true"] = estimate(trainer, room, checkpointing=True)(batch).total
    if batch > 1:
        fewer = [rows for rows in range(batch - 1, 0, -1) if batch % rows == 0]
        rows = next((rows for rows in fewer if needs(rows).total <= room), 1)
        flags = f"--per_device_train_batch_size {rows} --gradient_accumulation_steps {batch * steps // rows}"
        found[flags] = needs(rows).total
    if getattr(args, "max_length", None):
        found[f"--max_length {args.max_length // 2}"] = need.total - need.activations / 2
    head = getattr(model, "policy", model).get_output_embeddings()
    layers = [m for m in model.modules() if type(m) in (nn.Linear, Conv1D)]
    frozen = [layer.weight for layer in layers if layer is not head and not layer.weight.requires_grad]
    if not frozen:
        found["LoRA (no --no_use_peft)"] = need.weights + need.activations
    elif not getattr(model, "is_quantized", False):
        found["--load_in_4bit"] = need.total - sum(w.nbytes * (1 - FOUR_BIT / w.element_size()) for w in frozen)
    if args.device.type == "cuda" and engine_of(trainer) == "ddp" and not hasattr(trainer, "ppo"):
        count, trained = 2 * args.world_size, need.gradients / min(args.world_size, 2)
        shared = held(need.weights, trained, need.optimizer / trained, count, "full")
        found[f"--config_file accelerate_config/fsdp2.yaml --num_processes {count}"] = shared.total + need.activations
    return found
