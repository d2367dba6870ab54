"""Merge several LoRAs into one by PEFT's `add_weighted_adapter`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from turret.adapters.adapter import LORA_PREFIX, Parts
from turret.errors import AdapterError
from turret.methods.lora.spec import COMBINATIONS

if TYPE_CHECKING:
    from turret.families import Family
    from turret.transformer import Model


def combined(
    model: Model, family: Family, given: Sequence[Parts], weights: Sequence[float], how: str, density: float, seed: int
) -> tuple[int, dict[str, Tensor]]:
    """One LoRA, with scaling 1, whose change of the weights merges those of several.

        linear, svd, cat:  delta = sum_i weight_i * scaling_i * B_i A_i     (svd: cut to the largest r; cat: exact)
        ties:  drops the smallest values, then those with the minority's sign (Yadav et al. 2023)
        dare:  drops values at random and scales up the rest (Yu et al. 2024)

    `linear` adds A and B separately, so its delta also has products of one adapter's A and another's B.

    Args:
        model: the base with nothing attached; it is restored afterwards.
        given: factors A (R_i, D_in), B (D_out, R_i) by layer, and the scaling, of each adapter.
        weights: one for each LoRA.
        density: share of the values that ties and dare keep.

    Returns:
        The rank, and the tensors by the names that are stored.

    Raises:
        AdapterError: PEFT does not merge these, such as `linear` of different ranks.
    """
    import peft

    kind, prunes = COMBINATIONS[how]
    configs = [
        peft.LoraConfig(
            r=(rank := len(next(iter(parts.factors.values()))[0])),
            lora_alpha=parts.scaling * rank,
            target_modules=sorted(parts.factors),
            fan_in_fan_out=family.fan_in_fan_out,
        )
        for parts in given
    ]
    names = [f"a{place}" for place in range(len(given))]
    wrapped = peft.PeftModel(model, configs[0], adapter_name=names[0])
    try:
        for name, config in zip(names[1:], configs[1:], strict=True):
            wrapped.add_adapter(name, config)
        layers = dict(model.named_modules())
        with torch.no_grad():
            for name, parts in zip(names, given, strict=True):
                for path, (A, B) in parts.factors.items():
                    layers[path].lora_A[name].weight.copy_(A)
                    layers[path].lora_B[name].weight.copy_(B)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)  # dare drops at random
            wrapped.base_model.add_weighted_adapter(
                names, list(weights), "merged", combination_type=kind, density=density if prunes else None
            )
        tensors = {}
        for path, layer in layers.items():
            if "merged" in getattr(layer, "lora_A", ()):
                for factor in ("lora_A", "lora_B"):
                    weight = getattr(layer, factor)["merged"].weight
                    tensors[f"{LORA_PREFIX}{path}.{factor}.weight"] = weight.detach().clone().float()
        return int(wrapped.peft_config["merged"].r), tensors
    except ValueError as error:
        raise AdapterError(f"these cannot be merged by {how} ({' '.join(str(error).split())[:120]}): try svd") from None
    finally:
        wrapped.unload()
