"""Merge LoRA versions of one base into a new version, whose lineage names all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from turret import bundles
from turret.adapters import Adapter, require_base
from turret.adapters.tuners.tuner import tuner_of
from turret.errors import AdapterError, RecipeError
from turret.json_types import JsonObject
from turret.methods.lora import COMBINATIONS
from turret.reference import check_name
from turret.store import Store, Version, scratch
from turret.workspace.importing import check
from turret.workspace.progress import Say
from turret.workspace.resident import load_base, read_adapter
from turret.workspace.results import Merged

if TYPE_CHECKING:
    from torch import Tensor

SEED = 42  # of the values that `dare` drops


@dataclass(frozen=True)
class MergeRequest:
    """The options of a merge."""

    how: str = "ties"
    weights: Sequence[float] | None = None  # one per version; None: 1 / count for each
    density: float = 0.5  # fraction of the values that ties and dare keep


def merge(store: Store, references: Sequence[str], name: str, request: MergeRequest, say: Say) -> Merged:
    """Merge versions into the next version of `name`.

    Raises:
        AdapterError: they differ in base, task, labels or method.
        RecipeError: there are fewer than two, or there is not one weight per version.
    """
    check_name(name)
    if request.how not in COMBINATIONS:
        raise RecipeError(f"--how {request.how}: expected one of {', '.join(COMBINATIONS)}")
    weights = _weights(references, request.weights)
    say("reading")
    versions, adapters = zip(*(read_adapter(store, reference) for reference in references), strict=True)
    notes = _require_alike(versions, adapters)
    first = adapters[0]
    say(f"loading {first.base.id}")
    base = load_base(first, "float32", "none")
    for adapter in adapters:
        require_base(adapter, base.fingerprint)
    say(f"merging by {request.how}")
    numbers = tuner_of(first.method)
    method, tensors = numbers.combine_adapters(base.model, adapters, weights, request.how, request.density, SEED)
    head = _mean([adapter.head for adapter in adapters], weights)
    lineage = {
        "parents": [version.digest for version in versions],
        "merge": {"how": request.how, "weights": list(weights), "density": request.density},
    }
    merged = replace(first, method=method, tensors=tensors, head=head, task=_settings(first), lineage=lineage)
    say("checking it on its base")
    effect = check(base, merged)
    with scratch.folder(store.root) as working:
        bundle = working / "bundle" / name
        bundles.save_bundle(merged, bundle)
        version = store.put(name, bundle)
    return Merged(
        version=str(version),
        digest=version.digest,
        parents=[str(each) for each in versions],
        how=request.how,
        weights=list(weights),
        effect=effect.effect,
        bundle_bytes=version.bytes,
        notes=notes,
    )


def _weights(references: Sequence[str], given: Sequence[float] | None) -> Sequence[float]:
    if len(references) < 2:
        raise RecipeError(f"merge needs at least two versions, given {len(references)}: name another")
    if given is None:
        return [1 / len(references)] * len(references)
    if len(given) != len(references):
        raise RecipeError(f"{len(references)} versions are named and {len(given)} weights: give one weight per version")
    return given


def _require_alike(versions: Sequence[Version], adapters: Sequence[Adapter]) -> list[str]:
    """Raise AdapterError if the versions cannot be merged. Returns notes on harmless differences."""
    first, notes = adapters[0], []
    for version, adapter in zip(versions[1:], adapters[1:], strict=True):
        for what, one, other in (
            ("method", first.method.kind, adapter.method.kind),
            ("base", first.base.fingerprint, adapter.base.fingerprint),
            ("task", first.task.get("kind"), adapter.task.get("kind")),
            ("labels", first.task.get("labels"), adapter.task.get("labels")),
        ):
            if one != other:
                raise AdapterError(
                    f"{version} cannot be merged with {versions[0]}: its {what} is {str(other)[:60]}, and there it is "
                    f"{str(one)[:60]}; merge versions of one base, task and method"
                )
        if _settings(adapter) != _settings(first):
            notes.append(f"{version} has other task settings: the new version gets those of {versions[0]}")
    return notes


def _settings(adapter: Adapter) -> JsonObject:
    """The task's settings without the calibration, which holds for one version's weights only."""
    return {key: value for key, value in adapter.task.items() if key != "calibration"}


def _mean(heads: Sequence[Mapping[str, Tensor]], weights: Sequence[float]) -> dict[str, Tensor]:
    """The weighted mean of the heads, with the weights scaled to a sum of 1."""
    if not heads[0]:
        return {}
    total = sum(weights)
    if total == 0:
        raise RecipeError("the weights add up to 0, so there is no mean of the heads: give others")
    shares = [weight / total for weight in weights]
    stacked = {key: torch.stack([head[key].float() for head in heads]) for key in heads[0]}
    return {key: torch.tensordot(torch.tensor(shares), values, dims=1) for key, values in stacked.items()}
