"""Claim: through its MLP an encoder's prefix drowns the text; trained by itself it does not.

How much attention goes to a prefix while it is trained on movie snippets, and what is left of the text: the share of
attention on the prefix (mean over layers, heads and texts, from every token and from the first alone, which the
classifier reads), how long the prefix's values are against the text's, and how far apart the logits of different texts
lie. On validation examples drawn off the train file.

    python benchmarks/prefix_attention.py --data DATA        DATA as for defaults.py
    python benchmarks/prefix_attention.py                    what the kept runs say
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import defaults
import record

NAME = "prefix_attention"
CLAIM = "through its MLP an encoder's prefix drowns the text; trained by itself it does not"
LOOKED_AT = (1, 20, 50, 100, 200, 400)  # steps
TEXTS = 32
SIDES = {"through the MLP, 1e-3": (defaults.MLP, 1e-3), "by itself, 3e-2": (defaults.FLAT, 3e-2)}


def measure(name: str, options: argparse.Namespace) -> None:
    """One training, looked at after some of its steps."""
    from turret import train as trainer

    method, rate = SIDES[name]
    job = defaults.Job("snippets", defaults.LARGE, method, (("lr", rate), ("epochs", 3), ("max_steps", LOOKED_AT[-1])))
    recipe, base, task, data = defaults.ready(job, options.seed, options.data)
    recipe = trainer.fill_recipe(recipe, base, task.kind, len(trainer.splits_of(recipe, data).train))
    rows = [each.ids for each in task.encode_sources([example.text for example in data.validation[:TEXTS]])]
    looks, losses = [], []
    for step in trainer.fit(recipe, base, task, data):
        losses.append(step.loss)
        if step.step in LOOKED_AT:
            looks.append({"step": step.step, **look(base.model, rows)})
    metrics, _ = trainer.evaluate(base.model, task, data.validation)
    run = {"side": name, "seed": options.seed, "looks": looks, "curve": defaults.thinned(losses)}
    run |= {"accuracy": metrics["accuracy"], "machine": record.machine(options.threads)}
    record.keep(NAME, CLAIM, run)
    print(name, run["accuracy"], looks, flush=True)


def look(model: Any, rows: list[Any]) -> dict[str, float]:
    """What a prefix takes of every layer's attention, and what the logits still tell apart."""
    import torch

    from turret.adapters import packed

    seen: list[dict[str, float]] = []
    training = model.training
    model.eval()
    with torch.no_grad(), _watched(seen):
        logits = packed.classify_logits(model, rows).float()
    model.train(training)
    means = {name: sum(each[name] for each in seen) / len(seen) for name in seen[0]}
    return {name: round(value, 4) for name, value in means.items()} | {"logits": round(float(logits.std(0).mean()), 4)}


@contextmanager
def _watched(seen: list[dict[str, float]]) -> Iterator[None]:
    """Adds what every layer of a pass attends to."""
    import torch

    from turret.adapters import attention

    plain = attention._attend_unpadded

    def watching(hooked: Any, q: Any, k: Any, v: Any, call: Any) -> Any:
        keys, values = (each.float() for each in hooked.prefix(1, hooked.site))  # (H, P, D)
        all_tokens, first, start = [], [], 0
        for length in next(iter(hooked.context.lengths.values())):
            span = slice(start, start + length)
            start += length
            if q.shape[2] <= start - length or q.shape[2] != k.shape[2]:  # the last layer asks for first tokens only
                break
            scores = q[0, :, span].float() @ torch.cat([keys, k[0, :, span].float()], 1).transpose(1, 2) * call.scaling
            share = scores.softmax(-1)[..., : keys.shape[1]].sum(-1)  # (H, T)
            all_tokens.append(share.mean())
            first.append(share[:, 0].mean())
        if all_tokens:
            part = {"share": float(torch.stack(all_tokens).mean()), "share_of_first": float(torch.stack(first).mean())}
            part["length"] = float(values.norm(dim=-1).mean() / v[0].float().norm(dim=-1).mean())
            seen.append(part)
        return plain(hooked, q, k, v, call)

    attention._attend_unpadded = watching
    try:
        yield
    finally:
        attention._attend_unpadded = plain


def report(runs: list[dict[str, Any]]) -> str:
    """A row a look."""
    rows = []
    for run in record.newest(runs, lambda each: each["side"]):
        for each in run["looks"]:
            shares = [f"{100 * each[name]:.0f}%" for name in ("share", "share_of_first")]
            last = f"{100 * run['accuracy']:.1f}" if each is run["looks"][-1] else ""
            rows.append([run["side"], each["step"], *shares, f"{each['length']:.2f}", f"{each['logits']:.4f}", last])
    header = ["prefix", "step", "attention on the prefix", "by the first token", "norm of its values, text = 1"]
    return record.table([*header, "spread of the logits over texts", "accuracy"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="the folder of the train files; left out: print the kept runs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    if options.data:
        import torch

        torch.set_num_threads(options.threads)
        for name in SIDES:
            measure(name, options)
    print(report(record.load(NAME)))


if __name__ == "__main__":
    main()
