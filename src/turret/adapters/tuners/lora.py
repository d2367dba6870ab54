"""The tensors of LoRA: two factors for each layer, with PEFT's names."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from turret import quantized
from turret.adapters.adapter import LORA_PREFIX, Adapter, Extracted, Parts
from turret.adapters.batch_context import ATTACHED
from turret.adapters.hooks import AdapterInit, HookedModel, device_of, linear_at, routed_linear, target_paths
from turret.adapters.lora import LoRAFactors, layer_sizes
from turret.adapters.tuners.tuner import Tuner, tuner_of
from turret.errors import AdapterError
from turret.families import FAMILIES, Family, family_of
from turret.json_types import JsonObject
from turret.manifest import AdapterConfig
from turret.methods.lora import COMBINATIONS, LoRA
from turret.methods.method import Check
from turret.transformer import Model

# --- weighted ---------------------------------------------------------------------------------------------------------
# Merge several LoRAs into one by PEFT's `add_weighted_adapter`.


def combine_loras(
    model: Model, family: Family, given: Sequence[Parts], weights: Sequence[float], how: str, density: float, seed: int
) -> tuple[int, dict[str, Tensor]]:
    """One LoRA, with scaling 1, whose change of the weights merges those of several.

        linear, svd, cat:  delta = sum_i weight_i * scaling_i * B_i A_i     (svd: cut to the largest r; cat: exact)
        ties:  drops the smallest values, then those with the minority's sign (Yadav et al. 2023)
        dare:  drops values at random and scales up the rest (Yu et al. 2024)

    `linear` adds A and B separately, so its delta also has products of one adapter's A and another's B.

    Args:
        model: the base with nothing attached; it is restored afterwards.
        given: factors A (R_i, D_in), B (D_out, R_i) by layer, and the scaling, of each adapter.
        weights: one for each LoRA.
        density: share of the values that ties and dare keep.

    Returns:
        The rank, and the tensors by the names that are stored.

    Raises:
        AdapterError: PEFT does not merge these, such as `linear` of different ranks.
    """
    quantized.before_peft()
    import peft

    kind, prunes = COMBINATIONS[how]
    configs = [
        peft.LoraConfig(
            r=(rank := len(next(iter(parts.factors.values()))[0])),
            lora_alpha=parts.scaling * rank,
            target_modules=sorted(parts.factors),
            fan_in_fan_out=family.fan_in_fan_out,
        )
        for parts in given
    ]
    names = [f"a{place}" for place in range(len(given))]
    wrapped = peft.PeftModel(model, configs[0], adapter_name=names[0])
    try:
        for name, config in zip(names[1:], configs[1:], strict=True):
            wrapped.add_adapter(name, config)
        layers = dict(model.named_modules())
        with torch.no_grad():
            for name, parts in zip(names, given, strict=True):
                for path, (A, B) in parts.factors.items():
                    layers[path].lora_A[name].weight.copy_(A)
                    layers[path].lora_B[name].weight.copy_(B)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)  # dare drops at random
            wrapped.base_model.add_weighted_adapter(
                names, list(weights), "merged", combination_type=kind, density=density if prunes else None
            )
        tensors = {}
        for path, layer in layers.items():
            if "merged" in getattr(layer, "lora_A", ()):
                for factor in ("lora_A", "lora_B"):
                    weight = getattr(layer, factor)["merged"].weight
                    tensors[f"{LORA_PREFIX}{path}.{factor}.weight"] = weight.detach().clone().float()
        return int(wrapped.peft_config["merged"].r), tensors
    except ValueError as error:
        raise AdapterError(f"these cannot be merged by {how} ({' '.join(str(error).split())[:120]}): try svd") from None
    finally:
        wrapped.unload()


# --- numbers ----------------------------------------------------------------------------------------------------------


class LoRATuner(Tuner[LoRA]):
    """LoRA on the linear layers that `target_modules` names."""

    def targets(self, model: Model) -> Check:
        targets = self.method.target_modules
        try:
            paths = target_paths(model, targets)
        except AdapterError as error:
            names = sorted({path.rsplit(".", 1)[-1] for path in target_paths(model, "all-linear")})
            unknown = [] if isinstance(targets, str) else [name for name in targets or () if name not in names]
            near = [close for name in unknown for close in difflib.get_close_matches(name, names, n=1)]
            remedy = f"did you mean {', '.join(near)}?" if near else "name other method.target_modules"
            return Check("method", "refuse", str(error), remedy)
        if (problem := self._loftq_problem(model, paths)) is not None:
            return Check("method", "refuse", problem, "leave it out, or load a plain checkpoint in 4 bits")
        names = sorted({path.rsplit(".", 1)[-1] for path in paths})
        return Check("method", "ok", f"LoRA of rank {self.method.r} on {len(paths)} layers ({', '.join(names)})")

    def _loftq_problem(self, model: Model, paths: Sequence[str]) -> str | None:
        """Why these layers have no error of 4 bits to start from; None if they have, or if it is not asked for."""
        if self.method.init_lora_weights != "loftq":
            return None
        given = 'init_lora_weights = "loftq" starts from what 4 bits lose of a weight'
        if paths and not quantized.has_original(model.get_submodule(paths[0])):
            return f'{given}: expected base_quantization = "nf4" and a plain checkpoint, given other weights'
        return None

    def start(self, model: Model, attached: HookedModel, beginning: AdapterInit) -> None:
        super().start(model, attached, beginning)
        paths = target_paths(model, self.method.target_modules)
        if (problem := self._loftq_problem(model, paths)) is not None:
            raise AdapterError(f"{problem}; leave it out")
        for path in paths:
            factors = _initial(self.method, model.get_submodule(path), beginning.generator).to(device_of(model))
            routed_linear(model, attached, path).slots[str(ATTACHED)] = factors

    def tensors(self, attached: HookedModel, slot: int) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for path, layer in attached.linears.items():
            if (factors := layer.factors(slot)) is not None:
                A, B = factors.folded_factors()
                tensors |= {f"{LORA_PREFIX}{path}.lora_A.weight": A, f"{LORA_PREFIX}{path}.lora_B.weight": B}
        return tensors

    def extract(self, attached: HookedModel, slot: int) -> Extracted:
        """Copies as in the protocol, but PiSSA is stored as plain LoRA of twice the rank.

        PiSSA subtracts its initial factors from the base: B A - B0 A0 = [B, -B0] [A; A0]. Turret leaves the base as it
        is and stores the right-hand side.
        """
        extracted, method = super().extract(attached, slot), self.method
        if method.init_lora_weights == "pissa":
            r = 2 * method.r
            alpha = method.scaling * (r**0.5 if method.use_rslora else r)
            method = method.model_copy(update={"r": r, "lora_alpha": alpha, "init_lora_weights": True})
        return Extracted(extracted.tensors, extracted.head, method)

    def fill(self, model: Model, attached: HookedModel, adapter: Adapter, generator: torch.Generator | None) -> None:
        method, given = self.method, adapter.method
        assert isinstance(given, LoRA)
        if method.init_lora_weights == "pissa":
            raise AdapterError(
                'init_lora_weights = "pissa" starts from the base\'s weights, not a version: leave it or init_from out'
            )
        if (method.r, method.scaling) != (given.r, given.scaling):
            raise AdapterError(
                f"it has r {given.r} and scaling {given.scaling:g}, and this recipe has r {method.r} and scaling "
                f"{method.scaling:g}: set method.r and method.lora_alpha to its values"
            )
        super().fill(model, attached, adapter, generator)

    def owns(self, name: str) -> bool:
        return ".lora_" in name

    def peft_words(self) -> JsonObject:
        r, alpha, rslora = self.method.r, self.method.lora_alpha, self.method.use_rslora
        return super().peft_words() | {"r": r, "lora_alpha": alpha, "use_rslora": rslora}

    def peft_config(self, adapter: Adapter) -> AdapterConfig:
        alpha, paths = self.method.lora_alpha, {name.rsplit(".lora_", 1)[0] for name in adapter.tensors}
        family = FAMILIES.get(adapter.base.family or "")
        return self.peft_words() | {
            "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
            "lora_dropout": self.method.lora_dropout,
            "target_modules": sorted(path.removeprefix(LORA_PREFIX) for path in paths),
            "fan_in_fan_out": family is not None and family.fan_in_fan_out,
            "bias": "none",
            "modules_to_save": adapter.head_modules or None,
        }

    def rate_ratios(self, names: Iterable[str]) -> dict[str, float]:
        """LoRA+: B moves at a multiple of A's rate, because B starts at zero and A does not."""
        ratio = self.method.lora_plus_ratio
        return {} if ratio is None else {name: ratio for name in names if name.endswith(".lora_B")}

    def combine_adapters(
        self, model: Model, given: Sequence[Adapter], weights: Sequence[float], how: str, density: float, seed: int
    ) -> tuple[LoRA, dict[str, Tensor]]:
        parts = [tuner_of(adapter.method).parts(model, adapter) for adapter in given]
        rank, tensors = combine_loras(model, family_of(model.config), parts, weights, how, density, seed)
        targets = {adapter.method.target_modules for adapter in given if isinstance(adapter.method, LoRA)}
        target = targets.pop() if len(targets) == 1 else None
        method = LoRA(r=rank, lora_alpha=rank, lora_dropout=self.method.lora_dropout, target_modules=target)
        return method.of_tensors(tensors), tensors

    def parts(self, model: Model, adapter: Adapter) -> Parts:
        """A (R, D_in) and B (D_out, R) of every layer. Checks that every tensor is one of them and fits."""
        r, pairs = self.method.r, lora_pairs(adapter)
        checked = {}
        for path, pair in pairs.items():
            layer = linear_at(model, path)
            if set(pair) != {"lora_A", "lora_B"}:
                raise AdapterError(f"LoRA of {path} needs lora_A and lora_B, given only {next(iter(pair))}")
            d_in, d_out = layer_sizes(layer)
            A, B = pair["lora_A"], pair["lora_B"]
            if A.shape != (r, d_in) or B.shape != (d_out, r):
                raise AdapterError(
                    f"LoRA of {path} has shapes {tuple(A.shape)} and {tuple(B.shape)}: expected ({r}, {d_in}) and "
                    f"({d_out}, {r}); it belongs to another base or rank"
                )
            checked[path] = (A, B)
        return Parts(checked, self.method.scaling)


def lora_pairs(adapter: Adapter) -> dict[str, dict[str, Tensor]]:
    """lora_A and lora_B by layer."""
    pairs: dict[str, dict[str, Tensor]] = {}
    for name, tensor in adapter.tensors.items():
        path, _, factor = name.removeprefix(LORA_PREFIX).removesuffix(".weight").rpartition(".")
        if not name.startswith(LORA_PREFIX) or factor not in ("lora_A", "lora_B"):
            raise AdapterError(
                f"tensor {name!r} is not a LoRA factor: expected {LORA_PREFIX}<layer>.lora_A.weight or lora_B"
            )
        pairs.setdefault(path, {})[factor] = tensor
    if not pairs:
        raise AdapterError("a LoRA without factors has no effect: export it again from where it was trained")
    return pairs


def _initial(method: LoRA, layer: nn.Module, generator: torch.Generator | None) -> LoRAFactors:
    """The factors that training starts from, by `method.init_lora_weights`.

    True: A uniform as in PEFT (Kaiming, a = sqrt 5), B zero. "gaussian": A normal with deviation 1/R, B zero.
    "pissa": the R largest singular triples of W, divided by the scaling, and subtracted again. All three start equal to
    the base. "loftq": the R largest singular triples of what 4 bits lose of W, so that the adapter starts closer to the
    plain base than the base in 4 bits is. False: both random, for tests.
    """
    d_in, d_out = layer_sizes(layer)
    A = torch.empty(method.r, d_in)
    B = torch.zeros(d_out, method.r)
    if method.init_lora_weights == "pissa":
        A, B = _principal(quantized.dense_weight(layer).float(), method)
    elif method.init_lora_weights == "loftq":
        A, B = _principal(_quantization_error(layer), method)
    elif method.init_lora_weights == "gaussian":
        A.normal_(0.0, 1.0 / method.r, generator=generator)
    else:
        A.uniform_(-1.0 / math.sqrt(d_in), 1.0 / math.sqrt(d_in), generator=generator)
        if method.init_lora_weights is False:
            B.normal_(0.0, 0.02, generator=generator)
    factors = LoRAFactors(A, B, method.scaling, method.lora_dropout)
    if method.init_lora_weights == "pissa":
        factors.initial_A, factors.initial_B = A.clone(), B.clone()
    return factors


def _quantization_error(layer: nn.Module) -> Tensor:
    """W - Q (D_out, D_in) float32: what the weight Q in 4 bits lost of the checkpoint's weight W.

    The first step of Li et al. 2023, "LoftQ", Algorithm 1. Further steps would quantize the base again.
    """
    original = quantized.original_weight(layer)
    assert original is not None
    dense = quantized.dense_weight(layer).float()
    return original.to(dense.device).float() - dense


def _principal(W: Tensor, method: LoRA) -> tuple[Tensor, Tensor]:
    """A (R, D_in) and B (D_out, R) with B A = (U_R S_R V_R^T) / scaling, the principal part of W (D_out, D_in) float32.

    Source: Meng et al. 2024 (PiSSA).
    """
    if method.r > min(W.shape):
        raise AdapterError(
            f"{method.init_lora_weights} needs r <= {min(W.shape)} for a weight of {tuple(W.shape)}, "
            f"given {method.r}: lower r"
        )
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    root = (S[: method.r] / method.scaling).sqrt()
    return root[:, None] * Vh[: method.r], U[:, : method.r] * root
