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


def uploaded(tensor: Tensor, device: torch.device) -> Tensor:
    """A large tensor on a device, the same one on a CPU. It goes to a GPU from pinned memory, on a stream of its own.

    So passes that another thread submits compute meanwhile. The calling thread waits for the copy.
    """
    if not real_gpu(device):
        return tensor.to(device)
    there = torch.empty_like(tensor, device=device)  # from the memory of the stream on which it is read
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))  # what used this memory before may still run
    with torch.cuda.stream(side):
        there.copy_(tensor, non_blocking=True)
    side.synchronize()
    return there


def use_device(device: torch.device) -> None:
    """Make a GPU the calling thread's own: programs start there, and memory is pinned for it."""
    if real_gpu(device):
        torch.cuda.set_device(device)
