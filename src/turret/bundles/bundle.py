"""Write and read a bundle: PEFT's two files and a manifest, as `docs/reference/bundle.md` specifies.

`save` writes the adapter that is attached to a model, for programs with a training loop of their own.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
import stat
import uuid
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypedDict, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, deserialize, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from turret import quantized
from turret.adapters.adapter import LORA_PREFIX, Adapter, BaseInfo, all_finite, rename_paths, require_base
from turret.adapters.hooks import ATTRIBUTE, HookedModel, attachment, detach, require_bare
from turret.adapters.lifecycle import attach, extract, mount, start_from
from turret.adapters.tuners.tuner import tuner_of
from turret.arguments import check_arguments
from turret.bases.fingerprints import fingerprint_of
from turret.disk import describe_error, make_folder, permissions, sync
from turret.errors import AdapterError, BundleError, RecipeError, one_line
from turret.families import FAMILIES
from turret.json_types import JsonObject, JsonValue
from turret.manifest import (
    AdapterConfig,
    BaseKey,
    BaseSpec,
    FileEntry,
    Manifest,
    MethodSpec,
    check_config,
    refuse_code,
    short_ascii,
)
from turret.methods import METHODS, Method, method_class
from turret.tasks import TASKS, stored_task
from turret.tasks.embedding import HEADLESS
from turret.tasks.shapes import Generation, TaskSpec
from turret.transformer import Model

M = TypeVar("M", bound=nn.Module)
FORMAT = 1
WEIGHTS, CONFIG, MANIFEST = "adapter_model.safetensors", "adapter_config.json", "manifest.json"
KEYS = {"format", "method", "task", "generation", "base", "lineage", "files", "digest"}
FILES = (WEIGHTS, CONFIG, MANIFEST)
MAX_FILE, MAX_JSON = 16 * 2**30, 16 * 2**20
AT_ONCE = 64 * 2**20  # weights up to this size are read once, so the bytes hashed are the bytes parsed
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
# Of the base in a manifest. Only the id is required.
BASE: tuple[BaseKey, ...] = ("id", "fingerprint", "family", "revision", "quantization")


@check_arguments
def load(folder: str | Path, model: M, *, trainable: bool = False) -> M:
    """Put the adapter in a folder on a model of transformers, which answers with it afterwards.

    Args:
        folder: a bundle that `save` or an export wrote, or a PEFT folder.
        model: the adapter's base, without an attachment. `detach` takes the adapter off again.
        trainable: go on with training from the adapter; else nothing of the model requires gradients.

    Returns:
        The same model.

    Raises:
        BundleError: the folder is broken or not accepted.
        WrongBase: the adapter was trained on other weights. A PEFT folder does not say on which.
        AdapterError: the model has an adapter already, or a tensor does not fit it.
    """
    base = require_bare(model)
    adapter = named_for(read_bundle(folder), base)
    if adapter.base.fingerprint is not None:
        require_base(adapter, fingerprint_of(base.named_parameters(), base))
    own = {name: each.shape for name, each in base.named_parameters()}
    for name, tensor in adapter.head.items():
        if own.get(name, tensor.shape) != tensor.shape:
            raise AdapterError(
                f"the head's {name} has the shape {tuple(tensor.shape)}, and the model's has {tuple(own[name])}: load "
                "the base with the adapter's num_labels"
            )
    try:
        if not trainable:
            return mount(model, adapter)
        attach(model, adapter.method)
        start_from(base, adapter)
    except BaseException:
        if isinstance(getattr(model, ATTRIBUTE, None), HookedModel):
            detach(model)
        raise
    return model


@check_arguments
def save(
    model: nn.Module,
    folder: str | Path,
    *,
    base: str | None = None,
    task: TaskSpec | None = None,
    generation: Generation | None = None,
) -> Manifest:
    """Write the adapter on `model` as a bundle into a new folder.

    The fingerprint in the manifest is that of the model's weights before the adapter was attached.

    Args:
        model: a model of transformers with an attached adapter.
        base: the base's id. None: the model's name.
        task: the settings that prediction needs, such as {"kind": "classify", "labels": [...]}.
        generation: the arguments of `generate()`.

    Returns:
        The manifest.

    Raises:
        BundleError: the folder exists or cannot be written, or a tensor is not finite.
    """
    attached = attachment(model)
    tensors, head, method = extract(model)
    transformer = cast(Model, model)  # only a model of transformers has an attachment
    fingerprint = fingerprint_of(attached.originals.items(), transformer)
    name = base or getattr(transformer.config, "_name_or_path", "") or attached.family.name
    kept = getattr(transformer, quantized.KEPT_IN, None)
    info = BaseInfo(name, fingerprint, attached.family.name, quantization=kept)
    try:
        return save_bundle(Adapter(method, tensors, head, info, task or {}, generation or {}), folder)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name, or a setting that JSON does not have
        reason = describe_error(error, Path(folder)) if isinstance(error, OSError) else one_line(str(error), 120)
        raise BundleError(f"the adapter cannot be saved: {reason}: choose another folder, or plain settings") from None


def save_bundle(adapter: Adapter, folder: str | Path) -> Manifest:
    """Write `adapter` as a bundle and return its manifest. If writing fails, no folder is left.

    Raises:
        BundleError: the folder exists, or a tensor is not finite.
    """
    folder = Path(folder)
    if folder.exists():
        raise BundleError(f"{folder} exists already: expected a new folder; remove it or choose another name")
    partial = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    try:
        make_folder(partial)
        manifest = _write(adapter, partial)
        partial.rename(folder)
        sync(folder.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return manifest


def _write(adapter: Adapter, folder: Path) -> Manifest:
    body = _body(adapter.task, adapter.base.family)
    stored = rename_paths(tuner_of(adapter.method).stored_tensors(adapter), body, "")
    tensors = {name: stored[name].contiguous() for name in sorted(stored)}
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise BundleError(f"tensor {name!r} holds NaN or infinity: the training diverged; lower the learning rate")
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(_pretty(_config(adapter)), encoding="utf-8")
    manifest: Manifest = {
        "format": FORMAT,
        "method": adapter.method.model_dump(mode="json"),
        "task": adapter.task,
        "generation": adapter.generation,
        "base": _base(adapter.base),
        "lineage": adapter.lineage,
        "files": {name: _file_entry(folder / name) for name in (CONFIG, WEIGHTS)},
    }
    manifest["digest"] = manifest_digest(manifest)
    (folder / MANIFEST).write_text(_pretty(manifest), encoding="utf-8")
    (folder / WEIGHTS).chmod(permissions(folder) & 0o666)  # the process's default, which safetensors ignores
    for name in FILES:
        sync(folder / name)
    sync(folder)
    return manifest


def _base(base: BaseInfo) -> BaseSpec:
    """The manifest's base. A base with plain weights has no quantization, so that digests of earlier bundles stay."""
    found: BaseSpec = {"id": base.id, "fingerprint": base.fingerprint, "family": base.family, "revision": base.revision}
    return found if base.quantization is None else found | {"quantization": base.quantization}


def _config(adapter: Adapter) -> AdapterConfig:
    """PEFT's configuration."""
    own: JsonObject = {**tuner_of(adapter.method).peft_config(adapter)}
    body = _body(adapter.task, adapter.base.family)
    if isinstance(paths := own.get("target_modules"), list):
        own["target_modules"] = [path.removeprefix(body) for path in paths]
    return {
        "peft_type": None,
        "task_type": task_type(adapter),
        "base_model_name_or_path": adapter.base.id,
        "inference_mode": True,
        **own,
    }


# --- names in a model without a head ----------------------------------------------------------------------------------
# An adapter for vectors is one of transformers' `AutoModel`, whose modules are those of the body of a model with a
# head: `encoder.layer.0`, and not `bert.encoder.layer.0`. In memory all adapters have the names of the latter.


def named_for(adapter: Adapter, model: Model) -> Adapter:
    """The adapter with the names that its tensors have in a model, which may have a head or none."""
    paths = [name.removeprefix(LORA_PREFIX) for name in adapter.tensors if name.startswith(LORA_PREFIX)]
    first = {path.partition(".")[0] for path in paths}
    body, outside = f"{model.base_model_prefix}.", {each for each in first if not hasattr(model, each)}
    if outside == {model.base_model_prefix}:
        return replace(adapter, tensors=rename_paths(adapter.tensors, body, ""))
    if outside and outside == first and all(hasattr(model.base_model, each) for each in outside):
        return replace(adapter, tensors=rename_paths(adapter.tensors, "", body))
    return adapter


def _body(task: TaskSpec, family: str | None) -> str:
    """Where the body is in a model with a head, such as `bert.`; "" if the adapter is stored with that name."""
    if not task or stored_task(task).peft_type(encoder_decoder=False) != HEADLESS or family is None:
        return ""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    named = MODEL_MAPPING_NAMES.get(family)
    return "" if not isinstance(named, str) else f"{getattr(transformers, named).base_model_prefix}."


def task_type(adapter: Adapter) -> str | None:
    """PEFT's `task_type` of an adapter; None if its family is not known."""
    known = FAMILIES.get(adapter.base.family or "")
    task = TASKS["classify"] if adapter.head and not adapter.task else stored_task(adapter.task)
    two_halves = known is not None and known.is_encoder_decoder
    return task.peft_type(encoder_decoder=None if adapter.base.family is None else two_halves)


def read_bundle(folder: str | Path) -> Adapter:
    """The adapter in a folder: a bundle, or a plain PEFT folder, which has no task and no fingerprint.

    Every file is checked against the manifest, and every tensor for finite values.

    Raises:
        BundleError: the folder is broken or not accepted.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise BundleError(f"{folder} is not a folder: expected one with {WEIGHTS} and {CONFIG}")
    refuse_foreign_files(folder)
    config = read_config(folder)
    path = folder / WEIGHTS
    content = np.fromfile(path, np.uint8) if path.stat().st_size <= AT_ONCE else None
    manifest = read_manifest(folder, content) if (folder / MANIFEST).exists() else None
    tensors = read_tensors(path, content)
    if manifest is None:
        method = _method_of(config, tensors)
        base = BaseInfo(str(config.get("base_model_name_or_path") or "unknown"))
        adapter_tensors, head = tuner_of(method).read(tensors, config)
        return Adapter(method, adapter_tensors, head, base)
    method = _method(manifest["method"])
    tuner_of(method).check_config(config)
    tensors = rename_paths(tensors, "", _body(manifest["task"], manifest["base"].get("family")))
    adapter_tensors, head = tuner_of(method).read(tensors, config)
    said = manifest["base"]
    base = BaseInfo(
        said["id"], said.get("fingerprint"), said.get("family"), said.get("revision"), said.get("quantization")
    )
    return Adapter(method, adapter_tensors, head, base, manifest["task"], manifest["generation"], manifest["lineage"])


def read_config(folder: Path) -> AdapterConfig:
    """PEFT's configuration in a folder, not checked yet."""
    return _json(folder / CONFIG)


def read_manifest(folder: Path, weights: Content | None) -> Manifest:
    """The manifest of a bundle, checked against its own digest and the files.

    weights: the content of that file, if it is in memory already.
    """
    manifest: Manifest = _json(folder / MANIFEST)
    version = manifest.get("format")
    if type(version) is not int or not 1 <= version <= FORMAT:
        raise BundleError(
            f"{folder.name}/{MANIFEST} has format {version!r}: this version reads up to {FORMAT}; upgrade"
        )
    if set(manifest) != KEYS:
        keys = sorted(set(manifest) ^ KEYS)
        raise BundleError(f"{folder.name}/{MANIFEST} has missing or unknown keys {', '.join(keys)}: export it again")
    for key in ("task", "generation", "base", "lineage"):
        if not isinstance(manifest[key], dict):
            raise BundleError(f"{folder.name}/{MANIFEST} must have an object as {key}: export it again")
    for key in BASE:
        value = manifest["base"].get(key)
        if not (_one_line(value) or (value is None and key != "id")):
            raise BundleError(f"{folder.name}/{MANIFEST} has an unusable base.{key}: export it again")
    if manifest["digest"] != manifest_digest(manifest):
        raise BundleError(f"{folder.name}/{MANIFEST} does not match its own digest: it was changed; fetch it again")
    if not isinstance(manifest["files"], dict) or set(manifest["files"]) != {CONFIG, WEIGHTS}:
        raise BundleError(f"{folder.name}/{MANIFEST} must list {CONFIG} and {WEIGHTS}: export it again")
    for name, entry in manifest["files"].items():
        found = _file_entry(folder / name) if weights is None or name != WEIGHTS else _entry(weights)
        if found != entry:
            raise BundleError(
                f"{folder.name}/{name} does not match the manifest: it was changed or cut off; fetch it again"
            )
    return manifest


def _one_line(value: str | None) -> bool:
    """Whether a value is a string of one line, at most as long as a path."""
    return isinstance(value, str) and len(value) <= 4096 and value.isprintable()


def manifest_digest(manifest: Manifest) -> str:
    """`sha256:…` over the manifest without its digest, as JSON with sorted keys and no spaces."""
    rest = {key: value for key, value in manifest.items() if key != "digest"}
    try:
        canonical = json.dumps(
            rest, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
        ).encode()
    except ValueError as error:  # 1e999, or half of a surrogate pair
        raise BundleError(
            f"{MANIFEST} has values that JSON does not have ({type(error).__name__}): export it again"
        ) from None
    return "sha256:" + hashlib.sha256(canonical).hexdigest()


def refuse_foreign_files(folder: Path) -> None:
    """Raises BundleError for a pickle instead of safetensors, a link, a device or a large file. Reads no file."""
    names = sorted(each.name for each in folder.iterdir())
    for name in names:
        if name.casefold() in FILES and name not in FILES:
            raise BundleError(f"{folder.name} holds {visible_name(name)}: expected {name.casefold()}, in lower case")
    for name in FILES:
        path = folder / name
        if name in names:
            _refuse_odd_file(path, f"{folder.name}/{name}")
    if WEIGHTS not in names:
        pickles = [name for name in names if name.lower().endswith(PICKLES)]
        found = f"; {visible_name(pickles[0])} is a pickle, which is never opened" if pickles else ""
        raise BundleError(f"{folder.name} holds no {WEIGHTS}{found}: save the adapter as safetensors")


def _refuse_odd_file(path: Path, label: str) -> None:
    """Raises BundleError for a link, a device, or a file over the size limit."""
    found = path.lstat()
    if stat.S_ISLNK(found.st_mode):
        raise BundleError(f"{label} is a link: expected a plain file; copy the file itself")
    if not stat.S_ISREG(found.st_mode):
        raise BundleError(f"{label} is not a plain file: expected one; copy the file itself")
    if found.st_nlink > 1:
        raise BundleError(f"{label} is a hard link ({found.st_nlink} names for one file): copy the file itself")
    limit = MAX_FILE if path.name == WEIGHTS else MAX_JSON
    if found.st_size > limit:
        raise BundleError(f"{label} has {found.st_size} bytes, and the limit is {limit}: fetch it again")


def _json(path: Path) -> JsonValue:
    """The object in a file, not checked yet."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_number)
    except FileNotFoundError:
        raise BundleError(f"{path.parent.name} holds no {path.name}: expected a bundle or a PEFT folder") from None
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{path.parent.name}/{path.name} is not JSON ({error}): fetch it again") from None
    if not isinstance(value, dict):
        raise BundleError(f"{path.parent.name}/{path.name} is not a JSON object: fetch it again")
    return value


def _no_number(word: str) -> None:
    raise ValueError(f"{word} is not a JSON number")


def _method_of(config: AdapterConfig, tensors: dict[str, Tensor]) -> Method:
    """The method of a plain PEFT folder. Raises BundleError for one that Turret does not support."""
    refuse_code(config)
    particular_first = sorted(METHODS.values(), key=lambda each: not each.open_settings)
    method = next((each for each in particular_first if each.reads(config, tensors)), None)
    if method is None:
        known = [each.peft_name for each in METHODS.values() if each.peft_name is not None]
        raise BundleError(
            f"adapter_config.json has peft_type {short_ascii(config.get('peft_type'))}: expected {' or '.join(known)}; "
            "merge it first"
        )
    if not method.open_settings:  # else PEFT checks them
        check_config(config)
    try:
        return method.from_peft(config, {name: tuple(each.shape) for name, each in tensors.items()})
    except RecipeError as error:
        reason = str(error).removeprefix("method.")
        raise BundleError(f"adapter_config.json has an unusable {reason}: train it again") from None


def _method(value: MethodSpec) -> Method:
    try:
        return method_class(value).model_validate(value)
    except RecipeError as error:
        raise BundleError(f"{MANIFEST} names an unusable method ({error}): export it again") from None


def _file_entry(path: Path) -> FileEntry:
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256")
    except FileNotFoundError:
        raise BundleError(f"{path.parent.name} holds no {path.name}: fetch it again") from None
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def _entry(content: Content) -> FileEntry:
    return {"bytes": len(content), "sha256": hashlib.sha256(content.data).hexdigest()}


def _pretty(value: Manifest | AdapterConfig) -> str:
    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"


# --- tensors ----------------------------------------------------------------------------------------------------------
# Reads a safetensors file from outside: known dtypes, plain names, a limited number of tensors, all values finite.
#
# The tensors of a file in memory are views of it. The safetensors library checks each header. A header that it accepted
# is cached, byte for byte, because adapters with one base and one recipe differ only in their values.


MAX_HEADER, MAX_TENSORS = 16 * 2**20, 20_000
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
CACHED_HEADERS, CACHED_SIZE = 64, 2**20  # number of headers in the cache, and bytes of the longest
_NAME = re.compile(r"[\x21-\x7e]{1,500}")

Content = NDArray[np.uint8]  # a whole file


@dataclass(frozen=True)
class _Layout:
    """The layout of a file that holds only float32 tensors, one after the other without gaps."""

    names: tuple[str, ...]
    shapes: tuple[torch.Size, ...]
    counts: tuple[int, ...]


_layouts: dict[bytes, _Layout] = {}  # by header


class _Entry(TypedDict):
    """A tensor as the library reads it from memory."""

    dtype: str
    shape: list[int]
    data: bytes


def read_tensors(path: Path, content: Content | None) -> dict[str, Tensor]:
    """The tensors of a file, by name.

    Args:
        content: the whole file, if it is in memory already.

    Raises:
        BundleError: the file is broken or not accepted.
    """
    try:
        if content is None:
            tensors = _in_file(path)
        elif (views := _view_tensors(content)) is not None:
            return views
        else:
            tensors = _in_memory(path, content)
    except (SafetensorError, OSError, ValueError, OverflowError) as error:
        raise BundleError(f"{path.name} is not a readable safetensors file ({error}): fetch it again") from None
    for name, tensor in tensors.items():
        if not all_finite(tensor.float()):  # a float64 may be too large for a float32
            raise BundleError(f"tensor {name!r} in {path.name} holds NaN or infinity: train or export it again")
    return tensors


def _view_tensors(content: Content) -> dict[str, Tensor] | None:
    """Views of a file whose header is cached and whose values have a finite sum; None if either does not hold."""
    header = _header(content)
    layout = _layouts.get(header)
    if layout is None or len(header) + 4 * sum(layout.counts) != len(content):
        return None
    numbers = content[len(header) :].view(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        if not math.isfinite(numbers.sum()):
            return None
    parts = torch.split(torch.from_numpy(numbers), list(layout.counts))
    return {name: part.view(shape) for name, part, shape in zip(layout.names, parts, layout.shapes, strict=True)}


def _in_memory(path: Path, content: Content) -> dict[str, Tensor]:
    _refuse_header(content[:8].tobytes())
    listed: dict[str, _Entry] = dict(deserialize(content.tobytes()))  # type: ignore[no-untyped-call]  # no types
    dtypes = {name: each["dtype"] for name, each in listed.items()}
    _refuse_listed(path, dtypes)
    if set(dtypes.values()) == {"F32"}:
        _remember(_header(content))
    return {
        name: torch.frombuffer(each["data"], dtype=DTYPES[each["dtype"]]).reshape(each["shape"])
        if each["data"]
        else torch.empty(each["shape"], dtype=DTYPES[each["dtype"]])
        for name, each in listed.items()
    }


def _header(content: Content) -> bytes:
    """The bytes before the values; empty if they are too long for the cache."""
    begin = 8 + _header_size(content[:8].tobytes())
    return content[:begin].tobytes() if begin <= CACHED_SIZE else b""


def _remember(header: bytes) -> None:
    """Cache the layout of a float32 file that the library accepted, so its tensors have no gaps and no overlaps."""
    if not header or len(header) % 4:
        return
    entries = {name: entry for name, entry in json.loads(header[8:]).items() if name != "__metadata__"}
    places = sorted((*entry["data_offsets"], name) for name, entry in entries.items())
    shapes = tuple(torch.Size(entries[name]["shape"]) for _, _, name in places)
    if len(_layouts) >= CACHED_HEADERS:
        _layouts.clear()
    _layouts[header] = _Layout(tuple(name for *_, name in places), shapes, tuple(each.numel() for each in shapes))


def _in_file(path: Path) -> dict[str, Tensor]:
    with path.open("rb") as raw:
        _refuse_header(raw.read(8))
    with safe_open(path, framework="pt", device="cpu") as file:
        names = list(file.keys())
        _refuse_listed(path, {name: str(file.get_slice(name).get_dtype()) for name in names[: MAX_TENSORS + 1]})
        return {name: file.get_tensor(name) for name in names}


def _header_size(start: bytes) -> int:
    """The length of the header after the first eight bytes, which hold it."""
    return int.from_bytes(start, "little")


def _refuse_header(start: bytes) -> None:
    size = _header_size(start)
    if size > MAX_HEADER:
        raise ValueError(f"its header has {size} bytes, and the limit is {MAX_HEADER}")


def _refuse_listed(path: Path, dtypes: dict[str, str]) -> None:
    if len(dtypes) > MAX_TENSORS:
        raise BundleError(f"{path.name} lists {len(dtypes)} tensors: the limit is {MAX_TENSORS}")
    for name, dtype in dtypes.items():
        if not _NAME.fullmatch(name):
            raise BundleError(f"{path.name} names a tensor {visible_name(name)}: expected plain ASCII names")
        if dtype not in DTYPES:
            raise BundleError(f"tensor {name!r} has dtype {dtype}: expected one of {', '.join(DTYPES)}")


def visible_name(name: str) -> str:
    """A name from outside in visible ASCII, short enough for one line."""
    return ascii(name)[1:-1][:60]
