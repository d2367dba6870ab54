"""Forgetting: how much worse the base predicts texts with an adapter than without it.

Measured are neutral texts, and examples of the other tasks in the store that generate on the same base. The loss per
token with the adapter is compared with that of slot 0, the bare base, on the same tokens. Only a version that generates
has a number: a classifier answers through a head of its own, so it has no loss per token that could grow.

With d_i the difference of a text's summed losses and n_i its number of tokens, the increase is `sum d_i / sum n_i`. Its
95% interval is a percentile bootstrap over texts. Source: Efron and Tibshirani 1993, An Introduction to the Bootstrap.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources

import numpy as np
import torch
from torch import Tensor

from turret import adapters
from turret.adapters import packed
from turret.errors import TurretError
from turret.recipe import Recipe
from turret.reference import Reference
from turret.store import Store, Version
from turret.tasks import stored_task, task_from_spec
from turret.tasks.shapes import Metrics, MetricValue
from turret.train.batches import EncodedRows, spread_indices
from turret.train.evaluation import evaluation_mode, example_losses
from turret.transformer import Model, Tokenizer
from turret.workspace.progress import Say, silent
from turret.workspace.reading import read_dataset

# --- neutral texts ----------------------------------------------------------------------------------------------------
# Neutral paragraphs, one a line, written for this package, to measure forgetting.
#
# No task is about them. If the base predicts them worse with an adapter than without it, the adapter made it forget.


PARAGRAPHS = (resources.files("turret.workspace") / "neutral_texts.txt").read_text("utf-8").splitlines()


# --- forgetting -------------------------------------------------------------------------------------------------------


LEAD = 24  # tokens of a neutral text that are given; the others are predicted
MOST_TOKENS = 256  # of a neutral text
EXAMPLES = 32  # of another task
MOST_TASKS = 16
RESAMPLES = 2000
LEVEL = 0.95
SEED = 42
Losses = tuple[Sequence[float], Sequence[int]]  # the summed loss of each text, and its number of tokens


@dataclass(frozen=True)
class Increase:
    """The increase of the loss per token on some texts, with its interval."""

    increase: float
    low: float
    high: float
    loss: float  # per token, with the adapter
    base_loss: float
    texts: int

    @classmethod
    def of(cls, own: Losses, bare: Losses) -> Increase:
        """Compare the losses of the same texts with the adapter and without it."""
        tokens = np.asarray(own[1], dtype=float)  # (N,)
        more = np.asarray(own[0], dtype=float) - np.asarray(bare[0], dtype=float)
        drawn = np.random.RandomState(SEED).randint(len(tokens), size=(RESAMPLES, len(tokens)))
        means = more[drawn].sum(1) / tokens[drawn].sum(1)
        low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        total = float(tokens.sum())
        return cls(
            increase=float(more.sum()) / total,
            low=float(low),
            high=float(high),
            loss=float(sum(own[0])) / total,
            base_loss=float(sum(bare[0])) / total,
            texts=len(tokens),
        )


def metrics_of(
    neutral: Increase, tasks: Mapping[str, Increase] | None = None, skipped: Mapping[str, str] | None = None
) -> Metrics:
    """The metrics of the split `forgetting`. `tasks` is the largest increase; 0 if there is no other task.

    Args:
        neutral: on neutral texts.
        tasks: by the version of another task; None: not measured yet.
        skipped: why a task could not be measured, by its version.
    """
    found: dict[str, MetricValue] = {"neutral": neutral.increase}
    found |= {f"neutral_{name}": value for name, value in vars(neutral).items() if name != "increase"}
    if tasks is not None:
        none = Increase(0.0, 0.0, 0.0, loss=0.0, base_loss=0.0, texts=0)
        worst = max(tasks.values(), key=lambda each: each.increase, default=none)
        found |= {"tasks": worst.increase, "tasks_low": worst.low, "tasks_high": worst.high}
        found["against"] = {version: vars(each) for version, each in tasks.items()}
        found["skipped"] = dict(skipped or {})
    return found


def is_defined(version: Version) -> bool:
    """Whether a version has forgetting: one that classifies answers through a head of its own."""
    return stored_task(version.task).generates


def on_neutral_texts(model: Model, tokenizer: Tokenizer) -> Increase:
    """The forgetting on neutral texts of the attached adapter."""
    sources, targets = [], []
    for paragraph in PARAGRAPHS:
        ids = torch.tensor(tokenizer(paragraph)["input_ids"], dtype=torch.long)[:MOST_TOKENS]
        lead = min(LEAD, len(ids) // 2)
        sources.append(ids[:lead])
        targets.append(ids[lead:])
    losses: list[Losses] = []
    for slot in (adapters.ATTACHED, adapters.BARE):
        sums = []
        with evaluation_mode(model, slot):
            for source, target in zip(sources, targets, strict=True):
                sums.append(_summed_loss(packed.target_states(model, [source], [target]), target, model))
        losses.append((sums, [len(target) for target in targets]))
    return Increase.of(*losses)


def _summed_loss(states: Tensor, target: Tensor, model: Model) -> float:
    """The loss of a text, summed over its T tokens. The logits of a large vocabulary are not in memory at once.

    Args:
        states: (T, D), each before its target token.
        target: (T,) int64.
    """
    most = packed.targets_at_once(model)
    parts = zip(torch.split(states, most), torch.split(target.to(states.device), most), strict=True)
    entropy = torch.nn.functional.cross_entropy
    return sum(
        float(entropy(packed.vocabulary_logits(model, each).float(), ids, reduction="sum")) for each, ids in parts
    )


def on_other_tasks(
    store: Store, version: Version, model: Model, tokenizer: Tokenizer, neutral: Increase, say: Say = silent
) -> Metrics:
    """The metrics with those of the other tasks of the store as well. model: with the version's adapter attached."""
    found, skipped = dict[str, Increase](), dict[str, str]()
    for other in other_generators(store, version):
        say(f"measuring forgetting on {other}")
        try:
            found[str(other)] = _on_task(store, other, model, tokenizer)
        except TurretError as error:  # its data may be gone, and then nothing can be measured on it
            skipped[str(other)] = str(error)
    return metrics_of(neutral, found, skipped)


def other_generators(store: Store, version: Version) -> list[Version]:
    """The version in use of every other name that generates on the same base, at most `MOST_TASKS`.

    Those with an alias come first, then the newest.
    """
    base = version.base.get("fingerprint")
    names = dict.fromkeys(each.name for each in store.list() if each.name != version.name and each.comparison is None)
    found = sorted((store.resolve(Reference(name)) for name in names), key=lambda each: each.created, reverse=True)
    fitting = [
        each
        for each in sorted(found, key=lambda each: not each.aliases)
        if each.base.get("fingerprint") == base and is_defined(each) and isinstance(each.lineage.get("recipe"), str)
    ]
    return fitting[:MOST_TASKS]


def is_current(measured: Metrics, expected: Sequence[Version]) -> bool:
    """Whether stored metrics of forgetting cover these versions of other tasks."""
    seen = {each for name in ("against", "skipped") if isinstance(part := measured.get(name), Mapping) for each in part}
    return "tasks" in measured and seen == {str(each) for each in expected}


def _on_task(store: Store, other: Version, model: Model, tokenizer: Tokenizer) -> Increase:
    """On test examples of another version's task, as that task writes its prompts."""
    recipe = Recipe.from_toml(str(other.lineage["recipe"]))
    dataset = read_dataset(store, recipe)
    examples = dataset.test or dataset.validation or dataset.train
    its_task = task_from_spec(other.task, tokenizer)
    items = EncodedRows(its_task, [examples[place] for place in spread_indices(len(examples), EXAMPLES)])
    own = example_losses(model, its_task, items)
    return Increase.of(own, example_losses(model, its_task, items, slot=adapters.BARE))
