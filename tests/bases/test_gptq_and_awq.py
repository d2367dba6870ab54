"""A checkpoint that GPTQ or AWQ has packed computes its unpacked weights, and LoRA trains next to it.

The checkpoints are written here, from the formats. gptqmodel reads them; without it these tests are skipped.
"""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import small_models
import torch
from safetensors.torch import load_file, save_file

import turret
from turret import bases
from turret.adapters import packed, trainable_parameters
from turret.bases.quantized import PACKAGES

GROUP = 32  # weights that share a scale
BACKENDS = {"gptq": "torch", "awq": "torch_awq"}  # of gptqmodel, those without a kernel that is compiled first
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # of eight neighbours in a word


def words(values: torch.Tensor, order: tuple[int, ...] = tuple(range(8))) -> torch.Tensor:
    """Numbers of 4 bits, (8 N, M), as words of 32 bits (N, M); `order` is their order inside a word."""
    packed_words = torch.zeros(values.shape[0] // 8, values.shape[1], dtype=torch.int64)
    for place, which in enumerate(order):
        packed_words |= values[which::8].long() << (4 * place)
    return torch.where(packed_words >= 1 << 31, packed_words - (1 << 32), packed_words).int()


def pack(folder: Path, kind: str) -> dict[str, torch.Tensor]:
    """Pack the linear layers of a saved base; returns the weights that the packed numbers mean."""
    kept, meant = dict[str, torch.Tensor](), dict[str, torch.Tensor]()
    for name, weight in load_file(folder / "model.safetensors").items():
        if weight.ndim != 2 or ".layers." not in name:
            kept[name] = weight.half()
            continue
        (rows, columns), stem = weight.shape, name.removesuffix(".weight")
        groups = weight.view(rows, columns // GROUP, GROUP)
        scales = (groups.abs().amax(-1) / 7).half()  # (D_out, groups)
        numbers = (groups / scales.float()[..., None]).round().clamp(-8, 7)
        meant[name] = (numbers * scales.float()[..., None]).view(rows, columns)
        numbers = numbers.view(rows, columns).int() + 8
        kept[f"{stem}.scales"] = scales.T.contiguous()
        if kind == "gptq":
            kept[f"{stem}.qweight"] = words(numbers.T)
            kept[f"{stem}.qzeros"] = words(torch.full((rows, columns // GROUP), 7)).T.contiguous()  # one less than 8
            kept[f"{stem}.g_idx"] = (torch.arange(columns) // GROUP).int()
        else:
            kept[f"{stem}.qweight"] = words(numbers, AWQ_ORDER).T.contiguous()
            kept[f"{stem}.qzeros"] = words(torch.full((rows, columns // GROUP), 8), AWQ_ORDER).T.contiguous()
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    settings = {"quant_method": kind, "bits": 4, "group_size": GROUP, "backend": BACKENDS[kind]}
    settings |= {"desc_act": False, "sym": True} if kind == "gptq" else {"version": "gemm", "zero_point": True}
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "float16", "quantization_config": settings}))
    return meant


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gptq", "awq"])
def test_a_packed_checkpoint_computes_its_weights_and_lora_trains_next_to_it(tmp_path: Path, kind: str) -> None:
    if missing := [name for name in PACKAGES[kind] if find_spec(name) is None]:
        pytest.skip(f"{', '.join(missing)} is not installed")
    where = small_models.save_base("llama", tmp_path / "llama", hidden_size=64, intermediate_size=96)
    plain: Any = bases.load(str(where), task="generate", dtype="float32").model
    plain.load_state_dict(pack(where, kind), strict=False)
    base = bases.load(str(where), task="generate")
    assert any(f"14 linear layers are kept in {kind}" in note for note in base.notes)
    ids = torch.tensor([[5, 9, 20, 7, 11]])
    with torch.no_grad():
        got, expected = (each(input_ids=ids).logits.float() for each in (base.model, plain))  # type: ignore[operator]
    assert float((got - expected).abs().max()) < 0.01 * float(expected.abs().max())
    turret.attach(base.model, turret.LoRA(r=4, target_modules="all-linear", lora_dropout=0.0))
    states = packed.target_states(base.model, [ids[0, :3]], [ids[0, 3:]])
    packed.vocabulary_logits(base.model, states).float().logsumexp(-1).sum().backward()
    gradients = {name: each.grad for name, each in trainable_parameters(base.model).items() if "lora_B" in name}
    assert len(gradients) == 14
    assert all(each is not None and float(each.abs().sum()) > 0 for each in gradients.values())
