"""What training makes: one adapter as numbers and words, and the way between it and an attached model.

`extract` reads an Adapter's tensors off a model, `mount` puts them into a slot and checks that every one fits and is
used. Refuses to know files; `bundle` writes and reads them.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from turret.adapters import through_peft
from turret.adapters.attached import (
    ATTRIBUTE,
    Attachment,
    attachment,
    device_of,
    hook_model,
    invite,
    routed_linear,
    routed_module,
    swap_parameters,
)
from turret.adapters.lora import LoRAFactors, sizes
from turret.adapters.prefix import PrefixGroup, PrefixSlot
from turret.errors import AdapterError, WrongBase
from turret.families import Family, family_of
from turret.methods import Full, LoRA, Method, Peft, Prefix

LORA_PREFIX = "base_model.model."  # as PEFT names the layers of a LoRA
PROMPT = {"decoder": "prompt_embeddings", "encoder": "encoder_prompt_embeddings", "cross": "cross_prompt_embeddings"}


@dataclass(frozen=True)
class BaseInfo:
    """The base an adapter was trained on; the fingerprint decides, the id only tells where to look."""

    id: str
    fingerprint: str | None = None
    family: str | None = None
    revision: str | None = None


@dataclass(frozen=True)
class Adapter:
    """tensors: PEFT's names -> CPU tensors, a prefix (L, 2, H, P, D); head: names in the model -> CPU tensors."""

    method: Method
    tensors: dict[str, Tensor]
    head: dict[str, Tensor]
    base: BaseInfo
    task: dict[str, Any] = field(default_factory=dict)  # all that answering needs: kind, labels, max_tokens, …
    generation: dict[str, Any] = field(default_factory=dict)
    lineage: dict[str, Any] = field(default_factory=dict)  # recipe, data digest, seed, library versions, …


@dataclass(frozen=True)
class Extracted:
    """The numbers of one slot, and the method as it is stored: PiSSA becomes plain LoRA of twice the rank."""

    tensors: dict[str, Tensor]
    head: dict[str, Tensor]
    method: Method

    def __iter__(self) -> Any:
        return iter((self.tensors, self.head, self.method))


def extract(model: Any, slot: int = 1) -> Extracted:
    """Copies of what a slot holds, on the CPU in float32. Raises AdapterError for an empty slot."""
    attached = attachment(model)
    if slot not in attached.methods:
        raise AdapterError(f"slot {slot} is empty: expected one of {sorted(attached.methods)}")
    method, key = attached.methods[slot], str(slot)
    head = {
        f"{path}.{name}": _copy(value)
        for path, module in attached.heads.items()
        if key in module.slots
        for name, value in module.slots[key].state_dict().items()
    }
    if isinstance(method, Full):
        names = tuple(f"{name}." for name in attached.family.head_modules)
        tensors = {name: _copy(value) for name, value in attached.full.items()}
        head = {name: value for name, value in tensors.items() if name.startswith(names)}
        return Extracted({k: v for k, v in tensors.items() if k not in head}, head, method)
    if isinstance(method, LoRA):
        return Extracted(*_extract_lora(attached, key, method, head))
    if isinstance(method, Peft):
        assert attached.guest is not None
        tensors = {name: _copy(value) for name, value in through_peft.tensors_of(attached.guest).items()}
        return Extracted(tensors, head, through_peft.finished(attached.guest.method))
    if isinstance(method, Prefix):
        module = attached.prefixes[key]
        assert isinstance(module, PrefixSlot)
        groups = {name: group.folded() for name, group in module.groups.items() if isinstance(group, PrefixGroup)}
        names_ = prompt_names(list(groups))
        return Extracted({names_[name]: _copy(value) for name, value in groups.items()}, head, method)
    return Extracted({}, head, method)


def _extract_lora(
    attached: Attachment, key: str, method: LoRA, head: dict[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor], Method]:
    tensors: dict[str, Tensor] = {}
    for path, layer in attached.linears.items():
        if key in layer.slots:
            factors = layer.slots[key]
            assert isinstance(factors, LoRAFactors)
            A, B = factors.folded()
            tensors[f"{LORA_PREFIX}{path}.lora_A.weight"] = _copy(A)
            tensors[f"{LORA_PREFIX}{path}.lora_B.weight"] = _copy(B)
    if method.init_lora_weights == "pissa":
        r = 2 * method.r
        alpha = method.scaling * (r**0.5 if method.use_rslora else r)
        method = method.model_copy(update={"r": r, "lora_alpha": alpha, "init_lora_weights": True})
    return tensors, head, method


def mount(model: Any, adapter: Adapter, slot: int = 1, *, fingerprint: str | None = None) -> Any:
    """Put a finished adapter into a slot and make every row take it; returns the same model.

    fingerprint: that of the model's base; where given, an adapter of another base is refused (WrongBase). Every tensor
    must fit a layer of the model and every layer needs both factors, or AdapterError says which does not.
    """
    require_base(adapter, fingerprint)
    if slot < 1:
        raise AdapterError(f"slot {slot} cannot hold an adapter: slot 0 is the bare base; use 1 or more")
    attached = getattr(model, ATTRIBUTE, None) or hook_model(model, plain=isinstance(adapter.method, Peft))
    unmount(model, slot)
    if isinstance(adapter.method, Full):
        if attached.methods:
            raise AdapterError("a full fine-tuning replaces every weight: mount it alone, on a model without adapters")
        _check_names(model, {**adapter.tensors, **adapter.head})
        swap_parameters(model, attached, {**adapter.tensors, **adapter.head})
    else:
        if isinstance(adapter.method, LoRA):
            _mount_lora(model, attached, adapter, adapter.method, slot)
        elif isinstance(adapter.method, Prefix):
            _mount_prefix(model, attached, adapter, slot)
        elif isinstance(adapter.method, Peft):
            _mount_peft(model, attached, adapter, adapter.method, slot)
        elif adapter.tensors:
            raise AdapterError(f"a head holds no other tensors, given {', '.join(sorted(adapter.tensors)[:3])}")
        _mount_head(model, attached, adapter.head, slot)
    attached.methods[slot] = adapter.method
    attached.route.active = slot
    return model


def require_base(adapter: Adapter, fingerprint: str | None) -> None:
    """Raises WrongBase for an adapter of another base; one that does not know its base, or no fingerprint, passes."""
    if fingerprint and adapter.base.fingerprint and fingerprint != adapter.base.fingerprint:
        raise WrongBase(
            f"adapter was trained on base {adapter.base.fingerprint[:19]} ({adapter.base.id}), this model is "
            f"{fingerprint[:19]}: load that base, or retrain"
        )


def unmount(model: Any, slot: int) -> None:
    """Empty a slot; nothing happens where it is empty already."""
    attached = attachment(model)
    key = str(slot)
    if attached.guest is not None and slot in attached.methods:
        attached.guest.leave()
        attached.guest = None
    slots = [linear.slots for linear in attached.linears.values()] + [head.slots for head in attached.heads.values()]
    for each in slots:
        if key in each:
            del each[key]
    if key in attached.prefixes:
        del attached.prefixes[key]
    attached.methods.pop(slot, None)
    if attached.route.active == slot:
        attached.route.active = 0


def _mount_lora(model: Any, attached: Attachment, adapter: Adapter, method: LoRA, slot: int) -> None:
    for path, (A, B) in checked_factors(model, adapter, method).items():
        factors = LoRAFactors(A.float().clone(), B.float().clone(), method.scaling).requires_grad_(False)
        layer = routed_linear(model, attached, path)
        layer.slots[str(slot)] = factors.to(device_of(layer.base_layer)).eval()


def checked_factors(model: Any, adapter: Adapter, method: LoRA) -> dict[str, tuple[Tensor, Tensor]]:
    """A (R, D_in) and B (D_out, R) of every layer the LoRA adapts, as they are stored.

    All of its tensors are among them and fit, or AdapterError says which does not.
    """
    pairs: dict[str, dict[str, Tensor]] = {}
    for name, tensor in adapter.tensors.items():
        path, _, factor = name.removeprefix(LORA_PREFIX).removesuffix(".weight").rpartition(".")
        if not name.startswith(LORA_PREFIX) or factor not in ("lora_A", "lora_B"):
            raise AdapterError(
                f"tensor {name!r} is no LoRA factor: expected {LORA_PREFIX}<layer>.lora_A.weight or lora_B"
            )
        pairs.setdefault(path, {})[factor] = tensor
    if not pairs:
        raise AdapterError("a LoRA without any factors would change nothing: export it again from where it was trained")
    checked = {}
    for path, pair in pairs.items():
        layer = _linear_at(model, path)
        if set(pair) != {"lora_A", "lora_B"}:
            raise AdapterError(f"LoRA of {path} needs lora_A and lora_B, given only {next(iter(pair))}")
        d_in, d_out = sizes(layer)
        A, B = pair["lora_A"], pair["lora_B"]
        if A.shape != (method.r, d_in) or B.shape != (d_out, method.r):
            raise AdapterError(
                f"LoRA of {path} has shapes {tuple(A.shape)} and {tuple(B.shape)}: expected ({method.r}, {d_in}) and "
                f"({d_out}, {method.r}); it belongs to another base or rank"
            )
        checked[path] = (A, B)
    return checked


def _linear_at(model: Any, path: str) -> nn.Module:
    if (known := attachment(model).linears.get(path)) is not None:
        return known.base_layer  # at once: a path is looked up part by part
    try:
        layer = model.get_submodule(path)
    except AttributeError:
        raise AdapterError(f"the base has no layer {path!r}: the adapter belongs to another architecture") from None
    layer = getattr(layer, "base_layer", layer)
    assert isinstance(layer, nn.Module)
    return layer


def _mount_prefix(model: Any, attached: Attachment, adapter: Adapter, slot: int) -> None:
    modules = {group: PrefixGroup(tensor, None, None) for group, tensor in checked_prefix(attached, adapter).items()}
    attached.prefixes[str(slot)] = PrefixSlot(modules).requires_grad_(False).to(device_of(model)).eval()


def checked_prefix(attached: Attachment, adapter: Adapter) -> dict[str, Tensor]:
    """Keys and values by group, (L, 2, H, P, D), as they are stored; all of the prefix's tensors, and they fit."""
    groups: dict[str, list[Any]] = {}
    for site in attached.sites:
        groups.setdefault(site.group, []).append(site)
    names = {name: group for group, name in prompt_names(list(groups)).items()}
    unknown = sorted(set(adapter.tensors) - set(names))
    if unknown or not adapter.tensors:
        raise AdapterError(f"a prefix of {attached.family.name} holds {', '.join(names)}, given {unknown or 'nothing'}")
    checked = {}
    for name, tensor in adapter.tensors.items():
        sites = groups[names[name]]
        expected = (len(sites), 2, sites[0].kv_heads, sites[0].head_dim)
        if tensor.dim() != 5 or (*tensor.shape[:3], tensor.shape[4]) != expected or not tensor.shape[3]:
            layers, two, heads, dim = expected
            raise AdapterError(
                f"{name} has shape {tuple(tensor.shape)}: expected ({layers}, {two}, {heads}, virtual tokens, {dim}); "
                "it belongs to another base"
            )
        checked[names[name]] = tensor
    return checked


def prompt_names(groups: list[str]) -> dict[str, str]:
    """group -> tensor name. An encoder alone has the plain name, which PEFT reads too."""
    return {"encoder": PROMPT["decoder"]} if groups == ["encoder"] else {group: PROMPT[group] for group in groups}


def _mount_peft(model: Any, attached: Attachment, adapter: Adapter, method: Peft, slot: int) -> None:
    if attached.methods or slot != 1:
        raise AdapterError("an adapter of PEFT answers alone: mount it in slot 1 of a model without adapters")
    invite(model, attached, through_peft.finished(method))
    assert attached.guest is not None
    through_peft.fill(attached.guest, adapter.tensors)
    for each in attached.guest.parameters.values():
        each.requires_grad_(False)
    for part in (*attached.guest.layers, *attached.prefixes.values()):
        part.eval()


def _mount_head(model: Any, attached: Attachment, head: dict[str, Tensor], slot: int) -> None:
    required = [name for name in attached.family.head_modules if name in dict(model.named_children())]
    missing = [name for name in required if not any(key.startswith(name + ".") for key in head)]
    if missing:
        raise AdapterError(f"the adapter has no head {', '.join(missing)}: a classifier needs one; retrain, or give it")
    for path in head_paths(attached.family, head):
        module = attached.heads[path].base_module if path in attached.heads else model.get_submodule(path)
        values = {key[len(path) + 1 :]: value for key, value in head.items() if key.startswith(path + ".")}
        routed_module(model, attached, path).slots[str(slot)] = filled_head(module, path, values, device_of(module))


def head_paths(family: Family, head: dict[str, Tensor]) -> list[str]:
    """The modules that the head's tensors fill: the family's head modules, and poolers inside the body."""
    paths: list[str] = []
    for key in head:
        path = next((name for name in family.head_modules if key.startswith(name + ".")), None)
        if path is None:
            at = next((key.find(f".{part}.") for part in family.body_excludes if f".{part}." in key), -1)
            if at < 0:
                raise AdapterError(f"tensor {key!r} belongs to no head of {family.name}: remove it or retrain")
            path = key[: key.index(".", at + 1)]
        if path not in paths:
            paths.append(path)
    return paths


def check_head(module: nn.Module, path: str, values: Mapping[str, Tensor]) -> None:
    """Whether the values are all that the module holds, and fit; the last layer takes its size from them."""
    expected = module.state_dict()
    if set(values) != set(expected):
        raise AdapterError(f"head {path} needs {', '.join(sorted(expected))}, given {', '.join(sorted(values))}")
    for key, value in values.items():
        old, last = expected[key], isinstance(module.get_submodule(key.rpartition(".")[0]), nn.Linear)
        if value.dim() != old.dim() or value.shape[1:] != old.shape[1:] or (not last and value.shape != old.shape):
            raise AdapterError(f"head {path}.{key} has shape {tuple(value.shape)}: expected {tuple(old.shape)}")


def filled_head(module: nn.Module, path: str, values: dict[str, Tensor], device: torch.device) -> nn.Module:
    """A frozen float32 copy of a head module with these values."""
    check_head(module, path, values)
    twin = _twin(module)
    for key, value in values.items():
        owner, name = twin.get_submodule(key.rpartition(".")[0]), key.rpartition(".")[2]
        setattr(owner, name, nn.Parameter(value.float().clone().to(device), requires_grad=False))
        if isinstance(owner, nn.Linear) and name == "weight":
            owner.out_features = value.shape[0]
    return twin


def _twin(module: nn.Module) -> nn.Module:
    """The same modules anew, with the same parameters: a deep copy would take longer than reading an adapter."""
    twin = copy.copy(module)
    vars(twin)["_parameters"] = dict(module._parameters)
    vars(twin)["_modules"] = {name: child if child is None else _twin(child) for name, child in module._modules.items()}
    return twin.eval()


def _check_names(model: Any, values: dict[str, Tensor]) -> None:
    expected = {name: tuple(each.shape) for name, each in model.named_parameters()}
    head = family_of(model.config).head_modules
    for name, value in values.items():
        fits = name in expected and (expected[name] == tuple(value.shape) or name.startswith(head))
        if not fits:
            raise AdapterError(
                f"weight {name!r} of shape {tuple(value.shape)} does not fit this base: load its own base"
            )
    if missing := sorted(set(expected) - set(values)):
        raise AdapterError(f"a full fine-tuning needs every weight, {missing[0]!r} is missing: train it again")


def _copy(value: Tensor) -> Tensor:
    return value.detach().to("cpu", torch.float32 if value.is_floating_point() else value.dtype).contiguous().clone()
