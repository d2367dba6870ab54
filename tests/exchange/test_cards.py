"""The Python on a model card runs as it stands and answers as Turret does; exports have what it needs."""

from __future__ import annotations

import contextlib
import io
import json
import re
import tempfile
from pathlib import Path
from typing import Any

import peft
import pytest
import small_models
import torch
import transformers
from exchange.foreign import LABELS, TEXTS, chances, peft_folder

from turret import adapters, bases, bundles
from turret.tasks import task_from_spec
from turret.workspace import Workspace

BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def code_of(folder: Path, base: Path, text: str) -> str:
    """The Python of a card, with the three words that a reader fills in."""
    (code,) = BLOCK.findall((folder / "README.md").read_text())
    for word, given in (("BASE", base), ("FOLDER", folder)):
        code = code.replace(f"'{word}'", repr(str(given)))
    return code.replace("'a text of your own'", repr(text)).replace('"a text of your own"', repr(text))


def printed(code: str) -> str:
    """What the code prints. transformers warns of a head that the base lacks, which the adapter brings."""
    transformers.logging.set_verbosity_error()
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(code, "card", "exec"), {})  # the card's own code
    return out.getvalue().strip()


def written(workspace: Workspace, name: str, text: str, *, bare: bool = False) -> str:
    """The text of a stored writer, greedily and with a float32 base on every machine."""
    manifest = workspace.show(name)["manifest"]
    base = bases.load(manifest["base"]["id"], task="generate", dtype="float32")
    task: Any = task_from_spec(manifest["task"], base.tokenizer)
    if not bare:
        with tempfile.TemporaryDirectory() as folder:
            workspace.store.materialize(name, Path(folder))
            adapters.mount(base.model, bundles.read_bundle(folder), fingerprint=base.fingerprint)
    ids = task.encode_sources([text])[0].ids[None]
    with torch.no_grad():
        out = base.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **task.generation)
    return str(task.decode(out[0].tolist() if base.family.is_encoder_decoder else out[0, ids.shape[1] :].tolist()))


@pytest.fixture
def empty(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path / "store")


@pytest.mark.parametrize("form", ["peft", "merged"])
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_the_code_of_a_classifiers_card_prints_its_answer(
    form: Any, family: str, empty: Workspace, tmp_path: Path
) -> None:
    base = small_models.save_base(family, tmp_path / "base")
    settings = {"prefix_text": "film: ", "max_tokens": 12}
    folder = peft_folder(family, "classify", tmp_path / "peft")
    empty.import_adapter(folder, "x", base=str(base), labels=LABELS, settings=settings)
    empty.export("x", tmp_path / "out", form=form)
    for text in TEXTS:  # the second one is cut
        label, chance = printed(code_of(tmp_path / "out", base, text)).split()
        expected = chances(empty, "x", text)
        assert label == LABELS[int(expected.argmax())]
        assert float(chance) == pytest.approx(float(expected.max()), abs=1e-4)


def test_the_code_of_a_multi_label_card_prints_all_labels(empty: Workspace, tmp_path: Path) -> None:
    base = small_models.save_base("bert", tmp_path / "base")
    folder = peft_folder("bert", "classify", tmp_path / "peft")
    empty.import_adapter(folder, "x", base=str(base), labels=LABELS, settings={"multi_label": True})
    empty.export("x", tmp_path / "out")
    assert printed(code_of(tmp_path / "out", base, TEXTS[0])) == str(empty.predict("x", TEXTS[:1])[0]["label"])


@pytest.mark.parametrize(
    ("family", "form", "settings"),
    [
        ("llama", "peft", {"prefix_text": "summarize: "}),
        ("llama", "merged", {"max_tokens": 14}),
        ("gpt2", "peft", {"prefix_text": "write of {document} now"}),
        ("qwen3", "peft", {"chat_template": True, "prefix_text": "say: "}),
        ("t5", "peft", {"prefix_text": "summarize: "}),
        ("t5", "merged", {}),
    ],
)
def test_the_code_of_a_writers_card_prints_its_text(
    family: str, form: Any, settings: dict[str, Any], empty: Workspace, tmp_path: Path
) -> None:
    base = small_models.save_base(family, tmp_path / "base")
    settings = {"max_new_tokens": 8, **settings}
    folder = peft_folder(family, "generate", tmp_path / "peft")
    empty.import_adapter(folder, "x", base=str(base), task="summarize", settings=settings)
    found = empty.export("x", tmp_path / "out", form=form)
    assert found.warnings == []
    for text in TEXTS:
        assert printed(code_of(tmp_path / "out", base, text)) == written(empty, "x", text)


@pytest.mark.parametrize("family", ["qwen3", "llama"])  # with a chat template, and without one
def test_the_code_of_a_chats_card_prints_its_answer(family: str, empty: Workspace, tmp_path: Path) -> None:
    base = small_models.save_base(family, tmp_path / "base")
    folder = peft_folder(family, "generate", tmp_path / "peft")
    empty.import_adapter(folder, "x", base=str(base), task="chat", settings={"max_new_tokens": 8})
    empty.export("x", tmp_path / "out")
    for text in TEXTS:
        assert printed(code_of(tmp_path / "out", base, text)) == written(empty, "x", text)


def test_the_code_of_a_prefixs_card_uses_the_prefix(workspace: Workspace, llama: Path, tmp_path: Path) -> None:
    found = workspace.export("prefix", tmp_path / "out")
    (warning,) = found.warnings
    assert "PEFT's generate() leaves the prefix out" in warning
    assert "generate() leaves the prefix out" in (tmp_path / "out" / "README.md").read_text()
    for text in TEXTS:
        code = code_of(tmp_path / "out", llama, text).replace("range(128)", "range(8)")
        answer = written(workspace, "prefix", text)
        assert answer.startswith(printed(code))
        assert answer != written(workspace, "prefix", text, bare=True)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_peft_still_drops_a_prefix_in_generate(family: str, tmp_path: Path) -> None:
    """If this fails, PEFT has mended it: then take the warning of `Prefix.peft_generate` and the docs back."""
    torch.manual_seed(1)
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    model = peft.get_peft_model(small_models.build(family, "generate"), config).eval()
    bare = small_models.build(family, "generate")
    ids = torch.tensor([[5, 9, 30, 31, 32]])
    settings = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    with pytest.warns(FutureWarning, match="ignoring deprecated `past_key_values="):
        given = model.generate(input_ids=ids, **settings)
    right = ids
    for _ in range(6):  # forward has the prefix
        right = torch.cat([right, model(input_ids=right).logits[:, -1:].argmax(-1)], dim=1)
    assert given.tolist() != right.tolist()
    if family == "llama":  # GPT-2's positions move too, so that its text is neither
        assert given.tolist() == bare.generate(input_ids=ids, **settings).tolist()


def test_an_export_has_the_files_of_the_bases_tokenizer(workspace: Workspace, bert: Path, tmp_path: Path) -> None:
    found = workspace.export("sentiment", tmp_path / "out")
    names = [path.name for path in bert.iterdir() if "token" in path.name]
    assert {"tokenizer.json", "tokenizer_config.json"} <= set(names) <= set(found.files)
    for name in names:
        assert (tmp_path / "out" / name).read_bytes() == (bert / name).read_bytes()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer(TEXTS[0])["input_ids"] == small_models.tokenizer("bert")(TEXTS[0])["input_ids"]


def test_an_export_without_its_base_has_no_tokenizer_and_says_so(empty: Workspace, tmp_path: Path) -> None:
    base = small_models.save_base("bert", tmp_path / "base")
    empty.import_adapter(peft_folder("bert", "classify", tmp_path / "peft"), "x", base=str(base), labels=LABELS)
    base.rename(tmp_path / "moved")
    found = empty.export("x", tmp_path / "out")
    assert "tokenizer.json" not in found.files
    assert found.warnings[0].startswith("the tokenizer is not among the files: base ")
    text = TEXTS[0]
    label, _ = printed(code_of(tmp_path / "out", tmp_path / "moved", text)).split()  # the base's own tokenizer
    (tmp_path / "moved").rename(base)
    assert label == LABELS[int(chances(empty, "x", text).argmax())]


@pytest.mark.slow
def test_labels_and_templates_from_outside_are_literals_of_the_code(empty: Workspace, tmp_path: Path) -> None:
    base = small_models.save_base("bert", tmp_path / "base")
    nasty = ['"]; raise SystemExit #', "gut 😀", "```\n# Title"]
    empty.import_adapter(peft_folder("bert", "classify", tmp_path / "peft"), "x", base=str(base), labels=nasty)
    empty.export("x", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "\n# Title" not in card
    code = code_of(tmp_path / "out", base, TEXTS[0])
    assert code.isascii()
    scope: dict[str, Any] = {"print": lambda *_: None}
    exec(compile(code, "card", "exec"), scope)
    assert scope["labels"] == nasty
    assert scope["model"].config.id2label == dict(enumerate(nasty))


def test_a_merged_head_has_its_class_and_labels_on_the_card(empty: Workspace, tmp_path: Path) -> None:
    base = small_models.save_base("bert", tmp_path / "base")
    empty.import_adapter(peft_folder("bert", "classify", tmp_path / "peft"), "x", base=str(base), labels=LABELS)
    empty.export("x", tmp_path / "out", form="merged")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["id2label"] == {
        str(number): label for number, label in enumerate(LABELS)
    }
    assert "AutoModelForSequenceClassification" in (tmp_path / "out" / "README.md").read_text()
