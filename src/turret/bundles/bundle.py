"""An adapter on disk: write and read the folder that `docs/reference/bundle.md` specifies.

PEFT's two files and a manifest. `save` writes what is attached to a model, for a program that has its own loop.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import stat
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from safetensors.torch import save_file
from torch import Tensor

from turret.adapters.adapter import Adapter, BaseInfo
from turret.adapters.attached import attachment
from turret.adapters.lifecycle import extract
from turret.adapters.peft_config import check_config, shortly
from turret.bundles.tensors import Content, read_tensors, visible
from turret.disk import make_folder, permissions, sync
from turret.errors import BundleError, RecipeError
from turret.families import FAMILIES
from turret.fingerprint import body, hashed
from turret.methods import METHODS, Method, method_class
from turret.methods.lookup import numbers_of
from turret.tasks import stored_task

TASK_TYPES = {"classify": "SEQ_CLS", "encoder-decoder": "SEQ_2_SEQ_LM", "decoder": "CAUSAL_LM"}
FORMAT = 1
WEIGHTS, CONFIG, MANIFEST = "adapter_model.safetensors", "adapter_config.json", "manifest.json"
KEYS = {"format", "method", "task", "generation", "base", "lineage", "files", "digest"}
FILES = (WEIGHTS, CONFIG, MANIFEST)
MAX_FILE, MAX_JSON = 16 * 2**30, 16 * 2**20
AT_ONCE = 64 * 2**20  # weights up to so many bytes are read once: what is hashed is what is parsed
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
_SAID: dict[str, tuple[type, ...]] = {  # what a manifest may say of a base
    "id": (str,),
    "fingerprint": (str, type(None)),
    "family": (str, type(None)),
    "revision": (str, type(None)),
}


def save(
    model: Any,
    folder: str | Path,
    *,
    base: str | None = None,
    task: dict[str, Any] | None = None,
    generation: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Write the adapter on `model` as a bundle into a new folder, and return its manifest.

    base: the base's id, where the model's own name is not it. task, generation: what answering will need, such as
    {"kind": "classify", "labels": [...]}. The fingerprint is that of the weights the model had when it was attached to.
    """
    attached = attachment(model)
    tensors, head, method = extract(model)
    fingerprint = hashed(body(attached.originals.items(), model, attached.family))
    name = base or getattr(model.config, "_name_or_path", "") or attached.family.name
    info = BaseInfo(name, fingerprint, attached.family.name)
    return save_bundle(Adapter(method, tensors, head, info, task or {}, generation or {}), folder)


def save_bundle(adapter: Adapter, folder: str | Path) -> dict[str, Any]:
    """Write `adapter` as a bundle and return its manifest. The folder appears whole or not at all.

    Raises BundleError when the folder exists already or a tensor is not finite.
    """
    folder = Path(folder)
    if folder.exists():
        raise BundleError(f"{folder} exists already: expected a new folder; remove it or choose another name")
    beside = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    make_folder(beside)
    try:
        manifest = _write(adapter, beside)
        beside.rename(folder)
        sync(folder.parent)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    return manifest


def _write(adapter: Adapter, folder: Path) -> dict[str, Any]:
    stored = numbers_of(adapter.method).stored(adapter)
    tensors = {name: stored[name].contiguous() for name in sorted(stored)}
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise BundleError(f"tensor {name!r} holds NaN or infinity: the training diverged; lower the learning rate")
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(_pretty(_config(adapter)), encoding="utf-8")
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "method": adapter.method.model_dump(mode="json"),
        "task": adapter.task,
        "generation": adapter.generation,
        "base": {key: getattr(adapter.base, key) for key in ("id", "fingerprint", "family", "revision")},
        "lineage": adapter.lineage,
        "files": {name: _file_entry(folder / name) for name in (CONFIG, WEIGHTS)},
    }
    manifest["digest"] = manifest_digest(manifest)
    (folder / MANIFEST).write_text(_pretty(manifest), encoding="utf-8")
    (folder / WEIGHTS).chmod(permissions(folder) & 0o666)  # as the process makes files, whatever safetensors made of it
    for name in (WEIGHTS, CONFIG, MANIFEST):
        sync(folder / name)
    sync(folder)
    return manifest


def _config(adapter: Adapter) -> dict[str, Any]:
    """The JSON object PEFT reads. Paths of layers are whole, so that no suffix can hit another layer."""
    config: dict[str, Any] = {
        "peft_type": None,
        "task_type": _task_type(adapter),
        "base_model_name_or_path": adapter.base.id,
        "inference_mode": True,
    }
    return config | numbers_of(adapter.method).peft_config(adapter)


def _task_type(adapter: Adapter) -> str | None:
    if adapter.head or not stored_task(adapter.task).generates:
        return TASK_TYPES["classify"]
    family = adapter.base.family
    if family is None:
        return None
    known = FAMILIES.get(family)
    return TASK_TYPES["encoder-decoder" if known is not None and known.is_encoder_decoder else "decoder"]


def read_bundle(folder: str | Path) -> Adapter:
    """The adapter in a folder: a bundle of ours, or a plain PEFT folder (then without task and fingerprint).

    Every file is checked against the manifest, every tensor for finite values. Raises BundleError in one line.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise BundleError(f"{folder} is no folder: expected one with {WEIGHTS} and {CONFIG}")
    refuse_foreign_files(folder)
    config = read_config(folder)
    path = folder / WEIGHTS
    content = np.fromfile(path, np.uint8) if path.stat().st_size <= AT_ONCE else None
    manifest = _checked_manifest(folder, content) if (folder / MANIFEST).exists() else None
    tensors = read_tensors(path, content)
    if manifest is None:
        method = _method_of(config, tensors)
        base = BaseInfo(str(config.get("base_model_name_or_path") or "unknown"))
        adapter_tensors, head = numbers_of(method).read(tensors, config)
        return Adapter(method, adapter_tensors, head, base)
    method = _method(manifest["method"])
    numbers_of(method).check_config(config)
    adapter_tensors, head = numbers_of(method).read(tensors, config)
    base = BaseInfo(**{key: manifest["base"].get(key) for key in ("id", "fingerprint", "family", "revision")})
    return Adapter(method, adapter_tensors, head, base, manifest["task"], manifest["generation"], manifest["lineage"])


def read_config(folder: Path) -> dict[str, Any]:
    """PEFT's configuration as it stands in the folder, not yet judged."""
    return _json(folder / CONFIG)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest, after its own digest and those of the files have been checked."""
    return _checked_manifest(folder, None)


def _checked_manifest(folder: Path, weights: Content | None) -> dict[str, Any]:
    """The same; weights: the whole of that file, where it has been read already."""
    manifest = _json(folder / MANIFEST)
    version = manifest.get("format")
    if type(version) is not int or not 1 <= version <= FORMAT:
        raise BundleError(
            f"{folder.name}/{MANIFEST} has format {version!r}: this version reads up to {FORMAT}; upgrade"
        )
    if set(manifest) != KEYS:
        odd = sorted(set(manifest) ^ KEYS)
        raise BundleError(f"{folder.name}/{MANIFEST} has missing or unknown keys {', '.join(odd)}: export it again")
    for key in ("task", "generation", "base", "lineage"):
        if not isinstance(manifest[key], dict):
            raise BundleError(f"{folder.name}/{MANIFEST} must have an object as {key}: export it again")
    odd = [key for key, types in _SAID.items() if not _says(manifest["base"].get(key), types)]
    if odd:
        raise BundleError(f"{folder.name}/{MANIFEST} has an unusable base.{odd[0]}: export it again")
    if manifest["digest"] != manifest_digest(manifest):
        raise BundleError(f"{folder.name}/{MANIFEST} does not match its own digest: it was changed; fetch it again")
    if not isinstance(manifest["files"], dict) or set(manifest["files"]) != {CONFIG, WEIGHTS}:
        raise BundleError(f"{folder.name}/{MANIFEST} must list {CONFIG} and {WEIGHTS}: export it again")
    for name, entry in manifest["files"].items():
        found = _file_entry(folder / name) if weights is None or name != WEIGHTS else _entry(weights)
        if found != entry:
            raise BundleError(
                f"{folder.name}/{name} does not match the manifest: it was changed or cut; fetch it again"
            )
    return manifest


def _says(value: Any, types: tuple[type, ...]) -> bool:
    """Whether it is of such a type; words are on one line and no longer than a path."""
    words = not isinstance(value, str) or (len(value) <= 4096 and value.isprintable())
    return isinstance(value, types) and words


def manifest_digest(manifest: dict[str, Any]) -> str:
    """`sha256:…` over the manifest without its own digest, keys sorted, no spaces."""
    rest = {key: value for key, value in manifest.items() if key != "digest"}
    try:
        canonical = json.dumps(
            rest, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
        ).encode()
    except ValueError as error:  # 1e999, half a character
        raise BundleError(f"{MANIFEST} holds what is no JSON ({type(error).__name__}): export it again") from None
    return "sha256:" + hashlib.sha256(canonical).hexdigest()


def refuse_foreign_files(folder: Path) -> None:
    """A pickle instead of safetensors, a link, a device, a file too large: BundleError, before anything is read."""
    names = sorted(each.name for each in folder.iterdir())
    for name in names:
        if name.casefold() in FILES and name not in FILES:
            raise BundleError(f"{folder.name} holds {visible(name)}: expected {name.casefold()}, in small letters")
    for name in FILES:
        path = folder / name
        if name in names:
            refuse_odd_file(path, f"{folder.name}/{name}")
    if WEIGHTS not in names:
        pickles = [name for name in names if name.lower().endswith(PICKLES)]
        found = f"; {visible(pickles[0])} is a pickle, which is never opened" if pickles else ""
        raise BundleError(f"{folder.name} holds no {WEIGHTS}{found}: save the adapter as safetensors")


def refuse_odd_file(path: Path, called: str) -> None:
    """Raises BundleError for a link, a device, or a file that is larger than is read."""
    found = path.lstat()
    if stat.S_ISLNK(found.st_mode):
        raise BundleError(f"{called} is a link: expected a plain file; copy the file itself")
    if not stat.S_ISREG(found.st_mode):
        raise BundleError(f"{called} is no plain file: expected one; copy the file itself")
    if found.st_nlink > 1:
        raise BundleError(f"{called} is a hard link ({found.st_nlink} names for one file): copy the file itself")
    most = MAX_FILE if path.name == WEIGHTS else MAX_JSON
    if found.st_size > most:
        raise BundleError(f"{called} has {found.st_size} bytes, and at most {most} are read: fetch it again")


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_number)
    except FileNotFoundError:
        raise BundleError(f"{path.parent.name} holds no {path.name}: expected a bundle or a PEFT folder") from None
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{path.parent.name}/{path.name} is no JSON ({error}): fetch it again") from None
    if not isinstance(value, dict):
        raise BundleError(f"{path.parent.name}/{path.name} holds no JSON object: fetch it again")
    return value


def _no_number(word: str) -> None:
    raise ValueError(f"{word} is no number")


def _method_of(config: dict[str, Any], tensors: dict[str, Tensor]) -> Method:
    """The method a PEFT folder holds. Raises BundleError for what is not computed here."""
    check_config(config)
    known = {each.peft_name: each for each in METHODS.values() if each.peft_name is not None}
    found = known.get(str(config.get("peft_type")))
    if found is None:
        raise BundleError(
            f"adapter_config.json has peft_type {shortly(config.get('peft_type'))}: expected {' or '.join(known)}; "
            "merge it first"
        )
    try:
        return found.from_peft(config, {name: tuple(each.shape) for name, each in tensors.items()})
    except ValidationError as error:
        first = error.errors()[0]
        raise BundleError(
            f"adapter_config.json has an unusable {'.'.join(map(str, first['loc']))} ({first['msg']}): train it again"
        ) from None


def _method(value: Any) -> Method:
    try:
        return method_class(value).model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        reason = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    except RecipeError as error:
        reason = str(error)
    raise BundleError(f"{MANIFEST} names an unusable method ({reason}): export it again")


def _file_entry(path: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(2**20):
                digest.update(block)
    except FileNotFoundError:
        raise BundleError(f"{path.parent.name} holds no {path.name}: fetch it again") from None
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def _entry(content: Content) -> dict[str, Any]:
    return {"bytes": len(content), "sha256": hashlib.sha256(content.data).hexdigest()}


def _pretty(value: Any) -> str:
    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
