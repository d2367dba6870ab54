"""Export a stored version as a folder for PEFT, transformers, vLLM or llama.cpp.

`peft` is the stored bundle with the base's tokenizer and a model card. `vllm` is the same, after a check that vLLM can
serve it. `merged` is a whole model with the adapter in its weights. `gguf` is a LoRA for llama.cpp. Everything is first
written and flushed in a temporary folder on the target's disk:

- A new target is made by renaming that folder, so it is complete or missing.
- In an existing target, configuration files of an earlier export are removed first and those of this export are moved
  last. Nothing loads a folder without them, so after a kill no tool can load a mixture of two exports.
- A target that is not empty is refused without `force`. With `force`, only files of the same names and files of an
  earlier export are replaced.
"""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, cast

import huggingface_hub
import torch
from huggingface_hub import errors as hub
from safetensors import SafetensorError
from torch import Tensor

from turret import adapters, bases, bundles
from turret.adapters import Adapter, lifecycle, packed
from turret.bases import Base
from turret.bases.source import TOKENIZER, licence_of, quiet_transformers
from turret.bundles import gguf_lora
from turret.bundles.bundle import FILES, read_config
from turret.bundles.fetch import PATIENCE, bounded_requests, check_id, plain_errors
from turret.disk import describe_error, errno_of, exclusive_lock, permissions, sync
from turret.errors import AdapterError, BaseModelError, HubError, StoreError, quote_all
from turret.manifest import BaseSpec
from turret.methods import method_named
from turret.process import StopRequest
from turret.store import Store, Version, scratch
from turret.store.scratch import BESIDE, LOADED, WorkingFolder
from turret.tasks import stored_task, task_from_spec
from turret.tasks.calibration import stored_by_question
from turret.tasks.shapes import HeadConfig
from turret.transformer import Model
from turret.workspace.card import FOLDER, card, dropped_by_peft
from turret.workspace.importing import probe_items
from turret.workspace.progress import Say, silent
from turret.workspace.resident import load_base, quantization_of
from turret.workspace.results import Exported, Pushed

Form = Literal["peft", "merged", "vllm", "gguf"]
BUNDLES: tuple[Form, ...] = ("peft", "vllm")  # the forms that are the stored bundle with more files
CARD = "README.md"
MODEL = ("config.json", "generation_config.json", "model.safetensors", "model.safetensors.index.json")
OURS = {*FILES, CARD, gguf_lora.FILE, *MODEL, *TOKENIZER}  # every file that an export can write
Rows = list[dict[str, Tensor | bool]]  # the arguments of a pass, for each row
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}  # largest difference of an output / the largest output


@dataclass
class Written:
    """Facts to report about the files of an export."""

    tokenizer: bool  # whether the base's tokenizer is among them
    notes: list[str] = field(default_factory=list)  # how to load it
    warnings: list[str] = field(default_factory=list)  # what another tool does not do, or what is missing


def export(
    store: Store,
    reference: str,
    folder: str | Path,
    form: Form = "peft",
    *,
    force: bool = False,
    say: Say = silent,
) -> Exported:
    """Write a version into `folder`.

    Args:
        folder: new or empty, unless `force`.

    Raises:
        AdapterError: the version cannot be merged, or vLLM cannot serve it.
        StoreError: the folder cannot be written.
    """
    target = Path(os.path.expanduser(folder)).absolute()
    _check_target(target, force)
    version = store.resolve(reference)
    working = WorkingFolder(store.root, target)
    with _disk_errors(target, working), working:
        written = write_files(store, version, form, working.files, working.folder / "stored", say)
        files = {each.name: each.stat().st_size for each in sorted(working.files.iterdir())}
        say("writing")
        _place(working, target)
    return Exported(str(version), version.digest, form, str(target), files, written.notes, written.warnings)


def write_files(
    store: Store, version: Version, form: Form, folder: Path, beside: Path, say: Say, *, place: str = FOLDER
) -> Written:
    """Write all files of an export and the model card.

    Args:
        folder: for the files. In the forms `peft` and `vllm` it is new.
        beside: a new folder on the same disk, for what is not exported.
        place: where the card says that the files are.
    """
    stored = folder if form in BUNDLES else beside
    store.materialize(str(version), stored)
    written = Written(tokenizer=form == "merged")
    if form == "merged":
        written.notes += _write_merged(bundles.read_bundle(stored), version, folder, say)
    elif form == "gguf":
        written.notes += _write_gguf(bundles.read_bundle(stored), version, folder)
    else:
        if form == "vllm":
            rank = gguf_lora.max_lora_rank(bundles.read_bundle(stored))
            written.notes.append(
                f"vLLM serves it with: vllm serve BASE --enable-lora --max-lora-rank {rank} "
                f"--lora-modules {version.name}=FOLDER"
            )
        _complete_bundle(version, folder, written)
    fitted = stored_by_question(version.task.get("calibration"))
    hot = [f"{float(each['temperature']):.4g}{f' ({name})' if name else ''}" for name, each in fitted.items()]
    if hot:
        written.notes.append(
            "other libraries give its probabilities without the temperature: divide the logits by " + ", ".join(hot)
        )
    shown = store.show(str(version))
    licence = licence_of(str(version.base.get("id") or ""))
    task_type = _task_type(stored, loaded_by_peft=form != "merged")
    text = card(shown, licence, form, task_type, written.notes, place=place, tokenizer=written.tokenizer)
    (folder / CARD).write_text(text, encoding="utf-8")
    return written


def _complete_bundle(version: Version, folder: Path, written: Written) -> None:
    """Add the base's tokenizer, and warn of what other tools do not do."""
    problem = _copy_tokenizer(version.base, folder)
    written.tokenizer = problem is None
    written.warnings += [problem] if problem else []
    if dropped := dropped_by_peft(method_named(version.method.get("kind")), version.task):
        written.warnings.append(dropped)


def _copy_tokenizer(base: BaseSpec, folder: Path) -> str | None:
    """Copy the files of the base's tokenizer, as they are. Returns why there are none."""
    try:
        source, _ = bases.small_files(base["id"], base.get("revision"))
    except BaseModelError as error:
        return f"the tokenizer is not among the files: {error}"
    found = [source / name for name in TOKENIZER if (source / name).is_file()]
    for path in found:
        shutil.copyfile(path, folder / path.name)
    return None if found else f"the tokenizer is not among the files: {base['id']} has none next to its weights"


def _write_gguf(adapter: Adapter, version: Version, folder: Path) -> list[str]:
    """Write the LoRA for llama.cpp. Returns notes."""
    gguf_lora.require_llama_cpp(adapter)
    _, config = bases.small_files(adapter.base.id, adapter.base.revision)
    layers = gguf_lora.write(adapter, config, folder / gguf_lora.FILE, str(version))
    return [
        f"llama.cpp runs it with: llama-server -m BASE.gguf --lora {gguf_lora.FILE} "
        f"(BASE.gguf has the weights of the base; {layers} layers change)"
    ]


def _task_type(folder: Path, *, loaded_by_peft: bool) -> str | None:
    """PEFT's `task_type` of a bundle; None if it has none, or if PEFT shall load it and has no such method."""
    config = read_config(folder)
    known = config.get("task_type") and (config.get("peft_type") or not loaded_by_peft)
    return str(config["task_type"]) if known else None


# --- merged -----------------------------------------------------------------------------------------------------------


def _write_merged(adapter: Adapter, version: Version, folder: Path, say: Say) -> list[str]:
    """Write the merged model, its tokenizer and configuration; read it back and compare its outputs. Returns notes."""
    lifecycle.require_mergeable(adapter)
    if not adapter.task:
        raise AdapterError(f"{version} does not store its task, so it cannot be merged: import it with --task")
    as_trained = _outputs_as_trained(adapter, say)
    say(f"loading {adapter.base.id}")
    base = load_base(adapter, _dtype_of(adapter.base.id), "none")
    say("merging")
    rows = _probe_rows(adapter, base)
    expected = _adapted_outputs(adapter, base, rows)
    state, model = lifecycle.merged_state(base.model, adapter), _exported_part(adapter, base.model)
    if model is not base.model:
        body = f"{base.model.base_model_prefix}."
        state = {name.removeprefix(body): value for name, value in state.items() if name.startswith(body)}
    with quiet_transformers():
        _set_config(model, stored_task(adapter.task).head_config(adapter.task))
        model.save_pretrained(folder, state_dict=state)
        with _tokenizer_errors(folder):
            base.tokenizer.save_pretrained(folder)
    model_class, precision = type(model), base.dtype
    del base, model, state
    say("reading it back")
    with quiet_transformers():
        again = model_class.from_pretrained(folder, dtype=precision, local_files_only=True, use_safetensors=True).eval()
    error = float((_outputs(again, rows) - expected).abs().max()) / float(expected.abs().max())
    if not error <= TOLERANCE[precision]:
        raise AdapterError(
            f"the merged model was not written: read back, its outputs differ from {version} by {error:.1e} of the "
            f"largest, allowed is {TOLERANCE[precision]:.0e}; export the adapter without --merged"
        )
    word = str(precision).removeprefix("torch.")
    notes = [f"Its weights are {word}; read back, its outputs differ from the adapter's by {error:.1e} of the largest."]
    return notes + _cost_of_merging(quantization_of(adapter), as_trained, expected)


def _outputs_as_trained(adapter: Adapter, say: Say) -> Tensor | None:
    """The adapter's outputs on the base as it was trained; None if that was plain, or cannot be loaded here."""
    if (kept := quantization_of(adapter)) == "none":
        return None
    say(f"loading {adapter.base.id} in {kept}")
    try:
        base = load_base(adapter, _dtype_of(adapter.base.id), kept)
    except BaseModelError as error:
        if isinstance(error.__context__, ImportError):  # bitsandbytes is not installed
            return None
        raise
    return _adapted_outputs(adapter, base, _probe_rows(adapter, base))


def _cost_of_merging(kept: str, as_trained: Tensor | None, merged: Tensor) -> list[str]:
    """A note on what it costs to merge an adapter into other weights than those it was trained on."""
    if kept == "none":
        return []
    note = f"It was trained on the base in {kept} and is merged into the checkpoint's own weights"
    if as_trained is None:
        return [f"{note}; what that changes was not measured, because bitsandbytes is not installed."]
    change = float((merged - as_trained).abs().max()) / float(as_trained.abs().max())
    mean = float((merged - as_trained).abs().mean()) / float(as_trained.abs().mean())
    return [f"{note}: its outputs change by {change:.1e} of the largest, {mean:.1e} on average."]


def _adapted_outputs(adapter: Adapter, base: Base, rows: Rows) -> Tensor:
    """The adapter's outputs on a base, which is left as it was."""
    adapters.mount(base.model, adapter, fingerprint=base.fingerprint)
    try:
        return _outputs(_exported_part(adapter, base.model), rows)
    finally:
        adapters.detach(base.model)


@contextmanager
def _tokenizer_errors(folder: Path) -> Iterator[None]:
    """Raise OSError for an error of the disk; the library tokenizers raises a bare Exception with the errno in it."""
    try:
        yield
    except Exception as error:
        number = errno_of(error)
        if isinstance(error, OSError) or number is None:
            raise
        raise OSError(number, os.strerror(number), str(folder)) from error


def _dtype_of(base_id: str) -> Literal["float32", "bfloat16"]:
    """The checkpoint's dtype; float32 for all but bfloat16, because float32 holds the others without loss."""
    config = bases.resolve(base_id).config
    return "bfloat16" if (config.get("dtype") or config.get("torch_dtype")) == "bfloat16" else "float32"


def _set_config(model: Model, changes: HeadConfig) -> None:
    """Write the head's settings, such as labels, into the model's configuration."""
    model.config = copy.deepcopy(model.config)
    model.config.update(changes)


def _probe_rows(adapter: Adapter, base: Base) -> Rows:
    """A few texts as tokens."""
    items = probe_items(task_from_spec(adapter.task, base.tokenizer))
    rows: Rows = []
    for item in items:
        ids, settings = packed.token_arguments(base.model, [item.source])
        if item.target is not None and base.family.is_encoder_decoder:
            settings["labels"] = item.target[None]
        elif item.target is not None:
            ids = torch.cat([ids, item.target[None]], dim=1)
        rows.append({"input_ids": ids, **settings})
    return rows


@torch.no_grad()
def _outputs(model: Model, rows: Rows) -> Tensor:
    """All logits, or hidden states of a model without a head, in one float32 vector."""
    model.eval()
    with quiet_transformers():
        found = [model(**row) for row in rows]
    every = [each.logits if "logits" in each else each.last_hidden_state for each in found]
    return torch.cat([each.float().reshape(-1) for each in every])


def _exported_part(adapter: Adapter, model: Model) -> Model:
    """The part of a model that is written: all of it, or its body if the task has no head."""
    return cast(Model, model.base_model) if stored_task(adapter.task).head == "embed" else model


# --- the folder -------------------------------------------------------------------------------------------------------


def _check_target(target: Path, force: bool) -> None:
    try:
        os.lstat(target)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        raise StoreError(f"cannot write {target}: {error.strerror}: choose another folder") from None
    if target.is_symlink():
        raise StoreError(f"{target} is a link: expected a new folder; name the folder itself")
    if not target.exists():
        return
    if not target.is_dir():
        raise StoreError(f"{target} is a file: expected a new folder; choose another name")
    if not force and _is_occupied(target):
        raise StoreError(f"{target} is not empty: expected a new folder; choose another one, or give --force")


def _is_occupied(target: Path) -> bool:
    """Whether the folder holds anything other than the files of an unfinished export."""
    names = {each.name for each in target.iterdir()}
    working = {name for name in names if name.startswith(BESIDE)}
    rest = names - working
    unfinished = rest <= OURS and not rest & set(LOADED) and any(scratch.unfinished(target / name) for name in working)
    return bool(rest) and not unfinished


def _place(working: WorkingFolder, target: Path) -> None:
    """Rename the finished folder to the target, or move its files into an existing target, configurations last."""
    for each in working.files.iterdir():
        each.chmod(permissions(working.files) & 0o666)  # the process's default, whatever mode a library gave the file
        sync(each)
    sync(working.files)
    if not target.exists():
        working.files.rename(target)
        try:
            sync(target.parent)
        except OSError:
            target.rename(working.files)
            raise
        return
    new = {each.name for each in working.files.iterdir()}
    for name in new:
        if (target / name).is_dir() and not (target / name).is_symlink():
            raise StoreError(f"{target / name} is a folder, where a file of that name would go: choose another folder")
    with exclusive_lock(target) as locked, StopRequest():  # a signal waits until the folder is complete
        if not locked:
            raise StoreError(f"{target} is being written by another export: wait for it, or choose another folder")
        working.begin_placing(sorted(new))
        try:
            _replace(working.files, target, new)
        except BaseException:
            for name in new:
                if not (working.files / name).exists():
                    (target / name).unlink(missing_ok=True)
            raise


def _replace(files: Path, target: Path, new: set[str]) -> None:
    """Move the files in an order in which no tool ever loads files of two exports."""
    for name in (*LOADED, *sorted(OURS - new)):  # files of another form would be loaded instead of the new ones
        if (target / name).is_file() or (target / name).is_symlink():
            (target / name).unlink()
    sync(target)
    for name in sorted(new - set(LOADED)):
        os.replace(files / name, target / name)
    sync(target)
    for name in sorted(new & set(LOADED)):
        os.replace(files / name, target / name)
    sync(target)


@contextmanager
def _disk_errors(target: Path, working: WorkingFolder) -> Iterator[None]:
    """Turn an error of the disk into a StoreError that says what the target contains now."""
    before = _names(target)
    try:
        yield
    except StoreError as error:
        if not isinstance(error.__cause__, OSError):
            raise
        raise _write_error(target, working, error.__cause__, before) from error
    except (OSError, SafetensorError) as error:
        raise _write_error(target, working, error, before) from error


def _names(folder: Path) -> set[str] | None:
    """The names in a folder; None if it does not exist."""
    return {each.name for each in folder.iterdir()} if folder.exists() else None


def _write_error(target: Path, working: WorkingFolder, error: Exception, before: set[str] | None) -> StoreError:
    """The error for a failed export.

    Args:
        before: the names in the target before the export.
    """
    names = _names(target)
    gone = sorted((before or set()) - (names or set()))
    if names is None:
        now = "the folder does not exist"
    elif gone:
        now = f"the folder has lost {', '.join(gone)[:60]}"
    else:
        now = "the folder is unchanged" if before is not None else "the folder may not survive a power cut"
    left = f"; {working.folder} is left, `turret gc` removes it" if working.left else ""
    return StoreError(
        f"cannot write {target}: {describe_error(error, target)}: free some space or choose another folder; {now}{left}"
    )


# --- to the Hub -------------------------------------------------------------------------------------------------------


TAG = "turret"  # in the front matter of every card that turret writes
OF_GIT = {".gitattributes"}  # the Hub's own file of a new repository


def push(
    store: Store,
    reference: str,
    hub_id: str,
    form: Form = "peft",
    *,
    public: bool = False,
    force: bool = False,
    say: Say = silent,
) -> Pushed:
    """Make a repository hold the files of an export, in one commit. A new repository is private unless `public`.

    Files that another export wrote there are removed.

    Args:
        force: also replace and remove files that turret did not write, if an export could write their names.

    Raises:
        HubError: the Hub cannot be reached or refuses, or the repository holds something else.
    """
    check_id(hub_id)
    version = store.resolve(reference)
    failed = f"{version} cannot be written to {store.root}"
    with scratch.disk_errors(failed, store.root, "free some space there"), scratch.folder(store.root) as working:
        folder = working / "files"
        if form not in BUNDLES:  # a bundle is written as a new folder
            folder.mkdir()
        written = write_files(store, version, form, folder, working / "stored", say, place=hub_id)
        files = {each.name: each.stat().st_size for each in sorted(folder.iterdir())}
        say(f"uploading to {hub_id}")
        api = huggingface_hub.HfApi()
        with bounded_requests(), plain_errors(hub_id):
            info, created = _info(api, hub_id), False
            if info is None:
                api.create_repo(hub_id, private=not public)
                info, created = api.model_info(hub_id, timeout=PATIENCE), True
            there = {each.rfilename for each in info.siblings or ()}
            if not force:
                _refuse_foreign(hub_id, there, info.tags or ())
            operations: list[huggingface_hub.CommitOperationAdd | huggingface_hub.CommitOperationDelete] = [
                huggingface_hub.CommitOperationAdd(name, folder / name) for name in files
            ]
            gone = sorted(there & OURS - files.keys())
            operations += [huggingface_hub.CommitOperationDelete(name) for name in gone]
            message = f"{version} ({version.digest[:19]})"
            made = api.create_commit(hub_id, operations, commit_message=message, parent_commit=info.sha)
    return Pushed(
        version=str(version),
        digest=version.digest,
        form=form,
        hub_id=hub_id,
        url=f"{api.endpoint}/{hub_id}",
        commit=made.oid,
        private=bool(info.private),
        created=created,
        changed=made.oid != info.sha,
        files=files,
        notes=written.notes,
        warnings=[*written.warnings, *_base_elsewhere(version.base)],
    )


def _base_elsewhere(base: BaseSpec) -> list[str]:
    """A warning if other machines cannot find the base by the id in the files."""
    known = str(base.get("id") or "")
    if base.get("revision") or known.startswith("pypi:"):
        return []
    return [f"its base is a folder here, {known}, and the files name it so: elsewhere, pull it with --base"]


def _info(api: huggingface_hub.HfApi, hub_id: str) -> huggingface_hub.ModelInfo | None:
    """What the Hub says of a repository; None if there is none that this token may see."""
    try:
        return api.model_info(hub_id, timeout=PATIENCE)
    except (hub.GatedRepoError, hub.DisabledRepoError):
        raise
    except hub.RepositoryNotFoundError:
        return None


def _refuse_foreign(hub_id: str, there: Collection[str], tags: Collection[str]) -> None:
    foreign = sorted(set(there) - OF_GIT)
    if foreign and TAG not in tags:
        raise HubError(
            f"{hub_id} holds {quote_all(foreign, 60)}, which turret did not write: choose another name, or give "
            "--force, which replaces files of the same names"
        )
