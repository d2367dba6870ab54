"""The tensors of a method that PEFT computes: PEFT puts its modules into the model and names their tensors."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from turret import quantized
from turret.adapters import peft_backend
from turret.adapters.adapter import (
    LORA_PREFIX,
    PROMPT,
    Adapter,
    Extracted,
    Parts,
    cpu_copy,
)
from turret.adapters.batch_context import ATTACHED, BARE, set_context
from turret.adapters.hooks import (
    AdapterInit,
    HookedModel,
    RoutedDropout,
    attachment,
    detach,
    device_of,
    hook_model,
    linear_at,
    target_paths,
)
from turret.adapters.layers import TokenLogits, TokenRows, base_module_of, with_values
from turret.adapters.lora import ScaledLayer, dora, layer_sizes
from turret.adapters.prefix import Groups
from turret.adapters.tuners.tuner import Tuner, fill_parameters, head_parameters, head_tensors, mount_head
from turret.errors import AdapterError, RecipeError
from turret.families import family_of
from turret.families.family import Stream
from turret.json_types import JsonObject, JsonValue, Plain, mapping_of
from turret.manifest import AdapterConfig, check_agreement, check_config, refuse_code
from turret.methods.peft import MARKS, NORMS, PROMPTS, WRAPPED, Peft, other_trained_tensors, without_repeated
from turret.transformer import Model

# --- mixing -----------------------------------------------------------------------------------------------------------
# How PEFT's methods change each layer, so that they mix with others in a batch. Those in `METHODS` are computed from
# the stored tensors. For the others, PEFT's own module of each layer is called (`peft_backend.changes`).


MORE = {"use_dora": "lora_magnitude_vector", "lora_bias": "lora_B.bias"}  # setting of LoRA -> mark of its tensor
Layers = dict[str, ScaledLayer]  # by path
ByLayer = Mapping[str, Mapping[str, Tensor]]  # layer -> the last part of a tensor's name -> the tensor


def parts_of(kind: str, settings: AdapterConfig, tensors: Mapping[str, Tensor], model: Model) -> Parts:
    """The change of each layer and the modules that are replaced, for a method in `METHODS`.

    Args:
        kind: PEFT's `peft_type`.
        settings: of PEFT's configuration.
        tensors: by PEFT's names.

    Raises:
        AdapterError: the tensors do not fit the model.
    """
    extra = other_trained_tensors(tensors, MARKS[kind])
    layers = dict(METHODS[kind](settings, {name: each for name, each in tensors.items() if name not in extra}, model))
    values = {name.removeprefix(LORA_PREFIX): tensors[name].float() for name in extra}
    values = with_biases(values, layers, model)
    whole = with_modules(values, settings, model)
    if not layers and not whole:
        raise AdapterError(f"the {kind} holds no tensor of a layer: save it again")
    return Parts(layers=layers, whole=whole)


def _by_layer(tensors: Mapping[str, Tensor]) -> ByLayer:
    """The tensors by layer and mark: `base_model.model.<path>.<mark>[.weight]`."""
    layers: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if not name.startswith(LORA_PREFIX):
            continue
        path, mark = _split(name.removeprefix(LORA_PREFIX))
        layers.setdefault(path, {})[mark] = tensor.float()
    return layers


def _split(name: str) -> tuple[str, str]:
    """(layer, mark): `a.b.query.lora_A.weight` is (`a.b.query`, `lora_A`)."""
    if name.endswith(".lora_B.bias"):
        return name.removesuffix(".lora_B.bias"), "lora_B.bias"
    path, _, mark = name.removesuffix(".weight").rpartition(".")
    return path, mark


def _layer(model: Model, path: str) -> nn.Module:
    """A linear layer, or GPT-2's Conv1D. Raises AdapterError for another module."""
    layer = linear_at(model, path)
    layer_sizes(layer)
    return layer


def _lora(settings: AdapterConfig, tensors: Mapping[str, Tensor], model: Model) -> Iterator[tuple[str, ScaledLayer]]:
    """The variants of LoRA that the method `lora` does not have: DoRA, ranks and alphas by pattern, biases."""
    wanted = {"lora_A", "lora_B"} | {mark for key, mark in MORE.items() if settings.get(key)}
    for path, parts in _by_layer(tensors).items():
        layer = _layer(model, path)
        _require_marks(path, parts, wanted)
        A, B = parts["lora_A"], parts["lora_B"]
        d_in, d_out = layer_sizes(layer)
        if A.shape[1:] != (d_in,) or B.shape != (d_out, len(A)):
            raise AdapterError(
                f"LoRA of {path} has shapes {tuple(A.shape)} and {tuple(B.shape)}: expected (r, {d_in}) and "
                f"({d_out}, r); it belongs to another base"
            )
        B = B * _scaling(settings, path, len(A))
        if (magnitude := parts.get("lora_magnitude_vector")) is not None:
            yield path, dora(layer, A, B, magnitude)
            continue
        bias = parts.get("lora_B.bias")
        yield path, ScaledLayer((A, B), shift=None if bias is None else bias * _scaling(settings, path, len(A)))


def _scaling(settings: AdapterConfig, path: str, r: int) -> float:
    """alpha / r or alpha / sqrt(r) of a layer, with PEFT's `alpha_pattern`."""
    quantized.before_peft()
    from peft.utils.other import get_pattern_key

    alphas = mapping_of(settings.get("alpha_pattern"))
    key = get_pattern_key(alphas, path)
    alpha: JsonValue = alphas[key] if key in alphas else settings.get("lora_alpha", 8)
    return float(alpha) / (r**0.5 if settings.get("use_rslora") else r)


def _ia3(settings: AdapterConfig, tensors: Mapping[str, Tensor], model: Model) -> Iterator[tuple[str, ScaledLayer]]:
    """(1, D_in) scales a feed-forward layer's input, (D_out, 1) another layer's output (Liu et al. 2022)."""
    for path, parts in _by_layer(tensors).items():
        _require_marks(path, parts, {"ia3_l"})
        gain, (d_in, _) = parts["ia3_l"], layer_sizes(_layer(model, path))
        inputs = gain.shape[0] == 1 and gain.shape[1] == d_in
        yield path, ScaledLayer(input=gain.flatten()) if inputs else ScaledLayer(output=gain.flatten())


def _vera(settings: AdapterConfig, tensors: Mapping[str, Tensor], model: Model) -> Iterator[tuple[str, ScaledLayer]]:
    """diag(b) B diag(d) A, where all layers share A and B (Kopiczko et al. 2024)."""
    A, B = (tensors.get(f"base_model.{name}") for name in ("vera_A", "vera_B"))
    if A is None or B is None:
        raise AdapterError("this VeRA was saved without its projection: save it with save_projection=True")
    for path, parts in _by_layer(tensors).items():
        _require_marks(path, parts, {"vera_lambda_d", "vera_lambda_b"})
        d_in, d_out = layer_sizes(_layer(model, path))
        down = parts["vera_lambda_d"][:, None] * A[:, :d_in].float()
        up = parts["vera_lambda_b"][:, None] * B[:d_out].float()
        yield path, ScaledLayer((down, up))


def _require_marks(path: str, parts: Mapping[str, Tensor], known: set[str]) -> None:
    """Raises AdapterError unless a layer has these tensors, so that none is left out in silence."""
    if odd := sorted(set(parts) ^ known):
        word = "lacks" if odd[0] in known else "has"
        raise AdapterError(f"{path} {word} {odd[0]}, unlike what its configuration says: save the adapter again")


Compute = Callable[["AdapterConfig", Mapping[str, Tensor], "Model"], Iterator[tuple[str, ScaledLayer]]]
METHODS: dict[str, Compute] = {
    "LORA": _lora,
    "DORA": _lora,
    "RSLORA": _lora,
    "IA3": _ia3,
    "VERA": _vera,
    "LN_TUNING": lambda settings, tensors, model: iter(()),  # all of its tensors replace norms
}


# --- numbers ----------------------------------------------------------------------------------------------------------


# Options of PEFT's LoRA that `mixing` computes and the method `lora` does not.
COMPUTED = {
    *("use_dora", "bias", "lora_bias", "rank_pattern", "alpha_pattern", "trainable_token_indices"),
    "ensure_weight_tying",
}


class PeftTuner(Tuner[Peft]):
    """PEFT's modules of a model without other adapters."""

    def require_known(self) -> None:
        """Raises RecipeError for a method or a setting that PEFT does not know, or that trains the base's weights."""
        peft_backend.config_of(self.method)
        options = self.method.options
        if options.get("bias", "none") != "none":
            raise RecipeError(
                f'method.bias = "{options["bias"]}" trains the base\'s own biases, and the base is never written to: '
                "set method.lora_bias = true, which trains a bias beside them"
            )
        if options.get("trainable_token_indices"):
            raise RecipeError(
                "method.trainable_token_indices cannot be trained here, only imported, mixed, served and exported: "
                "leave it out"
            )

    def start(self, model: Model, attached: HookedModel, beginning: AdapterInit) -> None:
        self.require_known()
        _invite(model, attached, self.method, beginning.generator)
        super().start(model, attached, beginning)

    def extract(self, attached: HookedModel, slot: int) -> Extracted:
        if slot in attached.stored:
            return Extracted(dict(attached.stored[slot]), head_tensors(attached, slot), self.method)
        guest = _guest(attached)
        tensors = {name: cpu_copy(value) for name, value in peft_backend.tensors_of(guest).items()}
        return Extracted(tensors, head_tensors(attached, slot), peft_backend.mounted_method(guest.method))

    def fill(self, model: Model, attached: HookedModel, adapter: Adapter, generator: torch.Generator | None) -> None:
        guest = _guest(attached)
        if adapter.method != peft_backend.mounted_method(guest.method):
            raise AdapterError("its PEFT settings differ from those of this recipe: set [method] to its values")
        peft_backend.fill_tensors(guest, adapter.tensors)
        fill_parameters(head_parameters(attached), adapter.head)

    def read(self, tensors: dict[str, Tensor], config: AdapterConfig) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        kind = peft_backend.config_of(self.method).peft_type.value
        if kind == "LORA":
            check_config(config, computed=COMPUTED)
        kept = without_repeated(tensors) if kind in MARKS else set(tensors)
        extra = self._beside(kept)
        own, head = super().read({name: each for name, each in tensors.items() if name in kept - extra}, config)
        return own | {name: tensors[name] for name in extra}, head

    def _beside(self, names: Iterable[str]) -> set[str]:
        """The tensors of modules that are trained whole, in addition to the method's own tensors."""
        mark = MARKS.get(self.method.peft_type)
        return set() if mark is None else other_trained_tensors(names, mark)

    def owns(self, name: str) -> bool:
        """Whether the name has the substring that PEFT puts into the names of a method's tensors."""
        quantized.before_peft()
        from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING

        config = peft_backend.config_of(self.method)
        mark = PEFT_TYPE_TO_PREFIX_MAPPING.get(config.peft_type)
        if config.is_prompt_learning:
            return name == PROMPT["decoder"]
        shared = not name.startswith(LORA_PREFIX)  # tensors that all layers use, such as VeRA's matrices
        return shared or bool(mark and mark in name)

    def peft_words(self) -> JsonObject:
        config = peft_backend.config_of(self.method)
        return peft_backend.config_settings(config) | {"peft_type": config.peft_type.value}

    def peft_config(self, adapter: Adapter) -> AdapterConfig:
        """PEFT's own words, and the modules of the head and of the body that are trained whole."""
        extra = {name.removeprefix(LORA_PREFIX) for name in self._beside(adapter.tensors) if NORMS not in name}
        body = {name.rpartition(".")[0] for name in extra if not name.endswith((".bias", ".trainable_tokens_delta"))}
        saved = sorted({*adapter.head_modules, *body})
        return self.peft_words() | ({"modules_to_save": saved} if saved else {})

    def check_config(self, config: AdapterConfig) -> None:
        refuse_code(config)
        check_agreement(config, self.peft_words())

    def merged_weights(self, model: Model, adapter: Adapter) -> dict[str, Tensor]:
        """The weights that differ after PEFT's own merge, which runs on a copy of the model.

        PEFT's merge leaves out what is trained whole, so such an adapter is merged by its parts.
        """
        if self._beside(adapter.tensors):
            return super().merged_weights(model, adapter)
        twin = copy.deepcopy(model)
        guest = peft_backend.attach_with_peft(twin, family_of(twin.config), self.method)
        peft_backend.fill_tensors(guest, adapter.tensors)
        before = model.state_dict()
        whole = peft_backend.merged_state_dict(guest)
        if odd := sorted(set(whole) ^ set(before)):
            raise AdapterError(
                f"PEFT does not merge {self.method.peft_type} completely ({odd[0]}): export it without --merged"
            )
        return {name: each for name, each in whole.items() if not torch.equal(each, before[name])}

    def parts(self, model: Model, adapter: Adapter) -> Parts:
        """The effect on each layer, or the prefix that the bare base computes for virtual tokens."""
        kind, method = self.method.peft_type, self.method
        if kind in METHODS:
            return parts_of(kind, peft_backend.config_settings(peft_backend.config_of(method)), adapter.tensors, model)
        family = family_of(model.config)
        if (reason := method.why_unanswered(family, hasattr(model, family.output_layer))) is not None:
            raise AdapterError(reason)
        if kind in PROMPTS:
            return Parts(prefix=_prefix(model, adapter.tensors))
        return Parts(
            layers=peft_backend.build_peft_layers(method, adapter.tensors, _changed_layers(model, adapter.tensors))
        )

    def why_unserved(self, model: Model, adapter: Adapter) -> str | None:
        if self.method.peft_type not in WRAPPED:
            return None
        try:
            paths = _changed_layers(model, adapter.tensors)
        except AdapterError as error:
            return str(error)
        outside = sorted(set(paths) - set(target_paths(model, "all-linear")))
        return f"{outside[0]} is outside the base, and the engine adapts only layers inside" if outside else None

    def mount(self, model: Model, attached: HookedModel, adapter: Adapter, slot: int) -> None:
        extra = self._beside(adapter.tensors)
        if attached.methods or slot != 1 or (extra and not tunes_linear(model, extra)):
            super().mount(model, attached, adapter, slot)
            attached.stored[slot] = adapter.tensors
            return
        _invite(model, attached, peft_backend.mounted_method(self.method), trains=False)
        guest = _guest(attached)
        peft_backend.fill_tensors(guest, adapter.tensors)
        for each in guest.parameters.values():
            each.requires_grad_(False)
        for part in (*guest.layers, *attached.prefixes.values()):
            part.eval()
        mount_head(model, attached, adapter.head, slot)


def _changed_layers(model: Model, tensors: Mapping[str, Tensor]) -> dict[str, nn.Module]:
    """The base's own layers that the tensors' names name, by path, in the base's order."""
    known, found = dict(model.named_modules()), set[str]()
    for name in tensors:
        path = name.removeprefix(LORA_PREFIX) if name.startswith(LORA_PREFIX) else ""
        while path and path not in known:
            path = path.rpartition(".")[0]
        found |= {path} if path else set()
    if not found:
        raise AdapterError("the adapter holds no tensor of a layer of this base: load its own base")
    return {path: _layer(model, path) for path in known if path in found}


def _prefix(model: Model, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Keys and values (L, 2, H, P, D) by group, which the bare base computes for virtual tokens (P, D).

    The hooked model may be in use, so its spare computes them.
    """
    attached = attachment(model)
    tokens, width = tensors.get(PROMPT["decoder"]), model.get_input_embeddings().weight.shape[1]
    if tokens is None or len(tensors) > 1 or tokens.dim() != 2 or tokens.shape[1] != width or not len(tokens):
        shapes = ", ".join(f"{name} {tuple(each.shape)}" for name, each in sorted(tensors.items()))[:120]
        raise AdapterError(f"expected {PROMPT['decoder']} of shape (virtual tokens, {width}), given {shapes or 'none'}")
    if (most := getattr(model.config, "max_position_embeddings", None) or len(tokens)) < len(tokens):
        raise AdapterError(f"{len(tokens)} virtual tokens do not fit this base, which has {most} positions: retrain")
    if attached.spare is None:
        raise AdapterError("virtual tokens share a model with other adapters in an engine only: mount them alone")
    spare = attached.spare()
    try:
        with torch.no_grad():
            groups = _read_groups(spare, hook_model(spare), tokens[None].to(device_of(spare)))
    finally:
        detach(spare)
    return {
        name: torch.stack([torch.stack(both) for both in layers]).float() for name, layers in groups.items()
    }  # each (L, 2, H, P, D)


def _guest(attached: HookedModel) -> peft_backend.PeftBackend:
    assert attached.guest is not None
    return attached.guest


def _invite(
    model: Model,
    attached: HookedModel,
    method: Peft,
    generator: torch.Generator | None = None,
    *,
    trains: bool = True,
) -> None:
    """Let PEFT put its modules into a hooked model. `detach` removes them."""
    guest = peft_backend.attach_with_peft(model, attached.family, method, generator, trains=trains)
    attached.guest = guest
    attached.context.draws_alone = True
    for path, layer in model.named_modules():
        if layer in guest.layers:
            _hash_masks(layer, attached, attached.family.stream(path))
    attached.undo.append(guest.leave)
    if not guest.layers:
        prompt = peft_backend.Prompt(guest, functools.partial(_read_groups, model, attached))
        attached.prefixes[str(ATTACHED)] = prompt.to(device_of(model))


def _hash_masks(layer: nn.Module, attached: HookedModel, stream: Stream) -> None:
    """Replace dropout of one of PEFT's layers by one with the masks of the pass; `guest.leave` takes both away."""
    for owner in list(layer.modules()):
        for name, each in list(owner.named_children()):
            if type(each) is nn.Dropout:
                setattr(owner, name, RoutedDropout(each, attached.context, stream))


def _read_groups(model: Model, attached: HookedModel, tokens: Tensor) -> Groups:
    """The keys and values that the bare base computes for virtual tokens, by group. tokens: (1, P, D)."""
    captured: dict[str, tuple[Tensor, Tensor]] = {}
    context = attached.context
    before = context.active, context.capture
    context.active, context.capture = BARE, captured
    try:
        kind, P = attached.family.kind, tokens.shape[1]
        with set_context(context, None, None, masked={kind: [P]}, examples=()):  # the same in every pass of a step
            mask = torch.ones(tokens.shape[:2], dtype=torch.long, device=tokens.device)
            dtype = model.get_input_embeddings().weight.dtype
            model.base_model(inputs_embeds=tokens.to(dtype), attention_mask=mask, use_cache=False)
    finally:
        context.active, context.capture = before
    groups: Groups = {}
    for site in attached.sites:
        key, value = captured[site.name]
        groups.setdefault(site.group, []).append((key[0], value[0]))
    return groups


# --- modules that PEFT trains whole -----------------------------------------------------------------------------------
# Besides a method's own tensors: biases, norms, embeddings, tokens, output layer.


TOKENS = ".token_adapter.trainable_tokens_delta"
BASE_BIAS = ".base_layer.bias"  # of a layer that the method itself changes
Values = dict[str, Tensor]  # by name in the model


def with_biases(values: Mapping[str, Tensor], layers: dict[str, ScaledLayer], model: Model) -> Values:
    """Put the trained biases of linear layers into `layers`, as differences from the base's. Returns the other values.

    Args:
        values: by names in PEFT's model.
        layers: what the method itself does, by path; it is changed.
    """
    others: Values = {}
    for name, value in values.items():
        name = name.replace(NORMS, ".")
        path = name.removesuffix(BASE_BIAS) if name.endswith(BASE_BIAS) else name.removesuffix(".bias")
        layer = linear_at(model, path) if path != name else None
        if layer is None or not quantized.is_linear(layer):
            others[name] = value
            continue
        own = layer._parameters["bias"]
        if own is None or own.shape != value.shape:
            has = "no bias" if own is None else f"a bias of shape {tuple(own.shape)}"
            raise AdapterError(
                f"{name} has shape {tuple(value.shape)}, and the base has {has}: it belongs to another base"
            )
        change = value.to(own.device) - own.detach().float()
        before = layers.get(path, ScaledLayer())
        shift = change if before.shift is None else before.shift.to(own.device) + change
        layers[path] = ScaledLayer(before.factors, before.input, before.output, shift)
    return others


def tunes_linear(model: Model, names: Iterable[str]) -> bool:
    """Whether LN tuning trains linear layers, as it does on BERT by default. names: of the adapter's tensors."""
    paths = {name.removeprefix(LORA_PREFIX).partition(NORMS)[0] for name in names if NORMS in name}
    return any(quantized.is_linear(linear_at(model, path)) for path in paths)


def with_modules(values: Mapping[str, Tensor], settings: AdapterConfig, model: Model) -> dict[str, nn.Module]:
    """A frozen module for each that the values replace, by its path.

    Args:
        values: by names in the model; a module's missing parameters are the base's.
        settings: of PEFT's configuration.

    Raises:
        AdapterError: a module cannot be replaced for single rows, or the values do not fit.
    """
    whole: dict[str, nn.Module] = {}
    by_path: dict[str, Values] = {}
    for name, value in values.items():
        if name.endswith(TOKENS):
            whole |= _tokens(model, name.removesuffix(TOKENS), value, settings)
        else:
            path, _, key = name.rpartition(".")
            by_path.setdefault(path, {})[key] = value
    for path, own in by_path.items():
        module = _module(model, path)
        _require_shapes(path, module, own)
        whole[path] = with_values(module, own)
    if settings.get("ensure_weight_tying"):
        whole |= _tied_output(model, whole)
    return whole


def _module(model: Model, path: str) -> nn.Module:
    """The base's own module. Raises AdapterError unless it is a norm, an embedding or the output layer."""
    try:
        module = base_module_of(model.get_submodule(path))
    except AttributeError:
        raise AdapterError(f"the base has no module {path!r}: the adapter belongs to another architecture") from None
    family = family_of(model.config)
    last = path.rpartition(".")[2]
    if path.partition(".")[0] in family.head_modules:
        raise AdapterError(
            f"{path} is a part of the classification head, which is trained as a whole: name the parts of the body in "
            "target_modules, such as layers.0.attn_norm, and train again"
        )
    if last in family.heads_first:
        raise AdapterError(
            f"{path} of one row cannot differ from that of another, because its input has heads before tokens: "
            "leave it out of target_modules, or merge the adapter with PEFT and use the result as a base"
        )
    alone = isinstance(module, (nn.Embedding, nn.LayerNorm)) or "norm" in type(module).__name__.lower()
    if (alone and last != family.position_module) or path == family.output_layer:
        return module
    raise AdapterError(
        f"the adapter replaces {path}; a row can have its own norms, embeddings and output layer, but no other module: "
        "merge the adapter with PEFT and use the result as a base"
    )


def _require_shapes(path: str, module: nn.Module, values: Values) -> None:
    expected = {name: tuple(each.shape) for name, each in module.named_parameters()}
    for name, value in values.items():
        if name not in expected:
            raise AdapterError(f"{path} of the base has no {name!r}: the adapter belongs to another base")
        if tuple(value.shape) == expected[name]:
            continue
        more = len(value) - expected[name][0]
        remedy = "it belongs to another base"
        if more > 0 and tuple(value.shape[1:]) == expected[name][1:]:
            remedy = f"it has {more} more tokens; save the resized base with its tokenizer and give it as --base"
        raise AdapterError(f"{path}.{name} has shape {tuple(value.shape)} and the base's {expected[name]}: {remedy}")


def _tokens(model: Model, path: str, vectors: Tensor, settings: AdapterConfig) -> dict[str, nn.Module]:
    """The embedding at a path with other vectors (n, D) for a few tokens, and every layer that is tied to it."""
    embedding, ids = _module(model, path), _token_ids(settings.get("trainable_token_indices"), path)
    weight = embedding.get_parameter("weight")
    rows, width = weight.shape
    if vectors.shape != (len(ids), width) or len(set(ids)) != len(ids) or not all(0 <= each < rows for each in ids):
        raise AdapterError(
            f"trainable_token_indices of {path}: expected {len(ids)} different tokens below {rows} and vectors "
            f"({len(ids)}, {width}), given vectors {tuple(vectors.shape)}: it belongs to another base"
        )
    own = TokenRows(embedding, ids, vectors)
    whole: dict[str, nn.Module] = {path: own}
    if not _ties(model) or embedding is not base_module_of(model.get_input_embeddings()):
        return whole
    for name, module in model.named_modules(remove_duplicate=False):
        tied = name.removesuffix(".base_module")
        if module._parameters.get("weight") is weight and tied != path:
            another = isinstance(module, nn.Embedding)
            whole[tied] = TokenRows(module, ids, vectors) if another else TokenLogits(module, own)
    return whole


def _ties(model: Model) -> bool:
    return bool(getattr(model.config, "tie_word_embeddings", False))


def _token_ids(value: Plain, path: str) -> list[int]:
    """The tokens of the embedding at a path: PEFT has a list for all, or one for each name."""
    if isinstance(value, Mapping):
        value = next((ids for name, ids in value.items() if path.endswith(name)), None)
    if not isinstance(value, list) or not value or not all(type(each) is int for each in value):
        raise AdapterError(f"trainable_token_indices names no tokens of {path}: save the adapter again with PEFT")
    return value


def _tied_output(model: Model, whole: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """The output layer with the new embedding's weight, if the base ties both and the adapter has only one."""
    output, name = model.get_output_embeddings(), family_of(model.config).output_layer
    if output is None or not _ties(model) or name in whole:
        return {}
    inputs = base_module_of(model.get_input_embeddings())
    path = next((path for path in whole if base_module_of(model.get_submodule(path)) is inputs), None)
    if path is None or isinstance(whole[path], TokenRows):
        return {}
    return {name: with_values(base_module_of(output), {"weight": whole[path].get_parameter("weight")})}
