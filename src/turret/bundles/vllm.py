"""Which adapters vLLM serves, according to its documentation.

- `vllm.lora.peft_helper.PEFTHelper` (docs.vllm.ai/en/latest/api/vllm/lora/peft_helper/): a LoRA by `r`, `lora_alpha`,
  `target_modules` and `use_rslora`; `bias` is "none", `modules_to_save` is None, no DoRA; one rank for all layers.
- `vllm.config.lora` (docs.vllm.ai/en/v0.14.0/api/vllm/config/lora/): `max_lora_rank` is one of `RANKS`; adapters of
  a larger rank are refused.
- `vllm.lora.lora_model.LoRAModel`: tensors are called `base_model.model.<layer>.lora_A.weight`, and every layer is a
  linear layer of the model.
- the LoRA column of the supported models (docs.vllm.ai/en/v0.6.1/models/supported_models.html): Llama, Mistral and the
  Qwens have it, GPT-2 has not; encoders and encoder-decoders do not generate there.
"""

from __future__ import annotations

import re

from turret.adapters.adapter import LORA_PREFIX, Adapter
from turret.errors import AdapterError
from turret.families import FAMILIES
from turret.tasks import stored_task

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
_LAYER = re.compile(r"model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)", re.ASCII)


def max_lora_rank(adapter: Adapter) -> int:
    """The smallest `--max-lora-rank` that fits the adapter. Raises AdapterError if vLLM does not serve it."""
    method, family = adapter.method, adapter.base.family
    if (r := method.vllm_rank) is None:
        raise AdapterError(f"vLLM serves only LoRA, and this is a {method.kind}: export it without --vllm")
    if adapter.head or not stored_task(adapter.task).generates:
        raise AdapterError(
            "vLLM serves no adapter with a head (modules_to_save), and this one classifies: use --merged"
        )
    served = [name for name, each in FAMILIES.items() if each.vllm_lora]
    if family not in served:
        raise AdapterError(f"vLLM serves LoRA on {', '.join(served)}, and this base is a {family}: use --merged")
    if r > RANKS[-1]:
        raise AdapterError(f"vLLM serves ranks up to {RANKS[-1]}, and this one has {r}: use --merged")
    for name in adapter.tensors:
        path = name.removeprefix(LORA_PREFIX).rsplit(".lora_", 1)[0]
        if not _LAYER.fullmatch(path):
            raise AdapterError(
                f"vLLM serves LoRA on the linear layers of a decoder's blocks, not on {path}: use --merged"
            )
    return next(rank for rank in RANKS if rank >= r)
