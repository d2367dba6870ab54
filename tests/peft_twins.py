"""PEFT's LoRA next to ours: the reference of outputs and gradients.

lora_twin(family, task, adapter)     a fresh model under PEFT, with the adapter's factors and head copied in by name
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import peft
import torch
from small_models import build

from turret.adapters import Adapter, BaseInfo, attachment, extract
from turret.methods import LoRA


def adapter_from(model: Any, base: str = "small") -> Adapter:
    """The adapter that a model trains."""
    tensors, head, method = extract(model)
    return Adapter(method, tensors, head, BaseInfo(base))


@torch.no_grad()
def lora_twin(family: str, task: Any, adapter: Adapter, targets: Sequence[str] | None = None, **changes: Any) -> Any:
    """PEFT on a fresh model of the same weights, in eval mode.

    Args:
        targets: names of layers for PEFT; default: the paths that the adapter has factors of.
        changes: of the model's configuration.
    """
    method = adapter.method
    assert isinstance(method, LoRA)
    paths = {name.removeprefix("base_model.model.").rpartition(".lora_")[0] for name in adapter.tensors}
    config = peft.LoraConfig(
        task_type="SEQ_CLS" if task == "classify" else None,
        r=method.r,
        lora_alpha=method.lora_alpha,
        lora_dropout=0.0,
        target_modules=list(targets or sorted(paths)),
        use_rslora=method.use_rslora,
        fan_in_fan_out=family == "gpt2",
    )
    model = peft.get_peft_model(build(family, task, **changes), config)
    state = model.state_dict()
    for name, value in adapter.tensors.items():
        key = name.replace(".weight", ".default.weight")
        assert key in state, key
        state[key].copy_(value)
    for name, value in adapter.head.items():
        module, _, leaf = name.partition(".")
        saved = f"base_model.model.{module}.modules_to_save.default.{leaf}"
        state[saved if saved in state else f"base_model.model.{name}"].copy_(value)
    return model.eval()


def require_the_same_gradients(
    model: Any, twin: Any, logits: torch.Tensor, theirs: torch.Tensor, labels: torch.Tensor
) -> None:
    """Every LoRA factor of a model has the gradient of its twin.

    Args:
        logits: (N, C), of the model.
        theirs: (N, C), of the twin.
        labels: (N,), classes.
    """
    model.zero_grad()
    twin.zero_grad()
    torch.nn.functional.cross_entropy(logits, labels).backward()
    torch.nn.functional.cross_entropy(theirs, labels).backward()
    gradients = {name: each.grad for name, each in twin.named_parameters() if each.grad is not None}
    for path, layer in attachment(model).linears.items():
        for factor in ("lora_A", "lora_B"):
            mine = getattr(layer.slots["1"], factor).grad
            their = gradients[f"base_model.model.{path}.{factor}.default.weight"]
            torch.testing.assert_close(mine, their, atol=1e-5, rtol=1e-4)
