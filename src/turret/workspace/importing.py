"""The import verb: an adapter from outside to a version in the store, checked on its base before it is kept.

A folder of PEFT says neither task nor labels nor the weights of its base: what is missing is given, or read, and said.
Nothing in it chooses code, a tokenizer or where files go; the base it names is a hint, and the loaded weights decide.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from turret import adapters, bases, bundles
from turret.adapters import Adapter, BaseInfo
from turret.bundles import fetch
from turret.bundles.bundle import CONFIG, WEIGHTS, read_config
from turret.disk import plainly
from turret.errors import AdapterError, BaseModelError, RecipeError, StoreError
from turret.recipe import Recipe
from turret.recipe import Task as TaskSettings
from turret.reference import check_name
from turret.store import Store, Version, scratch
from turret.tasks import TASKS, make_task, task_from_spec, task_of
from turret.tasks.task import kinds
from turret.train.adapter_effect import AdapterEffect, effect_of
from turret.train.batches import Item, Items
from turret.workspace.results import Imported

TASK_TYPES = {"SEQ_CLS": "classify", "CAUSAL_LM": "generate", "SEQ_2_SEQ_LM": "generate"}  # PEFT's words
PROBE = (  # what both are asked; any text does, because only the difference counts
    "The quick brown fox jumps over the lazy dog.",
    "Shares of the bank fell by 12% in London, and nobody said why!",
    "a dull film",
)
WRITTEN = "It was a great pleasure to read."


@dataclass(frozen=True)
class ImportRequest:
    """What the user said of the adapter, each where it was said."""

    base: str | None = None
    task: str | None = None
    labels: Sequence[str] | None = None
    settings: Mapping[str, Any] | None = None  # keys of a recipe's [task]


def import_adapter(
    store: Store, source: str, name: str, wanted: ImportRequest, stage: Callable[[str], None] | None = None
) -> Imported:
    """Bring the adapter here, check it on its base, and store it as the next version of `name`."""
    say = stage or (lambda _words: None)
    check_name(name)
    with _told(store, source), scratch.folder(store.root) as beside:
        say(f"reading {source}")
        brought = fetch.bring(source, beside)
        given = bundles.read_bundle(brought.folder)
        config = read_config(brought.folder)
        if given.task:
            _refuse_retelling(wanted)
        kind = _kind(given, config, wanted)
        base_id = wanted.base or given.base.id
        if not (wanted.base or given.base.fingerprint or config.get("base_model_name_or_path")):
            raise AdapterError("its configuration names no base: give --base with the one it was trained on")
        say(f"loading {base_id}")
        base = _load(base_id, kind, wanted)
        adapters.require_base(given, base.fingerprint)
        adapter, notes = given, list(base.notes)
        if not given.task:
            if wanted.base is None:
                notes.append(f"the base is the one that its configuration names: {base_id}")
            adapter = _completed(given, kind, base, name, wanted, notes)
            adapter = replace(adapter, lineage=adapter.lineage or _origin(brought, config))
        elif base_id != given.base.id:
            notes.append(f"its base is called {base_id} here and {given.base.id} where it was made: the digest is new")
            adapter = replace(given, base=_info(base))
        say("checking it on its base")
        found = _checked(base, adapter)
        bundle = brought.folder
        if adapter is not given:
            bundle = beside / "bundle" / name
            bundles.save_bundle(adapter, bundle)
        say("storing")
        before = {version.digest for version in store.list(name)}
        version = store.put(name, bundle)
        if version.digest in before:
            notes.append(f"{version} is this content already: nothing new is stored")
        return _imported(version, adapter, base, found, notes)


@contextmanager
def _told(store: Store, source: str) -> Iterator[None]:
    """What the disk says while the adapter is copied and looked at, as one line."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise StoreError(
            f"adapter {ascii(source)[:80]} cannot be copied into {store.root}: {plainly(error, store.root)}: make room "
            "there, make it readable, or use another --store"
        ) from error


def _refuse_retelling(wanted: ImportRequest) -> None:
    said = {"--task": wanted.task, "--labels": wanted.labels, "--set": wanted.settings}
    if given := [word for word, value in said.items() if value]:
        raise RecipeError(f"this is a bundle, which says its task and labels itself: leave {', '.join(given)} out")


def _kind(adapter: Adapter, config: Mapping[str, Any], wanted: ImportRequest) -> str:
    """classify, summarize or generate: as given, as the bundle says, or as PEFT's task_type tells."""
    told = adapter.task.get("kind") or wanted.task or TASK_TYPES.get(str(config.get("task_type")))
    kind = told or ("classify" if adapter.head else None)
    if kind is None:
        raise AdapterError(f"nothing says what the adapter is for: give --task {kinds()}")
    if kind not in TASKS:
        raise AdapterError(f"its task {ascii(kind)[:40]} is not known: expected {kinds()}")
    return str(kind)


def _load(base_id: str, kind: str, wanted: ImportRequest) -> Any:
    try:
        return bases.load(base_id, task=task_of(kind).request)
    except BaseModelError as error:
        if wanted.base is not None:
            raise
        raise type(error)(f"{error}; or say with --base where the adapter's base is") from error


def _info(base: Any) -> BaseInfo:
    return BaseInfo(id=base.id, fingerprint=base.fingerprint, family=base.family.name, revision=base.revision)


def _origin(brought: fetch.Brought, config: Mapping[str, Any]) -> dict[str, Any]:
    """Where the numbers come from, as far as it can be known: the digests of the files, and who wrote them."""
    files = {}
    for name in (CONFIG, WEIGHTS):
        with (brought.folder / name).open("rb") as file:
            files[name] = hashlib.file_digest(file, "sha256").hexdigest()
    said = {"peft_version": config.get("peft_version"), "hub_commit": brought.revision}
    return {"imported": {"sha256": files, **{key: str(value)[:80] for key, value in said.items() if value}}}


def _completed(given: Adapter, kind: str, base: Any, name: str, wanted: ImportRequest, notes: list[str]) -> Adapter:
    """The adapter with all that a PEFT folder does not say: its base, its task, and a head that the base has."""
    recipe = Recipe(name=name, base=base.id, data={"source": name}, task={"kind": kind})
    said = {f"task.{key}": each if isinstance(each, str) else json.dumps(each) for key, each in _settings(wanted)}
    settings = recipe.with_overrides(said).task
    head, labels = given.head, tuple[str, ...]()
    if not task_of(kind).generates:
        head = _head(given, base, notes)
        labels = _labels(kind, head, base, wanted, notes)
    elif wanted.labels:
        raise RecipeError(
            f"--labels are for a classifier, and this is to {kind}: leave them out, or give --task classify"
        )
    dataset = SimpleNamespace(kind=kind, labels=labels, train=())
    spec = make_task(settings, dataset, base.tokenizer, base.family.kind).spec()
    method = given.method.of_tensors(given.tensors)
    tensors, head = ({key: each.float() for key, each in part.items()} for part in (given.tensors, head))
    return Adapter(method, tensors, head, _info(base), spec, dict(spec.get("generation") or {}), given.lineage)


def _settings(wanted: ImportRequest) -> Iterator[tuple[str, Any]]:
    for key, value in (wanted.settings or {}).items():
        if key == "kind":
            raise RecipeError("--set task.kind: give --task instead")
        yield key, value


def _head(given: Adapter, base: Any, notes: list[str]) -> dict[str, Tensor]:
    """The adapter's head; what it lacks is the base's own, where the checkpoint has it."""
    head, fresh = dict(given.head), set(base.fresh)
    modules = dict(base.model.named_children())
    for module in base.family.head_modules:
        if module not in modules or any(key.startswith(f"{module}.") for key in head):
            continue
        own = {f"{module}.{key}": value.detach().clone() for key, value in modules[module].state_dict().items()}
        if not set(own) & fresh:
            head |= own
            notes.append(f"the head {module} is the base's own: the adapter brings none")
    missing = [key for key in base.fresh if key not in head]
    if missing:
        raise AdapterError(
            f"nobody has {missing[0]}: neither the adapter nor the checkpoint of {base.id} holds it, so it was random "
            "where this was trained; save the adapter with modules_to_save, or give the base it was trained on"
        )
    return head


def _labels(
    kind: str, head: Mapping[str, Tensor], base: Any, wanted: ImportRequest, notes: list[str]
) -> tuple[str, ...]:
    """The names of the head's outputs: as given, or as the base's configuration has them."""
    last = dict(base.model.named_children())[base.family.head_modules[-1]]
    names = [f"{base.family.head_modules[-1]}.{key}" for key, each in last.state_dict().items() if each.dim() == 2]
    if not names or names[-1] not in head:
        raise AdapterError(f"the adapter's head lacks {names[-1] if names else 'its last layer'}: save it again")
    size = len(head[names[-1]])
    if wanted.labels:
        if not all(label.strip() for label in wanted.labels):
            raise RecipeError(f"a label is empty: expected {size} names with commas between them, in order")
        if task_of(kind).num_labels(wanted.labels) != size:
            raise AdapterError(
                f"the head has {size} outputs, and {len(wanted.labels)} labels are given: name every output, in order"
            )
        return tuple(wanted.labels)
    said = json.loads((base.folder / "config.json").read_text(encoding="utf-8")).get("id2label")
    said = said if isinstance(said, dict) else {}
    found = tuple(str(said.get(str(number), "LABEL_")) for number in range(size))
    if len(said) != size or any(label.startswith("LABEL_") for label in found):
        raise AdapterError(f"nothing names the {size} outputs of the head: give --labels with {size} names, in order")
    notes.append(f"the labels are those of the base's configuration: {', '.join(found)}")
    return found


def _checked(base: Any, adapter: Adapter) -> AdapterEffect:
    """Every tensor is used, the outputs are not the bare base's, and there are as many as labels; AdapterError."""
    _check_task(adapter.task, base)
    try:
        task = task_from_spec(adapter.task, base.tokenizer)
        items = probe_items(task)
        targets = [item.target for item in items if item.target is not None]
        found = effect_of(base, adapter, [item.source for item in items], targets)
    except (RuntimeError, ValueError, IndexError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:120]
        raise AdapterError(
            f"it cannot be used on {base.id} ({reason}): it belongs to another base, or is broken"
        ) from None
    if found.outputs.shape[1] != (task.num_labels(task.labels) or found.outputs.shape[1]):
        raise AdapterError(
            f"the head has {found.outputs.shape[1]} outputs, and the bundle names {len(task.labels)} labels: "
            "export it again"
        )
    if problem := found.problem():
        raise AdapterError(f"not stored: on {base.id} {problem}")
    return found


def probe_items(task: Any) -> list[Item]:
    """A few texts as the task's model sees them."""
    example = task.schema(multi_label=task.multi_label).example
    return Items(task, [example(text, WRITTEN) for text in PROBE]).take(range(len(PROBE)))


def _check_task(spec: Mapping[str, Any], base: Any) -> None:
    """What a bundle says of its task is within what a recipe may say, and for a base of this kind."""
    kind = base.family.kind
    if spec.get("family_kind", kind) != kind:
        raise AdapterError(
            f"the bundle's task is for another kind of base, {ascii(spec['family_kind'])[:40]}, than {base.id}, "
            f"{kind!r}: export it again"
        )
    said = {key: value for key, value in spec.items() if key in TaskSettings.model_fields}
    generation = spec.get("generation")
    if isinstance(generation, Mapping):
        said |= {key: generation.get(key) for key in ("num_beams", "max_new_tokens")}
    labels = spec.get("labels", [])
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise AdapterError("the bundle's labels are no list of names: export it again")
    try:
        TaskSettings.model_validate(said)
    except RecipeError as error:
        raise AdapterError(f"the bundle's task makes no sense ({error}): export it again") from None


def _imported(version: Version, adapter: Adapter, base: Any, found: AdapterEffect, notes: list[str]) -> Imported:
    return Imported(
        version=str(version),
        digest=version.digest,
        base={"id": adapter.base.id, "fingerprint": base.fingerprint},
        method=adapter.method.kind,
        task={"kind": adapter.task["kind"], "labels": list(adapter.task.get("labels") or ())},
        tensors=len(adapter.tensors) + len(adapter.head),
        parameters=sum(each.numel() for each in (*adapter.tensors.values(), *adapter.head.values())),
        effect=found.effect,
        bundle_bytes=version.bytes,
        notes=notes,
    )
