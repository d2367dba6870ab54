"""The export verb: a stored version as a folder that PEFT, transformers or vLLM loads.

`peft` is the bundle as it is stored, with a model card; `vllm` the same, once it is sure that vLLM takes it; `merged` a
whole model. Everything is written and flushed in a folder of its own on the target's disk:

- a new target is that folder, renamed: whole or not there
- in a target that is there, the configurations of an earlier export, without which nothing loads it, are removed first,
  and those of this export come last: a kill between leaves a folder that is refused, never one half of each
- a target that holds something is left alone unless `force`; then nothing but files of the same names and those of
  an earlier export is replaced
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import Tensor

from turret import adapters, bases, bundles
from turret.adapters import Adapter, merge
from turret.bases.licence import licence_of
from turret.bases.silence_transformers import quiet
from turret.bundles import vllm
from turret.bundles.bundle import FILES, read_config
from turret.disk import alone, number_of, permissions, plainly, sync
from turret.errors import AdapterError, StoreError
from turret.interrupt import StopRequest
from turret.store import Store, Version, scratch
from turret.store.scratch import BESIDE, LOADED, WorkingFolder
from turret.tasks import stored_task, task_from_spec
from turret.workspace.card import card
from turret.workspace.importing import probe_items
from turret.workspace.results import Exported

Form = Literal["peft", "merged", "vllm"]
CARD = "README.md"
MODEL = ("config.json", "generation_config.json", "model.safetensors", "model.safetensors.index.json")
TOKENIZER = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
    *("vocab.txt", "vocab.json", "merges.txt", "spiece.model", "tokenizer.model", "sentencepiece.bpe.model"),
)
OURS = {*FILES, CARD, *MODEL, *TOKENIZER}  # what any export may have written
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}  # of the largest output


def export(
    store: Store,
    reference: str,
    folder: str | Path,
    form: Form = "peft",
    *,
    force: bool = False,
    stage: Callable[[str], None] | None = None,
) -> Exported:
    """Write the version into `folder`, which is new, empty, or given up with `force`."""
    say = stage or (lambda _words: None)
    target = Path(os.path.expanduser(folder)).absolute()
    _refuse(target, force)
    version = store.resolve(reference)
    beside = WorkingFolder(store.root, target)
    with _written(target, beside), beside:
        notes = _write(store, version, form, beside, say)
        files = {each.name: each.stat().st_size for each in sorted(beside.files.iterdir())}
        say("writing")
        _place(beside, target)
    return Exported(str(version), version.digest, form, str(target), files, notes)


def _write(store: Store, version: Version, form: Form, beside: WorkingFolder, say: Callable[[str], None]) -> list[str]:
    """Everything that becomes the target, and a card; returns what to know of it."""
    stored = beside.folder / "stored" if form == "merged" else beside.files
    store.materialize(str(version), stored)
    notes = []
    if form == "merged":
        notes += _write_merged(bundles.read_bundle(stored), version, beside.files, say)
    elif form == "vllm":
        rank = vllm.max_lora_rank(bundles.read_bundle(stored))
        notes.append(
            f"vLLM serves it with: vllm serve BASE --enable-lora --max-lora-rank {rank} "
            f"--lora-modules {version.name}=FOLDER"
        )
    shown = store.show(str(version))
    licence = licence_of(str((shown["manifest"].get("base") or {}).get("id") or ""))
    text = card(shown, licence, form, _task_type(stored), notes)
    (beside.files / CARD).write_text(text, encoding="utf-8")
    return notes


def _task_type(folder: Path) -> str | None:
    """PEFT's word for the model that carries the adapter; None where PEFT does not load it."""
    config = read_config(folder)
    return str(config.get("task_type")) if config.get("peft_type") and config.get("task_type") else None


# --- merged -----------------------------------------------------------------------------------------------------------


def _write_merged(adapter: Adapter, version: Version, folder: Path, say: Callable[[str], None]) -> list[str]:
    """The whole model with tokenizer and configuration, read back and compared; returns what to know of it."""
    merge.require_mergeable(adapter)
    if not adapter.task:
        raise AdapterError(f"{version} says nothing of its task: it cannot be merged; import it with --task")
    task, labels = stored_task(adapter.task), adapter.task.get("labels") or ()
    say(f"loading {adapter.base.id}")
    dtype = _dtype_of(adapter.base.id)
    base = bases.load(adapter.base.id, task=task.request, num_labels=task.num_labels(labels), dtype=dtype)
    say("merging")
    rows = _rows(adapter, base)
    adapters.mount(base.model, adapter, fingerprint=base.fingerprint)
    expected = _outputs(base.model, rows)
    adapters.detach(base.model)
    state = merge.merged_state(base.model, adapter)
    with quiet():
        _configured(base.model, task.head_config(adapter.task)).save_pretrained(folder, state_dict=state)
        with _said_by_tokenizers(folder):
            base.tokenizer.save_pretrained(folder)
    model_class, precision = type(base.model), base.dtype
    del base, state
    say("reading it back")
    with quiet():
        again = model_class.from_pretrained(folder, dtype=precision, local_files_only=True, use_safetensors=True).eval()
    error = float((_outputs(again, rows) - expected).abs().max()) / float(expected.abs().max())
    if not error <= TOLERANCE[precision]:
        raise AdapterError(
            f"the merged model was not kept: read back, its outputs differ from {version} by {error:.1e} of the "
            f"largest, allowed is {TOLERANCE[precision]:.0e}; export the adapter without --merged"
        )
    word = str(precision).removeprefix("torch.")
    return [f"Its weights are {word}; read back, its outputs differ from the adapter's by {error:.1e} of the largest."]


@contextmanager
def _said_by_tokenizers(folder: Path) -> Iterator[None]:
    """What the disk says; tokenizers raises it as a bare Exception, with the number in its words."""
    try:
        yield
    except Exception as error:
        number = number_of(error)
        if isinstance(error, OSError) or number is None:
            raise
        raise OSError(number, os.strerror(number), str(folder)) from error


def _dtype_of(base_id: str) -> Literal["float32", "bfloat16"]:
    """The checkpoint's own; float32 holds any other without loss."""
    said = bases.resolve(base_id).config
    return "bfloat16" if (said.get("dtype") or said.get("torch_dtype")) == "bfloat16" else "float32"


def _configured(model: Any, said: dict[str, Any]) -> Any:
    """The model with what is said of its head, such as labels, in its configuration."""
    model.config = copy.deepcopy(model.config)
    model.config.update(said)
    return model


def _rows(adapter: Adapter, base: Any) -> list[tuple[Tensor, Tensor | None]]:
    """(ids, target ids) of a few texts, (1, T) each."""
    items = probe_items(task_from_spec(adapter.task, base.tokenizer))
    pairs = [(item.source[None], None if item.target is None else item.target[None]) for item in items]
    if base.family.is_encoder_decoder:
        return pairs
    return [(source if target is None else torch.cat([source, target], dim=1), None) for source, target in pairs]


@torch.no_grad()
def _outputs(model: Any, rows: list[tuple[Tensor, Tensor | None]]) -> Tensor:
    """All logits in one row, float32."""
    model.eval()
    with quiet():
        given = [model(input_ids=ids, **({} if target is None else {"labels": target})).logits for ids, target in rows]
    return torch.cat([each.float().reshape(-1) for each in given])


# --- the folder -------------------------------------------------------------------------------------------------------


def _refuse(target: Path, force: bool) -> None:
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
    if not force and _holds_something(target):
        raise StoreError(f"{target} is not empty: expected a new folder; choose another one, or give --force")


def _holds_something(target: Path) -> bool:
    """Whether anything but an export that broke off is in the folder."""
    names = {each.name for each in target.iterdir()}
    begun = {name for name in names if name.startswith(BESIDE)}
    rest = names - begun
    placed = rest <= OURS and not rest & set(LOADED) and any(scratch.broken_off(target / name) for name in begun)
    return bool(rest) and not placed


def _place(beside: WorkingFolder, target: Path) -> None:
    """Rename the finished folder, or its files into a folder that is there, the configurations last."""
    for each in beside.files.iterdir():
        each.chmod(permissions(beside.files) & 0o666)  # as the process makes files, whatever a library made of it
        sync(each)
    sync(beside.files)
    if not target.exists():
        beside.files.rename(target)
        try:
            sync(target.parent)
        except OSError:
            target.rename(beside.files)
            raise
        return
    new = {each.name for each in beside.files.iterdir()}
    for name in new:
        if (target / name).is_dir() and not (target / name).is_symlink():
            raise StoreError(f"{target / name} is a folder, where a file of that name would go: choose another folder")
    with alone(target) as held, StopRequest():  # a signal waits until the folder is whole
        if not held:
            raise StoreError(f"{target} is being written by another export: wait for it, or choose another folder")
        beside.begin_placing(sorted(new))
        try:
            _replace(beside.files, target, new)
        except BaseException:
            for name in new:
                if not (beside.files / name).exists():
                    (target / name).unlink(missing_ok=True)
            raise


def _replace(files: Path, target: Path, new: set[str]) -> None:
    """Move the files, so that at no moment those of two exports are in a folder that anything loads."""
    for name in (*LOADED, *sorted(OURS - new)):  # another form's would be loaded in place of these
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
def _written(target: Path, beside: WorkingFolder) -> Iterator[None]:
    """What the disk says, as one line that names the folder and says what is there now."""
    before = _names(target)
    try:
        yield
    except StoreError as error:
        if not isinstance(error.__cause__, OSError):
            raise
        raise _told(target, beside, error.__cause__, before) from error
    except (OSError, SafetensorError) as error:
        raise _told(target, beside, error, before) from error


def _names(folder: Path) -> set[str] | None:
    """What is in the folder; None where it is not there."""
    return {each.name for each in folder.iterdir()} if folder.exists() else None


def _told(target: Path, beside: WorkingFolder, error: Exception, before: set[str] | None) -> StoreError:
    there = _names(target)
    gone = sorted((before or set()) - (there or set()))
    if there is None:
        now = "nothing is there"
    elif gone:
        now = f"of what was there, {', '.join(gone)[:60]} is gone"
    else:
        now = "what was there is as it was" if before is not None else "it is there, but may not outlast a power cut"
    left = f"; {beside.folder} is left, `turret gc` removes it" if beside.left else ""
    return StoreError(
        f"cannot write {target}: {plainly(error, target)}: make room or choose another folder; {now}{left}"
    )
