"""The layers of a model: a linear layer or a module with many slots, and whole layers as blocks of operations.

A layer of BERT, RoBERTa, Llama, Mistral or Qwen computes as one block (`turret.ops.blocks`) while one adapter trains on
unpadded rows, and in an engine's passes. Where a pass has few tokens (a short text, or the next token of some rows) one
call of a kernel computes this layer and those after it, up to the first hook between them; those layers return their
input. If a layer contains anything else, its modules compute it.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from turret import quantized
from turret.adapters.attention import AttentionCall, Hooked, attend_in_pass, rows_and_prefixes
from turret.adapters.batch_context import BARE, AdapterPoolProtocol, BatchContext
from turret.adapters.lora import LayerChange, LoRAFactors
from turret.families.family import FastPaths, Layout
from turret.ops import lora
from turret.ops.blocks import OUT, Block, Normed, PostNorm, PreNorm, Training, frozen_rms_norm, train_block
from turret.ops.core import LayerWeights, Ops, WholeLayers
from turret.ops.dropout import Masks
from turret.ops.lora import linear
from turret.ops.structs import DropoutArguments, Group, LayerNorm, Lora, Matrix, RMSNorm
from turret.ops.table import ops_for
from turret.transformer import Submodule

CosSin = tuple[Tensor, Tensor]  # of the rotary positions, each (1, N, head size)
SILU = ("SiLU", "SiLUActivation")
DONE = ("done",)  # key of a context's memo: the output of the latest call, and the index of the layer after it
NORMED = ("normed",)  # likewise: the output of the latest layer that trains, its version, and how its norm made it


# --- linear layers ----------------------------------------------------------------------------------------------------


class RoutedLinear(nn.Module):
    """`y = W x + delta_slot(row)(x)`: a frozen linear layer, and the factors of any number of slots.

    x: (B, T, D_in) or (B, D_in) padded, with a slot for each row; (1, N, D_in) unpadded, with a slot for each span of
    tokens. Rows without an adapter here get exactly the base layer's output.
    """

    def __init__(self, base_layer: nn.Module, context: BatchContext, stream: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.slots = nn.ModuleDict()
        self.scaled: dict[int, LayerChange] = {}  # by slot, for the methods that do more than add low-rank factors
        self.context = context
        self.stream = stream

    @property
    def weight(self) -> Tensor:
        """The base's own weight: T5 reads its dtype, GPT-2's initialisation its shape."""
        weight = self.base_layer._parameters["weight"]
        assert weight is not None
        return weight

    @property
    def bias(self) -> Tensor | None:
        return self.base_layer._parameters["bias"]

    def factors(self, slot: int) -> LoRAFactors | None:
        """The factors that a slot adds to this layer, or None."""
        if slot == BARE or str(slot) not in self.slots:
            return None
        factors = self.slots[str(slot)]
        assert isinstance(factors, LoRAFactors)
        return factors

    def forward(self, x: Tensor) -> Tensor:
        if self.context.adapter_pool is not None:
            return self.context.adapter_pool.linear(self, x)
        slot = self.context.single()
        if slot is not None and (scaled := self.scaled.get(slot)) is not None:
            return scaled(self.base_layer, x)
        if slot is not None and (factors := self.factors(slot)) is not None:
            return factors.with_base(self.base_layer, x, self.context, self.stream)
        y: Tensor = self.base_layer(x)  # (B, T, D_out)
        if slot is not None:
            return y
        dim, groups = self.context.places_by_slot(self.stream, x.device)
        if self.context.lengths is not None and x.dim() == 2:
            if len(x) != sum(self.context.lengths[self.stream]):
                return y  # a pooler inside the body takes unpadded tokens for one row; its output is never used
            dim = 0  # (N, D_in), as OPT passes tokens
        for slot, index in groups.items():
            if (scaled := self.scaled.get(slot)) is not None:
                y = y.index_copy(dim, index, scaled(self.base_layer, x.index_select(dim, index)).to(y.dtype))
            elif slot != BARE and str(slot) in self.slots:
                delta = self.slots[str(slot)](x.index_select(dim, index)).to(y.dtype)
                y = y.index_add(dim, index, delta)
        return y


# --- modules that are replaced whole ----------------------------------------------------------------------------------
# A module of the body that an adapter replaces whole: a norm, an embedding, or the output layer.
#
# PEFT trains such modules with `modules_to_save`, `bias = "all"`, `trainable_token_indices` and LN tuning. Each row of
# a batch uses the module of its own adapter. All these modules work token by token, so rows do not mix.


class RoutedWhole(nn.Module):
    """The base's own module for slot 0 and for adapters that do not replace it, and a frozen copy for each that does.

    x: (B, T, ...) padded or (1, N, ...) unpadded, ids (int64) or hidden states; the output layer also takes (N, D).
    """

    def __init__(self, base_module: nn.Module, context: BatchContext, path: str, stream: str) -> None:
        super().__init__()
        self.base_module = base_module
        self.slots = nn.ModuleDict()
        self.context = context
        self.path, self.stream = path, stream

    @property
    def weight(self) -> Tensor:
        """The base's own weight; models read its dtype."""
        return self.base_module.get_parameter("weight")

    def at(self, slot: int) -> nn.Module:
        """The module that the rows of a slot take."""
        return self.slots[str(slot)] if str(slot) in self.slots else self.base_module  # noqa: SIM401 (a ModuleDict)

    def forward(self, x: Tensor) -> Tensor:
        if self.context.adapter_pool is not None:
            return self.context.adapter_pool.whole(self, x)
        slot = self.context.single()
        if slot is not None:
            return linear(self.at(slot), x)
        dim, groups = self.context.places_by_slot(self.stream, x.device)
        if dim == 0 and len(x) == 1:  # positions, the same for all rows
            x = x.expand(sum(map(len, groups.values())), *x.shape[1:])
        if dim == 1 and x.dim() == 2 and x.is_floating_point():  # hidden states (N, D); ids are (1, N)
            dim = 0
        y = linear(self.base_module, x)
        for slot, index in groups.items():
            if str(slot) in self.slots:
                y = y.index_copy(dim, index, self.slots[str(slot)](x.index_select(dim, index)).to(y.dtype))
        return y


def module_of_pass(module: nn.Module) -> nn.Module:
    """The one module that all rows of this pass take, or `module` itself if they take several."""
    if not isinstance(module, RoutedWhole):
        return module
    if (pool := module.context.adapter_pool) is not None:
        return module if pool.scales else module.base_module
    slot = module.context.single()
    return module if slot is None else module.at(slot)


def base_module_of(module: nn.Module) -> nn.Module:
    """The base's own module."""
    return module.base_module if isinstance(module, RoutedWhole) else module


def shallow_copy_module(module: nn.Module) -> nn.Module:
    """New modules with the same parameters; a deep copy would take longer than reading an adapter."""
    made = copy.copy(module)
    vars(made)["_parameters"] = dict(module._parameters)
    vars(made)["_modules"] = {
        name: child if child is None else shallow_copy_module(child) for name, child in module._modules.items()
    }
    return made.eval()


def with_values(module: nn.Module, values: Mapping[str, Tensor]) -> nn.Module:
    """A frozen copy of a module with its own parameters, those in `values` replaced, all in the module's dtypes."""
    made = shallow_copy_module(module)
    for name, own in module.named_parameters():
        parent, _, key = name.rpartition(".")
        value = values.get(name, own).detach().to(own.device, own.dtype, copy=True)
        setattr(made.get_submodule(parent), key, nn.Parameter(value, requires_grad=False))
    return made


class TokenRows(nn.Module):
    """An embedding with other vectors for a few tokens. ids: (n,) int64, all different; vectors: (n, D)."""

    ids: Tensor

    def __init__(self, embedding: nn.Module, ids: Sequence[int], vectors: Tensor) -> None:
        super().__init__()
        own = embedding.get_parameter("weight")
        order = sorted(range(len(ids)), key=lambda place: ids[place])
        self.register_buffer("ids", torch.tensor([ids[place] for place in order], device=own.device))
        self.few = shallow_copy_module(embedding)  # scales its vectors as the embedding does
        vars(self.few)["padding_idx"] = None
        self.few.weight = nn.Parameter(vectors[order].detach().to(own.device, own.dtype), requires_grad=False)
        self._all = (embedding,)  # the base's own, not a child of this module

    def forward(self, x: Tensor) -> Tensor:
        place = torch.searchsorted(self.ids, x).clamp_(max=len(self.ids) - 1)
        found = (self.ids[place] == x)[..., None]
        return torch.where(found, self.few(place), self._all[0](x))


class TokenLogits(nn.Module):
    """An output layer whose weights for a few tokens are those of a `TokenRows`, because the base ties both."""

    def __init__(self, layer: nn.Module, rows: TokenRows) -> None:
        super().__init__()
        self.rows = rows
        self._all = (layer,)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.rows.few.get_parameter("weight")
        return linear(self._all[0], x).index_copy(-1, self.rows.ids, x @ weight.mT)


def merged_values(module: nn.Module, weight: Tensor) -> dict[str, Tensor]:
    """The parameters of the base's module after a merge, by name. weight: the base's own."""
    rows = module.rows if isinstance(module, TokenLogits) else module
    if isinstance(rows, TokenRows):
        few = rows.few.get_parameter("weight")
        return {"weight": weight.index_copy(0, rows.ids.to(weight.device), few.to(weight.device, weight.dtype))}
    return dict(module.named_parameters())


# --- replaced modules -------------------------------------------------------------------------------------------------


class FrozenNorm(nn.Module):
    """Replaces an RMS norm of the base, with the same weight; see `ops.blocks`."""

    def __init__(self, replaced: nn.Module, context: BatchContext, narrows: bool = False) -> None:
        super().__init__()
        self.context = context
        self.weight = replaced.get_parameter("weight")
        self.variance_epsilon: float = vars(replaced)["variance_epsilon"]
        self.narrows = narrows

    def forward(self, hidden_states: Tensor) -> Tensor:
        serves, eps = self.context.serves, self.variance_epsilon
        return frozen_rms_norm(hidden_states, self.weight, eps, serves=serves, narrows=self.narrows)


class NarrowedOutput(nn.Module):
    """Replaces the module that ends the attention of the last layer; the base's own layers stay inside.

    If a classifier reads one token of each row (`BatchContext.read`), only these tokens go on.
    """

    def __init__(self, replaced: nn.Module, context: BatchContext) -> None:
        super().__init__()
        for name, module in replaced.named_children():
            self.add_module(name, module)
        self.context, self._forward = context, type(replaced).forward

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        if (read := self.context.read) is not None:  # (1, N, D) -> (1, B, D)
            self.context.narrow()
            hidden_states, input_tensor = (each.index_select(1, read) for each in (hidden_states, input_tensor))
        return self._forward(self, hidden_states, input_tensor)


def attention_output_path(last_attention: str) -> str:
    """The path of the module that ends the attention at this path."""
    return f"{last_attention.rpartition('.')[0]}.output"


# --- checks -----------------------------------------------------------------------------------------------------------


def has_hooks(module: nn.Module) -> bool:
    """Whether calling the module also calls a hook."""
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)


def is_of_class(module: nn.Module, names: Sequence[str]) -> bool:
    """Whether the module is of one of these classes; FSDP2 gives it a class of its own below its class."""
    return any(each.__name__ in names for each in type(module).__mro__)


def trains_one_adapter(context: BatchContext) -> bool:
    """Whether this pass trains one adapter on unpadded rows, and layers may be one operation."""
    if context.serves or context.cache is not None or context.capture is not None:
        return False
    if context.lengths is None or context.single() is None:
        return False
    return not (torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"))


def flat_rotary(cos_sin: CosSin | None) -> CosSin | None:
    """The rotary positions as operations take them, (N, head size) each."""
    return None if cos_sin is None else (cos_sin[0][0].contiguous(), cos_sin[1][0].contiguous())


def frozen_base(module: nn.Module) -> nn.Module | None:
    """The frozen linear layer of a module that is a product and nothing else; None for any other."""
    base = module.base_layer if isinstance(module, RoutedLinear) else module
    if has_hooks(module) or has_hooks(base) or "forward" in vars(base):
        return None
    if quantized.in_four_bits(base):
        return base
    if type(base) is not nn.Linear or base.weight.requires_grad or not base.weight.is_contiguous():
        return None
    return base


class Matrices:
    """Makes the matrices of a layer for one training pass."""

    def __init__(self, context: BatchContext, slot: int, x: Tensor, ops: Ops) -> None:
        self._context, self._slot, self._x, self._ops = context, slot, x, ops

    def group(self, *modules: nn.Module) -> Group | None:
        """The matrices of layers with one input, or None if the operations do not take them."""
        found = [self._matrix(each) for each in modules]
        group = tuple(each for each in found if each is not None)
        if len(group) < len(found) or not self._ops.takes_lora([each.lora for each in group]):
            return None
        return group

    def _matrix(self, module: nn.Module) -> Matrix | None:
        base, added = frozen_base(module), None
        if base is None:
            return None
        if isinstance(module, RoutedLinear):
            factors = module.factors(self._slot)
            if self._slot in module.scaled or (factors is not None and factors.initial_A is not None):
                return None
            if factors is not None:
                p = factors.dropout if factors.training else 0.0
                added = Lora(factors.lora_A, factors.lora_B, factors.scaling, p)
        bias = base._parameters["bias"]
        if bias is not None and (bias.requires_grad or bias.dtype != self._x.dtype):
            return None
        if quantized.in_four_bits(base):
            packed = quantized.FourBitProducts.of(base)
            return Matrix(packed.weight, bias, packed, added)
        weight = base.get_parameter("weight")
        if weight.dtype != self._x.dtype:
            return None
        return Matrix(weight, bias, lora.FrozenProducts(), added)


# --- an engine's pass -------------------------------------------------------------------------------------------------


class Serving:
    """A pass of an engine through a layer: every token takes its row's adapter (`ops.blocks.Pass`).

    Args:
        ops: of the device.
        context: of the model.
        linears: the layer's, by group.
        hooked: what its attention carries.
        call: the settings of its attention.
        cos_sin: of the rotary positions, if it rotates.
    """

    def __init__(
        self,
        ops: Ops,
        context: BatchContext,
        linears: Sequence[Sequence[RoutedLinear]],
        hooked: Hooked,
        call: AttentionCall,
        cos_sin: CosSin | None,
    ) -> None:
        assert context.adapter_pool is not None
        self.ops, self._context, self._pool, self._linears = ops, context, context.adapter_pool, linears
        self._hooked, self._call = hooked, call
        self._cos_sin = flat_rotary(cos_sin)

    def products(self, group: int, x: Tensor, plus: Tensor | None = None) -> list[Tensor]:
        if group == OUT and self._hooked.last:
            self._context.narrow()
        return self._pool.products(self._linears[group], x, plus)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self._cos_sin is not None:
            q, k = self.ops.rotate(q, k, *self._cos_sin, 1.0)
        q, k, v = (each.transpose(0, 1)[None] for each in (q, k, v))
        return attend_in_pass(self._hooked, q, k, v, self._call)[0].transpose(0, 1)

    def keep(self, **tensors: Tensor | None) -> None:
        """Nothing: there is no backward pass."""


# --- hooks ------------------------------------------------------------------------------------------------------------


Linears = Sequence[Sequence[nn.Module]]  # by group: q, k, v; out; up, or gate and up; down


class LayerHook:
    """Replaces the forward of one layer of Llama, Mistral or Qwen.

    one_call: computes this layer and those after it, where a kernel does.
    """

    layout: Layout = "pre-norm"

    def __init__(self, module: Submodule, fast: FastPaths, context: BatchContext, order: list[OneCall]) -> None:
        self.module, self.context, self._fast = module, context, fast
        self._original: Callable[..., Any] = module.forward
        self.one_call = OneCall(self, order)

    @property
    def attention(self) -> Submodule:
        """The module that calls the attention function."""
        return self.module.self_attn

    # transformers' arguments pass through; bound to this object, so that a copy of the model uses the copy's weights
    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward, where no block computes the same."""
        y = None
        if hidden_states.dim() == 3 and hidden_states.shape[0] == 1 and hidden_states.numel() > 0:
            compute = self.trained_output if torch.is_grad_enabled() else self.served_output
            y = compute(hidden_states, kwargs.get("position_embeddings"))
        return self._original(hidden_states, *args, **kwargs) if y is None else y

    def served_output(self, x: Tensor, cos_sin: CosSin | None) -> Tensor | None:
        """The layer in an engine's pass: (1, N, D) -> (1, N, D), or None if its modules must compute it."""
        if not self.context.serves or self.module.training:
            return None
        y = self.one_call(x, cos_sin)
        return self._block(x, cos_sin) if y is None else y

    def _block(self, x: Tensor, cos_sin: CosSin | None) -> Tensor | None:
        context, pool = self.context, self.context.adapter_pool
        if pool is None or pool.replaces or context.lengths is None:
            return None
        ops = ops_for(x, *(cos_sin or ()))
        if not ops.takes_layer(self.layout, trains=False) or (parts := self.parts()) is None:
            return None
        block, linears = parts
        routed = [[each for each in group if isinstance(each, RoutedLinear)] for group in linears]
        unfit = any(len(own) < len(group) for own, group in zip(routed, linears, strict=True))
        if unfit or ops_for(x, *tensors_of(block)) is not ops or not self.fits(x, cos_sin):
            return None
        run = Serving(ops, context, routed, self.hooked, self.call(0.0), cos_sin)
        if self.narrows and isinstance(block, PostNorm):
            block = block._replace(read=context.read)
        return block.forward(run, x.contiguous()[0])[None]

    def trained_output(self, x: Tensor, cos_sin: CosSin | None) -> Tensor | None:
        """The layer while one adapter trains: (1, N, D) -> (1, N or B, D), or None if its modules must compute it."""
        context, slot = self.context, self.context.single()
        if slot is None or not trains_one_adapter(context) or not self.fits(x, cos_sin):
            return None
        ops = ops_for(x, *(cos_sin or ()))
        if not ops.takes_layer(self.layout, trains=True) or (parts := self.parts()) is None:
            return None
        block, linears = parts
        norms, p = tensors_of(block), self.dropout
        if ops_for(x, *norms) is not ops or any(each.requires_grad for each in norms):
            return None
        call = self.call(p)
        rows, prefixes = rows_and_prefixes(self.hooked, call.scaling, call.window, x.dtype)
        if not ops.takes_attention(rows, prefixes, block.dim, p):
            return None
        matrices = Matrices(context, slot, x, ops)
        bare = [found for own in linears if (found := matrices.group(*own)) is not None]
        if len(bare) < len(linears) or not (x.requires_grad or lora.lora_factors(bare) or prefixes.pairs):
            return None  # nothing trains in this layer or below it
        masks, (first, last) = context.masks or Masks(), self.branch_dropout
        groups: list[Group] = []
        dropped: list[DropoutArguments] = []
        for group, rate in zip(bare, (p, first, 0.0, last), strict=True):  # masks are drawn in the modules' order
            keys = functools.partial(masks.tokens, self.hooked.site.group, x.device, read=bool(groups) and self.narrows)
            adapted = (m if m.lora is None else m._replace(lora=lora.with_mask(m.lora, masks, keys)) for m in group)
            groups.append(tuple(adapted))
            dropped.append(masks.arguments(rate, keys))
        run = Training(ops, groups, rows, prefixes.of_row, dropped[0], flat_rotary(cos_sin))
        made: tuple[Tensor, int, Normed] | None = context.memo.get(NORMED)
        normed = made[2] if made is not None and made[0] is x and made[1] == x._version else None
        pairs = [each for pair in prefixes.pairs for each in pair]
        y, normed = train_block(self.while_training(block, dropped[1], dropped[3]), run, x.contiguous(), pairs, normed)
        if normed is not None:
            context.memo[NORMED] = y, y._version, normed
        return y

    @property
    def hooked(self) -> Hooked:
        """What the layer's attention carries."""
        return self.attention.turret_hook

    def call(self, p: float) -> AttentionCall:
        """The settings of its attention. p: rate of dropout."""
        return AttentionCall(self.attention.scaling, p, self.hooked.family.window(self.attention))

    @property
    def dropout(self) -> float:
        """Of attention's probabilities, in this mode."""
        return self.attention.attention_dropout if self.attention.training else 0.0

    @property
    def branch_dropout(self) -> tuple[float, float]:
        """The rates of dropout after attention and after the MLP, in this mode."""
        return 0.0, 0.0

    @property
    def narrows(self) -> bool:
        """Whether only some tokens go on after attention."""
        return False

    def fits(self, x: Tensor, cos_sin: CosSin | None) -> bool:
        """Whether the rotary positions are those of x's tokens, or none, as the layer needs them."""
        shape = (1, x.shape[1], self.attention.head_dim)
        return cos_sin is not None and all(each.shape == shape for each in cos_sin)

    def parts(self) -> tuple[Block, Linears] | None:
        """The layer's norms and linear layers, or None if it contains anything else."""
        module, attention, mlp = self.module, self.attention, self.module.mlp
        gated = is_of_class(mlp, self._fast.gated_mlps) and type(getattr(mlp, "act_fn", None)).__name__ in SILU
        if not gated or any(map(has_hooks, (attention, mlp, mlp.act_fn))):
            return None
        modules = [module.input_layernorm, module.post_attention_layernorm]
        modules += [own for name in ("q_norm", "k_norm") if (own := getattr(attention, name, None)) is not None]
        norms = []
        for own in modules:
            norm = own if torch.is_grad_enabled() else base_module_of(own)
            if type(norm) is not FrozenNorm or has_hooks(own) or has_hooks(norm):
                return None
            norms.append(RMSNorm(norm.weight, norm.variance_epsilon))
        linears = (
            (attention.q_proj, attention.k_proj, attention.v_proj),
            (attention.o_proj,),
            (mlp.gate_proj, mlp.up_proj),
            (mlp.down_proj,),
        )
        heads = (norms[2], norms[3]) if len(norms) > 2 else None
        return PreNorm((norms[0], norms[1]), attention.head_dim, heads), linears

    def while_training(self, block: Block, first: DropoutArguments, last: DropoutArguments) -> Block:
        """The block with the dropout of both branches in this pass, and the only tokens that go on."""
        return block

    def call_layers(
        self, layers: WholeLayers, hooks: Sequence[LayerHook], x: Tensor, cos_sin: CosSin | None
    ) -> Tensor | None:
        """Consecutive layers in one call of a kernel, or None if this pass is of another kind."""
        pool, cache = self.context.adapter_pool, self.context.cache
        if pool is None or cache is None or cos_sin is None or cache.fresh("decoder") or not self.fits(x, cos_sin):
            return None
        cos, sin = (each.contiguous() for each in cos_sin)
        steps = [cache.step("decoder", each.hooked.site.layer, None, None) for each in hooks]
        if any(part.kept is None for parts in steps for part in parts) or ops_for(x, cos, sin) is not ops_for(x):
            return None
        parts = [[(part.kept, part.keys, part.values) for part in own if part.kept is not None] for own in steps]
        return layers.decoder(x, cos, sin, pool.spans("decoder"), parts)


class PostNormHook(LayerHook):
    """The same for a layer of BERT or RoBERTa."""

    layout: Layout = "post-norm"

    @property
    def attention(self) -> Submodule:
        return self.module.attention.self

    @property
    def dropout(self) -> float:
        return self.attention.dropout.p if self.attention.training else 0.0

    @property
    def branch_dropout(self) -> tuple[float, float]:
        first, last = (each.dropout for each in (self.module.attention.output, self.module.output))
        return first.p if first.training else 0.0, last.p if last.training else 0.0

    @property
    def narrows(self) -> bool:
        return isinstance(self.module.attention.output, NarrowedOutput)

    def fits(self, x: Tensor, cos_sin: CosSin | None) -> bool:
        return cos_sin is None

    def parts(self) -> tuple[Block, Linears] | None:
        module, attention, intermediate = self.module, self.attention, self.module.intermediate
        outputs = module.attention.output, module.output
        known = all(is_of_class(each, (*self._fast.added_norms, NarrowedOutput.__name__)) for each in outputs)
        if not known or module.is_decoder or not is_gelu(intermediate.intermediate_act_fn):
            return None
        if any(map(has_hooks, (module.attention, attention, intermediate, intermediate.intermediate_act_fn, *outputs))):
            return None
        norms = []
        for output in outputs:
            own = output.LayerNorm
            norm = own if torch.is_grad_enabled() else base_module_of(own)
            if type(norm) is not nn.LayerNorm or norm.bias is None or has_hooks(own) or has_hooks(norm):
                return None
            norms.append(LayerNorm(norm.weight, norm.bias, norm.eps))
        linears = (
            (attention.query, attention.key, attention.value),
            (outputs[0].dense,),
            (intermediate.dense,),
            (outputs[1].dense,),
        )
        return PostNorm((norms[0], norms[1]), attention.attention_head_size), linears

    def while_training(self, block: Block, first: DropoutArguments, last: DropoutArguments) -> Block:
        assert isinstance(block, PostNorm)
        norms = block.norms[0]._replace(dropped=first), block.norms[1]._replace(dropped=last)
        return PostNorm(norms, block.dim, self.context.read if self.narrows else None)

    def call_layers(
        self, layers: WholeLayers, hooks: Sequence[LayerHook], x: Tensor, cos_sin: CosSin | None
    ) -> Tensor | None:
        context, pool = self.context, self.context.adapter_pool
        if pool is None or context.lengths is None or context.read is not None:
            return None
        rows = [rows_and_prefixes(each.hooked, each.attention.scaling, None, x.dtype) for each in hooks]
        return layers.encoder(x, pool.spans("encoder"), rows)


# --- one call ---------------------------------------------------------------------------------------------------------


class OneCall:
    """A layer and those after it in one call. Calling it gives None if the block or the modules must compute.

    order: all layers of the model.
    """

    def __init__(self, hook: LayerHook, order: list[OneCall]) -> None:
        self.hook, self._order, self._index = hook, order, len(order)
        self._weights: tuple[AdapterPoolProtocol, LayerWeights | None] | None = None  # as found in this pool
        self._runs: dict[int, WholeLayers] = {}  # by the number of layers
        order.append(self)

    def __call__(self, x: Tensor, cos_sin: CosSin | None) -> Tensor | None:
        """x: (1, N, D) -> (1, N, D)."""
        context = self.hook.context
        done: tuple[Tensor, int] | None = context.memo.get(DONE)
        if done is not None and done[0] is x and self._index < done[1]:
            return x
        pool, ops = context.adapter_pool, ops_for(x)
        if pool is None or pool.scales or not 0 < x.shape[1] <= ops.few_for_layers():
            return None
        run = self._run(pool, ops, x.dtype)
        if not run:
            return None
        if len(run) not in self._runs:
            own = [found for each in run if (found := each.weights(pool, ops)) is not None]
            self._runs[len(run)] = ops.whole_layers(own)
        y = self.hook.call_layers(self._runs[len(run)], [each.hook for each in run], x.contiguous(), cos_sin)
        if y is not None:
            context.memo[DONE] = y, self._index + len(run)
        return y

    def weights(self, pool: AdapterPoolProtocol, ops: Ops) -> LayerWeights | None:
        """The layer's weights, or None if it contains anything that the kernel does not compute."""
        if self._weights is None or self._weights[0] is not pool:
            self._weights, self._runs = (pool, self._layer_weights(pool, ops)), {}
        return self._weights[1]

    def _layer_weights(self, pool: AdapterPoolProtocol, ops: Ops) -> LayerWeights | None:
        if (parts := self.hook.parts()) is None:
            return None
        block, groups = parts
        matrices = []
        for each in (own for group in groups for own in group):
            if not isinstance(each, RoutedLinear) or not lora.is_plain_linear(each.base_layer):
                return None
            matrices.append((pool.number(each), each.weight, each.bias))
        call, heads = self.hook.call(0.0), block.head_norms if isinstance(block, PreNorm) else None
        scaling, window = call.scaling, call.window or 0
        return ops.layer_weights(matrices, block.norms, heads, dim=block.dim, scaling=scaling, window=window)

    def _run(self, pool: AdapterPoolProtocol, ops: Ops, dtype: torch.dtype) -> list[OneCall]:
        """This layer and those after it that one call computes; empty if it computes none."""
        run: list[OneCall] = []
        first = self.weights(pool, ops)
        for each in self._order[self._index : self.hook.attention.config.num_hidden_layers]:
            own = each.weights(pool, ops)
            if own is None or first is None or own.alike != first.alike or own.dtype != dtype:
                break
            if run and each.hook.module._forward_pre_hooks:
                break
            run.append(each)
            if each.hook.module._forward_hooks:
                break
        return run


def is_gelu(module: nn.Module) -> bool:
    """Whether the module is the exact GELU."""
    exact = type(module) is nn.GELU and module.approximate == "none"
    return exact or (type(module).__name__ == "GELUActivation" and getattr(module, "act", None) is nn.functional.gelu)


def tensors_of(block: Block) -> list[Tensor]:
    """The weights of a block's norms."""
    heads = block.head_norms or () if isinstance(block, PreNorm) else ()
    biases = [each.bias for each in block.norms if isinstance(each, LayerNorm)]
    return [*(each.weight for each in (*block.norms, *heads)), *biases]


def hook_layers(model: nn.Module, fast: FastPaths, context: BatchContext) -> list[Callable[[], None]]:
    """Let the layers of a model compute as blocks where they can; returns functions that undo it."""
    if fast.layout is None:
        return []
    kind = PostNormHook if fast.layout == PostNormHook.layout else LayerHook
    order: list[OneCall] = []
    undo: list[Callable[[], None]] = []
    for module in model.modules():
        if is_of_class(module, fast.layers) and "forward" not in vars(module):
            module.forward = kind(cast(Submodule, module), fast, context, order).forward
            undo.append(functools.partial(vars(module).__delitem__, "forward"))
    return undo
