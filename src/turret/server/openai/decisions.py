"""`POST /v1/decisions` and `POST /v1/systemone`: many questions about one text, in OpenAI's and in vLLM's format.

`model` is a panel, whose questions each name an adapter, or one adapter. Every adapter reads the text once, and all of
them share passes. It may also be a base, which answers without training (`turret.engine.untrained`). Both formats
become `Asked`, and each `Verdict` is written in the format that asked.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal, TypeAlias

from pydantic import BaseModel, Field

from turret.engine import untrained
from turret.engine.request import Ask
from turret.errors import AdapterError, BadRequest, NotFound, quote, quote_all
from turret.json_types import JsonObject, Plain
from turret.server import limits
from turret.server.questions import Asker, Asking, PendingAnswers, Reply, abstaining, now, promise_of, prompt_tokens
from turret.server.routes import NO_EFFECT, USER, WHOLE, Model, Name, Text, User, View, router
from turret.store.panels import MOST_LABELS, MOST_QUESTIONS, Panel, decisions_of
from turret.tasks import Decision, QuestionType, label_probabilities
from turret.tasks.shapes import Answer

questions = router("infer")

# --- policy -----------------------------------------------------------------------------------------------------------
# Which adapter answers a question, how the values of a request are those of its labels, and what is decided.


Value = str | bool
ASKED_AS: dict[QuestionType, tuple[QuestionType, ...]] = {  # how a question of this type may be asked
    "predicate": ("predicate", "choice"),
    "choice": ("choice",),
    "score": ("score", "choice"),
}
Body: TypeAlias = "DecisionRequest | SystemRequest"  # prior: whether a base's answer to an empty text is divided out


@dataclass(frozen=True)
class Asked:
    """A question of a request.

    Args:
        values: the choices or levels, in its order; none for a predicate.
        instructions, descriptions: what is asked, and what each value means: a base reads it, an adapter does not.
    """

    name: str | None
    type: QuestionType
    values: tuple[Value, ...] = ()
    instructions: str = ""
    descriptions: Mapping[Value, str] = field(default_factory=dict)

    @property
    def decision(self) -> Decision:
        """The question as it was asked."""
        return Decision(self.type, tuple(map(str, self.values)))


@dataclass(frozen=True)
class Planned:
    """A question with the adapter that answers it.

    Args:
        model: the reference of the adapter.
        part: which of the adapter's questions it is; empty if the adapter answers one.
        labels: of the adapter, for each of the values; of a predicate false and true.
        threshold: the least probability of an answer; None: that of the promise of the version that answers.
    """

    asked: Asked
    model: str
    part: str
    labels: tuple[str, ...]
    threshold: float | None


@dataclass(frozen=True)
class Verdict:
    """The answer to one question.

    Args:
        probabilities: of each of the values, renormalised to a sum of 1.
        label_mass: the probability of the labels that were asked for, before that.
        complete: whether all labels of the adapter were asked for.
        best: the number of the value that is the adapter's answer; if that was not asked for, of the most probable one.
        confidence: the probability that the adapter gave to it.
        threshold: the least probability of an answer, of the question or of its version's promise; None: there is none.
        decided: whether the confidence reaches it.
        first: whether no label that was not asked for is more probable.
        untrained: whether a base answered, which learnt nothing for the question.
    """

    planned: Planned
    probabilities: tuple[float, ...]
    label_mass: float
    complete: bool
    best: int
    confidence: float
    threshold: float | None
    decided: bool
    first: bool
    version: str
    receipt: str
    untrained: bool = False


def plan(view: View, model: str, asked: Sequence[Asked]) -> tuple[Panel | None, list[Planned]]:
    """The panel, if the model is one, and the plan of every question; no plan for a base. Reads the store.

    Raises:
        NotFound: The model is neither a panel nor an adapter.
        AdapterError: The adapter decides nothing.
        BadRequest: A question does not fit; the error lists what would.
    """
    panel = view.workspace.panels.find(model)
    if panel is not None:
        return panel, [_of_panel(panel, each) for each in asked]
    if view.engines.is_base(model):
        return None, []
    try:
        version = view.workspace.resolve(view.aliases.exact(model))
    except NotFound as error:
        raise view.missing_model(model, error, panels=True) from None
    found, planned = decisions_of(version), []
    for each in asked:
        part = "" if "" in found else each.name or ""
        if part not in found:
            what = f"no question {quote(part, 40)}" if part else "a question has no name"
            raise BadRequest(f"{what}: {version} answers {quote_all(found, 160)}")
        decision = found[part]
        labels = _match_labels(each, decision, decision.type if decision.type != "choice" else None, str(version))
        planned.append(Planned(each, model, part, labels, None))
    return None, planned


def _of_panel(panel: Panel, asked: Asked) -> Planned:
    question = panel.question(asked.name)
    assert question.type is not None
    decision = Decision(question.type, question.labels)
    labels = _match_labels(asked, decision, question.type, f"panel {panel}")
    return Planned(asked, question.adapter, question.part, labels, question.threshold)


def _match_labels(asked: Asked, decision: Decision, type_: QuestionType | None, who: str) -> tuple[str, ...]:
    """The labels of the values of a question. type_: how it may be asked; None: in any way that its labels allow."""
    what = _named(asked)
    known = quote_all(decision.labels, 120)
    if type_ is not None and asked.type not in ASKED_AS[type_]:
        raise BadRequest(f"{what} is a {asked.type} here and a {type_} in {who}: ask it as one; its labels are {known}")
    if asked.type == "predicate":
        if decision.type != "predicate":
            raise BadRequest(
                f"{what} is a predicate, and {who} does not say which label is true: ask for a choice of {known}"
            )
        return decision.labels
    labels: list[str] = []
    for value in asked.values:
        label = decision.labels[value] if isinstance(value, bool) and decision.type == "predicate" else value
        if not isinstance(label, str) or label not in decision.labels:
            raise BadRequest(f"{what}: no label {quote(value, 40)}, {who} has {known}")
        _add_label(labels, label, what)
    if asked.decision.ordered and decision.ordered:
        places = [decision.labels.index(label) for label in labels]
        if places != sorted(places):
            raise BadRequest(f"{what}: the levels are not in their order, from the lowest to the highest: {known}")
    return tuple(labels)


def _named(asked: Asked) -> str:
    """How an error names a question."""
    return f"question {quote(asked.name, 40)}" if asked.name is not None else "the question"


def _add_label(labels: list[str], label: str, what: str) -> None:
    """Append the label of a value. Raises BadRequest if another value of the question has it. what: the question."""
    if label in labels:
        raise BadRequest(f"{what}: {quote(label, 40)} is asked for twice: give each value once")
    labels.append(label)


def judge(planned: Planned, answer: Answer, promised: float | None, version: str, receipt: str) -> Verdict:
    """What an answer decides. Raises AdapterError if a label is missing.

    The answer's own label counts, as for a promise: of levels it is the median, which may not be the most probable one.

    Args:
        answer: of the adapter, to one text.
        promised: the threshold of the version's promise.
    """
    found = label_probabilities(answer, planned.part)
    missing = [label for label in planned.labels if label not in found]
    if missing:
        raise AdapterError(
            f"{version} has no label {quote(missing[0], 40)}, it has {quote_all(found, 100)}: make a new version of "
            "the panel, or ask for its labels"
        )
    own = [float(found[label]) for label in planned.labels]
    mass = sum(own)
    likeliest = max(range(len(own)), key=own.__getitem__)
    said = None if planned.part else answer.get("label")
    best = planned.labels.index(said) if said in planned.labels else likeliest
    threshold = promised if planned.threshold is None else planned.threshold
    return Verdict(
        planned,
        tuple(each / mass for each in own) if mass > 0 else tuple(0.0 for _ in own),
        min(1.0, mass),
        len(own) == len(found),
        best,
        own[best],
        threshold,
        mass > 0 and (threshold is None or own[best] >= threshold),
        own[likeliest] >= max(found.values()),
        version,
        receipt,
    )


async def decide(asker: Asker, body: Body, text: str, asked: Sequence[Asked]) -> tuple[str, int, list[Verdict]]:
    """The name of the panel, version or base, the tokens that were read, and a verdict for each question."""
    view = asker.view
    panel, planned = await view.asking(plan, view, body.model, asked)
    if not planned:
        return await _by_the_base(asker, body, text, asked)
    models = list(dict.fromkeys(each.model for each in planned))
    async with asker.ask_each("classify", body, models, text) as pending:
        by_model = dict(zip(models, pending, strict=True))
        promised = {model: await _promised_threshold(view, each) for model, each in by_model.items()}
        verdicts = [_verdict(each, by_model[each.model], promised[each.model]) for each in planned]
    asker.response.headers.update(_headers(panel, pending))
    tokens = sum(prompt_tokens(answer) for each in pending for answer in each.complete)
    name = str(panel) if panel is not None else pending[0].model or body.model
    return name, tokens, verdicts


async def _by_the_base(asker: Asker, body: Body, text: str, asked: Sequence[Asked]) -> tuple[str, int, list[Verdict]]:
    """The same without training. A decoder is asked once for each question, and all rows are submitted at once."""
    ways = await asker.view.parsing(_ways, asker.view, body, text, asked)
    asks = [ask for _, *parts in ways for part in parts for ask in part]
    if len(asks) > limits.MOST_INPUTS:
        raise BadRequest(f"these questions need {len(asks)} rows of a base, at most {limits.MOST_INPUTS}: ask fewer")
    rows, options = [ask.text for ask in asks], [ask.options for ask in asks]
    pending, answers = await asker.answers(asks[0].kind, body, rows, options)
    left, verdicts = iter(answers), []
    for own, (way, *parts) in zip(asked, ways, strict=True):
        first, about, empty = ([next(left) for _ in part] for part in parts)
        found = untrained.combine_answers(way, first, about, empty or None)
        verdicts.append(_untrained_verdict(own, found, body.model, pending.id))
    return body.model, sum(map(prompt_tokens, answers)), verdicts


Asks = Sequence[Ask]


def _ways(view: View, body: Body, text: str, asked: Sequence[Asked]) -> list[tuple[untrained.Way, Asks, Asks, Asks]]:
    """How the base answers each question, what it is asked first, about the text, and about an empty one."""
    engine, found = view.engines.base_of(body.model).engine, []
    for each in asked:
        labels: list[str] = []
        for value in each.values or (False, True):
            _add_label(labels, _label(value), _named(each))
        described = {_label(value): said for value, said in each.descriptions.items()}
        question = untrained.Question(labels, each.instructions, described)
        way = untrained.way_of(engine.base, question, room=engine.longest)
        found.append((way, way.first(), way.about(text), way.about(untrained.EMPTY) if body.prior else ()))
    return found


def _label(value: Value) -> str:
    return ("no", "yes")[value] if isinstance(value, bool) else value


def _untrained_verdict(asked: Asked, found: untrained.Untrained, model: str, receipt: str) -> Verdict:
    """A verdict that is always decided: a base has no threshold."""
    chances, mass = tuple(found.probabilities.values()), found.label_mass
    best = max(range(len(chances)), key=chances.__getitem__)
    return Verdict(
        Planned(asked, model, "", tuple(found.probabilities), None),
        chances,
        1.0 if mass is None else mass,
        mass is None,
        best,
        chances[best],
        None,
        True,
        mass is None or mass * chances[best] >= 1 - mass,  # else what is not a label may be more probable
        model,
        receipt,
        untrained=True,
    )


async def _promised_threshold(view: View, pending: PendingAnswers) -> float | None:
    """The threshold of the promise of a version; its log gets the answer."""
    covered = await promise_of(view, pending)
    await abstaining(view, pending, pending.complete)
    return None if covered is None else covered.promise.threshold


def _verdict(planned: Planned, pending: PendingAnswers, promised: float | None) -> Verdict:
    (answer,) = pending.complete
    return judge(planned, answer, promised, str(pending.model), pending.id)


def _headers(panel: Panel | None, pending: Sequence[PendingAnswers]) -> dict[str, str]:
    """The receipt of the only adapter; of several the panel, the bases, and how many of them cut the text."""
    if panel is None:
        return pending[0].headers
    headers = {"turret-panel": str(panel)}
    if cut := sum(ticket.cut for each in pending for ticket in each.tickets):
        headers["turret-truncated"] = str(cut)
    return headers


# --- OpenAI's format --------------------------------------------------------------------------------------------------


Short = Annotated[str, Field(max_length=1000)]
QuestionName = Annotated[str, Field(min_length=1, max_length=100)]


class InputText(Model):
    type: Literal["input_text", "output_text"]
    text: Text
    prompt_cache_breakpoint: JsonObject | None = Field(None, description=NO_EFFECT)


class InputJson(Model):
    type: Literal["input_json"]
    data: JsonObject | Annotated[list[JsonObject], Field(max_length=limits.MOST_INPUTS, fail_fast=True)]


class InputRefusal(Model):
    type: Literal["refusal"]
    refusal: Text


Part = Annotated[InputText | InputJson | InputRefusal, Field(discriminator="type")]
Parts = Text | Annotated[list[Part], Field(min_length=1, max_length=limits.MOST_MESSAGES, fail_fast=True)]
CallId = Annotated[str, Field(max_length=256)]


class InputMessage(Model):
    role: Literal["user", "developer", "system", "assistant"]
    content: Parts
    type: Literal["message"] | None = None
    phase: Literal["commentary", "final_answer"] | None = Field(None, description=NO_EFFECT)


class InputItem(Model):
    call_id: CallId
    id: CallId | None = Field(None, description=NO_EFFECT)
    namespace: CallId | None = Field(None, description=NO_EFFECT)
    status: Literal["in_progress", "completed", "incomplete"] | None = Field(None, description=NO_EFFECT)


class InputCall(InputItem):
    type: Literal["function_call"]
    name: Short
    arguments: Text


class InputCustomCall(InputItem):
    type: Literal["custom_tool_call"]
    name: Short
    input: Text


class InputOutput(InputItem):
    type: Literal["function_call_output", "custom_tool_call_output"]
    output: Parts


Item = InputMessage | InputCall | InputCustomCall | InputOutput
Instructions = Text | Annotated[list[Part], Field(max_length=limits.MOST_MESSAGES, fail_fast=True)]
PRIOR = "Of a base: divide out what it answers about an empty text. An adapter does not read it."
UNREAD = "What a base reads, as `model`. An adapter was trained for its question and does not read it."


class AskedQuestion(Model):
    name: QuestionName | None = Field(None, description="The question of the panel, or of an adapter for several.")
    instructions: Instructions = Field(description=UNREAD)

    def _asked(self, type: QuestionType, described: Sequence[tuple[Value, str | None]] = ()) -> Asked:
        """The question with its values, and what each means."""
        meanings = {value: text for value, text in described if text}
        values = tuple(value for value, _ in described)
        return Asked(self.name, type, values, _content_text(self.instructions), meanings)


class AskedPredicate(AskedQuestion):
    type: Literal["predicate"]

    def as_question(self) -> Asked:
        return self._asked(self.type)


class Choice(Model):
    value: Short | bool = Field(description="A label; of a predicate also true or false.")
    description: Text | None = Field(None, description=UNREAD)


class AskedChoice(AskedQuestion):
    type: Literal["choice"]
    choices: Annotated[list[Choice], Field(min_length=2, max_length=MOST_LABELS, fail_fast=True)]

    def as_question(self) -> Asked:
        return self._asked(self.type, [(each.value, each.description) for each in self.choices])


class Level(Model):
    label: Short
    description: Text | None = Field(None, description=UNREAD)


class AskedScore(AskedQuestion):
    type: Literal["score"]
    levels: Annotated[list[Level], Field(min_length=2, max_length=MOST_LABELS, fail_fast=True)]

    def as_question(self) -> Asked:
        return self._asked(self.type, [(each.label, each.description) for each in self.levels])


AnyQuestion = Annotated[AskedPredicate | AskedChoice | AskedScore, Field(discriminator="type")]


class DecisionRequest(Model):
    model: Name = Field(description="A panel: name or name@3; an adapter; or a base, untrained.")
    input: Text | Annotated[list[Item], Field(min_length=1, max_length=limits.MOST_MESSAGES, fail_fast=True)]
    questions: Annotated[list[AnyQuestion], Field(min_length=1, max_length=MOST_QUESTIONS, fail_fast=True)]
    prior: bool = Field(False, description=PRIOR)
    user: User | None = Field(None, description=USER)
    prompt_cache_key: Annotated[str, Field(max_length=1024)] | None = Field(None, description=NO_EFFECT)
    prompt_cache_options: JsonObject | None = Field(None, description=NO_EFFECT)
    safety_identifier: Annotated[str, Field(max_length=1024)] | None = Field(None, description=NO_EFFECT)

    def text(self) -> str:
        """The texts of users' messages; if there are other items, all of them, each after who wrote it."""
        if isinstance(self.input, str):
            return self.input
        plain = all(isinstance(each, InputMessage) and each.role == "user" for each in self.input)
        return "\n\n".join(_item_text(each) if plain else f"{_writer(each)}: {_item_text(each)}" for each in self.input)


def _writer(item: Item) -> str:
    return item.role if isinstance(item, InputMessage) else item.type


def _item_text(item: Item) -> str:
    if isinstance(item, InputCall):
        return f"{item.name} {item.arguments}"
    if isinstance(item, InputCustomCall):
        return f"{item.name} {item.input}"
    content = item.content if isinstance(item, InputMessage) else item.output
    return _content_text(content)


def _content_text(content: Parts) -> str:
    return content if isinstance(content, str) else "".join(map(_part_text, content))


def _part_text(part: InputText | InputJson | InputRefusal) -> str:
    if isinstance(part, InputJson):
        return json_text(part.data)
    return part.text if isinstance(part, InputText) else part.refusal


def json_text(value: Mapping[str, Plain] | Sequence[Mapping[str, Plain] | str]) -> str:
    """The text of an object that has one text and nothing else; any other value as compact JSON."""
    if isinstance(value, dict) and len(value) == 1 and isinstance(text := next(iter(value.values())), str):
        return text
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


class Answered(BaseModel):
    name: str | None = None
    version: str = Field(description="The version that answered, such as urgency@3.")
    receipt: str = Field(description="Of this answer, for `POST /api/outcomes`.")
    label_mass: float | None = Field(
        None,
        description="If only some labels were asked for, or a decoder answers untrained: their probability, before it "
        "was made 1.",
    )
    untrained: bool | None = Field(None, description="True: a base answered, and nothing was learnt for the question.")


class PredicateAnswer(Answered):
    type: Literal["predicate"] = "predicate"
    probability: float


class ChoiceProbability(BaseModel):
    value: Value
    probability: float


class ChoiceAnswer(Answered):
    type: Literal["choice"] = "choice"
    choice: Value
    confidence: float = Field(description="The probability that the adapter gave to the choice.")
    probabilities: list[ChoiceProbability]


class LevelProbability(BaseModel):
    label: str
    value: int
    probability: float


class ScoreAnswer(Answered):
    type: Literal["score"] = "score"
    score: float = Field(description="The mean of the levels' numbers, from 0, by their probabilities.")
    confidence: float = Field(description="The probability of the answered level: the median, if a `score` answers.")
    probabilities: list[LevelProbability]


class RefusalAnswer(Answered):
    type: Literal["refusal"] = "refusal"
    confidence: float = Field(description="The probability of the answer that is not given.")
    threshold: float | None = Field(description="That it does not reach: of the question, or of a promise.")


class CacheDetails(BaseModel):
    cache_write_tokens: int = 0
    cached_tokens: int = 0


class ReasoningDetails(BaseModel):
    reasoning_tokens: int = 0


class DecisionUsage(BaseModel):
    input_tokens: int = Field(description="Of the text, once for each adapter that read it.")
    input_tokens_details: CacheDetails = CacheDetails()
    output_tokens: int = 0
    output_tokens_details: ReasoningDetails = ReasoningDetails()
    total_tokens: int


class Decided(BaseModel):
    answers: list[PredicateAnswer | ChoiceAnswer | ScoreAnswer | RefusalAnswer]
    model: str = Field(description="The version of the panel, or of the adapter.")
    usage: DecisionUsage


@questions.post("/v1/decisions")
async def decisions(body: DecisionRequest, asker: Asking) -> Decided:
    """Answer questions about a text: predicates, choices and scores, by probabilities. In OpenAI's format.

    A question whose answer does not reach its threshold gets a refusal.
    """
    asked = [each.as_question() for each in body.questions]
    name, read, verdicts = await decide(asker, body, body.text(), asked)
    usage = DecisionUsage(input_tokens=read, total_tokens=read)
    return Decided(answers=[_answer(each) for each in verdicts], model=name, usage=usage)


def _answer(verdict: Verdict) -> PredicateAnswer | ChoiceAnswer | ScoreAnswer | RefusalAnswer:
    asked, found = verdict.planned.asked, verdict.probabilities
    mass = None if verdict.complete else verdict.label_mass
    common: JsonObject = {"name": asked.name, "version": verdict.version, "receipt": verdict.receipt}
    common |= {"untrained": True} if verdict.untrained else {}
    if not verdict.decided:
        return RefusalAnswer(**common, confidence=verdict.confidence, threshold=verdict.threshold)
    if asked.type == "predicate":
        return PredicateAnswer(**common, probability=found[1])
    common |= {"label_mass": mass, "confidence": verdict.confidence}
    if asked.type == "choice":
        pairs = zip(asked.values, found, strict=True)
        return ChoiceAnswer(
            **common,
            choice=asked.values[verdict.best],
            probabilities=[ChoiceProbability(value=value, probability=each) for value, each in pairs],
        )
    return ScoreAnswer(
        **common,
        score=sum(place * each for place, each in enumerate(found)),
        probabilities=[
            LevelProbability(label=str(label), value=place, probability=each)
            for place, (label, each) in enumerate(zip(asked.values, found, strict=True))
        ],
    )


# --- vLLM's format ----------------------------------------------------------------------------------------------------


class SystemQuestion(Model):
    type: Literal["noul", "choice", "score"]
    instructions: Text | JsonObject | list[JsonObject | Text] | None = Field(None, description=UNREAD)
    criteria: dict[Short, Text | JsonObject | list[JsonObject | Text] | None] | list[Short] | None = Field(
        None,
        description="Of a choice: its labels, with descriptions or null; of a score: its levels, the lowest first.",
    )

    def as_question(self, name: str) -> Asked:
        """Raises BadRequest."""
        if self.type == "noul":
            return Asked(name, "predicate", instructions=_instruction_text(self.instructions))
        form = dict if self.type == "choice" else list
        if not isinstance(self.criteria, form) or not 1 <= len(self.criteria) <= MOST_LABELS:
            what = "an object from its labels" if form is dict else "a list of its levels"
            raise BadRequest(f"question {quote(name, 40)}: criteria must be {what}, 1 to {MOST_LABELS}")
        given = self.criteria.items() if isinstance(self.criteria, dict) else ()
        described: dict[Value, str] = {label: _instruction_text(each) for label, each in given if each is not None}
        return Asked(name, self.type, tuple(self.criteria), _instruction_text(self.instructions), described)


def _instruction_text(value: str | Mapping[str, Plain] | Sequence[Mapping[str, Plain] | str] | None) -> str:
    return value if isinstance(value, str) else "" if value is None else json_text(value)


class SystemRequest(Model):
    model: Name = Field(description="A panel: name or name@3; an adapter; or a base, untrained.")
    state: Text | JsonObject | Annotated[list[JsonObject | Text], Field(max_length=limits.MOST_INPUTS)]
    questions: Annotated[dict[QuestionName, SystemQuestion], Field(min_length=1, max_length=MOST_QUESTIONS)]
    prior: bool = Field(False, description=PRIOR)
    user: User | None = Field(None, description=USER)
    instructions: Text | None = Field(None, description=NO_EFFECT)
    chat_template_kwargs: JsonObject | None = Field(None, description=NO_EFFECT)
    cache_salt: Annotated[str, Field(max_length=1024)] | None = Field(None, description=NO_EFFECT)
    priority: Annotated[int, Field(ge=-(2**31), lt=2**31), WHOLE] | None = Field(None, description=NO_EFFECT)
    request_id: Annotated[str, Field(max_length=256)] | None = Field(None, description=NO_EFFECT)


class SystemUsage(BaseModel):
    input_tokens: int = Field(description="Of the text, once for each adapter that read it.")
    output_tokens: int = 0


class Diagnostics(BaseModel):
    label_mass: float = Field(description="The probability of the labels that were asked for, before it was made 1.")
    argmax_is_label: bool = Field(description="Whether no other label of the adapter is more probable.")
    version: str
    receipt: str
    untrained: bool | None = Field(None, description="True: a base answered, and nothing was learnt for the question.")


class SystemDecided(Reply):
    object: Literal["structured_decision"] = "structured_decision"
    answers: dict[str, JsonObject]
    usage: SystemUsage
    diagnostics: dict[str, Diagnostics]


@questions.post("/v1/systemone")
async def systemone(body: SystemRequest, asker: Asking) -> SystemDecided:
    """Answer questions about a text: yes or no, choices and scores, by probabilities. In vLLM's and TypeSafe's format.

    A question whose answer does not reach its threshold gets an answer of the type `refusal`.
    """
    asked = [each.as_question(name) for name, each in body.questions.items()]
    text = body.state if isinstance(body.state, str) else json_text(body.state)
    name, read, verdicts = await decide(asker, body, text, asked)
    return SystemDecided(
        id=f"decision-{verdicts[0].receipt}",
        created=now(),
        model=name,
        answers={str(each.planned.asked.name): _system_answer(each) for each in verdicts},
        usage=SystemUsage(input_tokens=read),
        diagnostics={
            str(each.planned.asked.name): Diagnostics(
                label_mass=each.label_mass,
                argmax_is_label=each.first,
                version=each.version,
                receipt=each.receipt,
                **({"untrained": True} if each.untrained else {}),
            )
            for each in verdicts
        },
    )


def _system_answer(verdict: Verdict) -> JsonObject:
    asked, found, sure = verdict.planned.asked, verdict.probabilities, {"confidence": verdict.confidence}
    if not verdict.decided:
        return {"type": "refusal", **sure, "threshold": verdict.threshold}
    if asked.type == "predicate":
        return {"type": "noul", "noul": found[1], "probabilities": {"yes": found[1], "no": found[0]}, **sure}
    if asked.type == "choice":
        named = dict(zip(map(str, asked.values), found, strict=True))
        return {"type": "choice", "choice": asked.values[verdict.best], "probabilities": named, **sure}
    return {
        "type": "score",
        "score": sum(place * each for place, each in enumerate(found)),
        "legend": {str(place): label for place, label in enumerate(asked.values)},
        "probabilities": {str(place): each for place, each in enumerate(found)},
        **sure,
    }
