"""The model card (README.md) of an exported version, as Markdown.

It states only what the store knows; the same version gives the same bytes. Text from outside is escaped, so that it
cannot become markup.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence

from turret.bundles import gguf_lora
from turret.errors import plainly
from turret.json_types import Plain
from turret.manifest import Manifest, MethodSpec, base_in, lineage_in, method_in, task_in
from turret.store.core import VersionFacts
from turret.tasks import TASKS
from turret.tasks.shapes import Metrics, SplitMetrics
from turret.workspace.card_code import Place, inference, llama_cpp, on_hub_id, with_peft

FOLDER = "FOLDER"  # the place of a card that does not know where its files will be
LIBRARIES = {"merged": "transformers", "gguf": "gguf"}


def card(
    shown: VersionFacts,
    licence: str | None,
    form: str,
    task_type: str | None,
    notes: Sequence[str],
    *,
    place: str = FOLDER,
    tokenizer: bool = True,
) -> str:
    """The text of the card.

    Args:
        shown: the version as `Store.show` returns it.
        licence: of the base, if known.
        form: peft, merged, vllm or gguf.
        task_type: PEFT's name of the task; None: PEFT does not load the adapter.
        notes: further paragraphs on how to load it.
        place: where the files are: a Hub id, or the word FOLDER.
        tokenizer: whether the base's tokenizer is among the files.
    """
    manifest = shown["manifest"]
    base, task = base_in(manifest), task_in(manifest)
    parts = [
        "\n".join(_front(manifest, form)),
        f"# {plainly(str(shown['version']))}",
        "An adapter for a frozen base model, exported by Turret."
        if form != "merged"
        else "A base model with an adapter in its weights, exported by Turret.",
        _table(
            ("what", "value"),
            [
                ("version", _code(shown["version"])),
                ("digest", _code(shown["digest"])),
                ("method", _code(_method(method_in(manifest)))),
                ("task", _code(task.get("kind") or "not stated")),
                *([("labels", ", ".join(map(_code, task["labels"])))] if task.get("labels") else []),
                ("base", _code(base.get("id") or "not stated")),
                *([("base revision", _code(base["revision"]))] if base.get("revision") else []),
                *([("base quantization", _code(base["quantization"]))] if base.get("quantization") else []),
                ("base fingerprint", _code(base.get("fingerprint") or "not known")),
                ("licence of the base", _code(licence) if licence else "unknown: the base's files state none"),
                ("data digest", _code(lineage_in(manifest).get("data") or "not known")),
            ],
        ),
        "## Metrics",
        _metrics(shown.get("metrics") or {}),
        "## How to load it",
        *_loading(shown, form, task_type, place, tokenizer=tokenizer),
        *(plainly(note) for note in notes),
    ]
    return "\n\n".join(parts) + "\n"


def _front(manifest: Manifest, form: str) -> Iterator[str]:
    """The YAML front matter that the Hub reads. Its values are written as JSON, which is YAML too."""
    base, kind = on_hub_id(base_in(manifest)), task_in(manifest).get("kind")
    yield "---"
    yield f"library_name: {LIBRARIES.get(form, 'peft')}"
    if base is not None:
        yield f"base_model: {json.dumps(base)}"
    if kind in TASKS:
        yield f"pipeline_tag: {TASKS[kind].pipeline_tag}"
    yield "tags: [turret]"
    yield "---"


def _method(method: MethodSpec) -> str:
    words = [
        f"{key}={_short(value)}"
        for key, value in sorted(method.items())
        if key != "kind" and value is not None and value is not False
    ]
    return " ".join([str(method.get("kind") or "not stated"), *words])


def _short(value: Plain) -> str:
    text = ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _metrics(metrics: SplitMetrics) -> str:
    rows = []
    for split in sorted(metrics):
        values = metrics[split]
        size = _examples(values)
        for name in sorted(values):
            value = values[name]
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                rows.append((_code(split), size, name, f"{value:.6g}"))
    if not rows:
        return "No metrics are stored with this version. `turret evaluate` measures it."
    return _table(("split", "examples", "metric", "value"), rows)


def _examples(values: Metrics) -> str:
    """The number of measured examples, if the metrics state it: the supports of single-label classes add up to it."""
    if isinstance(values.get("examples"), int):
        return str(values["examples"])
    classes = values.get("per_class")
    if isinstance(classes, Mapping) and classes and not {"micro_f1", "per_question"} & values.keys():
        return str(sum(int(row.get("support") or 0) for row in classes.values() if isinstance(row, Mapping)))
    return "not stored"


def _loading(shown: VersionFacts, form: str, task_type: str | None, place: str, *, tokenizer: bool) -> Iterator[str]:
    """How to load the files at `place`, and code that answers a text."""
    name = str(shown["version"]).partition("@")[0]
    base, task = base_in(shown["manifest"]), task_in(shown["manifest"])
    files = Place(
        place,
        on_hub_id(base) or "BASE",
        place if tokenizer else on_hub_id(base) or "BASE",
        form == "merged",
        bool(base.get("quantization")),
    )
    if form == "merged":
        yield "With transformers:"
        yield _block("python", inference(files, task, task_type))
        return
    if form == "gguf":
        yield "With llama.cpp (`--lora`), or with llama-cpp-python, on a GGUF file of the same base:"
        path = f"{place}/{gguf_lora.FILE}" if place == FOLDER else gguf_lora.FILE
        yield _block("python", llama_cpp(path, task))
        return
    yield "With Turret, which checks the base by its fingerprint:"
    brought = f"turret import {place} --name {name}" if place == FOLDER else f"turret pull {place} --name {name}"
    yield _block("console", f'{brought}\nturret predict {name} "a text"')
    code, words = with_peft(method_in(shown["manifest"]), task, task_type, files)
    if code is not None:
        yield "With PEFT, which does not check the base:"
        if files.base == "BASE":
            yield f"(BASE is a folder or a Hub id that has the weights of {_code(base.get('id'))}.)"
    yield from words
    if code is not None:
        yield _block("python", code)


def _block(language: str, text: str) -> str:
    return f"```{language}\n{text}\n```"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _code(value: Plain) -> str:
    """Text from outside as a code span on one line, which no character of it can end."""
    text = plainly(str(value)).replace("`", "'").replace("|", "/")
    return f"`{text[:200].strip() or ' '}`"
