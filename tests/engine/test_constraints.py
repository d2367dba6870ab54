"""Constrained answers keep to their schema, leave the other rows of a pass as they are, and are bounded in time."""

from __future__ import annotations

import contextlib
import json
import random
import time
from typing import Any

import byte_level
import jsonschema
import pytest

from turret import bases
from turret.engine import Engine, Limits, Options
from turret.engine.constraint import MOST_BYTES, Constraint
from turret.errors import DataError, NotFound

PROMPT = "the film "


class NoAdapters:
    def resolve(self, reference: str) -> Any:
        raise NotFound(f"no {reference}")

    load = resolve


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Any:
    folder = byte_level.save_base(tmp_path_factory.mktemp("base"))
    return bases.load(str(folder), task="generate", dtype="float32")


@pytest.fixture
def engine(base) -> Any:
    with Engine(base, NoAdapters(), Limits(queue_tokens=1 << 20)) as made:
        yield made


def schema(draw: random.Random, depth: int = 3) -> dict[str, Any]:
    """A schema of the supported subset, whose JSON is short enough to end within a few hundred tokens."""
    kinds = ["string", "integer", "number", "boolean", "null", "enum", "const", "format", "pattern"]
    kinds += ["object", "array", "anyOf", "ref", "types", "tuple"] * (depth > 0)
    kind = draw.choice(kinds)
    if kind == "string":
        low = draw.randint(0, 3)
        return {"type": "string", "minLength": low, "maxLength": low + draw.randint(0, 6)}
    if kind in ("integer", "number"):
        low = draw.randint(-100, 100)
        ends = draw.choice([("minimum", "maximum"), ("exclusiveMinimum", "exclusiveMaximum")])
        return {"type": kind, ends[0]: low, ends[1]: low + draw.randint(2, 200)}
    if kind in ("boolean", "null"):
        return {"type": kind}
    if kind == "enum":
        return {"enum": draw.sample(["a", "été", 1, -2.5, None, True, "a b", ""], draw.randint(1, 4))}
    if kind == "const":
        return {"const": draw.choice(["x", 3, False, None, {"a": [1]}, []])}
    if kind == "format":
        return {"type": "string", "format": draw.choice(["date", "time", "uuid", "ipv4", "date-time"])}
    if kind == "pattern":
        return {"type": "string", "pattern": draw.choice(["^[a-c]{2,4}$", "^(x|yz)-[0-9]{1,3}$", "^[A-Z][a-z]?$"])}
    if kind == "array":
        low = draw.randint(0, 2)
        return {
            "type": "array",
            "items": schema(draw, depth - 1),
            "minItems": low,
            "maxItems": low + draw.randint(0, 2),
        }
    if kind == "tuple":
        parts = [schema(draw, depth - 1) for _ in range(draw.randint(1, 2))]
        return {"type": "array", "prefixItems": parts, "items": False, "minItems": len(parts)}
    if kind == "anyOf":
        return {"anyOf": [schema(draw, depth - 1) for _ in range(draw.randint(1, 3))]}
    if kind == "ref":
        return {"$ref": "#/$defs/shared"}
    if kind == "types":
        return {"type": draw.sample(["boolean", "null"], draw.randint(1, 2))}
    names = draw.sample(["name", "age", "é", "a b", "tags", 'q"'], draw.randint(0, 3))
    required = draw.sample(names, draw.randint(0, len(names)))
    properties = {name: schema(draw, depth - 1) for name in names}
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def random_schema(seed: int) -> dict[str, Any]:
    draw = random.Random(seed)
    return {"$defs": {"shared": schema(draw, 0)}, **schema(draw)}


def keeps_to_random_schemas(engine: Engine, seeds: range) -> None:
    asked = []
    for seed in seeds:
        wanted = random_schema(seed)
        options = Options(max_tokens=160, temperature=1.0, seed=seed, constraint=Constraint.json_schema(wanted))
        asked.append((wanted, engine.submit("generate", PROMPT, None, options)))
    reasons = []
    for wanted, ticket in asked:
        answer = ticket.result(120)
        reasons.append(answer["finish_reason"])
        if answer["finish_reason"] == "stop":
            jsonschema.validate(json.loads(answer["text"]), wanted)
        else:
            assert (answer["finish_reason"], answer["tokens"]) == ("length", 160)
    assert reasons.count("stop") > 0.9 * len(reasons)


def test_every_answer_that_stops_is_valid_for_its_schema(engine) -> None:
    keeps_to_random_schemas(engine, range(20))


@pytest.mark.slow
def test_every_answer_that_stops_is_valid_for_a_thousand_schemas(engine) -> None:
    for start in range(0, 1000, 100):
        keeps_to_random_schemas(engine, range(start, start + 100))


def test_an_unconstrained_row_breaks_the_schema_and_is_the_same_beside_constrained_ones(base) -> None:
    options = Options(max_tokens=24, temperature=1.0, seed=9, logprobs=3)
    with Engine(base, NoAdapters()) as engine:
        alone = engine.submit("generate", PROMPT, None, options).result(30)
    with pytest.raises(ValueError):
        json.loads(alone["text"])
    with Engine(base, NoAdapters()) as engine:
        one = Options(max_tokens=60, temperature=1.0, constraint=Constraint.json_object())
        crowd = [engine.submit("generate", PROMPT, None, one) for _ in range(6)]
        beside = engine.submit("generate", PROMPT, None, options).result(30)
        assert all(ticket.result(30) for ticket in crowd)
    for key in ("text", "finish_reason", "tokens"):
        assert beside[key] == alone[key]
    ids = [[each["id"] for each in answer["logprobs"]] for answer in (alone, beside)]
    assert ids[0] == ids[1]


def test_a_masked_row_leaves_the_scores_of_other_rows_bit_equal(base) -> None:
    import torch
    from decoding_rows import Row

    from turret.engine.decode import choose
    from turret.engine.guide import Constraints, Guide
    from turret.engine.request import GenerationSettings

    constraints = Constraints(base.tokenizer, byte_level.VOCABULARY, [base.tokenizer.eos_token_id])
    guide = Guide(constraints.compiled(Constraint.choice(["yes", "no"])), constraints.eos, constraints.eos)

    rows = [Row(GenerationSettings(9, tuple(constraints.eos)))] * 3
    scores = torch.randn(3, byte_level.VOCABULARY, generator=torch.Generator().manual_seed(1))
    masked = scores.clone()
    choose(masked, rows, {1: guide})
    assert torch.equal(masked[[0, 2]], scores[[0, 2]])
    allowed = {int(token) for token in torch.isfinite(masked[1]).nonzero()}
    assert {base.tokenizer.decode([token])[0] for token in allowed} == {"y", "n"}


def test_the_end_of_an_adapter_that_is_not_the_bases_ends_a_constrained_answer(base) -> None:
    from turret.engine.guide import Constraints, Guide

    other, eos = 0, base.tokenizer.eos_token_id
    constraints = Constraints(base.tokenizer, byte_level.VOCABULARY, [eos])
    guide = Guide(constraints.compiled(Constraint.regex("a*")), constraints.eos, [other])
    import torch

    scores = torch.zeros(byte_level.VOCABULARY)
    guide.mask(scores)
    assert scores[other] == 0
    assert scores[eos] == -torch.inf


EXPLODING: dict[str, Any] = {
    "nested anyOf": lambda: Constraint.json_schema(_nested(9)),
    "wide object": lambda: Constraint.json_schema(
        {"type": "object", "properties": {f"key{i}": {"type": "string"} for i in range(1800)}}
    ),
    "recursion": lambda: Constraint.json_schema({"$ref": "#"}),
    "repeated": lambda: Constraint.json_schema(
        {
            "type": "array",
            "items": {"type": "array", "items": {"type": "string", "minLength": 30_000}, "minItems": 3000},
        }
    ),
    "counted regex": lambda: Constraint.regex("((a{1,99}){1,99}){1,99}" * 20),
    "alternatives": lambda: Constraint.regex("(" + "|".join(f"[a-z]{{{i}}}x.*" for i in range(1, 900)) + ")*"),
    "dots": lambda: Constraint.regex(".*a.{200}b" * 50),
    "and": lambda: Constraint.json_schema(
        {"allOf": [{"type": "string", "pattern": f"^.*{chr(97 + i)}.*$"} for i in range(24)]}
    ),
    "one of": lambda: Constraint.json_schema(
        {"oneOf": [{"type": "object", "properties": {f"k{i}": {"type": "integer"}}} for i in range(400)]}
    ),
}


def _nested(depth: int) -> dict[str, Any]:
    inner = _nested(depth - 1) if depth else {"type": "string"}
    return {"anyOf": [{"type": "object", "properties": {f"p{depth}{i}": inner}} for i in range(2)]}


@pytest.mark.parametrize("name", EXPLODING)
def test_a_constraint_built_to_explode_ends_or_is_refused_in_bounded_time(engine, name) -> None:
    started = time.monotonic()
    beside = engine.submit("generate", PROMPT, None, Options(max_tokens=8))
    with contextlib.suppress(DataError):
        options = Options(max_tokens=12, temperature=1.0, constraint=EXPLODING[name]())
        answer = engine.submit("generate", PROMPT, None, options).result(60)
        assert answer["finish_reason"] in ("stop", "length")
    assert beside.result(60)["tokens"] > 0
    assert time.monotonic() - started < 20


def test_a_schema_larger_than_the_limit_is_refused_at_once() -> None:
    with pytest.raises(DataError, match=f"expected 1 to {MOST_BYTES}"):
        Constraint.json_schema({"title": "x" * MOST_BYTES})
    with pytest.raises(DataError, match="expected 1 to 1024 texts"):
        Constraint.choice(["x"] * 1025)
