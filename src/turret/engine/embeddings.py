"""An embedding: one vector for a text, from the hidden states of the base's last layer. Loads no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, get_args

from turret.errors import DataError
from turret.families import Pooling

if TYPE_CHECKING:
    from torch import Tensor

POOLINGS: tuple[Pooling, ...] = get_args(Pooling)


@dataclass(frozen=True)
class Embedding:
    """How a text becomes a vector.

    Args:
        pooling: The mean of all tokens, or the first or the last token. None: the family's default.
        dimensions: Keep only the first numbers of the vector. None: all of them.
        normalize: Scale the vector to length 1, after it was cut.

    Raises:
        DataError: For a value that does not exist.
    """

    pooling: Pooling | None = None
    dimensions: int | None = None
    normalize: bool = True

    def __post_init__(self) -> None:
        if self.pooling is not None and self.pooling not in POOLINGS:
            raise DataError(f"pooling {self.pooling!r}: expected {', '.join(POOLINGS)}")
        if self.dimensions is not None and (not isinstance(self.dimensions, int) or self.dimensions < 1):
            raise DataError(f"dimensions = {self.dimensions!r}: expected a whole number of 1 or more")

    def vector(self, pooled: Tensor) -> list[float]:
        """The embedding: e = h[:dimensions], divided by |e| if `normalize`. pooled: h, (D,) float32."""
        cut = pooled[: self.dimensions]
        if not self.normalize:
            return [float(each) for each in cut.tolist()]
        length = math.sqrt(float(cut.double().square().sum()))
        return [float(each) for each in (cut / max(length, 1e-12)).tolist()]
