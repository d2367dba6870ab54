"""Questions without training: the probabilities of labels equal those of transformers' own models."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import small_models
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from turret import adapters, bases
from turret.cli.main import run
from turret.data.dataset import read_dataset
from turret.engine import Engine
from turret.engine.request import Limits
from turret.engine.sampling_params import SamplingParams
from turret.engine.untrained import SCALE, ByWords, Question, decide
from turret.errors import AdapterError, BaseModelError, DataError, NotFound, TurretError
from turret.methods import LoRA
from turret.recipe import Recipe
from turret.tasks import schemas
from turret.tasks.chat import Chat
from turret.workspace import Workspace

QUESTION = Question(("film", "bank story", "fox"), "What is it about?", {"fox": "a quick animal"})
TEXTS = ["a great film", "the quick fox is lazy and boring", ""]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_models.save_base("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_models.save_base("bert", tmp_path_factory.mktemp("bert"))


def log_probabilities(model: Any, known: Any, question: Question, text: str) -> list[float]:
    """Of each label after the prompt, by one forward pass of transformers for each, with the plain template."""
    found = []
    for label in question.labels:
        start = f"### User:\n{question.prompt(text)}\n\n### Assistant:\n"
        prompt = known(start)["input_ids"]
        answer = [*known(start + label)["input_ids"][len(prompt) :], known.eos_token_id]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[*prompt, *answer]])).logits[0]
        chances = logits.double().log_softmax(-1)[len(prompt) - 1 : -1]
        found.append(float(chances.gather(1, torch.tensor(answer)[:, None]).sum()))
    return found


def softmax(scores: Sequence[float]) -> list[float]:
    return torch.tensor(scores, dtype=torch.float64).softmax(0).tolist()


@pytest.mark.parametrize("prior", [False, True])
def test_a_decoder_answers_with_the_probabilities_of_its_own_forward_pass(llama: Path, prior: bool) -> None:
    with Engine(bases.load(str(llama), dtype="float32"), None) as engine:
        found = decide(engine, QUESTION, TEXTS, prior=prior)
    model, known = (
        AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32),
        AutoTokenizer.from_pretrained(llama),
    )
    empty = log_probabilities(model, known, QUESTION, "")
    for text, own in zip(TEXTS, found, strict=True):
        scores = log_probabilities(model, known, QUESTION, text)
        assert own.label_mass == pytest.approx(sum(map(math.exp, scores)), abs=1e-4, rel=1e-3)
        divided = [score - before for score, before in zip(scores, empty, strict=True)] if prior else scores
        assert list(own.probabilities.values()) == pytest.approx(softmax(divided), abs=1e-4)
        assert own.label == max(own.probabilities, key=own.probabilities.__getitem__)
        assert own.as_json()["untrained"] is True
    if prior:
        assert list(found[2].probabilities.values()) == pytest.approx([1 / 3] * 3, abs=1e-6), "of the empty text"
    else:
        assert max(abs(each - 1 / 3) for each in found[2].probabilities.values()) > 1e-3, "the control"


def test_an_adapter_changes_what_a_decoder_says_and_its_template_is_used(llama: Path) -> None:
    base = bases.load(str(llama), dtype="float32")
    method = LoRA(r=2, lora_alpha=16, init_lora_weights=False)
    model = bases.load(str(llama), dtype="float32").model
    adapters.attach(model, method, generator=torch.Generator().manual_seed(1))
    model.eval()
    tensors = adapters.extract(model)[0]
    with Engine(base, None) as engine:
        alone = decide(engine, QUESTION, TEXTS[:1])
        task = Chat(base.tokenizer, 200, 40)
        named = engine.hold("own", 1, adapters.Adapter(method, tensors, {}, base.info, task.spec()))
        changed = decide(engine, QUESTION, TEXTS[:1], named, task)
    with torch.no_grad():
        scores = log_probabilities(model, AutoTokenizer.from_pretrained(llama), QUESTION, TEXTS[0])
    assert list(changed[0].probabilities.values()) == pytest.approx(softmax(scores), abs=1e-4)
    assert changed[0].probabilities != pytest.approx(alone[0].probabilities, abs=1e-3), "the control"


@pytest.mark.parametrize("prior", [False, True])
def test_an_encoder_answers_by_the_cosine_to_descriptions(bert: Path, prior: bool) -> None:
    with Engine(bases.load(str(bert), dtype="float32"), None, Limits(max_tokens=64)) as engine:
        found = decide(engine, QUESTION, [*TEXTS, "a fox " * 400], prior=prior)
    model, known = AutoModel.from_pretrained(bert, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(bert)

    def vector(text: str) -> torch.Tensor:
        ids = known(text, return_tensors="pt", truncation=True, max_length=engine.longest)
        with torch.no_grad():
            return torch.nn.functional.normalize(model(**ids).last_hidden_state[0].mean(0), dim=0).double()

    labels = [vector(text) for text in ("film", "bank story", "a quick animal")]
    empty = [float(vector("") @ each) for each in labels]
    for text, own in zip([*TEXTS, "a fox " * 400], found, strict=True):
        cosines = [float(vector(text) @ each) for each in labels]
        scores = [SCALE * (one - prior * other) for one, other in zip(cosines, empty, strict=True)]
        assert list(own.probabilities.values()) == pytest.approx(softmax(scores), abs=1e-4)
        assert own.label_mass is None


def test_scored_is_the_log_probability_of_tokens_that_echo_reports(llama: Path) -> None:
    with Engine(bases.load(str(llama), dtype="float32"), None) as engine:
        ids = [5, 9, 30, 12, 7, 41]
        whole = engine.submit("generate", ids, None, SamplingParams(echo=True, max_tokens=0, logprobs=0)).result()
        for count in (1, 3, 5):
            own = engine.submit("generate", ids[:-count], None, SamplingParams(scored=(tuple(ids[-count:]),))).result()
            expected = sum(each["logprob"] for each in whole["logprobs"][-count:])
            assert own == {"logprobs": [pytest.approx(expected, abs=1e-5)], "prompt_tokens": 6}
        most = engine.longest
        wrong: list[tuple[Any, tuple[tuple[int, ...], ...], str]] = [
            ("a fox", ((1,),), "scored needs a prompt of token ids"),
            (ids, ((1,) * most,), f"this engine takes at most {most}"),
            (ids, ((1,) * (most // 2),) * 3, f"this engine takes at most {most}"),
            (ids, ((10**6,),), "needs one or more integers from 0"),
        ]
        for text, answers, said in wrong:
            with pytest.raises(TurretError, match=said):
                engine.submit("generate", text, None, SamplingParams(scored=answers)).result()
    for nothing in ((), ((),)):
        with pytest.raises(DataError, match="expected one or more answers"):
            SamplingParams(scored=nothing)


@pytest.mark.parametrize(
    ("labels", "more", "said"),
    [
        (["a"], {}, "a question needs 2 to 400 labels"),
        ("ab", {}, "a question needs 2 to 400 labels"),
        (["a", "a"], {}, "must be different"),
        (["a", "b"], {"descriptions": {"c": "x"}}, "'c' is described and is no label"),
    ],
)
def test_a_wrong_question_is_one_line(labels: Any, more: Any, said: str) -> None:
    with pytest.raises(DataError, match=said):
        Question(labels, **more)


def test_a_question_that_leaves_no_room_is_refused_and_a_much_longer_one_unread(llama: Path, monkeypatch: Any) -> None:
    read: list[int] = []
    encode = ByWords._encode_text
    monkeypatch.setattr(ByWords, "_encode_text", lambda self, text: read.append(1) or encode(self, text))
    with Engine(bases.load(str(llama)), None, limits=Limits(max_tokens=128)) as engine:
        assert decide(engine, Question(("film", "fox"), "which? " * 5), ["a fox"])
        assert read
        for words, tried in ((200, 1), (100_000, 0)):
            read.clear()
            with pytest.raises(
                DataError, match=r"the question has [\d,]+ characters beside the text, more than .* has room"
            ):
                decide(engine, Question(("film", "fox"), "which? " * words), ["a fox"])
            assert len(read) == tried


def test_a_base_that_cannot_is_one_line(tmp_path: Path) -> None:
    base = bases.load(str(small_models.save_base("t5", tmp_path / "t5")), dtype="float32")
    with Engine(base, None) as engine, pytest.raises(BaseModelError, match="is an encoder-decoder: ask a decoder"):
        decide(engine, QUESTION, TEXTS)


@pytest.mark.slow
def test_the_command_and_python_give_one_answer(llama: Path, bert: Path, tmp_path: Path, capsys: Any) -> None:
    store = ["--store", str(tmp_path / "store")]
    options = ["--label", "film", "--label", "fox=a quick animal", "--instructions", "Which?", "--prior", *store]
    workspace = Workspace(tmp_path / "store")
    for base in (llama, bert):
        assert run(["decide", str(base), *TEXTS[:2], *options, "--json"]) == 0
        said = json.loads(capsys.readouterr().out)
        found = workspace.decide(
            str(base),
            TEXTS[:2],
            ["film", "fox"],
            instructions="Which?",
            descriptions={"fox": "a quick animal"},
            prior=True,
        )
        assert said == [each.as_json() for each in found]
        assert all(each["untrained"] and ("label_mass" in each) == (base == llama) for each in said)
    assert run(["decide", str(llama), TEXTS[0], *options]) == 0
    assert "untrained: nothing was learnt" in capsys.readouterr().out

    rows = [{"text": f"{word} {n}", "label": word} for n in range(20) for word in ("film", "fox")]
    train: Any = {"epochs": 1, "lr": 1e-3}
    workspace.train(Recipe(name="c", base=str(bert), data={"source": rows}, train=train))
    with pytest.raises(AdapterError, match="c@1 was trained for its own question"):
        workspace.decide("c", TEXTS[:1], ["film", "fox"])
    chats = [{"prompt": f"a fox {n}", "completion": "film"} for n in range(40)]
    workspace.train(Recipe(name="g", base=str(llama), data={"source": chats}, train=train | {"epochs": 3, "lr": 1e-2}))
    (own,), (bare,) = (workspace.decide(each, TEXTS[:1], ["film", "fox"]) for each in ("g", str(llama)))
    assert own.probabilities["film"] > bare.probabilities["film"], "it has learnt to say film"
    with pytest.raises(NotFound):
        workspace.decide("nothing", TEXTS[:1], ["film", "fox"])


@pytest.mark.slow
def test_the_base_of_a_comparison_is_asked_in_the_same_way(llama: Path, tmp_path: Path) -> None:
    rows = [{"text": f"{word} {n}", "label": word} for n in range(30) for word in ("film", "fox")]
    workspace = Workspace(tmp_path)
    recipe = Recipe(name="c", base=str(llama), data={"source": rows, "test": 20}, train={"epochs": 1, "lr": 1e-3})
    found = workspace.compare(recipe, methods="base,head", against="head", seeds=1)
    (base,) = [row for row in found.rows if row.spec == "base"]
    test = read_dataset(recipe.data, schemas(recipe.task)).test
    own = workspace.decide(str(llama), [each.input for each in test], ["film", "fox"], prior=True)
    right = [each.label == example.label for each, example in zip(own, test, strict=True)]
    assert base.score.mean == pytest.approx(100 * sum(right) / len(right))
