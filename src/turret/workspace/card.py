"""The model card (README.md) of an exported version, as Markdown.

It states only what the store knows; the same version gives the same bytes. Text from outside is escaped, so that it
cannot become markup.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence

from turret.bundles import gguf_lora
from turret.errors import plainly
from turret.json_types import JsonMapping, JsonValue, part
from turret.methods import method_named
from turret.tasks import TASKS, stored_task
from turret.workspace.card_code import Place, inference, llama_cpp

FOLDER = "FOLDER"  # the place of a card that does not know where its files will be
LIBRARIES = {"merged": "transformers", "gguf": "gguf"}

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}", re.ASCII)


def card(
    shown: JsonMapping,
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
    base, task = part(manifest, "base"), part(manifest, "task")
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
                ("method", _code(_method(part(manifest, "method")))),
                ("task", _code(task.get("kind") or "not stated")),
                *([("labels", ", ".join(map(_code, task["labels"])))] if task.get("labels") else []),
                ("base", _code(base.get("id") or "not stated")),
                *([("base revision", _code(base["revision"]))] if base.get("revision") else []),
                *([("base quantization", _code(base["quantization"]))] if base.get("quantization") else []),
                ("base fingerprint", _code(base.get("fingerprint") or "not known")),
                ("licence of the base", _code(licence) if licence else "unknown: the base's files state none"),
                ("data digest", _code(part(manifest, "lineage").get("data") or "not known")),
            ],
        ),
        "## Metrics",
        _metrics(shown.get("metrics") or {}),
        "## How to load it",
        *_loading(shown, form, task_type, place, tokenizer=tokenizer),
        *(plainly(note) for note in notes),
    ]
    return "\n\n".join(parts) + "\n"


def _front(manifest: JsonMapping, form: str) -> Iterator[str]:
    """The YAML front matter that the Hub reads. Its values are written as JSON, which is YAML too."""
    base, kind = _on_hub(part(manifest, "base")), part(manifest, "task").get("kind")
    yield "---"
    yield f"library_name: {LIBRARIES.get(form, 'peft')}"
    if base is not None:
        yield f"base_model: {json.dumps(base)}"
    if kind in TASKS:
        yield f"pipeline_tag: {TASKS[kind].pipeline_tag}"
    yield "tags: [turret]"
    yield "---"


def _method(method: JsonMapping) -> str:
    words = [
        f"{key}={_short(value)}"
        for key, value in sorted(method.items())
        if key != "kind" and value is not None and value is not False
    ]
    return " ".join([str(method.get("kind") or "not stated"), *words])


def _short(value: JsonValue) -> str:
    text = ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _metrics(metrics: JsonMapping) -> str:
    rows = []
    for split in sorted(metrics):
        values = part(metrics, split)
        size = _examples(values)
        for name in sorted(values):
            value = values[name]
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                rows.append((_code(split), size, name, f"{value:.6g}"))
    if not rows:
        return "No metrics are stored with this version. `turret evaluate` measures it."
    return _table(("split", "examples", "metric", "value"), rows)


def _examples(values: JsonMapping) -> str:
    """The number of measured examples, if the metrics state it: the supports of single-label classes add up to it."""
    if isinstance(values.get("examples"), int):
        return str(values["examples"])
    classes = values.get("per_class")
    if isinstance(classes, Mapping) and classes and "micro_f1" not in values:
        return str(sum(int(row.get("support") or 0) for row in classes.values() if isinstance(row, Mapping)))
    return "not stored"


def _loading(shown: JsonMapping, form: str, task_type: str | None, place: str, *, tokenizer: bool) -> Iterator[str]:
    """How to load the files at `place`, and code that answers a text."""
    name = str(shown["version"]).partition("@")[0]
    base, task = part(shown["manifest"], "base"), part(shown["manifest"], "task")
    files = Place(
        place,
        _on_hub(base) or "BASE",
        place if tokenizer else _on_hub(base) or "BASE",
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
    if task_type is None:
        yield "PEFT does not load it: PEFT has no such method."
        return
    method = method_named(part(shown["manifest"], "method").get("kind"))
    if limitation := method.peft_cannot.get(task_type):
        yield limitation
        return
    dropped = method.peft_generate if stored_task(task).generates else None
    yield "With PEFT, which does not check the base:"
    if files.base == "BASE":
        yield f"(BASE is a folder or a Hub id that has the weights of {_code(base.get('id'))}.)"
    if dropped:
        yield dropped
    yield _block("python", inference(files, task, task_type, token_by_token=dropped is not None))


def _on_hub(base: JsonMapping) -> str | None:
    """The base's id if it is on the Hub. A folder can have the name of a Hub id, but it has no commit."""
    name, revision = str(base.get("id")), str(base.get("revision"))
    return name if _HUB_ID.fullmatch(name) and _COMMIT.fullmatch(revision) else None


def _block(language: str, text: str) -> str:
    return f"```{language}\n{text}\n```"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _code(value: JsonValue) -> str:
    """Text from outside as a code span on one line, which no character of it can end."""
    text = plainly(str(value)).replace("`", "'").replace("|", "/")
    return f"`{text[:200].strip() or ' '}`"
