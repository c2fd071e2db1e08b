"""What memory holds now, what a step would add to it, and how much there is: read of the process and the machine."""

import copy
import gc
import math
import os
import weakref
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil
import pyarrow.compute as pc
import torch
from accelerate.utils import send_to_device
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

GROUPS, CGROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
V1 = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
V2 = "memory.max", "memory.current", "inactive_file"


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
        with torch.random.fork_rng([trainer.args.device] if trainer.args.device.type == "cuda" else []):
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
        if checkpointing:  # as Trainer.train does it
            options = dict(args.activation_checkpointing_kwargs or {})
            layers = {name: options.pop(name) for name in ("every_n_layers", "offload") if name in options}
            model.activation_checkpointing_enable(options or None, **layers)
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
    rooms = [math.inf]
    for line in GROUPS.read_text().splitlines() if GROUPS.exists() else ():
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
