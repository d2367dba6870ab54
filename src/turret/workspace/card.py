"""The model card (README.md) of an exported version, as Markdown.

It states only what the store knows; the same version gives the same bytes. Text from outside is escaped, so that it
cannot become markup. In the Python of the card, it becomes literals in ASCII, so it cannot become code.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from turret.errors import printable
from turret.json_types import Plain
from turret.manifest import BaseSpec, Manifest, MethodSpec, base_in, lineage_in, method_in, task_in
from turret.methods import Method, method_named
from turret.store.core import VersionFacts
from turret.tasks import TASKS, stored_task
from turret.tasks.embedding import HEADLESS
from turret.tasks.shapes import Metrics, SplitMetrics, TaskSpec, numbers_in

FOLDER = "FOLDER"  # the place of a card that does not know where its files will be


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
    base, method, task = base_in(manifest), method_in(manifest), task_in(manifest)
    hub_base = on_hub_id(base)
    found = hub_base or "BASE"
    files = Place(place, found, place if tokenizer else found, form == "merged", bool(base.get("quantization")))
    code: str | None
    words: Sequence[str] = ()
    if form == "merged":
        code = inference(files, task, task_type)
    elif form == "gguf":
        from turret.bundles import gguf_lora  # imports torch

        code = llama_cpp(f"{place}/{gguf_lora.FILE}" if place == FOLDER else gguf_lora.FILE, task)
    else:
        code, words = with_peft(method, task, task_type, files)
    return _load_template("card.md.j2").render(
        shown=shown,
        name=str(shown["version"]).partition("@")[0],
        base=base,
        hub_base=hub_base,
        method=_method(method),
        task=task,
        pipeline_tag=TASKS[task["kind"]].pipeline_tag if task.get("kind") in TASKS else None,
        licence=licence,
        data=lineage_in(manifest).get("data"),
        metrics=list(_metrics(shown.get("metrics") or {})),
        form=form,
        files=files,
        code=code,
        words=words,
        notes=notes,
    )


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


def _metrics(metrics: SplitMetrics) -> Iterator[tuple[str, str, str, str]]:
    """The split, the number of its examples, the name and the value of each number."""
    for split in sorted(metrics):
        values = metrics[split]
        for name, value in sorted(numbers_in(values).items()):
            yield split, _examples(values), name, f"{value:.6g}"


def _examples(values: Metrics) -> str:
    """The number of measured examples, if the metrics state it: the supports of single-label classes add up to it."""
    if isinstance(values.get("examples"), int):
        return str(values["examples"])
    classes = values.get("per_class")
    if isinstance(classes, Mapping) and classes and not {"micro_f1", "per_question"} & values.keys():
        return str(sum(int(row.get("support") or 0) for row in classes.values() if isinstance(row, Mapping)))
    return "not stored"


def _code(value: Plain) -> str:
    """Text from outside as a code span on one line, which no character of it can end."""
    text = printable(str(value)).replace("`", "'").replace("|", "/")
    return f"`{text[:200].strip() or ' '}`"


@cache
def _load_template(name: str) -> Template:
    """A template of this package."""
    templates = Environment(loader=PackageLoader("turret.workspace", "."), undefined=StrictUndefined, trim_blocks=True)
    templates.filters |= {"code": _code, "literal": ascii, "plainly": printable}
    templates.globals |= {"FOLDER": FOLDER, "CHAT": CHAT, "PLAIN_CHAT": PLAIN_CHAT, "SLOT": SLOT}
    return templates.get_template(name)


# --- its Python -------------------------------------------------------------------------------------------------------


_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}", re.ASCII)
AUTO = {  # by PEFT's task_type
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
}
GENERATION = ("max_new_tokens", "num_beams", "do_sample", "eos_token_id", "pad_token_id")
SLOT = "{document}"
CHAT = "base"  # the template of conversations that the base's own chat template writes
PLAIN_CHAT = "plain"  # the template of those on a base that has none
PLAIN_TURNS = ("### User:\n", "\n\n### Assistant:\n")


@dataclass(frozen=True)
class Place:
    """Where the code of a card finds the files."""

    adapter: str  # a folder or a Hub id
    base: str  # a Hub id, or the word BASE
    tokenizer: str
    merged: bool = False  # the adapter is in the weights, and the base is not needed
    four_bits: bool = False  # the base's linear layers were kept in 4 bits during training


def inference(files: Place, task: TaskSpec, task_type: str | None, *, token_by_token: bool = False) -> str:
    """Python that answers one text.

    Args:
        task: as in a manifest.
        task_type: PEFT's name of the task.
        token_by_token: PEFT's `generate()` does not use the adapter, so the model is called for each token.
    """
    kind, labels, most = stored_task(task), task.get("labels"), task.get("max_tokens")
    names = [str(label) for label in labels] if isinstance(labels, list) else []
    outputs = kind.num_labels(names)  # of the head; None: there is none
    classifies = outputs is not None or task_type in ("SEQ_CLS", HEADLESS)
    return _render_code(
        "inference.py.j2",
        task,
        files=files,
        auto=AUTO.get(str(task_type), "AutoModel"),
        labels=names if len(names) == outputs else None,  # if every output is the score of a label
        outputs=outputs,
        classifies=classifies,
        headless=kind.peft_type(encoder_decoder=False) == HEADLESS,
        print_line=kind.print_line(task) if classifies else None,
        prefix=_text(task, "prefix_text"),
        most=most if isinstance(most, int) else 256,
        token_by_token=token_by_token,
    )


def llama_cpp(path: str, task: TaskSpec) -> str:
    """Python that answers one text with llama-cpp-python. path: of the GGUF file of the adapter."""
    return _render_code("llama_cpp.py.j2", task, path=path)


def _render_code(template: str, task: TaskSpec, **values: Place | Plain) -> str:
    head, tail = _turns(task)
    shared = {"task": task, "template": _text(task, "template"), "head": head, "tail": tail}
    return _load_template(template).render(**shared, settings=_generation(task), **values).removesuffix("\n")


def _turns(task: TaskSpec) -> tuple[str, str]:
    """What stands before and after the text."""
    template = _text(task, "template")
    if template == PLAIN_CHAT:
        return PLAIN_TURNS
    head, _, tail = (template or SLOT).partition(SLOT)
    return head, tail


def _generation(task: TaskSpec) -> dict[str, float]:
    found = task.get("generation")
    known: Mapping[str, object] = found if isinstance(found, dict) else {}
    return {key: value for key in GENERATION if isinstance(value := known.get(key), (int, float))}


def _text(task: TaskSpec, key: str) -> str:
    value = task.get(key)
    return value if isinstance(value, str) else ""


def with_peft(
    method: MethodSpec, task: TaskSpec, task_type: str | None, files: Place
) -> tuple[str | None, Sequence[str]]:
    """Python that answers one text with PEFT, or None, and sentences that say why not, or what PEFT leaves out.

    Args:
        method: as in a manifest, and `task`.
        task_type: PEFT's name of the task; None: PEFT has no such method.
    """
    if task_type is None:
        return None, ["PEFT does not load it: PEFT has no such method."]
    kind = method_named(method.get("kind"))
    if limitation := kind.peft_cannot.get(task_type):
        return None, [limitation]
    dropped = dropped_by_peft(kind, task)
    return inference(files, task, task_type, token_by_token=dropped is not None), [dropped] if dropped else []


def exported_with_peft(manifest: Manifest, folder: str) -> tuple[str | None, Sequence[str]]:
    """As `with_peft`, for a version that `turret export` wrote to a folder. It opens no file of the version."""
    base, method, task = base_in(manifest), method_in(manifest), task_in(manifest)
    named = method_named(method.get("kind")).peft_name or method.get("peft_type")
    task_type = stored_task(task).peft_type(encoder_decoder=task.get("family_kind") == "encoder-decoder")
    hub = on_hub_id(base)
    files = Place(folder, hub or "BASE", folder, four_bits=bool(base.get("quantization")))
    try:
        code, words = with_peft(method, task, task_type if named else None, files)
    except (KeyError, TypeError, ValueError):  # a bundle from elsewhere
        return None, ["Its manifest does not describe the whole task."]
    if code is not None and hub is None:
        words = [f"BASE is a folder or a Hub id that has the weights of {base.get('id')}.", *words]
    return code, words


def dropped_by_peft(method: type[Method], task: TaskSpec) -> str | None:
    """What PEFT's `generate()` leaves out of an adapter, in a sentence; None if it uses all of it."""
    return method.peft_generate if stored_task(task).generates else None


def on_hub_id(base: BaseSpec) -> str | None:
    """The base's id if it is on the Hub. A folder can have the name of a Hub id, but it has no commit."""
    name, revision = str(base.get("id")), str(base.get("revision"))
    return name if _HUB_ID.fullmatch(name) and _COMMIT.fullmatch(revision) else None
