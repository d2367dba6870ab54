"""The adapters of the rows of a pass, where a GPU finds them: their factors stay where they were loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from turret.ops.copies import copied


@dataclass(frozen=True)
class MixedLoRA:
    """The LoRA of N rows with S adapters, as the operation `add_mixed_lora` reads it. See there for the fields."""

    flats: list[Tensor]
    adapters: Tensor
    places: Tensor
    addresses: Tensor
    ranks: Tensor
    most: int

    @classmethod
    def of(
        cls,
        flats: Sequence[Tensor],
        offsets: Sequence[Tensor],
        ranks: Sequence[int],
        rows: Sequence[int],
    ) -> MixedLoRA:
        """All numbers go to the GPU in one copy.

        Args:
            flats: the tensor of each adapter.
            offsets: (L, 2) int64 each, bytes from its start to A and to B of each layer, -1 for none.
            ranks: of each adapter.
            rows: the adapter of each row, -1 for none.
        """
        S, N, size = len(flats), len(rows), flats[0].element_size()
        every = torch.stack(list(offsets))  # (S, L, 2)
        starts = torch.tensor([each.data_ptr() for each in flats])[:, None, None]
        missing = every < 0
        places = (every // size).masked_fill(missing, -1)
        addresses = (every + starts).masked_fill(missing, 0)
        parts = [torch.tensor(rows), torch.tensor(ranks), places.flatten(), addresses.flatten()]
        there = copied(torch.cat(parts), flats[0].device)
        adapters, own_ranks, place, address = torch.split(there, [N, S, places.numel(), places.numel()])
        shape = every.shape
        return cls(list(flats), adapters, place.view(shape), address.view(shape), own_ranks, max(ranks))

    @property
    def changing(self) -> list[Tensor]:
        """What differs between two batches of as many rows and adapters."""
        return [self.adapters, self.places, self.addresses, self.ranks]

    def with_changing(self, tensors: Sequence[Tensor]) -> MixedLoRA:
        """The same adapters, read from other places of memory."""
        adapters, places, addresses, ranks = tensors
        return MixedLoRA(self.flats, adapters, places, addresses, ranks, self.most)

    def add(self, y: Sequence[Tensor], x: Tensor, layers: Sequence[int], plus: Tensor | None = None) -> None:
        """y_g <- y_g + plus + (x A^T) B for layers with one input. x: (N, D_in), y: (N, D_out) each, in place."""
        torch.ops.turret.add_mixed_lora(
            list(y),
            x,
            self.flats,
            self.adapters,
            self.places,
            self.addresses,
            self.ranks,
            list(layers),
            self.most,
            plus,
        )
