"""Write the table in docs/howto/gpu.md: the memory of a training, and the smallest GPU for it.

The numbers come from the code that plans a training (`turret.train.memory`): it builds a base without weights from
its configuration, attaches the adapter, and counts the bytes that one pass saves. Nothing is downloaded or measured.

    python release/make_gpu_table.py            write the table
    python release/make_gpu_table.py --check    write nothing; exit status 1 if the table is out of date
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path

import torch
from transformers import BertConfig, LlamaConfig, PretrainedConfig

from turret.bases.meta_model import model_of
from turret.methods import LoRA, Method, Prefix
from turret.train.memory import Work, predict_on_gpu
from turret.train.training_plan import Prediction

PAGE = Path(__file__).parent.parent / "docs" / "howto" / "gpu.md"
BLOCK = re.compile(r"(<!-- computed: what-fits -->\n).*?(<!-- end of computed -->)", re.DOTALL)
CARDS = (8, 12, 16, 24, 48, 80)  # GB
USABLE = 0.95  # of a GPU: a screen and the driver have the rest
TOKENS = (512, 1024)  # of one text, its target included
TARGET = 64
METHODS: dict[str, Method] = {
    "LoRA, r = 16, all linear layers": LoRA(r=16, target_modules="all-linear"),
    "prefix of 20": Prefix(),
}
PRECISIONS = {"bfloat16": False, "nf4": True}


def decoder(layers: int, width: int, inner: int, heads: int, kv_heads: int, vocabulary: int) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        tie_word_embeddings=layers * width < 100_000,
    )


BASES: dict[str, PretrainedConfig] = {
    "0.1B encoder (like BERT)": BertConfig(),
    "0.1B (like SmolLM2-135M)": decoder(30, 576, 1536, 9, 3, 49152),
    "1B (like Llama 3.2 1B)": decoder(16, 2048, 8192, 32, 8, 128256),
    "3B (like Llama 3.2 3B)": decoder(28, 3072, 8192, 24, 8, 128256),
    "7B (like Llama 2 7B)": decoder(32, 4096, 11008, 32, 32, 32000),
    "8B (like Llama 3.1 8B)": decoder(32, 4096, 14336, 32, 8, 128256),
    "14B (like Qwen 2.5 14B)": decoder(48, 5120, 13824, 40, 8, 152064),
}


def predicted(
    config: PretrainedConfig, method: Method, tokens: int, nf4: bool, checkpointed: bool = False
) -> Prediction:
    """The memory of a training on one text a pass."""
    generates = not isinstance(config, BertConfig)
    work = Work(1, tokens - TARGET, TARGET) if generates else Work(1, tokens)
    model = model_of(config, "generate" if generates else "classify")
    return predict_on_gpu(model, method, work, torch.bfloat16, nf4=nf4, checkpointed=checkpointed)


def lines() -> Iterator[str]:
    heads = [f"{tokens:,} tokens" for tokens in TOKENS]
    heads.append(f"{TOKENS[-1]:,}, checkpointed")
    yield f"| base | method | weights in | weights | {' | '.join(heads)} | smallest GPU |"
    yield "| --- | --- | --- | ---: | " + "---: | " * len(heads) + "--- |"
    for (base, config), (name, method), (precision, nf4) in product(BASES.items(), METHODS.items(), PRECISIONS.items()):
        if nf4 and isinstance(config, BertConfig):
            continue  # so small a base needs no 4 bits
        within = [tokens for tokens in TOKENS if tokens <= config.max_position_embeddings]
        found = {tokens: predicted(config, method, tokens, nf4) for tokens in within}
        sizes = [gigabytes(found[tokens].total) if tokens in found else "–" for tokens in TOKENS]
        least = predicted(config, method, within[-1], nf4, checkpointed=True)
        sizes.append(gigabytes(least.total) if within[-1] == TOKENS[-1] else "–")
        cells = (base, name, precision, gigabytes(least.weights), *sizes, smallest(least.total))
        yield f"| {' | '.join(cells)} |"


def gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB"


def smallest(size: int) -> str:
    """The smallest GPU on which so much fits."""
    gpu = next((gpu for gpu in CARDS if size <= USABLE * gpu * 1e9), None)
    return "none of these" if gpu is None else f"{gpu} GB"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the table is out of date")
    options = parser.parse_args(arguments)
    page = PAGE.read_text(encoding="utf-8")
    table = "\n".join(lines())
    filled = BLOCK.sub(lambda found: f"{found[1]}{table}\n{found[2]}", page)
    if options.check:
        if filled != page:
            print(f"{PAGE} is out of date: run python release/make_gpu_table.py", file=sys.stderr)
        return int(filled != page)
    PAGE.write_text(filled, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
