"""The hooks on a real model: what is attached, and how `detach` leaves the base as it was, bit for bit.

Base weights are never written to: linear layers and heads are replaced by modules that hold the originals.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ParamSpec, Protocol, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from turret import quantized
from turret.adapters import attention, layers, peft_backend
from turret.adapters.batch_context import ATTACHED, BARE, BatchContext
from turret.adapters.layers import RoutedLinear, RoutedWhole
from turret.adapters.prefix import PrefixSlot
from turret.arguments import check_arguments
from turret.errors import AdapterError
from turret.families import family_of
from turret.families.family import Family, Site
from turret.methods import Method
from turret.ops.core import to_device
from turret.ops.dropout import Draws, dropout
from turret.transformer import Model, Submodule

# --- routed -----------------------------------------------------------------------------------------------------------
# Modules that replace the base's own and read the context: a task's head, and dropout.


class RoutedModule(nn.Module):
    """A task's head: the base's own module for slot 0, a copy for every other slot. x: (B, ...) -> (B, ...)."""

    def __init__(self, base_module: nn.Module, context: BatchContext) -> None:
        super().__init__()
        self.base_module = base_module
        self.slots = nn.ModuleDict()
        self.context = context

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # what the base passes to its own head
        def run(slot: int, rows: Tensor) -> Tensor:
            key = str(slot)
            module = self.slots[key] if key in self.slots else self.base_module  # noqa: SIM401 (a ModuleDict has no get)
            weight = next(module.parameters(), rows)
            return module(rows.to(weight.dtype), *args, **kwargs)

        slot = self.context.single()
        if slot is not None or self.context.in_body:  # inside a body, a pooler's output on unpadded tokens is not used
            return run(self.context.active if slot is None else slot, x)
        parts = {
            slot: ((index := to_device(torch.tensor(rows), x.device)), run(slot, x[index]))
            for slot, rows in self.context.rows_by_slot().items()
        }
        widths = {part.shape[-1] for _, part in parts.values()}
        if len(widths) > 1:
            raise AdapterError(f"heads of different sizes {sorted(widths)} in one batch: give each size its own batch")
        first = next(iter(parts.values()))[1]
        output = first.new_empty(x.shape[0], *first.shape[1:])
        for index, part in parts.values():
            output = output.index_copy(0, index, part.to(first.dtype))
        return output


class RoutedDropout(nn.Dropout):
    """Replaces a dropout layer of the base: the same, with the masks of the pass."""

    def __init__(self, replaced: nn.Dropout, context: BatchContext, stream: str) -> None:
        super().__init__(replaced.p)
        self.replaced = replaced  # follows train() and eval() with this one
        self.context, self.stream = context, stream

    def forward(self, x: Tensor) -> Tensor:
        return dropout(x, self.p, self.context.masks, self.stream) if self.training else x


# --- attached ---------------------------------------------------------------------------------------------------------


M = TypeVar("M", bound=nn.Module)
ATTRIBUTE = "turret"  # the name of the attachment on its model
Swapped = tuple[dict[str, nn.Parameter | None], str, nn.Parameter, nn.Parameter]  # a module's, key, the base's, a copy
PREFIXES = (PrefixSlot, peft_backend.Prompt)  # what may give keys and values before a row's own


class HookedModel(nn.Module):
    """Everything that is attached to one model, and how to undo it."""

    def __init__(self, model: Model, family: Family) -> None:
        super().__init__()
        self.family = family
        self.context = BatchContext()
        self.prefixes = nn.ModuleDict()  # by slot
        self.methods: dict[int, Method] = {}
        self.linears: dict[str, RoutedLinear] = {}  # by path in the model; the modules belong to the model
        self.heads: dict[str, RoutedModule] = {}
        self.wholes: dict[str, RoutedWhole] = {}
        self.stored: dict[int, dict[str, Tensor]] = {}  # by slot, of adapters that are mounted in another form
        self.full: dict[str, nn.Parameter] = {}  # the trained copies of a full adapter, by name
        self.swapped: list[Swapped] = []
        self.guest: peft_backend.PeftBackend | None = None  # a method that PEFT itself put on the model
        self.spare: Callable[[], Model] | None = None  # another model on its weights, with nothing attached
        self.undo: list[Callable[[], None]] = []
        self.originals = dict(model.named_parameters())  # the base's own, before any was replaced
        self.sites = family.sites(model)
        self.narrows = False  # whether the last layer can compute only the tokens of `BatchContext.read`

    def prefix_length(self, slot: int) -> int:
        """P of a slot, 0 without a prefix."""
        if self.context.adapter_pool is not None:
            return self.context.adapter_pool.prefix_length(slot)
        if slot == BARE or str(slot) not in self.prefixes:
            return 0
        module = self.prefixes[str(slot)]
        assert isinstance(module, PREFIXES)
        return module.length

    def keys_values(self, slot: int, site: Site) -> tuple[Tensor, Tensor] | None:
        """A slot's prefix at one site: (key, value), each (H, P, D), or None."""
        if self.context.adapter_pool is not None:
            return self.context.adapter_pool.keys_values(slot, site.group, site.layer)
        if str(slot) not in self.prefixes:
            return None
        module = self.prefixes[str(slot)]
        assert isinstance(module, PREFIXES)
        return module.keys_values(site.group, site.layer)


@dataclass(frozen=True)
class AdapterInit:
    """What a new adapter starts with; see `lifecycle.attach`."""

    init_ids: Tensor | None = None  # (n,) int64
    generator: torch.Generator | None = None
    head: tuple[str, ...] = ()


def attachment(model: nn.Module) -> HookedModel:
    """The attachment of `model`. Raises AdapterError if it has none."""
    found = getattr(model, ATTRIBUTE, None)
    if not isinstance(found, HookedModel):
        raise AdapterError(f"nothing is attached to this {type(model).__name__}: call turret.attach(model, …) first")
    return found


def require_bare(model: nn.Module) -> Model:
    """The model, if it is one of transformers without an adapter. Raises AdapterError."""
    if not isinstance(model, nn.Module) or not hasattr(model, "config"):
        raise AdapterError(
            f"an adapter goes on a model of transformers, given a {type(model).__name__}: load one with from_pretrained"
        )
    if isinstance(getattr(model, ATTRIBUTE, None), HookedModel):
        raise AdapterError("this model already carries an adapter: call turret.detach(model) first")
    return cast(Model, model)


@check_arguments
def detach(model: M) -> M:
    """Take everything off: modules, weights, hooks, attention function and requires_grad are as before.

    Returns the same model. Raises AdapterError if nothing is attached.
    """
    for undo in reversed(attachment(model).undo):
        undo()
    return model


def mixed_precision(model: nn.Module) -> torch.autocast:
    """The context of a training step's loss: a full fine-tuning multiplies float32 copies in its base's precision.

    Other methods compute in the base's precision anyway. An evaluation has no gradients and reads the float32 copies.

    Source: Micikevicius et al. 2018, "Mixed Precision Training".
    """
    attached = attachment(model)
    dtype = next(each.dtype for each in attached.originals.values() if each.is_floating_point())
    mixed = bool(attached.full) and dtype != torch.float32 and torch.is_grad_enabled()
    return torch.autocast(device_of(model).type, dtype, enabled=mixed)


@contextmanager
def drawing(model: nn.Module, draws: Draws, examples: Sequence[int]) -> Iterator[None]:
    """A training pass and its backward pass, whose random numbers depend on the step and on each example alone.

    Args:
        model: an attached model.
        draws: the run's seed, and the step.
        examples: the number of each row of the pass in the step.
    """
    context = attachment(model).context
    before, context.draws = context.draws, (draws, examples)
    try:
        yield
    finally:
        context.draws = before


@contextmanager
def on_slot(model: nn.Module, slot: int) -> Iterator[None]:
    """Make every row take `slot` for the length of the block; with 0 the model answers as the bare base.

    With another slot than the trained one, the base's own weights replace the copies of a full fine-tuning.
    """
    attached = attachment(model)
    context, bare = attached.context, attached.swapped if slot != ATTACHED else []
    before, context.active = context.active, slot
    put_back(bare)
    try:
        yield
    finally:
        context.active = before
        for parameters, key, _, copy in bare:
            parameters[key] = copy


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that training changes, by name in the attached model."""
    return {name: each for name, each in model.named_parameters() if each.requires_grad}


def target_paths(model: Model, targets: tuple[str, ...] | str | None) -> list[str]:
    """Dotted paths of the linear layers that `target_modules` names, as PEFT reads it.

    A name fits a path that equals it or ends with it after a dot. "all-linear" is every linear layer but the output
    layer and the head. None is the family's own choice.

    Raises:
        AdapterError: a name fits no layer.
    """
    family = family_of(model.config)
    linear = {path: module for path, module in model.named_modules() if quantized.is_linear(module)}
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    linear = {
        path: module
        for path, module in linear.items()
        if module is not output and path.split(".")[0] not in family.beside_body and path not in family.unread
    }
    if targets == "all-linear":
        return list(linear)
    wanted = family.lora_targets if targets is None else targets
    found = [path for path in linear if any(path == name or path.endswith("." + name) for name in wanted)]
    missing = [name for name in wanted if not any(path == name or path.endswith("." + name) for path in linear)]
    if missing:
        names = sorted({path.rsplit(".", 1)[-1] for path in linear})
        raise AdapterError(
            f"target_modules {', '.join(missing)} not found in {family.name}: expected some of {', '.join(names)} "
            "or all-linear"
        )
    return found


def hook_model(model: Model, *, plain: bool = False) -> HookedModel:
    """Put the hooks on a model without any adapter: attention function, context, positions, frozen parameters.

    plain: leave dropout, norms and MLPs as they are, for a method that replaces modules itself.
    """
    family = family_of(model.config)
    attached = HookedModel(model, family)
    attention.register()
    flags = {name: each.requires_grad for name, each in model.named_parameters()}
    for each in model.parameters():
        each.requires_grad_(False)
    found = (getattr(each, "config", None) for each in model.modules())
    configs = {id(config): config for config in found if config is not None}
    implementations = {key: config._attn_implementation for key, config in configs.items()}
    for config in () if family.rows_alone else configs.values():
        config._attn_implementation = attention.NAME
    bias_modules = _bias_modules(attached)
    for site in attached.sites:
        site.module.turret_hook = attention.Hooked(
            site,
            attached.context,
            attached.keys_values,
            family,
            bias_modules.get(site.group),
            last=site is attached.sites[-1],
        )
    handles = [stack.register_forward_pre_hook(_refresher(attached, groups)) for stack, groups in family.stacks(model)]
    handles += hook_positions(model, family, attached.context, attached.prefix_length)
    bias_undo = hook_bias(bias_modules.values(), family, attached.context)
    hook_undo = [] if plain else layers.hook_layers(model, family.fast, attached.context)
    attached.context.draws_alone = plain or family.fast.layout is None

    def undo() -> None:
        for handle in handles:
            handle.remove()
        bias_undo()
        for undo_one in hook_undo:
            undo_one()
        for site in attached.sites:
            del site.module.turret_hook
        for key, config in configs.items():
            config._attn_implementation = implementations[key]
        delattr(model, ATTRIBUTE)
        for name, each in model.named_parameters():
            each.requires_grad_(flags[name])

    attached.undo.append(undo)
    if not plain:
        _replace_modules(model, attached)
    model.add_module(ATTRIBUTE, attached)
    return attached


def _replace_modules(model: nn.Module, attached: HookedModel) -> None:
    """Replace dropout layers and RMS norms by faster ones, and the module that ends the last attention."""
    fast = attached.family.fast
    for path, module in list(model.named_modules()):
        if type(module) is nn.Dropout and module.p > 0.0:
            _replace(model, attached, path, RoutedDropout(module, attached.context, attached.family.stream(path)))
        elif type(module).__name__ in fast.rms_norms:
            _replace(model, attached, path, layers.FrozenNorm(module, attached.context, fast.narrow_norms))
        elif type(module).__name__ in fast.added_norms and path == layers.attention_output_path(
            attached.sites[-1].name
        ):
            attached.narrows = True
            _replace(model, attached, path, layers.NarrowedOutput(module, attached.context))


def _bias_modules(attached: HookedModel) -> dict[str, Submodule]:
    """The owners of a bias by relative position, by group; empty if the family has none."""
    bias, sites = attached.family.relative_bias, attached.sites
    if bias is None:
        return {}
    return {site.group: site.module for site in sites if site.group != "cross" and bias.owner(site.module)}


def _refresher(attached: HookedModel, groups: tuple[str, ...]) -> Callable[[nn.Module, Args], None]:
    """A hook that prepares the prefixes of some groups for the pass that begins."""

    def refresh(_: nn.Module, args: Args) -> None:
        if attached.guest is not None and attached.guest.layers and attached.context.capture is None:
            slot = attached.context.single()
            if slot is None:
                raise AdapterError("an adapter of PEFT needs a batch of its own: put other rows into another batch")
            peft_backend.switch_layers(attached.guest, slot == ATTACHED)
        for module in attached.prefixes.values():
            assert isinstance(module, PREFIXES)
            for group in groups:
                module.refresh(group)

    return refresh


def linear_at(model: Model, path: str) -> nn.Module:
    """The base's own layer at a path. Raises AdapterError if there is none."""
    attached: HookedModel | None = getattr(model, ATTRIBUTE, None)
    if attached is not None and (known := attached.linears.get(path)) is not None:
        return known.base_layer  # faster than get_submodule, which walks the path
    try:
        layer = model.get_submodule(path)
    except AttributeError:
        raise AdapterError(f"the base has no layer {path!r}: the adapter belongs to another architecture") from None
    layer = getattr(layer, "base_layer", layer)
    assert isinstance(layer, nn.Module)
    return layer


def routed_linear(model: Model, attached: HookedModel, path: str) -> RoutedLinear:
    """The routed linear layer at a path; it replaces the base's own at the first call."""
    if path not in attached.linears:
        stream = attached.family.stream(path)
        attached.linears[path] = RoutedLinear(model.get_submodule(path), attached.context, stream)
        _replace(model, attached, path, attached.linears[path])
    return attached.linears[path]


def routed_module(model: Model, attached: HookedModel, path: str) -> RoutedModule:
    """The routed head module at a path; it replaces the base's own at the first call."""
    if path not in attached.heads:
        attached.heads[path] = RoutedModule(model.get_submodule(path), attached.context)
        _replace(model, attached, path, attached.heads[path])
    return attached.heads[path]


def routed_whole(model: Model, attached: HookedModel, path: str) -> RoutedWhole:
    """The routed module of a norm, an embedding or the output layer; it replaces the base's own at the first call."""
    if path not in attached.wholes:
        whole = RoutedWhole(model.get_submodule(path), attached.context, path, attached.family.stream(path))
        attached.wholes[path] = whole
        _replace(model, attached, path, whole)
    return attached.wholes[path]


def _replace(model: nn.Module, attached: HookedModel, path: str, module: nn.Module) -> None:
    """Put `module` at `path`, and remember the original."""
    parent_path, _, name = path.rpartition(".")
    parent = model.get_submodule(parent_path)
    original = parent.get_submodule(name)
    module.train(original.training)
    parent._modules[name] = module
    attached.undo.append(functools.partial(parent._modules.__setitem__, name, original))


def start_head(model: Model, attached: HookedModel, extra: tuple[str, ...]) -> None:
    """Put trainable copies of the family's head, and of further modules, on it."""
    own = [name for name in attached.family.head_modules if name in dict(model.named_children())]
    for name in own + [name for name in extra if name not in own]:
        twin = _trainable_copy(model.get_submodule(name), attached.context)
        routed_module(model, attached, name).slots[str(ATTACHED)] = twin


def _trainable_copy(module: nn.Module, context: BatchContext) -> nn.Module:
    if isinstance(module, RoutedModule):
        module = module.base_module
    twin = copy.deepcopy(module, {id(context): context}).float()  # its dropout reads the same context
    for each in twin.parameters():
        each.requires_grad_(True)
    return twin


def put_back(swapped: Sequence[Swapped]) -> None:
    """Replace copies by the base's own parameters."""
    for parameters, key, original, _ in swapped:
        parameters[key] = original


def device_of(model: nn.Module) -> torch.device:
    """The device of a model or a layer."""
    return next(model.parameters()).device


def layer_paths(model: nn.Module) -> list[str]:
    """The layers of every stack: what lists of modules hold that are not inside another list."""
    layers: list[str] = []
    for path, module in model.named_modules():
        inside = path.startswith((f"{ATTRIBUTE}.", *(f"{each}." for each in layers)))
        if isinstance(module, nn.ModuleList) and not inside:
            layers += [f"{path}.{place}" for place in range(len(module))]
    return layers


# --- positions --------------------------------------------------------------------------------------------------------
# Of unpadded rows, and shifted by a causal prefix.
#
# A causal prefix of P tokens takes the positions 0 … P-1, so the real tokens begin at P. Then a prefix that starts from
# the keys and values of a text is exactly that text prepended. Encoders are not shifted.


Length = Callable[[int], int]  # slot -> P
Args = tuple[Any, ...]  # the arguments of a module of transformers, of any type
Kwargs = dict[str, Any]
PreHook = Callable[[nn.Module, Args, Kwargs], tuple[Args, Kwargs] | None]  # None leaves the arguments as they are
P = ParamSpec("P")


class _Cache(Protocol):
    """A key-value cache of transformers."""

    def get_seq_length(self) -> int: ...


def hook_positions(model: Model, family: Family, context: BatchContext, prefix_length: Length) -> list[RemovableHandle]:
    """Register the hooks that a family needs; returns the handles that remove them."""
    if family.decoder_only:
        body = model.base_model
        names = list(inspect.signature(type(body).forward).parameters)[1:]
        shift = _decoder_hook(names, family.position_offset(model.config), context, prefix_length)
        return [body.register_forward_pre_hook(shift, with_kwargs=True)]
    handles = []
    if family.position_module is not None:
        for stack, (stream, *_) in family.stacks(model):
            table = stack.get_submodule(family.position_module)
            before = _table_hook(stream, context, prefix_length)
            handles.append(table.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(table.register_forward_hook(lambda module, args, out: out[0] if out.dim() == 4 else out))
    return handles


def hook_bias(modules: Iterable[nn.Module], family: Family, context: BatchContext) -> Callable[[], None]:
    """Keep a base from computing an (N, N) bias for N unpadded tokens; `attention` computes the bias of each row."""
    modules, name = list(modules), "" if family.relative_bias is None else family.relative_bias.method
    for module in modules:
        setattr(module, name, _bias_of_padded(module, getattr(module, name), context))  # on this instance only

    def undo() -> None:
        for module in modules:
            delattr(module, name)

    return undo


def _bias_of_padded(module: nn.Module, original: Callable[P, Tensor], context: BatchContext) -> Callable[P, Tensor]:
    """The method that computes the bias; for unpadded tokens it gives zeros (1, 1, 1, 1)."""

    def compute(*args: P.args, **kwargs: P.kwargs) -> Tensor:
        if context.lengths is None:
            return original(*args, **kwargs)
        return next(module.parameters()).new_zeros(1, 1, 1, 1)

    return compute


def row_positions(lengths: Iterable[int], offset: int, device: torch.device) -> Tensor:
    """Positions of unpadded rows, each counted from `offset`: (N,) int64."""
    return to_device(torch.cat([torch.arange(offset, offset + length) for length in lengths]), device)


def _shift(context: BatchContext, prefix_length: Length, rows: int, stream: str, device: torch.device) -> Tensor | None:
    """P of every row, (B, 1), or of every unpadded token, (1, N); None if no row has a causal prefix."""
    slot = context.single()
    if slot is not None:
        P = prefix_length(slot)
        return torch.full((1, 1), P, device=device) if P else None
    assert context.slots is not None
    lengths = to_device(torch.tensor([prefix_length(each) for each in context.slots]), device)
    if not lengths.any():
        return None
    if context.lengths is None:
        return lengths[:rows, None]
    return lengths.repeat_interleave(to_device(torch.tensor(context.lengths[stream]), device))[None]


def _decoder_hook(names: list[str], offset: int, context: BatchContext, prefix_length: Length) -> PreHook:
    def shift_positions(body: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs] | None:
        if context.capture is not None or context.positions is not None:
            return None
        call = dict(zip(names, args, strict=False)) | kwargs
        tokens = call.get("input_ids")
        tokens = call["inputs_embeds"][..., 0] if tokens is None else tokens
        shift = _shift(context, prefix_length, tokens.shape[0], "decoder", tokens.device)
        if shift is None:
            return None
        if call.get("position_ids") is None:
            call["position_ids"] = _positions(tokens, call.get("attention_mask"), call.get("cache")) + offset
        call["position_ids"] = call["position_ids"] + shift
        return (), call

    return shift_positions


def _positions(tokens: Tensor, mask: Tensor | None, cache: _Cache | None) -> Tensor:
    """Positions of padded rows, (B, T), if the caller gave none: padding on either side does not count."""
    length = tokens.shape[1]
    if mask is not None and mask.dim() == 2:
        return (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -length:]
    past = cache.get_seq_length() if cache is not None else 0
    return torch.arange(past, past + length, device=tokens.device)[None]


def _table_hook(stream: str, context: BatchContext, prefix_length: Length) -> PreHook:
    def give_positions(module: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs] | None:
        if context.capture is not None:
            return None
        if context.positions is not None:
            return args, kwargs | {"position_ids": context.positions[stream]}
        first = args[0] if args else kwargs["input_ids"]
        shape = first if isinstance(first, tuple) else first.shape  # Pegasus hands over the shape alone
        device, shift = next(module.parameters()).device, None
        if stream == "decoder":
            shift = _shift(context, prefix_length, shape[0], stream, device)
        if context.lengths is not None:
            where = row_positions(context.lengths[stream], 0, device)[None]  # (1, N)
        elif shift is None:
            return None
        else:
            past = args[1] if len(args) > 1 else kwargs.get("cache_length", 0)
            where = torch.arange(past, past + shape[1], device=device)[None]
        where = where if shift is None else where + shift  # (B or 1, T)
        return args, kwargs | {"position_ids": where}

    return give_positions
