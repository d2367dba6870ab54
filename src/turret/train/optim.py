"""The optimiser: AdamW over one flat row of float32 weights, clipping, and the learning rate as a function of the step.

Refuses to know the model: it is given named parameters and owns their storage from then on. All trainable weights are
views into one row, so that an update, a norm, a checkpoint or an all-reduce is one call however many there are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from turret.adapters.prefix import GRADIENT_STAYS
from turret.errors import TrainingError


def warmup_steps(warmup: float, total: int) -> int:
    """`warmup` below one is a share of all steps, else a number of steps; never more than all of them."""
    return min(total, round(warmup * total) if warmup < 1 else int(warmup))


def learning_rate(step: int, *, total: int, peak: float, warmup: int, schedule: str) -> float:
    """The rate of optimiser step 1, 2, ... `total`; no step of it is spent at a rate of zero.

    Rises as step / warmup, then falls to zero (which step total + 1 would reach) as a line or half a cosine, or stays.
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

        m <- b1 m + (1 - b1) g        v <- b2 v + (1 - b2) g^2
        w <- w (1 - lr decay) - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

    weights, gradients, exp_avg, exp_avg_sq: (N,) float32; the first `decayed` of N decay, which leaves out whatever has
    fewer than two dimensions (biases, norms). A parameter that a step does not reach has a zero gradient.
    ratios: by name, how many times the rate a parameter moves at; 1 where it names none. Decay is at the rate itself.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        *,
        weight_decay: float = 0.0,
        ratios: Mapping[str, float] | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        if not parameters:
            raise TrainingError("nothing to train: the method made no trainable parameter; choose another method")
        for name, parameter in parameters.items():
            if parameter.dtype != torch.float32:
                given = str(parameter.dtype).removeprefix("torch.")
                raise TrainingError(f"{name} is {given}, trained weights must be float32: set train.dtype to float32")
        self.weight_decay, self.betas, self.eps = weight_decay, betas, eps
        self.steps = 0
        ordered = sorted(parameters.items(), key=lambda item: item[1].ndim < 2)  # stable: decayed ones first
        self.decayed = sum(parameter.numel() for _, parameter in ordered if parameter.ndim >= 2)
        size = sum(parameter.numel() for _, parameter in ordered)
        device = ordered[0][1].device
        self.weights = torch.empty(size, dtype=torch.float32, device=device)
        self.gradients = torch.zeros_like(self.weights)
        self.exp_avg = torch.zeros_like(self.weights)
        self.exp_avg_sq = torch.zeros_like(self.weights)
        self.layout: dict[str, list[int]] = {}  # name -> shape, in the order of the row
        self._parameters = [parameter for _, parameter in ordered]
        self._faster: list[tuple[slice, float]] = []  # where the ratio is not 1
        start = 0
        for name, parameter in ordered:
            stop = start + parameter.numel()
            view = self.weights[start:stop].view(parameter.shape)
            view.copy_(parameter.detach())
            parameter.data = view
            parameter.grad = self.gradients[start:stop].view(parameter.shape)
            setattr(parameter, GRADIENT_STAYS, True)
            self.layout[name] = list(parameter.shape)
            if (ratio := (ratios or {}).get(name, 1.0)) != 1.0:
                self._faster.append((slice(start, stop), ratio))
            start = stop

    def zero_gradients(self) -> None:
        self.gradients.zero_()

    def clip_gradients(self, largest: float | None) -> float:
        """Scales the gradients down to a norm of `largest` where they exceed it; returns the norm before."""
        norm = float(torch.linalg.vector_norm(self.gradients))
        if largest and norm > largest and math.isfinite(norm):
            self.gradients.mul_(largest / norm)
        return norm

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """One update; the gradients are used up (their row is the scratch space)."""
        self.steps += 1
        beta1, beta2 = self.betas
        gradients = self.gradients
        self.exp_avg.lerp_(gradients, 1 - beta1)
        self.exp_avg_sq.mul_(beta2).addcmul_(gradients, gradients, value=1 - beta2)
        if self.weight_decay:
            self.weights[: self.decayed].mul_(1 - rate * self.weight_decay)
        torch.sqrt(self.exp_avg_sq, out=gradients)
        gradients.div_(math.sqrt(1 - beta2**self.steps)).add_(self.eps)
        value = -rate / (1 - beta1**self.steps)
        self.weights.addcdiv_(self.exp_avg, gradients, value=value)
        for part, ratio in self._faster:
            self.weights[part].addcdiv_(self.exp_avg[part], gradients[part], value=value * (ratio - 1))
        self._changed()

    def state(self) -> dict[str, Tensor]:
        """The rows a checkpoint keeps (not copies)."""
        return {"weights": self.weights, "exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor], steps: int) -> None:
        for name, row in self.state().items():
            row.copy_(state[name])
        self.steps = steps
        self._changed()

    def end(self) -> None:
        """Give back all but the weights, which are about to be copied: no update can follow."""
        for parameter in self._parameters:
            parameter.grad = None
            delattr(parameter, GRADIENT_STAYS)
        self.gradients = self.exp_avg = self.exp_avg_sq = self.weights.new_empty(0)

    @torch.no_grad()
    def set_weights(self, weights: Tensor) -> None:
        self.weights.copy_(weights)
        self._changed()

    def _changed(self) -> None:
        """Tell autograd, and whoever caches by version, that the parameters moved with their row."""
        torch.autograd.graph.increment_version(self._parameters)
