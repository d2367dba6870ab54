"""The model card (README.md) of an exported version, as Markdown.

It states only what the store knows; the same version gives the same bytes. Text from outside is escaped, so that it
cannot become markup. In the Python of the card, it becomes literals in ASCII, so it cannot become code.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from turret.errors import plainly
from turret.json_types import Plain
from turret.manifest import BaseSpec, Manifest, MethodSpec, base_in, lineage_in, method_in, task_in
from turret.methods import Method, method_named
from turret.store.core import VersionFacts
from turret.tasks import TASKS, stored_task
from turret.tasks.embedding import HEADLESS
from turret.tasks.shapes import Metrics, SplitMetrics, TaskSpec

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
        from turret.bundles import gguf_lora  # imports torch

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
FOUR_BITS = (
    'four_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)'
)
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


def inference(place: Place, task: TaskSpec, task_type: str | None, *, token_by_token: bool = False) -> str:
    """Python that answers one text.

    Args:
        task: as in a manifest.
        task_type: PEFT's name of the task.
        token_by_token: PEFT's `generate()` does not use the adapter, so the model is called for each token.
    """
    auto = AUTO.get(str(task_type), "AutoModel")
    lines = ["import torch"]
    lines += [] if place.merged else ["from peft import PeftModel"]
    four_bits = place.four_bits and not place.merged
    lines += [f"from transformers import {auto}, AutoTokenizer{', BitsAndBytesConfig' if four_bits else ''}", ""]
    lines += [FOUR_BITS] if four_bits else []
    labels = task.get("labels")
    names = [str(label) for label in labels] if isinstance(labels, list) else []
    outputs = stored_task(task).num_labels(names)  # of the head; None: there is none
    named = len(names) == outputs  # every output is the score of a label
    lines += [f"labels = {names!a}"] if named else []
    lines += [f"tokenizer = AutoTokenizer.from_pretrained({place.tokenizer!a})"]
    lines += _model(place, auto, outputs, named)
    lines += ['text = "a text of your own"']
    if outputs is not None or task_type in ("SEQ_CLS", HEADLESS):
        lines += _classify(task)
    elif task.get("family_kind") == "encoder-decoder":
        lines += _encoder_decoder(task)
    else:
        lines += _decoder(task, token_by_token)
    return "\n".join(lines)


def llama_cpp(path: str, task: TaskSpec) -> str:
    """Python that answers one text with llama-cpp-python. path: of the GGUF file of the adapter."""
    most = _generation(task).get("max_new_tokens", 128)
    lines = [
        "from llama_cpp import Llama",
        "",
        f'model = Llama("BASE.gguf", lora_path={path!a}, n_ctx=2048, verbose=False)',
        'text = "a text of your own"',
    ]
    if _text(task, "template") == CHAT:
        lines += [
            'messages = [{"role": "user", "content": text}]',
            f"answer = model.create_chat_completion(messages, max_tokens={most}, temperature=0)",
            'print(answer["choices"][0]["message"]["content"].strip())',
        ]
    else:
        head, tail = _template(task)
        lines += [
            f"prompt = {head!a} + text + {tail!a}",
            f'print(model(prompt, max_tokens={most}, temperature=0)["choices"][0]["text"].strip())',
        ]
    return "\n".join(lines)


def _model(place: Place, auto: str, outputs: int | None, named: bool) -> Iterator[str]:
    if place.merged:
        yield f"model = {auto}.from_pretrained({place.adapter!a}).eval()"
        return
    kept = ", quantization_config=four_bits" if place.four_bits else ""
    if outputs is not None:
        yield f"base = {auto}.from_pretrained("
        yield f"    {place.base!a},"
        if named:
            yield "    id2label=dict(enumerate(labels)),"
            yield "    label2id={label: number for number, label in enumerate(labels)},"
        else:
            yield f"    num_labels={outputs},"
        yield "    ignore_mismatched_sizes=True,  # the head comes with the adapter"
        if kept:
            yield "    quantization_config=four_bits,"
        yield ")"
    else:
        yield f"base = {auto}.from_pretrained({place.base!a}{kept})"
    yield f"model = PeftModel.from_pretrained(base, {place.adapter!a}).eval()"


def _classify(task: TaskSpec) -> Iterator[str]:
    text = f"{_text(task, 'prefix_text')!a} + text" if _text(task, "prefix_text") else "text"
    if task.get("pairs"):
        yield 'text_pair = "a second text"'
        text += ", text_pair"
    yield f'inputs = tokenizer({text}, truncation=True, max_length={_most(task)}, return_tensors="pt")'
    yield "with torch.no_grad():"
    headless = stored_task(task).peft_type(encoder_decoder=False) == HEADLESS
    yield f"    {'states = model(**inputs).last_hidden_state[0]' if headless else 'logits = model(**inputs).logits[0]'}"
    yield stored_task(task).print_line(task)


def _decoder(task: TaskSpec, token_by_token: bool) -> Iterator[str]:
    head, tail = _template(task)
    most, template = _most(task), _text(task, "template")
    if template == CHAT:
        yield 'messages = [{"role": "user", "content": text}]'
        yield "prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)"
        yield 'ids = torch.tensor([tokenizer(prompt, add_special_tokens=False)["input_ids"]])'
    elif template == PLAIN_CHAT:
        yield f'ids = torch.tensor([tokenizer({head!a} + text + {tail!a})["input_ids"]])'
    elif task.get("chat_template"):  # turns and words are tokenized apart; the turns may have the first special token
        words = _text(task, "prefix_text").partition(SLOT)[0]
        words = words if head.endswith(words) else ""
        yield f"turns, tail = {head.removesuffix(words)!a}, {tail!a}"
        yield f"words = {words!a} + text.strip()"
        yield "special = not turns.startswith(tokenizer.bos_token or chr(0))"
        yield 'before = tokenizer(turns, add_special_tokens=special)["input_ids"]'
        yield 'before += tokenizer(words, add_special_tokens=False, split_special_tokens=True)["input_ids"]'
        yield from _cut_end_lines(most)
    else:
        yield f"head, tail = {head!a}, {tail!a}"
        yield f'before = tokenizer(head + text{".rstrip()" if tail else ""})["input_ids"]'
        yield from _cut_end_lines(most)
    yield "start = ids.shape[1]"
    settings = _generation(task)
    if token_by_token:
        yield f"for _ in range({settings.get('max_new_tokens', 128)}):"
        yield "    with torch.no_grad():"
        yield "        token = model(input_ids=ids).logits[:, -1].argmax(-1, keepdim=True)"
        yield f"    if int(token) == {settings.get('eos_token_id', 'tokenizer.eos_token_id')}:"
        yield "        break"
        yield "    ids = torch.cat([ids, token], dim=1)"
    else:
        yield f"ids = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids){_words(settings)})"
    yield "print(tokenizer.decode(ids[0, start:], skip_special_tokens=True).strip())"


def _cut_end_lines(most: int) -> Iterator[str]:
    """A text that is too long loses its end, and never the template's."""
    yield 'after = tokenizer(tail, add_special_tokens=False)["input_ids"]'
    yield f"ids = torch.tensor([before[: {most} - len(after)] + after])"


def _encoder_decoder(task: TaskSpec) -> Iterator[str]:
    head, tail = _template(task)
    parts = " + ".join(part for part in (head and ascii(head), "text", tail and ascii(tail)) if part)
    yield f'ids = torch.tensor([tokenizer({parts}, truncation=True, max_length={_most(task)})["input_ids"]])'
    yield f"ids = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids){_words(_generation(task))})"
    yield "print(tokenizer.decode(ids[0], skip_special_tokens=True).strip())"


def _template(task: TaskSpec) -> tuple[str, str]:
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


def _words(settings: Mapping[str, float]) -> str:
    return "".join(f", {key}={value!r}" for key, value in settings.items())


def _text(task: TaskSpec, key: str) -> str:
    value = task.get(key)
    return value if isinstance(value, str) else ""


def _most(task: TaskSpec) -> int:
    value = task.get("max_tokens")
    return value if isinstance(value, int) else 256


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
