"""The tensors of prefix tuning: the keys and values of every group of layers, which start from real words."""

from __future__ import annotations

import torch
from torch import Tensor

from turret.adapters.adapter import PROMPT, Adapter, Parts
from turret.adapters.batch_context import ATTACHED
from turret.adapters.hooks import AdapterInit, HookedModel, attachment, device_of
from turret.adapters.prefix import PrefixGroup, PrefixSlot, from_peft, to_peft
from turret.adapters.tuners.tuner import Tuner, fill_parameters, head_parameters, require_same
from turret.errors import AdapterError, BundleError
from turret.families import Site, family_of
from turret.manifest import AdapterConfig
from turret.methods.method import Check
from turret.methods.prefix import Prefix
from turret.transformer import Model


class PrefixTuner(Tuner[Prefix]):
    """A prefix in front of every attention layer."""

    def targets(self, model: Model) -> Check:
        family = family_of(model.config)
        if not family.rows_alone:
            return super().targets(model)
        return Check(
            "method",
            "refuse",
            f"{family.name} computes its attention itself, so a prefix cannot stand in front of it",
            'use method.kind = "lora"',
        )

    def start(self, model: Model, attached: HookedModel, beginning: AdapterInit) -> None:
        if (reason := self.method.refusal("train", attached.family, generates=False)) is not None:
            raise AdapterError(reason)
        super().start(model, attached, beginning)
        self._put(model, attached, _starts(model, attached, self.method, beginning), beginning.generator)

    def tensors(self, attached: HookedModel, slot: int) -> dict[str, Tensor]:
        groups = _groups(attached, slot)
        names = prompt_names(list(groups))
        return {names[name]: group.folded_keys_values() for name, group in groups.items()}

    def fill(self, model: Model, attached: HookedModel, adapter: Adapter, generator: torch.Generator | None) -> None:
        """Start a new prefix from the stored keys and values. Its MLP, if it has one, is drawn by `generator`."""
        fill_parameters(head_parameters(attached), adapter.head)
        groups = _groups(attached, ATTACHED)
        names = prompt_names(list(groups))
        require_same({names[name]: group.shape for name, group in groups.items()}, adapter.tensors)
        self._put(model, attached, {name: adapter.tensors[names[name]] for name in groups}, generator)

    def owns(self, name: str) -> bool:
        return name in PROMPT.values()

    def stored_tensors(self, adapter: Adapter) -> dict[str, Tensor]:
        return super().stored_tensors(adapter) | {name: to_peft(each) for name, each in adapter.tensors.items()}

    def read(self, tensors: dict[str, Tensor], config: AdapterConfig) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        own, head = super().read(tensors, config)
        return {name: _unflatten_prefix(name, value, config) for name, value in own.items()}, head

    def peft_config(self, adapter: Adapter) -> AdapterConfig:
        """The shape (L, 2, H, P, D) of the decoder's prefix, or of an encoder-only model's, in PEFT's keys."""
        layers, _, heads, tokens, dim = adapter.tensors[PROMPT["decoder"]].shape
        return self.peft_words() | {
            "num_virtual_tokens": tokens,
            "num_layers": layers,
            "num_attention_heads": heads,
            "token_dim": heads * dim,
            "num_transformer_submodules": 2 if len(adapter.tensors) > 1 else 1,
            "prefix_projection": False,
        }

    def require_mergeable(self) -> None:
        raise AdapterError(
            "a prefix cannot be merged: it is keys and values in every attention layer, not a change of weights; "
            "export it without --merged"
        )

    def parts(self, model: Model, adapter: Adapter) -> Parts:
        """Keys and values (L, 2, H, P, D) by group. Checks that every tensor is one of them and fits."""
        attached = attachment(model)
        groups: dict[str, list[Site]] = {}
        for site in attached.sites:
            groups.setdefault(site.group, []).append(site)
        names = {name: group for group, name in prompt_names(list(groups)).items()}
        unknown = sorted(set(adapter.tensors) - set(names))
        if unknown or not adapter.tensors:
            raise AdapterError(
                f"a prefix of {attached.family.name} holds {', '.join(names)}, given {unknown or 'nothing'}"
            )
        checked = {}
        for name, tensor in adapter.tensors.items():
            sites = groups[names[name]]
            expected = (len(sites), 2, sites[0].kv_heads, sites[0].head_dim)
            if tensor.dim() != 5 or (*tensor.shape[:3], tensor.shape[4]) != expected or not tensor.shape[3]:
                layers, two, heads, dim = expected
                raise AdapterError(
                    f"{name} has shape {tuple(tensor.shape)}: expected ({layers}, {two}, {heads}, virtual tokens, "
                    f"{dim}); it belongs to another base"
                )
            checked[names[name]] = tensor
        return Parts(prefix=checked)

    def _put(
        self, model: Model, attached: HookedModel, starts: dict[str, Tensor], generator: torch.Generator | None
    ) -> None:
        """Put a trainable prefix on a hooked model. starts: keys and values (L, 2, H, P, D) by group."""
        hidden = self.method.encoder_hidden_size if self.method.reparametrize else None
        groups = {name: PrefixGroup(start, hidden, generator) for name, start in starts.items()}
        attached.prefixes[str(ATTACHED)] = PrefixSlot(groups).to(device_of(model))


def _groups(attached: HookedModel, slot: int) -> dict[str, PrefixGroup]:
    module = attached.prefixes[str(slot)]
    assert isinstance(module, PrefixSlot)
    return {name: group for name, group in module.groups.items() if isinstance(group, PrefixGroup)}


def _unflatten_prefix(name: str, value: Tensor, config: AdapterConfig) -> Tensor:
    """PEFT's layout (P, L * 2 * H * D) -> (L, 2, H, P, D)."""
    heads, width = config.get("num_attention_heads"), config.get("token_dim")
    if not (isinstance(heads, int) and isinstance(width, int) and heads > 0 and width > 0 and width % heads == 0):
        raise BundleError(
            f"adapter_config.json needs token_dim as a multiple of num_attention_heads, given {width!r} and {heads!r}"
        )
    if value.dim() != 2 or not value.numel() or value.shape[1] % (2 * width):
        raise BundleError(f"tensor {name!r} has shape {tuple(value.shape)}: expected (P, layers * {2 * width})")
    return from_peft(value, value.shape[1] // (2 * width), heads, width // heads)


def prompt_names(groups: list[str]) -> dict[str, str]:
    """The tensor name of each group. An encoder-only model's has the decoder's name, because PEFT reads that one."""
    return {"encoder": PROMPT["decoder"]} if groups == ["encoder"] else {group: PROMPT[group] for group in groups}


def _starts(model: Model, attached: HookedModel, method: Prefix, beginning: AdapterInit) -> dict[str, Tensor]:
    """The keys and values that the bare base computes for P real words, by group: (L, 2, H, P, D)."""
    P, init_ids = method.num_virtual_tokens, beginning.init_ids
    if init_ids is None or init_ids.numel() == 0:
        vocabulary = model.get_input_embeddings().weight.shape[0]
        init_ids = torch.randint(vocabulary, (P,), generator=beginning.generator)
    repeats = -(-P // init_ids.numel())
    ids = init_ids.repeat(repeats)[:P][None].to(device_of(model))  # (1, P)
    ones = torch.ones_like(ids)
    was_training = [module for module in model.modules() if module.training]
    captured: dict[str, tuple[Tensor, Tensor]] = {}
    attached.context.capture = captured
    try:
        model.eval()
        with torch.no_grad():
            if attached.family.is_encoder_decoder:
                encoded = model.get_encoder()(input_ids=ids, attention_mask=ones)[0]
                model.get_decoder()(
                    input_ids=ids, attention_mask=ones, encoder_hidden_states=encoded, encoder_attention_mask=ones
                )
            else:
                model.base_model(input_ids=ids, attention_mask=ones)
    finally:
        attached.context.capture = None
        for module in was_training:
            module.training = True
    groups: dict[str, list[Tensor]] = {}
    for site in attached.sites:
        if site.group == "decoder" or method.encoder or not attached.family.is_encoder_decoder:
            groups.setdefault(site.group, []).append(torch.stack([x[0] for x in captured[site.name]]))
    return {group: torch.stack(layers).float() for group, layers in groups.items()}
