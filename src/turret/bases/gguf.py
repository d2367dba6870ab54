"""Convert a GGUF file to a folder of safetensors in the cache. Converting 135M weights takes half a minute.

The folder's name is the SHA-256 of the file. It is written under another name and renamed, so it is complete or absent.
A lock makes a second process wait for the first.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import tempfile
from pathlib import Path

from filelock import FileLock
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from turret.bases.silence_transformers import quiet
from turret.cache import cache_folder
from turret.disk import sha256_of, sync
from turret.errors import BaseModelError

FORMAT = 1  # version of the converted folder
_MAGIC = b"GGUF"


def convert(path: Path, name: str) -> tuple[Path, str]:
    """Convert a GGUF file to float32 safetensors with a tokenizer, or find it in the cache.

    Args:
        name: the base's name in errors.

    Returns:
        The folder, and the "sha256:..." of the file.

    Raises:
        BaseModelError: the file cannot be read, or the cache cannot be written.
    """
    digest = _digest(path, name)
    root = cache_folder() / "gguf"
    folder = root / f"v{FORMAT}-{digest}"
    if folder.is_dir():
        return folder, f"sha256:{digest}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / f"{digest}.lock"):
            if not folder.is_dir():
                _convert(path, folder, name)
    except (OSError, SafetensorError) as error:
        raise BaseModelError(
            f"base {name!r} cannot be converted into {root}: {getattr(error, 'strerror', None) or error}; "
            "free some space there, or set TURRET_CACHE to a folder that can be written"
        ) from error
    return folder, f"sha256:{digest}"


def _digest(path: Path, name: str) -> str:
    try:
        with path.open("rb") as file:
            if file.read(len(_MAGIC)) != _MAGIC:
                raise BaseModelError(
                    f"base {name!r} is not a GGUF file: expected it to begin with 'GGUF'; give another file"
                )
        return sha256_of(path)
    except OSError as error:
        raise BaseModelError(f"base {name!r} cannot be read: {error.strerror}; give a GGUF file") from error


def _convert(path: Path, folder: Path, name: str) -> None:
    prefix = f".partial-{folder.name}-"
    for left_over in folder.parent.glob(f"{prefix}*"):  # of a process that was killed; this one holds the lock
        shutil.rmtree(left_over, ignore_errors=True)
    partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix=prefix))
    try:
        with quiet(), contextlib.redirect_stderr(io.StringIO()):  # its progress bar ignores transformers' settings
            _write(path, partial, name)
        partial.chmod(0o755)
        for each in (*partial.iterdir(), partial):
            sync(each)
        partial.rename(folder)
        sync(folder.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write(path: Path, folder: Path, name: str) -> None:
    source = {"gguf_file": path.name, "trust_remote_code": False, "local_files_only": True}
    try:
        # The configuration is passed on, because transformers would parse the file again.
        config = AutoConfig.from_pretrained(path.parent, **source)
        tokenizer = AutoTokenizer.from_pretrained(path.parent, **source)
        model = AutoModelForCausalLM.from_pretrained(path.parent, **source, config=config, dtype="float32")
    except Exception as error:  # the GGUF reader raises many kinds for a broken file
        raise _unreadable(name, error) from error
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


def _unreadable(name: str, error: Exception) -> BaseModelError:
    reason = (str(error) or type(error).__name__).strip().splitlines()[0]
    return BaseModelError(
        f"base {name!r} cannot be read as GGUF: {reason}; give another file, or a folder of safetensors"
    )
