"""Types for `torch.autograd.Function`, which torch leaves untyped."""

from __future__ import annotations

from typing import Any, ParamSpec, Protocol, TypeVar

from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R", covariant=True)
Gradients = tuple[Tensor | None, ...]  # one for each argument of `forward`; None for what is not differentiated


class FunctionContext(Protocol):
    """What `forward` leaves for `backward`. A Function with attributes of its own adds them in a subclass."""

    @property
    def saved_tensors(self) -> tuple[Tensor, ...]: ...  # None where None was saved
    @property
    def needs_input_grad(self) -> tuple[bool, ...]: ...
    def save_for_backward(self, *tensors: Tensor | None) -> None: ...


class _Function(Protocol[P, R]):
    @staticmethod
    def forward(ctx: Any, *args: P.args, **kwargs: P.kwargs) -> R: ...  # a subclass of FunctionContext


def apply(function: type[_Function[P, R]], *args: P.args, **kwargs: P.kwargs) -> R:
    """`function.apply(*args)`, with the argument and result types of its `forward`."""
    result: R = function.apply(*args, **kwargs)  # type: ignore[attr-defined]  # torch.autograd.Function's, untyped
    return result
