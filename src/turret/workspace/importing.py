"""Import an adapter from outside: check it on its base, then store it as a new version.

A PEFT folder states neither task nor labels nor a fingerprint of its base. The caller gives them, or they are read from
the base, with a note. Nothing in the adapter can choose code, a tokenizer or a path. The base that it names is only a
hint: the fingerprint of the loaded weights decides.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from turret import adapters, bases, bundles
from turret.adapters import Adapter
from turret.adapters.adapter import head_paths
from turret.bases import Base
from turret.bases.quantized import Quantization
from turret.bundles import conversion, fetch
from turret.bundles.bundle import CONFIG, WEIGHTS, named_for, read_config
from turret.data import Dataset, Labelled, TextPair
from turret.errors import AdapterError, BaseModelError, RecipeError
from turret.json_types import JsonValue, Plain
from turret.manifest import AdapterConfig, ImportedFiles, Lineage
from turret.recipe import Recipe
from turret.recipe import Task as TaskSettings
from turret.reference import check_name
from turret.store import Store, Version, scratch
from turret.tasks import TASKS, Task, make_task, task_from_spec, task_of
from turret.tasks.embedding import HEADLESS
from turret.tasks.shapes import TaskSpec
from turret.tasks.task import task_kinds
from turret.train.batches import EncodedRow, EncodedRows
from turret.train.proof import AdapterEffect, effect_of
from turret.workspace.progress import Say, silent
from turret.workspace.resident import quantization_of
from turret.workspace.results import Imported

TASK_TYPES = {  # PEFT's task_type -> kind
    "SEQ_CLS": "classify",
    "TOKEN_CLS": "token_classification",
    "CAUSAL_LM": "generate",
    "SEQ_2_SEQ_LM": "generate",
    HEADLESS: "embedding",
}
PROBE = (  # inputs of the check; any text works, because only the difference from the bare base counts
    "The quick brown fox jumps over the lazy dog.",
    "Shares of the bank fell by 12% in London, and nobody said why!",
    "a dull film",
)
WRITTEN = "It was a great pleasure to read."  # the target text of each input


@dataclass(frozen=True)
class ImportRequest:
    """What the user states about the adapter. None: read it from the adapter or its base."""

    base: str | None = None
    task: str | None = None
    labels: Sequence[str] | None = None
    settings: Mapping[str, Plain] | None = None  # keys of a recipe's [task]
    rank: int | None = None  # of the LoRA to which another PEFT method is converted
    quantization: Quantization = "none"  # of the base that it is checked on
    revision: str | None = None  # of a repository on the Hub
    pulled: bool = False  # the source is a repository on the Hub, whatever lies here under that name
    device: str = "auto"  # where it is checked


def import_adapter(store: Store, source: str, name: str, request: ImportRequest, say: Say = silent) -> Imported:
    """Copy an adapter, check it on its base, and store it as the next version of `name`.

    Args:
        source: a PEFT folder, a bundle, a zip or tar archive of either, or a Hub id.

    Raises:
        AdapterError: it is broken, does not fit the base, or has no effect on the base's outputs.
        BaseModelError: its base cannot be loaded.
        RecipeError: the request contradicts the adapter.
        StoreError: the disk is full or not writable.
    """
    check_name(name)
    failed = f"adapter {ascii(source)[:80]} cannot be copied into {store.root}"
    remedy = "free some space there, make it readable, or use another --store"
    with scratch.disk_errors(failed, store.root, remedy), scratch.folder(store.root) as working:
        say(f"reading {source}")
        brought = fetch.pull(source, working, request.revision) if request.pulled else fetch.fetch(source, working)
        config, converted = read_config(brought.folder), list[str]()
        if conversion.needs_conversion(config):
            brought, note = _convert(brought, config, working, request, say)
            config = read_config(brought.folder)
            converted.append(note)
        given = bundles.read_bundle(brought.folder)
        if given.task:
            _refuse_settings(request)
        kind = _kind(given, config, request)
        base_id = request.base or given.base.id
        if not (request.base or given.base.fingerprint or config.get("base_model_name_or_path")):
            raise AdapterError("its configuration names no base: give --base with the one it was trained on")
        say(f"loading {base_id}")
        base = _load(base_id, kind, request, quantization_of(given) if given.task else request.quantization)
        adapters.require_base(given, base.fingerprint)
        adapter, notes = given, [*([brought.note] if brought.note else []), *base.notes, *converted]
        if not given.task:
            if request.base is None:
                notes.append(f"the base is the one that its configuration names: {base_id}")
            adapter = _complete_adapter(named_for(given, base.model), kind, base, name, request, notes)
            adapter = replace(adapter, lineage=adapter.lineage or _origin(brought, config))
        elif base_id != given.base.id:
            notes.append(f"its base is called {base_id} here and {given.base.id} where it was made: the digest is new")
            adapter = replace(given, base=base.info)
        say("checking it on its base")
        effect = check(base, adapter)
        bundle = brought.folder
        if adapter is not given:
            bundle = working / "bundle" / name
            bundles.save_bundle(adapter, bundle)
        say("storing")
        before = {version.digest for version in store.list(name)}
        version = store.put(name, bundle)
        if version.digest in before:
            notes.append(f"{version} has this content already: nothing new is stored")
        return _import_result(version, adapter, base, effect, notes)


def _convert(
    brought: fetch.Fetched, config: AdapterConfig, working: Path, request: ImportRequest, say: Say
) -> tuple[fetch.Fetched, str]:
    """Convert another PEFT method to LoRA. PEFT reads the adapter, on its base in float32.

    Returns:
        The folder of the LoRA, and a note on the error of the conversion.
    """
    base_id = request.base or config.get("base_model_name_or_path")
    kind = request.task or TASK_TYPES.get(str(config.get("task_type")))
    if not isinstance(base_id, str) or not base_id or kind not in TASKS:
        raise AdapterError("a conversion to LoRA needs its base and task: give --base and --task")
    say(f"converting {config.get('peft_type')} to LoRA on {base_id}")
    labels = request.labels or ()
    base = bases.load(base_id, task=task_of(kind).head, num_labels=task_of(kind).num_labels(labels), dtype="float32")
    ids = _same_length(base.tokenizer(list(PROBE))["input_ids"])
    found = conversion.as_lora(brought.folder, working / "lora", base.model, base.family, ids, request.rank)
    return replace(brought, folder=working / "lora"), (
        f"converted from {found.kind} to LoRA of rank {found.rank}: outputs change by at most "
        f"{100 * found.deviation:.2g}% of the largest"
    )


def _same_length(rows: Sequence[Sequence[int]]) -> Tensor:
    """Cut all rows to the length of the shortest: (B, T) int64."""
    shortest = min(map(len, rows))
    return torch.tensor([list(row[:shortest]) for row in rows])


def _refuse_settings(request: ImportRequest) -> None:
    packed = request.quantization != "none"
    options = {
        "--base-quantization": packed,
        "--task": request.task,
        "--labels": request.labels,
        "--set": request.settings,
    }
    if given := [option for option, value in options.items() if value]:
        raise RecipeError(f"this is a bundle, which states its task and labels itself: leave {', '.join(given)} out")


def _kind(adapter: Adapter, config: AdapterConfig, request: ImportRequest) -> str:
    """The kind of task: from the bundle, the request, PEFT's task_type, or the presence of a head."""
    stated = adapter.task.get("kind") or request.task or TASK_TYPES.get(str(config.get("task_type")))
    kind = stated or ("classify" if adapter.head else None)
    if kind is None:
        raise AdapterError(f"nothing states the adapter's task: give --task {task_kinds()}")
    if kind not in TASKS:
        raise AdapterError(f"its task {ascii(kind)[:40]} is not known: expected {task_kinds()}")
    return str(kind)


def _load(base_id: str, kind: str, request: ImportRequest, quantization: Quantization) -> Base:
    try:
        return bases.load(base_id, task=task_of(kind).head, quantization=quantization, device=request.device)
    except BaseModelError as error:
        if request.base is not None:
            raise
        raise type(error)(f"{error}; or give the adapter's base with --base") from error


def _origin(brought: fetch.Fetched, config: AdapterConfig) -> Lineage:
    """The lineage of an imported adapter: the digests of its files, PEFT's version and the Hub's commit."""
    files = {}
    for name in (CONFIG, WEIGHTS):
        with (brought.folder / name).open("rb") as file:
            files[name] = hashlib.file_digest(file, "sha256").hexdigest()
    imported: ImportedFiles = {"sha256": files}
    if made_with := config.get("peft_version"):
        imported["peft_version"] = str(made_with)[:80]
    if brought.revision:
        imported["hub_commit"] = brought.revision[:80]
    return {"imported": imported}


def _complete_adapter(
    given: Adapter, kind: str, base: Base, name: str, request: ImportRequest, notes: list[str]
) -> Adapter:
    """A PEFT adapter with what its folder does not state: base, task, and the parts of the head that the base has."""
    recipe = Recipe(name=name, base=base.id, data={"source": name}, task={"kind": kind})
    overrides = {f"task.{key}": each if isinstance(each, str) else json.dumps(each) for key, each in _settings(request)}
    recipe = recipe.with_overrides(overrides)
    recipe.require_read(kind)
    head, labels = given.head, tuple[str, ...]()
    if not task_of(kind).bare:
        head = _head(given, base, notes)
        labels = _labels(kind, head, base, request, notes)
    elif request.labels:
        raise RecipeError(
            f"--labels are for a classifier, and this is to {kind}: leave them out, or give --task classify"
        )
    dataset = Dataset((), (), (), kind, labels, columns={}, notes=(), duplicates=0, digest="")
    spec = make_task(recipe.task, dataset, base.tokenizer, base.family.kind).spec()
    method = given.method.of_tensors(given.tensors)
    tensors, head = ({key: each.float() for key, each in part.items()} for part in (given.tensors, head))
    return Adapter(method, tensors, head, base.info, spec, spec.get("generation", {}), given.lineage)


def _settings(request: ImportRequest) -> Iterator[tuple[str, JsonValue]]:
    for key, value in (request.settings or {}).items():
        if key == "kind":
            raise RecipeError("--set task.kind: give --task instead")
        yield key, value


def _head(given: Adapter, base: Base, notes: list[str]) -> dict[str, Tensor]:
    """The adapter's head; modules that it lacks are the base's own, if the checkpoint has them."""
    head, fresh = dict(given.head), set(base.fresh)
    modules = dict(base.model.named_children())
    for module in base.family.head_modules:
        if module not in modules or any(key.startswith(f"{module}.") for key in head):
            continue
        own = _copy_module(base, module)
        if not set(own) & fresh:
            head |= own
            notes.append(f"the head {module} is the base's own: the adapter has none")
    missing = [key for key in base.fresh if key not in head]
    if missing:
        raise AdapterError(
            f"{missing[0]} is missing: neither the adapter nor the checkpoint of {base.id} has it, so it was random "
            "during training; save the adapter with modules_to_save, or give the base it was trained on"
        )
    for path in head_paths(base.family, head):  # bias = "all" trains a pooler's bias, not its weight
        if all(key.endswith(".bias") for key in head if key.startswith(f"{path}.")):
            head |= {
                key: value for key, value in _copy_module(base, path).items() if key not in head and key not in fresh
            }
    return head


def _copy_module(base: Base, path: str) -> dict[str, Tensor]:
    """The tensors of one of the base's modules by their paths in the base, copied to the CPU."""
    state = base.model.get_submodule(path).state_dict()
    return {f"{path}.{key}": value.detach().cpu().clone() for key, value in state.items()}


def _labels(
    kind: str, head: Mapping[str, Tensor], base: Base, request: ImportRequest, notes: list[str]
) -> tuple[str, ...]:
    """The names of the head's outputs: from the request, else from the base's configuration."""
    last = dict(base.model.named_children())[base.family.head_modules[-1]]
    names = [f"{base.family.head_modules[-1]}.{key}" for key, each in last.state_dict().items() if each.dim() == 2]
    if not names or names[-1] not in head:
        raise AdapterError(f"the adapter's head lacks {names[-1] if names else 'its last layer'}: save it again")
    size = len(head[names[-1]])
    if request.labels:
        if not all(label.strip() for label in request.labels):
            raise RecipeError(f"a label is empty: expected {size} names with commas between them, in order")
        given = tuple(request.labels)
        given = task_of(kind).labels_of_outputs(given) if len(given) == size else given
        if task_of(kind).num_labels(given) != size:
            raise AdapterError(
                f"the head has {size} outputs, and {len(request.labels)} labels are given: name every output, in order"
            )
        return given
    names_by_number = json.loads((base.folder / "config.json").read_text(encoding="utf-8")).get("id2label")
    names_by_number = names_by_number if isinstance(names_by_number, dict) else {}
    labels = tuple(str(names_by_number.get(str(number), "LABEL_")) for number in range(size))
    if len(names_by_number) != size or any(label.startswith("LABEL_") for label in labels):
        raise AdapterError(f"nothing names the {size} outputs of the head: give --labels with {size} names, in order")
    notes.append(f"the labels are those of the base's configuration: {', '.join(labels)}")
    return task_of(kind).labels_of_outputs(labels)


def check(base: Base, adapter: Adapter) -> AdapterEffect:
    """Mount the adapter and compare its outputs with the bare base's.

    Raises:
        AdapterError: a tensor is unused, the outputs do not change, or their number differs from the labels.
    """
    _check_task(adapter.task, base)
    try:
        task = task_from_spec(adapter.task, base.tokenizer)
        items = probe_items(task)
        targets = [item.target for item in items if item.target is not None]
        effect = effect_of(base, adapter, [item.source for item in items], targets)
    except (RuntimeError, ValueError, IndexError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:120]
        raise AdapterError(
            f"it cannot be used on {base.id} ({reason}): it belongs to another base, or is broken"
        ) from None
    outputs = effect.outputs.shape[1]
    if outputs != (task.num_labels(task.labels) or outputs):
        raise AdapterError(
            f"the head has {outputs} outputs, and the bundle names {len(task.labels)} labels: export it again"
        )
    if problem := effect.problem():
        raise AdapterError(f"not stored: on {base.id} {problem}")
    return effect


def probe_items(task: Task) -> list[EncodedRow]:
    """A few texts as tokens, for a comparison of outputs."""
    examples = [Labelled(TextPair(text, text) if task.pairs else text, WRITTEN) for text in PROBE]
    return EncodedRows(task, examples).take(range(len(PROBE)))


def _check_task(spec: TaskSpec, base: Base) -> None:
    """Raise AdapterError unless a bundle's task is valid for a recipe and for this kind of base."""
    kind = base.family.kind
    if spec.get("family_kind", kind) != kind:
        raise AdapterError(
            f"the bundle's task is for another kind of base, {ascii(spec['family_kind'])[:40]}, than {base.id}, "
            f"{kind!r}: export it again"
        )
    settings = {key: value for key, value in spec.items() if key in TaskSettings.model_fields}
    generation = spec.get("generation")
    if isinstance(generation, Mapping):
        settings |= {key: generation.get(key) for key in ("num_beams", "max_new_tokens")}
    labels = spec.get("labels", [])
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise AdapterError("the bundle's labels are not a list of names: export it again")
    try:
        TaskSettings.model_validate(settings)
    except RecipeError as error:
        raise AdapterError(f"the bundle's task is invalid ({error}): export it again") from None


def _import_result(version: Version, adapter: Adapter, base: Base, effect: AdapterEffect, notes: list[str]) -> Imported:
    return Imported(
        version=str(version),
        digest=version.digest,
        base={"id": adapter.base.id, "fingerprint": base.fingerprint},
        method=adapter.method.kind,
        task={"kind": adapter.task["kind"], "labels": list(adapter.task.get("labels") or ())},
        tensors=len(adapter.tensors) + len(adapter.head),
        parameters=sum(each.numel() for each in (*adapter.tensors.values(), *adapter.head.values())),
        effect=effect.effect,
        bundle_bytes=version.bytes,
        notes=notes,
    )
