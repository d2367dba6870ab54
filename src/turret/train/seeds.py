"""The run's own random numbers, apart from the program's. Knows torch's and Python's generators, nothing of training.

Dropout draws from torch's global generator. A loop that yields between steps hands control to code that may draw too,
so the loop keeps a state of its own and swaps it in for the length of a step: what the caller draws changes nothing,
what the loop draws shows nowhere.
"""

from __future__ import annotations

import random
from types import TracebackType
from typing import Any

import torch
from torch import Tensor


class Randomness:
    """`with randomness:` runs the body on the run's own generators and puts the program's back afterwards."""

    def __init__(self, seed: int, device: torch.device) -> None:
        self.device = device
        self._outer: tuple[Any, Tensor, Tensor | None] | None = None
        with self:
            random.seed(seed)
            torch.manual_seed(seed)

    def _take(self) -> tuple[Any, Tensor, Tensor | None]:
        on_card = torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None
        return random.getstate(), torch.get_rng_state(), on_card

    def _set(self, state: tuple[Any, Tensor, Tensor | None]) -> None:
        python, host, on_card = state
        random.setstate(python)
        torch.set_rng_state(host)
        if on_card is not None:
            torch.cuda.set_rng_state(on_card, self.device)

    def __enter__(self) -> None:
        assert self._outer is None, "the run's random numbers are in use already"
        self._outer = self._take()
        if hasattr(self, "_own"):
            self._set(self._own)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._outer is not None
        self._own = self._take()
        self._set(self._outer)
        self._outer = None

    def tensors(self) -> dict[str, Tensor]:
        """The state as tensors, for a checkpoint."""
        (version, words, gauss), host, on_card = self._own
        assert version == 3, "another generator than Python's of today"
        assert gauss is None, "random.gauss leaves a half-used pair; nothing here calls it"
        state = {"python": torch.tensor(words, dtype=torch.int64), "torch": host}
        if on_card is not None:
            state["cuda"] = on_card
        return state

    def load(self, state: dict[str, Tensor]) -> None:
        python = (3, tuple(state["python"].tolist()), None)
        self._own = (python, state["torch"], state.get("cuda"))
