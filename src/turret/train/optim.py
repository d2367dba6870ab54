"""AdamW over one flat row of float32 weights, gradient clipping, and the learning rate schedule.

`moments` has the update itself.

All trainable parameters become views into one row, so an update, a norm, a checkpoint or an all-reduce is one call.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from turret.adapters.prefix import GRADIENT_STAYS
from turret.errors import TrainingError
from turret.train.moments import MOMENTS, Float32Moments, Moments, Part, Update


def warmup_steps(warmup: float, total: int) -> int:
    """The number of warm-up steps. `warmup` below 1 is a share of all steps, else a number of steps."""
    return min(total, round(warmup * total) if warmup < 1 else int(warmup))


def learning_rate(step: int, *, total: int, peak: float, warmup: int, schedule: str) -> float:
    """The rate of optimiser step 1, 2, ... `total`, which is never zero.

    It rises as step / warmup. Then it falls along a line or half a cosine, to zero at step total + 1, or it stays.

    Args:
        schedule: linear, cosine or constant.
    """
    if step <= warmup:
        return peak * step / warmup
    done = (step - warmup) / (total + 1 - warmup)
    if schedule == "constant":
        return peak
    if schedule == "linear":
        return peak * (1.0 - done)
    assert schedule == "cosine", schedule
    return peak * 0.5 * (1.0 + math.cos(math.pi * done))


class AdamW:
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019).

    weights and gradients are (N,) float32. Parameters with two or more dimensions come first and decay; biases and
    norms do not. A parameter that a step does not use has a zero gradient.

    Args:
        parameters: by name; the optimiser replaces their storage.
        ratios: by name, a factor on the parameter's learning rate, 1 if not named. It does not change weight decay.
        kind: a recipe's `train.optimizer`: adamw keeps its moments in float32, adamw8bit in 8 bits.

    Raises:
        TrainingError: there is no parameter, one is not float32, or a library is missing.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        *,
        weight_decay: float = 0.0,
        ratios: Mapping[str, float] | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        kind: str = "adamw",
    ) -> None:
        if not parameters:
            raise TrainingError("nothing to train: the method made no trainable parameter; choose another method")
        for name, parameter in parameters.items():
            if parameter.dtype != torch.float32:
                given = str(parameter.dtype).removeprefix("torch.")
                raise TrainingError(f"{name} is {given}, trained weights must be float32: set train.dtype to float32")
        self.weight_decay, self.betas, self.eps = weight_decay, betas, eps
        self.steps = 0
        ordered = sorted(parameters.items(), key=lambda item: item[1].ndim < 2)  # those that decay come first
        size = sum(parameter.numel() for _, parameter in ordered)
        device = ordered[0][1].device
        self.weights = torch.empty(size, dtype=torch.float32, device=device)
        self.gradients = torch.zeros_like(self.weights)
        self.layout: dict[str, list[int]] = {}  # name -> shape, in the order of the row
        self._parameters = [parameter for _, parameter in ordered]
        parts: list[Part] = []
        start = 0
        for name, parameter in ordered:
            stop = start + parameter.numel()
            view = self.weights[start:stop].view(parameter.shape)
            view.copy_(parameter.detach())
            parameter.data = view
            parameter.grad = self.gradients[start:stop].view(parameter.shape)
            setattr(parameter, GRADIENT_STAYS, True)
            self.layout[name] = list(parameter.shape)
            alike = parameter.ndim >= 2, (ratios or {}).get(name, 1.0)
            if parts and parts[-1][1:] == alike:
                parts[-1] = Part(slice(parts[-1].where.start, stop), *alike)
            else:
                parts.append(Part(slice(start, stop), *alike))
            start = stop
        self._moments: Moments = MOMENTS[kind](self.weights, parts)

    def zero_gradients(self) -> None:
        self.gradients.zero_()

    def clip_gradients(self, largest: float | None) -> float:
        """Scale the gradients down to a norm of `largest` if they exceed it. Returns the norm before."""
        norm = float(torch.linalg.vector_norm(self.gradients))
        if largest and norm > largest and math.isfinite(norm):
            self.gradients.mul_(largest / norm)
        return norm

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """One update. It overwrites the gradients, whose row is its scratch space."""
        self.steps += 1
        update = Update(rate, self.steps, self.weight_decay, self.betas, self.eps)
        self._moments.step(self.weights, self.gradients, update)
        self._changed()

    def state(self) -> dict[str, Tensor]:
        """The rows that a checkpoint keeps. They are not copies."""
        return {"weights": self.weights, **self._moments.state()}

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor], steps: int) -> None:
        """Continue from the rows of `state` after so many steps."""
        for name, row in self.state().items():
            row.copy_(state[name])
        self.steps = steps
        self._changed()

    @torch.no_grad()
    def restart(self, weights: Tensor) -> None:
        """Begin again from a row (N,), as if no step had been taken."""
        for row in self._moments.state().values():
            row.zero_()
        self.steps = 0
        self.set_weights(weights)

    def end(self) -> None:
        """Free everything but the weights. No update can follow."""
        for parameter in self._parameters:
            parameter.grad = None
            delattr(parameter, GRADIENT_STAYS)
        self.gradients = self.weights.new_empty(0)
        self._moments = Float32Moments(self.gradients, [])

    @torch.no_grad()
    def set_weights(self, weights: Tensor) -> None:
        """Copy a row (N,) into the weights."""
        self.weights.copy_(weights)
        self._changed()

    def _changed(self) -> None:
        """Raise the parameters' version, for autograd and for caches: a change of their row does not."""
        torch.autograd.graph.increment_version(self._parameters)
