"""Copies of small tensors from the CPU to a device."""

from __future__ import annotations

import torch
from torch import Tensor


def real_gpu(device: torch.device) -> bool:
    """Whether the device is a GPU and this torch can use one; a pretended GPU of the tests is none."""
    return device.type == "cuda" and (torch.version.cuda or torch.version.hip) is not None


def copied(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device. To a GPU it goes from pinned memory, so the CPU goes on while it travels.

    Later work on the GPU waits for it by itself, and torch keeps the pinned memory until then.
    """
    if real_gpu(device) and tensor.is_cpu:
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
