"""The model card (README.md) of an exported version, as Markdown.

It states only what the store knows; the same version gives the same bytes. Text from outside is escaped, so that it
cannot become markup.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence

from turret.json_types import JsonMapping, JsonValue
from turret.methods import method_named
from turret.tasks import TASKS, stored_task

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}", re.ASCII)
_CLASSES = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
}


def card(shown: JsonMapping, licence: str | None, form: str, task_type: str | None, notes: Sequence[str]) -> str:
    """The text of the card.

    Args:
        shown: the version as `Store.show` returns it.
        licence: of the base, if known.
        form: peft, merged or vllm.
        task_type: PEFT's name of the task; None: PEFT does not load the adapter.
        notes: further paragraphs on how to load it.
    """
    manifest = shown["manifest"]
    base, task = _part(manifest, "base"), _part(manifest, "task")
    parts = [
        "\n".join(_front(manifest, form)),
        f"# {_plain(str(shown['version']))}",
        "An adapter for a frozen base model, exported by Turret."
        if form != "merged"
        else "A base model with an adapter in its weights, exported by Turret.",
        _table(
            ("what", "value"),
            [
                ("version", _code(shown["version"])),
                ("digest", _code(shown["digest"])),
                ("method", _code(_method(_part(manifest, "method")))),
                ("task", _code(task.get("kind") or "not stated")),
                *([("labels", ", ".join(map(_code, task["labels"])))] if task.get("labels") else []),
                ("base", _code(base.get("id") or "not stated")),
                *([("base revision", _code(base["revision"]))] if base.get("revision") else []),
                *([("base quantization", _code(base["quantization"]))] if base.get("quantization") else []),
                ("base fingerprint", _code(base.get("fingerprint") or "not known")),
                ("licence of the base", _code(licence) if licence else "unknown: the base's files state none"),
                ("data digest", _code(_part(manifest, "lineage").get("data") or "not known")),
            ],
        ),
        "## Metrics",
        _metrics(shown.get("metrics") or {}),
        "## How to load it",
        *_loading(shown, base, form, task_type),
        *(_plain(note) for note in notes),
    ]
    return "\n\n".join(parts) + "\n"


def _part(manifest: JsonMapping, key: str) -> JsonMapping:
    found = manifest.get(key)
    return found if isinstance(found, Mapping) else {}


def _front(manifest: JsonMapping, form: str) -> Iterator[str]:
    """The YAML front matter that the Hub reads. Its values are written as JSON, which is YAML too."""
    base, kind = _on_hub(_part(manifest, "base")), _part(manifest, "task").get("kind")
    yield "---"
    yield f"library_name: {'transformers' if form == 'merged' else 'peft'}"
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
        values = metrics[split] if isinstance(metrics[split], Mapping) else {}
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


def _loading(shown: JsonMapping, base: JsonMapping, form: str, task_type: str | None) -> Iterator[str]:
    name = str(shown["version"]).partition("@")[0]
    kind = _CLASSES.get(str(task_type), "AutoModel")
    if form == "merged":
        yield "With transformers:"
        lines = (
            f"from transformers import {kind}, AutoTokenizer",
            "",
            f'model = {kind}.from_pretrained("FOLDER")',
            'tokenizer = AutoTokenizer.from_pretrained("FOLDER")',
        )
        yield _block("python", "\n".join(lines))
        return
    yield "With Turret, which checks the base by its fingerprint:"
    yield _block("console", f'turret import FOLDER --name {name}\nturret predict {name} "a text"')
    if task_type is None:
        yield "PEFT does not load it: PEFT has no such method."
        return
    if limitation := method_named(_part(shown["manifest"], "method").get("kind")).peft_cannot.get(task_type):
        yield limitation
        return
    yield "With PEFT, which does not check the base:"
    yield from _peft(base, _part(shown["manifest"], "task"), kind)


def _on_hub(base: JsonMapping) -> str | None:
    """The base's id if it is on the Hub. A folder can have the name of a Hub id, but it has no commit."""
    name, revision = str(base.get("id")), str(base.get("revision"))
    return name if _HUB_ID.fullmatch(name) and _COMMIT.fullmatch(revision) else None


def _peft(base: JsonMapping, task: JsonMapping, kind: str) -> Iterator[str]:
    named = _on_hub(base) or "BASE"
    if named == "BASE":
        yield f"(BASE is a folder or a Hub id that has the weights of {_code(base.get('id'))}.)"
    labels = task.get("labels")
    size = stored_task(task).num_labels(labels if isinstance(labels, list) else ())
    shape = f", num_labels={size}" if size else ""
    lines = (
        "from peft import PeftModel",
        f"from transformers import {kind}",
        "",
        f'base = {kind}.from_pretrained("{named}"{shape})',
        'model = PeftModel.from_pretrained(base, "FOLDER")',
    )
    yield _block("python", "\n".join(lines))


def _block(language: str, text: str) -> str:
    return f"```{language}\n{text}\n```"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _code(value: JsonValue) -> str:
    """Text from outside as a code span on one line, which no character of it can end."""
    text = "".join(c if c.isprintable() else " " for c in str(value)).replace("`", "'").replace("|", "/")
    return f"`{text[:200].strip() or ' '}`"


def _plain(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in text)
