"""What the JSON files of a bundle say: its manifest, and PEFT's configuration.

A manifest of today's turret has every key. One from elsewhere may lack some, so the sections are read by `task_in` and
the like, which give an empty one for what is missing or no object.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal, TypeAlias, TypedDict

from turret.json_types import Plain

if TYPE_CHECKING:
    from turret.tasks.shapes import Generation, TaskSpec

MethodSpec: TypeAlias = Mapping[str, Plain]  # the fields of a `Method`
AdapterConfig: TypeAlias = Mapping[str, Plain]  # `adapter_config.json`; each method of PEFT has keys of its own


class FileEntry(TypedDict):
    """A file of a bundle."""

    bytes: int
    sha256: str


BaseKey = Literal["id", "fingerprint", "family", "revision", "quantization"]


class BaseSpec(TypedDict, total=False):
    """The base that an adapter was trained on."""

    id: str
    fingerprint: str | None
    family: str | None
    revision: str | None
    quantization: str | None


class FlatLossSpec(TypedDict):
    """The level of a loss that is no better than guessing."""

    loss: float
    guessing: float


class ImportedFiles(TypedDict, total=False):
    """Where an imported adapter is from."""

    sha256: dict[str, str]  # of its files
    peft_version: str
    hub_commit: str


class Merge(TypedDict):
    """How versions were merged."""

    how: str
    weights: list[float]
    density: float


class Lineage(TypedDict, total=False):
    """What the weights depend on. parent, reference: digests of versions."""

    recipe: str
    data: str
    base: str
    tokenizer: str
    world_size: int
    device: str
    parent: str
    reference: str
    seed: int
    libraries: dict[str, str]
    steps: int
    lr: float
    head_start: dict[str, float]
    flat_loss: FlatLossSpec
    kept_step: int
    promise: Mapping[str, Plain]  # the fields of `turret.store.promises.Terms`, and `sureness`
    imported: ImportedFiles
    parents: list[str]
    merge: Merge


class Manifest(TypedDict, total=False):
    """The file `manifest.json` of a bundle."""

    format: int
    method: MethodSpec
    task: TaskSpec
    generation: Generation
    base: BaseSpec
    lineage: Lineage
    files: dict[str, FileEntry]
    digest: str


def base_in(manifest: Manifest) -> BaseSpec:
    """The section `base`."""
    found = manifest.get("base")
    return found if isinstance(found, Mapping) else {}


def method_in(manifest: Manifest) -> MethodSpec:
    """The section `method`."""
    found = manifest.get("method")
    return found if isinstance(found, Mapping) else {}


def task_in(manifest: Manifest) -> TaskSpec:
    """The section `task`."""
    found = manifest.get("task")
    return found if isinstance(found, Mapping) else {}


def lineage_in(manifest: Manifest) -> Lineage:
    """The section `lineage`."""
    found = manifest.get("lineage")
    return found if isinstance(found, Mapping) else {}
