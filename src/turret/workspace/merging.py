"""The merge verb: several versions of LoRA on one base become one new version, whose lineage names them all."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from turret import bases, bundles
from turret.adapters import Adapter, require_base
from turret.errors import AdapterError, RecipeError
from turret.methods.lookup import numbers_of
from turret.reference import check_name
from turret.store import Store, Version, scratch
from turret.tasks import stored_task
from turret.workspace.importing import check
from turret.workspace.progress import Say
from turret.workspace.results import Merged

if TYPE_CHECKING:
    from torch import Tensor

SEED = 42  # of what `dare` drops


@dataclass(frozen=True)
class MergeRequest:
    """What the user asks for."""

    how: str = "ties"
    weights: Sequence[float] | None = None  # one a version; all 1 / count where left out
    density: float = 0.5  # share of the values that ties and dare keep


def merge(store: Store, references: Sequence[str], name: str, request: MergeRequest, say: Say) -> Merged:
    """Merge versions into the next version of `name`.

    Raises:
        AdapterError: they are of different bases, tasks, labels or methods.
        RecipeError: fewer than two, or not as many weights as versions.
    """
    check_name(name)
    weights = _weights(references, request.weights)
    say("reading")
    versions, given = _read(store, references)
    notes = _agreed(versions, given)
    first = given[0]
    task = stored_task(first.task)
    say(f"loading {first.base.id}")
    labels = task.num_labels(first.task.get("labels") or ())
    base = bases.load(first.base.id, task=task.request, num_labels=labels, dtype="float32")
    for adapter in given:
        require_base(adapter, base.fingerprint)
    say(f"merging by {request.how}")
    numbers = numbers_of(first.method)
    method, tensors = numbers.combined(base.model, given, weights, request.how, request.density, SEED)
    head = _mean([adapter.head for adapter in given], weights)
    lineage = {
        "parents": [version.digest for version in versions],
        "merge": {"how": request.how, "weights": list(weights), "density": request.density},
    }
    merged = replace(first, method=method, tensors=tensors, head=head, lineage=lineage)
    say("checking it on its base")
    effect = check(base, merged)
    with scratch.folder(store.root) as beside:
        bundle = beside / "bundle" / name
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
        raise RecipeError(f"{len(references)} versions are named and {len(given)} weights: give one weight a version")
    return given


def _read(store: Store, references: Sequence[str]) -> tuple[list[Version], list[Adapter]]:
    versions, given = [], []
    for reference in references:
        with tempfile.TemporaryDirectory(prefix="turret-") as folder:
            versions.append(store.materialize(reference, Path(folder) / "bundle"))
            given.append(bundles.read_bundle(Path(folder) / "bundle"))
    return versions, given


def _agreed(versions: Sequence[Version], given: Sequence[Adapter]) -> list[str]:
    """Notes on what differs and does no harm. Raises AdapterError for what does."""
    first, notes = given[0], []
    for version, adapter in zip(versions[1:], given[1:], strict=True):
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
        if adapter.task != first.task:
            notes.append(f"{version} was trained with other settings of its task: those of {versions[0]} are kept")
    return notes


def _mean(heads: Sequence[Mapping[str, Tensor]], weights: Sequence[float]) -> dict[str, Tensor]:
    """The weighted mean of the heads; weights that do not add up to 1 are scaled so that they do."""
    total = sum(weights)
    if total == 0:
        raise RecipeError("the weights add up to 0, so there is no mean of the heads: give others")
    shares = [weight / total for weight in weights]
    stacked = {key: torch.stack([head[key].float() for head in heads]) for key in heads[0]}
    return {key: torch.tensordot(torch.tensor(shares), values, dims=1) for key, values in stacked.items()}
