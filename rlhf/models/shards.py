"""Weights that an engine holds in parts: their real shape, and the whole of them.

FSDP2 makes a parameter a DTensor; ZeRO-3 leaves one of shape (0,) and keeps what it is in attributes; ZeRO with 16-bit
weights trains a float32 copy of them, and that is what was learned.
"""

import torch
from torch.distributed.tensor import DTensor


def shape_of(parameter) -> torch.Size:
    """The shape of the whole."""
    return getattr(parameter, "ds_shape", parameter.shape)


def part_of(parameter) -> torch.Tensor:
    """What this process holds of it."""
    if isinstance(parameter, DTensor):
        return parameter.detach().to_local()
    if not hasattr(parameter, "ds_tensor"):
        return parameter.detach()
    part = parameter.ds_tensor.detach().flatten()
    start = part.numel() * torch.distributed.get_rank(parameter.ds_process_group)
    return part[: max(0, parameter.ds_numel - start)]  # the rest is no number of anything


def whole_of(parameter) -> torch.Tensor:
    """All of it, on each process: all have to ask, and for the same one."""
    if isinstance(parameter, DTensor):
        return parameter.detach().full_tensor()
    if hasattr(parameter, "_z3_optimizer") or hasattr(parameter, "_hp_mapping"):
        from deepspeed.utils import safe_get_full_fp32_param

        return safe_get_full_fp32_param(parameter).detach()
    if hasattr(parameter, "ds_id"):
        from deepspeed import zero

        with zero.GatheredParameters([parameter]):
            return parameter.detach().clone()
    return parameter.detach()
