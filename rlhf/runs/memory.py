"""How much memory a run takes on each of its processes, found before it starts, and what to type if that is too much.

What is held throughout follows from the weights in memory, from how many of them are trained and from the optimizer.
Activations are measured: a pass forward and backward over the longest rows, after which all is as it was.
"""

import copy
import gc
import math
import os
import sys
import weakref
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil
import pyarrow.compute as pc
import torch
from accelerate.utils import DistributedType, send_to_device
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Trainer
from transformers.pytorch_utils import Conv1D

CGROUPS = Path("/sys/fs/cgroup")
V1 = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
V2 = "memory.max", "memory.current", "inactive_file"
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
    except (ValueError, TypeError, RuntimeError):  # one that wants to see the whole model
        return 2.0
    return sum(part.nbytes for part in optimizer.state[weight].values() if torch.is_tensor(part)) / weight.nbytes


class Allocated(TorchDispatchMode):
    """Inside, `peak` is the most bytes that were held at once of tensors that were made inside."""

    def __init__(self):
        super().__init__()
        self.known, self.now, self.peak = {}, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for tensor in tree_leaves((args, kwargs)):
            self.see(tensor, new=False)  # or a view of a weight would look like a new tensor
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            self.see(tensor, new=True)
        return result

    def see(self, tensor, new: bool) -> None:
        if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided:
            return
        storage = tensor.untyped_storage()
        if storage._cdata not in self.known:
            self.known[storage._cdata] = size = storage.nbytes() if new else 0
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.forget, storage._cdata)

    def forget(self, storage: int) -> None:
        self.now -= self.known.pop(storage)


def tensors_held() -> int:
    """Bytes of all tensors of this process: weights, a reference's and a reward model's, copies laid out otherwise."""
    # type(), since isinstance() asks lazy modules for attributes
    tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
    plain = [t.untyped_storage() for t in tensors if t.layout == torch.strided]
    return sum({s._cdata: s.nbytes() for s in plain}.values()) + sum(
        t.numel() * t.element_size() for t in tensors if t.layout == torch._mkldnn
    )


@contextmanager
def unchanged(trainer):
    """Leaves a trainer, its modules, gradients and the random state as they were."""
    own, metrics = vars(trainer).copy(), copy.deepcopy(getattr(trainer, "_metrics", None))
    modules = [(m, vars(m).copy(), m._forward_hooks.copy()) for m in trainer.model.modules()]
    try:
        with torch.random.fork_rng():
            yield
    finally:
        trainer.model.zero_grad()
        vars(trainer).clear()
        vars(trainer).update(own, **({} if metrics is None else {"_metrics": metrics}))
        for module, attributes, hooks in modules:
            vars(module).clear()
            vars(module).update(attributes)
            module._forward_hooks.clear()
            module._forward_hooks.update(hooks)


def activations(trainer, rows: list[dict], checkpointing: bool) -> int:
    """Bytes at the peak of a pass forward and backward over these rows, beyond weights and gradients."""
    model, args = trainer.model, trainer.args
    with unchanged(trainer):
        model.train()
        if checkpointing and not getattr(model, "is_activation_checkpointing", False):
            model.activation_checkpointing_enable(args.activation_checkpointing_kwargs)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        with Allocated() as allocated:
            with trainer.accelerator.autocast():
                if hasattr(trainer, "rehearse"):
                    loss = trainer.rehearse(rows)
                else:
                    loss = trainer.compute_loss(model, send_to_device(trainer.data_collator(rows), model.device))
            loss.backward()
    return allocated.peak


def longest(trainer, count: int) -> list[dict]:
    """The training rows that make the longest batch, as the collator gets them."""
    rows = trainer.train_dataset
    columns = [name for name in rows.column_names if name.endswith("_ids")]
    table = rows.select_columns(columns).with_format("arrow")[:]
    lengths = {name: pc.list_value_length(table[name]).to_numpy() for name in columns}
    total = lengths.pop("prompt_ids", 0) + np.max([*lengths.values()] or [[0]], axis=0)
    chosen = np.resize(np.argsort(-total, kind="stable"), count)  # again from the first, where there are too few
    return list(trainer._remove_unused_columns(rows, "train").select(chosen))


def estimate(trainer, room: float, checkpointing: bool | None = None):
    """A function of how many rows a process has in a batch: the Memory that it needs.

    One row is measured first, and the whole batch only if so many times that would fit, or the process could be killed.

    Args:
        room: what `room_of` says.
        checkpointing: whether activations are computed twice, if not as the trainer's arguments say.
    """
    args, model = trainer.args, trainer.model
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    fixed = held(tensors_held(), trained, optimizer_state(args), args.world_size, engine_of(trainer))
    checkpointing = bool(args.activation_checkpointing) if checkpointing is None else checkpointing
    batch = args.per_device_train_batch_size
    rows = longest(trainer, max(batch, 2))
    one = activations(trainer, rows[:1], checkpointing)
    most = batch if batch > 1 and fixed.total + batch * one < room else 2
    slope = (activations(trainer, rows[:most], checkpointing) - one) / (most - 1) if batch > 1 else 0.0
    return lambda count: fixed._replace(activations=one + slope * (count - 1))


def room_of(trainer) -> float:
    """Bytes that a process may hold in all: of its GPU, or its share of what the machine and its control groups leave
    to the processes here; the least of all processes, so that they decide alike."""
    device = trainer.args.device
    if device.type == "cuda":
        room = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    else:
        free = min(psutil.virtual_memory().available, cgroup_room())
        room = free / int(os.environ.get("LOCAL_WORLD_SIZE", 1)) + tensors_held()
    return trainer.accelerator.gather(torch.tensor([room], device=device)).min().item()


def cgroup_room() -> float:
    """Bytes that the control groups of this process leave it: containers and Slurm set their limits there."""
    rooms, groups = [math.inf], Path("/proc/self/cgroup")
    for line in groups.read_text().splitlines() if groups.exists() else ():
        _, kinds, path = line.split(":", 2)
        root, names = (CGROUPS / "memory", V1) if kinds == "memory" else (CGROUPS, V2)
        if kinds not in ("", "memory"):
            continue
        folder = root / path.lstrip("/")
        for place in (folder, *folder.parents):
            limit, used = (place / name for name in names[:2])
            if place.is_relative_to(root) and limit.exists() and (most := limit.read_text().strip()) != "max":
                stat = dict(line.split() for line in (place / "memory.stat").read_text().splitlines())
                rooms.append(int(most) - int(used.read_text()) + int(stat.get(names[2], 0)))
    return min(rooms)


def fitted(trainer) -> str:
    """The memory that a run needs of each process, and what to type where that is more than there is."""
    room, batch = room_of(trainer), trainer.args.per_device_train_batch_size
    needs = estimate(trainer, room)
    need = needs(batch)
    weights, kept, activations = (f"{n / 1e9:.1f}" for n in (need[0], need[1] + need[2], need[3]))
    line = (
        f"memory: about {need.total / 1e9:.1f} GB a process (weights {weights}, gradients and optimizer {kept},"
        f" activations {activations}) of {room / 1e9:.1f} GB"
    )
    if need.total > room:
        options = remedies(trainer, needs, room)
        told = (f"{what}: {size / 1e9:.1f}" for what, size in sorted(options.items(), key=lambda item: item[1]))
        line += "\n  it will not fit; GB with\n    " + "\n    ".join(told)
    elif 2 * need.total > room and keeps_freed(trainer.args.device):
        line += (
            "\n  freed memory is kept for speed, up to as much again; MALLOC_MMAP_MAX_=65536 SCRIPT ... gives it back"
        )
    return line


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
    head, layers = model.get_output_embeddings(), [m for m in model.modules() if type(m) in (nn.Linear, Conv1D)]
    frozen = [layer.weight for layer in layers if layer is not head and not layer.weight.requires_grad]
    if not frozen:
        found["LoRA, without --no_use_peft"] = need.weights + need.activations
    elif not getattr(model, "is_quantized", False):
        found["--load_in_4bit"] = need.total - sum(w.nbytes * (1 - FOUR_BIT / w.element_size()) for w in frozen)
    if args.device.type == "cuda" and engine_of(trainer) == "ddp" and not hasattr(trainer, "ppo"):
        count, trained = 2 * args.world_size, need.gradients / min(args.world_size, 2)
        shared = held(need.weights, trained, need.optimizer / trained, count, "full")
        found[f"--config_file accelerate_config/fsdp2.yaml --num_processes {count}"] = shared.total + need.activations
    return found
