"""Any other method of PEFT on an attached base: PEFT creates its modules and their tensors, the hooks run the rows.

PEFT's own classes are used in two ways:

- A method that replaces layers works token by token. PEFT puts its layers into the model, and unpadded rows pass
  through them as through any other layer.
- A prompt of P virtual tokens before a decoder's text is a prefix whose keys and values the base computes. PEFT's
  module gives the tokens, one pass of the base over P tokens gives the prefix, and every row reads that.

A method that works in neither way is refused in one line.

A finished adapter that replaces linear layers is served beside others: `changes` gives PEFT's module of each layer.
"""

from __future__ import annotations

import difflib
import enum
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import Field, dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from turret import quantized
from turret.adapters.lora import layer_sizes
from turret.adapters.prefix import Groups
from turret.errors import AdapterError, RecipeError, TurretError
from turret.families.family import Family
from turret.json_types import JsonObject, JsonValue, Plain
from turret.methods import LoRA, Peft
from turret.methods.lora import require_no_data
from turret.methods.peft import CHOOSING, PROMPTS
from turret.methods.peft import LORA_PREFIX as LAYER_PREFIX
from turret.transformer import Model

if TYPE_CHECKING:
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer


# --- peft packed ------------------------------------------------------------------------------------------------------
# Check on one layer, before a training, whether a method of PEFT can compute on a quantized base.


REMEDY = "use lora, prefix or head, or base_quantization none"


def require_computable(layers: Sequence[BaseTunerLayer], kind: str, *, trains: bool = True) -> None:
    """Raise AdapterError for a method that reads a quantized weight as if it were plain.

    PEFT's first layer with a packed weight computes two tokens, and their gradient if it trains. All layers of a method
    are of one kind.
    """
    for layer in layers:
        base = layer.get_base_layer()
        if not quantized.is_packed(base):
            continue
        weight = next(iter((*base.parameters(), *base.buffers())))
        dtype = quantized.computes_in(base, base)
        x = torch.ones(1, 2, base.in_features, dtype=dtype, device=weight.device, requires_grad=trains)
        try:
            with torch.set_grad_enabled(trains):
                y = layer(x)
            if trains:
                torch.autograd.grad(y.float().sum(), x)
        except (RuntimeError, TypeError, ValueError, AttributeError) as error:
            reason = " ".join(str(error).split())[:120]
            raise AdapterError(f"PEFT's {kind} cannot compute on a quantized base ({reason}): {REMEDY}") from None
        if not bool(torch.isfinite(y).all()):
            raise AdapterError(f"PEFT's {kind} gives no finite numbers on a quantized base: {REMEDY}")
        return


# --- through peft -----------------------------------------------------------------------------------------------------


NAME = "default"  # of the adapter inside PEFT
# Settings that turret makes itself, alike for every method, and those that name code to import, which are refused.
OURS = {
    *("peft_type", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode"),
    *("modules_to_save", "peft_version", "megatron_config", "megatron_core", "tokenizer_kwargs"),
}
LORA = LoRA().model_dump(include={"r", "lora_alpha", "lora_dropout"})  # turret's own defaults, for fair comparisons
ALIASES: dict[str, tuple[str, JsonObject]] = {  # known as methods, options of another method in PEFT
    "DORA": ("LORA", {**LORA, "use_dora": True}),
    "RSLORA": ("LORA", {**LORA, "use_rslora": True}),
}
REFUSED = {
    "PREFIX_TUNING": 'turret has its own: set method.kind = "prefix"',
    "ADALORA": "it moves ranks between layers on its own schedule, which turret's training loop does not call",
    "ADAPTION_PROMPT": "it replaces the base's attention by its own",
    "CARTRIDGE": "it starts from a cache of keys and values that must be distilled first",
    "CPT": "it needs the part of the prompt that each token belongs to, which a recipe cannot give",
    "LILY": "its router averages over all texts of a batch, so that a text's answer would depend on its neighbours",
    "MULTITASK_PROMPT_TUNING": "it needs a task's number for every text, and a recipe has one task",
    "OSF": "it rewrites the base's weights, and turret never writes to the base",
    "POLY": "it needs a task's number for every text, and a recipe has one task",
    "SHADOW": "it trains a second model beside the base",
    "TRAINABLE_TOKENS": "it trains embeddings of new tokens, and the base's tokenizer has none",
    "XLORA": "it mixes LoRAs that are already trained",
}


class PeftConfig(Protocol):
    """A configuration of PEFT: a dataclass with fields of its own for each method, of any type."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]
    peft_type: enum.Enum
    task_type: str | None
    is_prompt_learning: bool
    target_modules: list[str] | str | None

    def __init__(self, **settings: Any) -> None: ...


@dataclass
class PeftBackend:
    """What PEFT put on a model.

    Args:
        wrapped: PEFT's model around the base.
        method: as it is stored, with the layers that PEFT found.
        layers: PEFT's layers in the model; none for a prompt.
        parameters: PEFT's own, by name.
        leave: removes everything.
    """

    wrapped: PeftModel
    method: Peft
    layers: tuple[BaseTunerLayer, ...]
    parameters: dict[str, nn.Parameter]
    leave: Callable[[], None]


# --- the configuration ------------------------------------------------------------------------------------------------


def peft_types() -> list[str]:
    """The values that `peft_type` can take."""
    return sorted({*_classes(), *ALIASES} - set(REFUSED))


def config_of(method: Peft) -> PeftConfig:
    """PEFT's own configuration of the method. Raises RecipeError for what PEFT or turret does not take."""
    kind, extra = ALIASES.get(method.peft_type, (method.peft_type, {}))
    known = _classes()
    if kind in REFUSED:
        raise RecipeError(f"peft_type {kind} cannot be used: {REFUSED[kind]}")
    if kind not in known:
        near = difflib.get_close_matches(method.peft_type, peft_types(), n=1)
        remedy = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(peft_types())}"
        raise RecipeError(f"method.peft_type {_short(method.peft_type)} is not a method of PEFT: {remedy}")
    try:
        require_no_data(method.options.get("init_lora_weights"))
    except ValueError as error:
        raise RecipeError(f"method.init_lora_weights: {error}") from None
    allowed = [field.name for field in fields(known[kind]) if field.init and field.name not in OURS]
    for key in method.options:
        if key in OURS:
            raise RecipeError(f"method.{key} is set by turret or not allowed: leave it out")
        if key not in allowed:
            near = difflib.get_close_matches(key, allowed, n=1)
            remedy = f"did you mean {near[0]!r}?" if near else f"{kind} knows {', '.join(sorted(allowed))}"
            raise RecipeError(f"unknown key 'method.{_short(key)}': {remedy}")
    try:
        with _quiet():
            return known[kind](**{**extra, **method.options})
    except (TypeError, ValueError, KeyError, ImportError, AttributeError) as error:
        raise RecipeError(f"PEFT does not take this {kind}: {_line(error)}") from None


def config_settings(config: PeftConfig) -> JsonObject:
    """The settings of a configuration that are not empty, as JSON."""
    found = {}
    for field in fields(config):
        value = _plain(getattr(config, field.name, None))
        if field.init and field.name not in OURS and value not in (None, {}, []):
            found[field.name] = value
    return found


def _plain(value: Plain | enum.Enum | set[str] | frozenset[str]) -> JsonValue:
    """The value as JSON; None for one that JSON does not have."""
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if isinstance(value, tuple):
        return list(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    return value if isinstance(value, (bool, int, float, str, list)) else None


def _classes() -> dict[str, type[PeftConfig]]:
    quantized.before_peft()
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    return {getattr(kind, "value", str(kind)): each for kind, each in PEFT_TYPE_TO_CONFIG_MAPPING.items()}


# --- on a model -------------------------------------------------------------------------------------------------------


def attach_with_peft(
    model: Model, family: Family, method: Peft, generator: torch.Generator | None = None, *, trains: bool = True
) -> PeftBackend:
    """Let PEFT put the method on a model that has turret's hooks. Raises AdapterError if it cannot."""
    config = config_of(method)
    prompt = bool(config.is_prompt_learning)
    if prompt:
        _require_writer(model, family, config)
        config.task_type = "CAUSAL_LM"
    before = dict(model.named_modules())
    attributes, sums = set(vars(model)), _sums(model)
    seed = 0 if generator is None else int(torch.randint(2**31, (1,), generator=generator))
    leave = _leaving(model, before, attributes)
    try:
        with torch.random.fork_rng(devices=[]), _quiet():
            torch.manual_seed(seed)
            wrapped = _wrap_model(model, family, config)
        layers = () if prompt else _layers(model)
        require_computable(layers, config.peft_type.value, trains=trains)
        _require_sound(model, family, config, before, layers, sums)
    except (TurretError, RuntimeError, ValueError, TypeError, LookupError, AttributeError, StopIteration) as error:
        leave()
        if isinstance(error, TurretError):
            raise
        raise AdapterError(f"PEFT cannot put {config.peft_type.value} on this {family.name}: {_line(error)}") from None
    owner = wrapped.prompt_encoder if prompt else wrapped
    own = {name: each for name, each in owner.named_parameters() if each.requires_grad}
    if not own:
        leave()
        raise AdapterError(f"PEFT's {config.peft_type.value} trains nothing on this {family.name}: give other settings")
    return PeftBackend(wrapped, method.with_options(config_settings(wrapped.peft_config[NAME])), layers, own, leave)


def _wrap_model(model: Model, family: Family, config: PeftConfig) -> PeftModel:
    quantized.before_peft()
    from peft import get_peft_model

    targets = getattr(config, "target_modules", ())
    if targets == "all-linear":
        config.target_modules = _linear(model, family)
    try:
        return get_peft_model(model, config, adapter_name=NAME)
    except ValueError:
        if targets is not None:
            raise
        config.target_modules = list(family.lora_targets)  # PEFT has none of its own for this architecture
        return get_peft_model(model, config, adapter_name=NAME)


def _linear(model: nn.Module, family: Family) -> list[str]:
    """Every linear layer of the body."""
    outside = family.beside_body
    return [
        path
        for path, each in model.named_modules()
        if isinstance(each, nn.Linear) and path.split(".")[0] not in outside
    ]


def _require_writer(model: Model, family: Family, config: PeftConfig) -> None:
    """Raise AdapterError for a prompt that turret cannot read, or a model that does not generate."""
    kind = config.peft_type.value
    if kind not in PROMPTS:
        raise AdapterError(f"turret cannot read a prompt of {kind}: use {', '.join(PROMPTS)}, or the method prefix")
    if not family.decoder_only or not hasattr(model, family.output_layer):
        raise AdapterError(
            f"{kind} puts virtual tokens before the text of a generating decoder, and this is "
            f"{'a classifier' if family.decoder_only else f'an {family.kind}'}: use the method prefix"
        )


def _require_sound(
    model: Model,
    family: Family,
    config: PeftConfig,
    before: Mapping[str, nn.Module],
    layers: tuple[BaseTunerLayer, ...],
    sums: Mapping[str, tuple[float, float]],
) -> None:
    """Raise AdapterError unless PEFT found layers, outside the head, and left the base's weights as they were."""
    kind = config.peft_type.value
    if config.is_prompt_learning:
        return
    if not layers:
        raise AdapterError(f"PEFT's {kind} found no layer of this {family.name}: set method.target_modules")
    head = [
        path for path, each in model.named_modules() if each in layers and path.split(".")[0] in family.head_modules
    ]
    if head:
        raise AdapterError(f"{kind} would change {head[0]}, the head: set method.target_modules within the body")
    changed = [
        path
        for path, each in before.items()
        if any(sums[f"{path}.{name}"] != _sum(own) for name, own in each.named_parameters(recurse=False))
    ]
    if changed:
        raise AdapterError(f"this {kind} rewrites the base's weights ({changed[0]}): use another method or setting")


def _layers(model: nn.Module) -> tuple[BaseTunerLayer, ...]:
    """PEFT's layers in the model."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return tuple(each for each in model.modules() if isinstance(each, BaseTunerLayer))


def _sums(model: nn.Module) -> dict[str, tuple[float, float]]:
    """The sums of every parameter, by the path of its module and its name there."""
    known: dict[int, tuple[float, float]] = {}  # of tied weights, which have several names
    sums = {}
    for path, module in model.named_modules():
        for name, each in module.named_parameters(recurse=False):
            sums[f"{path}.{name}"] = known[id(each)] = known.get(id(each)) or _sum(each)
    return sums


def _sum(weight: Tensor) -> tuple[float, float]:
    """Two numbers that change when the weight changes."""
    flat = weight.detach().float()
    return float(flat.sum()), float(flat.square().sum())


def _leaving(model: nn.Module, before: Mapping[str, nn.Module], attributes: set[str]) -> Callable[[], None]:
    """A function that puts the same modules and weights back, and the data of weights that were given other data."""
    weights = {id(each): (each, each.data) for each in model.parameters()}
    owners = [(module._parameters, dict(module._parameters)) for module in before.values()]

    def leave() -> None:
        for parameters, own in owners:
            parameters.update(own)  # PEFT's DoRA replaces a weight in 4 bits by a copy at every pass
        for each, data in weights.values():
            if each.data_ptr() != data.data_ptr():
                each.data = data
        for path, module in before.items():
            parent_path, _, name = path.rpartition(".")
            parent = before.get(parent_path)
            if path and parent is not None and parent._modules.get(name) is not module:
                parent._modules[name] = module
        for name in set(vars(model)) - attributes:
            delattr(model, name)

    return leave


def switch_layers(guest: PeftBackend, on: bool) -> None:
    """Turn PEFT's layers on or off for the next pass. PEFT's own switch would drop requires_grad."""
    for layer in guest.layers:
        layer._disable_adapters = not on


# --- beside other adapters --------------------------------------------------------------------------------------------


class PeftLayer:
    """PEFT's own module of one linear layer, frozen: a `lora.LayerChange`.

    Args:
        module: it calls the base's layer, or reads its weight.
    """

    def __init__(self, module: BaseTunerLayer) -> None:
        self._module = module.eval()
        base = module.get_base_layer()
        others = {id(each) for each in (*base.parameters(), *base.buffers())}
        every = (*module.parameters(), *module.buffers())
        self.tensors = tuple(each for each in every if id(each) not in others)
        for each in self.tensors:
            each.requires_grad_(False)

    def __call__(self, base: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """x: (..., D_in) -> (..., D_out), in x's precision."""
        y: Tensor = self._module(x if x.dim() > 2 else x[None])
        return (y if x.dim() > 2 else y[0]).to(x.dtype)

    def to(self, device: torch.device) -> PeftLayer:
        """Itself: PEFT puts it on the device of the base's layer."""
        return self


def build_peft_layers(
    method: Peft, tensors: Mapping[str, Tensor], layers: Mapping[str, nn.Module]
) -> dict[str, PeftLayer]:
    """PEFT's modules for a finished adapter, by path. Nothing is put on the base.

    PEFT sees the layers alone, in a module with nothing else. It first builds on the meta device: so settings that do
    not belong to the tensors are refused before they take memory.

    Args:
        tensors: the adapter's, by PEFT's names.
        layers: the base's own that it changes, by path, in the base's order.

    Raises:
        AdapterError: the tensors do not fit, or PEFT cannot compute on these layers.
    """
    own = {f"{LAYER_PREFIX}{path}.{name}" for path, layer in layers.items() for name, _ in layer.named_parameters()}
    if odd := next((name for name in tensors if name.replace(".base_layer.", ".") in own), None):
        raise AdapterError(f"this {method.peft_type} holds {odd}, the base's own: it cannot share a base with others")
    require_equal(_alone(method, {path: _meta(layer) for path, layer in layers.items()}, "meta"), tensors)
    guest = _alone(method, layers, "cpu")
    require_computable(guest.layers, method.peft_type, trains=False)
    fill_tensors(guest, tensors)
    owner = guest.wrapped.base_model.model
    return {path: PeftLayer(owner.get_submodule(path)) for path in layers}


def _alone(method: Peft, layers: Mapping[str, nn.Module], device: str) -> PeftBackend:
    """PEFT's modules on linear layers outside any model. device: where new tensors are made, before PEFT moves them."""
    options = {key: each for key, each in method.options.items() if key not in CHOOSING}
    config = config_of(method.with_options(options))
    config.target_modules = list(layers)
    root = nn.Module()
    for path, layer in layers.items():
        *parents, name = path.split(".")
        owner = root
        for each in parents:
            if each not in owner._modules:
                owner.add_module(each, nn.Module())
            owner = owner.get_submodule(each)
        owner.add_module(name, layer)
    vars(root)["is_loaded_in_4bit"] = any(map(quantized.in_four_bits, layers.values()))  # PEFT asks a model for it
    quantized.before_peft()
    from peft import get_peft_model

    try:
        with torch.random.fork_rng(devices=[]), _quiet(), torch.device(device):
            wrapped = get_peft_model(root, config, adapter_name=NAME)
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise AdapterError(f"PEFT cannot build this {method.peft_type}: {_line(error)}") from None
    if len(found := _layers(root)) != len(layers):
        raise AdapterError(f"PEFT's {method.peft_type} changes {len(found)} layers, and its tensors {len(layers)}")
    return PeftBackend(wrapped, method, found, {}, lambda: None)


def _meta(layer: nn.Module) -> nn.Module:
    """A layer of the same shape and class without weights."""
    d_in, d_out = layer_sizes(layer)
    with torch.device("meta"):
        if type(layer).__name__ == "Conv1D":
            return type(layer)(d_out, d_in)
        return nn.Linear(d_in, d_out, bias=layer._parameters.get("bias") is not None)


# --- its tensors ------------------------------------------------------------------------------------------------------


def tensors_of(guest: PeftBackend) -> dict[str, Tensor]:
    """The adapter's tensors under the names that PEFT saves them by."""
    from peft import get_peft_model_state_dict

    with _quiet():
        found: dict[str, Tensor] = get_peft_model_state_dict(
            guest.wrapped, adapter_name=NAME, save_embedding_layers=False
        )
    odd = [name for name, each in found.items() if not each.is_floating_point()]
    if odd:
        raise AdapterError(f"{guest.method.peft_type} has integer tensors ({odd[0]}), which a bundle cannot hold")
    return found


def require_equal(guest: PeftBackend, tensors: Mapping[str, Tensor]) -> None:
    """Raise AdapterError unless stored tensors have the names and shapes of those in the model."""
    expected = {name: tuple(each.shape) for name, each in tensors_of(guest).items()}
    kind = guest.method.peft_type
    if odd := sorted(set(expected) ^ set(tensors)):
        word = "lacks" if odd[0] in expected else "has"
        raise AdapterError(f"the {kind} {word} {odd[0]}: it belongs to another base, or to another version of PEFT")
    for name, each in tensors.items():
        if tuple(each.shape) != expected[name]:
            raise AdapterError(f"{name} has shape {tuple(each.shape)}: expected {expected[name]}; load its own base")


def fill_tensors(guest: PeftBackend, tensors: Mapping[str, Tensor]) -> None:
    """Copy stored tensors into the model. Raises AdapterError unless names and shapes are the same."""
    require_equal(guest, tensors)
    if not guest.layers:
        module = guest.wrapped.prompt_encoder[NAME]
        with torch.no_grad():
            module.embedding.weight.copy_(next(iter(tensors.values())))
        return
    from peft import set_peft_model_state_dict

    with _quiet():
        set_peft_model_state_dict(guest.wrapped, {name: each.float() for name, each in tensors.items()}, NAME)


def mounted_method(method: Peft) -> Peft:
    """The method as it is mounted: a prompt keeps only its tokens, not how they were initialized or computed."""
    if method.peft_type not in PROMPTS:
        return method
    gone = ("encoder_", "prompt_tuning_init", "tokenizer_")
    options = {key: value for key, value in method.options.items() if not key.startswith(gone)}
    return Peft(peft_type="PROMPT_TUNING", **options)


class Prompt(nn.Module):
    """The virtual tokens of PEFT's module as a prefix of every layer, which the base computes once per pass.

    Its keys and values are those of the tokens alone. That equals PEFT's prompt, whose tokens come before the text and
    so do not attend to it.
    """

    def __init__(self, guest: PeftBackend, keys_values: Callable[[Tensor], Groups]) -> None:
        super().__init__()
        self.encoder = guest.wrapped.prompt_encoder
        self.places = guest.wrapped.prompt_tokens[NAME][None]  # (1, P)
        self.length = int(self.places.shape[1])
        self._read = keys_values
        self._current: Groups = {}
        self._seen: tuple[int, ...] = ()
        self._busy = False

    def tokens(self) -> Tensor:
        """The virtual tokens (1, P, D), with gradients to PEFT's parameters."""
        module = self.encoder[NAME]
        return module(self.places.to(next(module.parameters()).device))

    def refresh(self, group: str) -> None:
        """Compute the prefix for the next pass; without gradients, only if a parameter has changed."""
        versions = tuple(each._version for each in self.parameters())
        if self._busy or (not torch.is_grad_enabled() and self._seen == versions):
            return
        self._busy = True
        try:
            self._current = self._read(self.tokens())
        finally:
            self._busy = False
        plain = not torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        self._seen = versions if plain else ()

    def keys_values(self, group: str, layer: int) -> tuple[Tensor, Tensor] | None:
        """(key, value) of one layer, each (H, P, D); None while the prefix itself is computed."""
        if self._busy:
            return None
        if group not in self._current:
            self.refresh(group)
        return self._current[group][layer]


# --- merged -----------------------------------------------------------------------------------------------------------


def merged_state_dict(guest: PeftBackend) -> dict[str, Tensor]:
    """The state dict of the model with PEFT's layers merged into its weights. Changes the model: pass a copy."""
    kind = guest.method.peft_type
    if not guest.layers:
        raise AdapterError(f"{kind} cannot be merged: it adds virtual tokens, and changes no weights")
    try:
        with _quiet():
            whole = guest.wrapped.merge_and_unload(safe_merge=True)
    except (NotImplementedError, ValueError, AttributeError, RuntimeError, TypeError) as error:
        raise AdapterError(f"PEFT does not merge {kind} ({_line(error)}): export it without --merged") from None
    return dict(whole.state_dict())


# --- messages ---------------------------------------------------------------------------------------------------------


@contextmanager
def _quiet() -> Iterator[None]:
    """Without PEFT's warnings about settings that a user of turret does not make: fan_in_fan_out, adapter names."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _short(text: str) -> str:
    return ascii(text[:60])[1:-1]
