"""AdamW over one row of weights (moments in float32, or in 8 bits by bitsandbytes), and the learning rate schedule.

m <- b1 m + (1 - b1) g        v <- b2 v + (1 - b2) g^2
w <- w (1 - lr decay) - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from turret import quantized
from turret.engine.protocol import OptimStep
from turret.errors import TrainingError, require_package
from turret.ops.structs import GRADIENT_STAYS

BLOCK = 256  # values with one scale, in 8 bits; bitsandbytes has no other size


class Part(NamedTuple):
    """A part of the row whose weights are updated alike. ratio: its learning rate over the row's."""

    where: slice
    decays: bool
    ratio: float

    def weight_decay(self, how: OptimStep) -> float:
        """What to multiply by the part's learning rate, so that a ratio does not change the decay."""
        return how.weight_decay / self.ratio if self.decays else 0.0


class Float32Moments:
    """Adam's moments as (N,) float32: 8 bytes a weight.

    Args:
        weights: the row (N,).
        parts: they cover the row.
    """

    def __init__(self, weights: Tensor, parts: Sequence[Part]) -> None:
        self.exp_avg, self.exp_avg_sq = torch.zeros_like(weights), torch.zeros_like(weights)
        self._parts = parts

    def step(self, weights: Tensor, gradients: Tensor, how: OptimStep, steps: int) -> None:
        beta1, beta2 = how.betas
        for part in self._parts:
            adamw(
                [weights[part.where]],
                [gradients[part.where]],
                [self.exp_avg[part.where]],
                [self.exp_avg_sq[part.where]],
                [],
                [weights.new_full((), steps - 1.0)],
                fused=True,
                amsgrad=False,
                beta1=beta1,
                beta2=beta2,
                lr=how.lr * part.ratio,
                weight_decay=part.weight_decay(how),
                eps=how.eps,
                maximize=False,
            )

    def state(self) -> dict[str, Tensor]:
        return {"exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}


class EightBitMoments:
    """The moments as one byte each, with a scale for every 256 values: 2 bytes a weight.

    The bytes are indices into bitsandbytes' dynamic map of 256 values (Dettmers et al. 2022, "8-bit Optimizers via
    Block-wise Quantization"). Its operation updates moments and weights.

    Args:
        weights: the row (N,).
        parts: they cover the row. A block never spans two parts.

    Raises:
        TrainingError: bitsandbytes is not installed.
    """

    def __init__(self, weights: Tensor, parts: Sequence[Part]) -> None:
        require_eight_bits()
        functional = quantized.library().functional
        self._update = functional.optimizer_update_8bit_blockwise
        self._maps: tuple[Tensor, Tensor] = (
            functional.create_dynamic_map(signed=True).to(weights.device),
            functional.create_dynamic_map(signed=False).to(weights.device),
        )
        self._parts, self._scales, blocks = list(parts), list[slice](), 0
        for part in self._parts:
            count = -(-(part.where.stop - part.where.start) // BLOCK)
            self._scales.append(slice(blocks, blocks + count))
            blocks += count
        self._moments = [torch.zeros_like(weights, dtype=torch.uint8) for _ in range(2)]
        self._absmax = [weights.new_zeros(blocks) for _ in range(2)]

    def step(self, weights: Tensor, gradients: Tensor, how: OptimStep, steps: int) -> None:
        (m, v), (m_scale, v_scale), (beta1, beta2) = self._moments, self._absmax, how.betas
        for part, blocks in zip(self._parts, self._scales, strict=True):
            self._update(
                "adam",
                gradients[part.where],
                weights[part.where],
                m[part.where],
                v[part.where],
                beta1,
                beta2,
                0.0,  # of other optimisers
                0.0,
                how.eps,
                steps,
                how.lr * part.ratio,
                *self._maps,
                m_scale[blocks],
                v_scale[blocks],
                weight_decay=part.weight_decay(how),
            )

    def state(self) -> dict[str, Tensor]:
        names = "exp_avg", "exp_avg_sq"
        moments = dict(zip(names, self._moments, strict=True))
        return moments | {f"{name}_absmax": each for name, each in zip(names, self._absmax, strict=True)}


MOMENTS: dict[str, type[Float32Moments] | type[EightBitMoments]] = {
    "adamw": Float32Moments,
    "adamw8bit": EightBitMoments,
}


def moment_bytes(optimizer: str | None, weights: int) -> int:
    """Bytes of the moments of so many weights, for a recipe's `train.optimizer`."""
    if optimizer == "adamw8bit":
        return 2 * weights + 8 * -(-weights // BLOCK)
    return 8 * weights


def require_eight_bits() -> None:
    """Raise TrainingError if bitsandbytes is not installed."""
    remedy = "pip install 'turret[quantized]', or leave it out"
    with require_package('train.optimizer = "adamw8bit"', "bitsandbytes", remedy, TrainingError):
        quantized.library()


# --- optim ------------------------------------------------------------------------------------------------------------
# AdamW over one flat row of float32 weights, gradient clipping, and the learning rate schedule.
#
# All trainable parameters become views into one row, so an update, a norm, a checkpoint or an all-reduce is one call.


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
        ratios: Mapping[str, float] | None = None,
        kind: str = "adamw",
    ) -> None:
        if not parameters:
            raise TrainingError("nothing to train: the method made no trainable parameter; choose another method")
        for name, parameter in parameters.items():
            if parameter.dtype != torch.float32:
                given = str(parameter.dtype).removeprefix("torch.")
                raise TrainingError(f"{name} is {given}, trained weights must be float32: set train.dtype to float32")
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
        self._moments: Float32Moments | EightBitMoments = MOMENTS[kind](self.weights, parts)

    def zero_gradients(self) -> None:
        self.gradients.zero_()

    def clip_gradients(self, largest: float | None) -> float:
        """Scale the gradients down to a norm of `largest` if they exceed it. Returns the norm before."""
        norm = float(torch.linalg.vector_norm(self.gradients))
        if largest and norm > largest and math.isfinite(norm):
            self.gradients.mul_(largest / norm)
        return norm

    @torch.no_grad()
    def step(self, how: OptimStep) -> None:
        """One update; nothing is clipped."""
        self.steps += 1
        self._moments.step(self.weights, self.gradients, how, self.steps)
        self._raise_version()

    def state(self) -> dict[str, Tensor]:
        """The rows that a checkpoint keeps. They are not copies."""
        return {"weights": self.weights, **self._moments.state()}

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor], steps: int) -> None:
        """Continue from the rows of `state` after so many steps."""
        for name, row in self.state().items():
            row.copy_(state[name])
        self.steps = steps
        self._raise_version()

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
        self._raise_version()

    def _raise_version(self) -> None:
        """Raise the parameters' version, for autograd and for caches: a change of their row does not."""
        torch.autograd.graph.increment_version(self._parameters)
