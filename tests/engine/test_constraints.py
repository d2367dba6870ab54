"""Constrained answers keep to their schema, leave the other rows of a pass as they are, and are bounded in time."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import byte_level
import jsonschema
import psutil
import pytest

from turret import bases
from turret.engine import Engine, Limits, SamplingParams
from turret.engine.constraint import MOST_BYTES, MOST_DEPTH, Constraint, Helper, helper_process, refusal
from turret.errors import DataError, EngineError, NotFound
from turret.process import Died

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
        options = SamplingParams(max_tokens=160, temperature=1.0, seed=seed, constraint=Constraint.json_schema(wanted))
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
    options = SamplingParams(max_tokens=24, temperature=1.0, seed=9, logprobs=3)
    with Engine(base, NoAdapters()) as engine:
        alone = engine.submit("generate", PROMPT, None, options).result(30)
    with pytest.raises(ValueError):
        json.loads(alone["text"])
    with Engine(base, NoAdapters()) as engine:
        one = SamplingParams(max_tokens=60, temperature=1.0, constraint=Constraint.json_object())
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

    from turret.engine.request import GenerationSettings
    from turret.engine.sampler import choose
    from turret.engine.structured_output import Constraints, Guide

    constraints = Constraints(base.tokenizer, byte_level.VOCABULARY, [base.tokenizer.eos_token_id])
    guide = Guide(constraints.compile_matcher(Constraint.choice(["yes", "no"])), constraints.eos, constraints.eos)
    constraints.close()

    rows = [Row(GenerationSettings(9, tuple(constraints.eos)))] * 3
    scores = torch.randn(3, byte_level.VOCABULARY, generator=torch.Generator().manual_seed(1))
    masked = scores.clone()
    choose(masked, rows, {1: guide})
    assert torch.equal(masked[[0, 2]], scores[[0, 2]])
    allowed = {int(token) for token in torch.isfinite(masked[1]).nonzero()}
    assert {base.tokenizer.decode([token])[0] for token in allowed} == {"y", "n"}


def test_the_end_of_an_adapter_that_is_not_the_bases_ends_a_constrained_answer(base) -> None:
    from turret.engine.structured_output import Constraints, Guide

    other, eos = 0, base.tokenizer.eos_token_id
    constraints = Constraints(base.tokenizer, byte_level.VOCABULARY, [eos])
    guide = Guide(constraints.compile_matcher(Constraint.regex("a*")), constraints.eos, [other])
    constraints.close()
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


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPLODING)
def test_a_constraint_built_to_explode_ends_or_is_refused_in_bounded_time(engine, name) -> None:
    started = time.monotonic()
    beside = engine.submit("generate", PROMPT, None, SamplingParams(max_tokens=8))
    with contextlib.suppress(DataError):
        options = SamplingParams(max_tokens=12, temperature=1.0, constraint=EXPLODING[name]())
        answer = engine.submit("generate", PROMPT, None, options).result(60)
        assert answer["finish_reason"] in ("stop", "length")
    assert beside.result(60)["tokens"] > 0
    assert time.monotonic() - started < 20


def test_a_schema_larger_than_the_limit_is_refused_at_once() -> None:
    with pytest.raises(DataError, match=f"expected 1 to {MOST_BYTES}"):
        Constraint.json_schema({"title": "x" * MOST_BYTES})
    with pytest.raises(DataError, match="expected 1 to 1024 texts"):
        Constraint.choice(["x"] * 1025)


# --- constraints that would end the process ---------------------------------------------------------------------------


def chained(definitions: int, depth: int, kind: str = "items") -> dict[str, Any]:
    """A schema of lists (or anyOf, or items alone) in one another, continued in the next definition by a `$ref`."""
    made: dict[str, Any] = {}
    for number in range(definitions):
        inner: Any = {"type": "string"} if number + 1 == definitions else {"$ref": f"#/$defs/{number + 1}"}
        for _ in range(depth):
            inner = {"items": {"type": "array", "items": inner}, "anyOf": {"anyOf": [inner]}, "bare": {"items": inner}}[
                kind
            ]
        made[str(number)] = inner
    return {"$defs": made, "$ref": "#/$defs/0"}


def chain_of_rules(count: int, name: str = "r") -> str:
    rules = (f'{name}{number}: "a" {name}{number + 1}' for number in range(count))
    return "\n".join([f"start: {name}0", *rules, f'{name}{count}: "b"', ""])


KILLERS: dict[str, Any] = {  # each ended the whole process with SIGSEGV
    "a chain of references": lambda: Constraint.json_schema(chained(39, 100, "bare")),
    "a chain of references and anyOf": lambda: Constraint.json_schema(chained(39, 70, "anyOf")),
    "a chain of rules": lambda: Constraint.lark(chain_of_rules(3200)),
    "a chain of terminals": lambda: Constraint.lark(chain_of_rules(3200, "R")),
    "brackets": lambda: Constraint.lark("start: " + "(" * 30_000 + '"a"' + ")" * 30_000),
    "a tool": lambda: Constraint.json_between(["<"], chained(39, 100, "bare"), [">"], "the schema of a tool"),
}
HIDDEN = (
    f"start: found\nfound: %json {json.dumps(chained(55, 95, 'bare'))}"  # the references of a schema within a grammar
)


@pytest.mark.parametrize("name", KILLERS)
def test_a_constraint_that_is_nested_too_deeply_is_refused_before_it_is_compiled(name) -> None:
    started = time.perf_counter()
    with pytest.raises(DataError, match=f"more than {MOST_DEPTH} deep") as refused:
        KILLERS[name]()
    assert len(str(refused.value)) < 300
    assert time.perf_counter() - started < 2


def test_what_is_no_grammar_is_one_line(engine) -> None:
    for text in ("\\" * 60_000, "x", ":", "start", '"a"', "%json", "start: (" * 3000):
        with pytest.raises(DataError) as refused:
            engine.compile(Constraint.lark(text))
        assert len(str(refused.value)) < 300


def test_schemas_and_grammars_that_refer_to_themselves_or_are_deep_but_not_too_deep_are_answered(engine) -> None:
    tree = {
        "$defs": {"tree": {"type": "object", "properties": {"next": {"$ref": "#/$defs/tree"}}, "required": ["next"]}},
        "anyOf": [{"$ref": "#/$defs/tree"}, {"$ref": "#"}, {"type": "boolean"}],
    }
    again = 'start: thing\nthing: "(" thing ")" | "a" thing | "b"'
    for made in (
        Constraint.json_schema(tree),
        Constraint.lark(again),
        Constraint.json_schema(chained(5, 80)),
        Constraint.lark(chain_of_rules(400)),
        Constraint.regex("(" * 100 + "a" + ")" * 100),
    ):
        answer = engine.submit("generate", PROMPT, None, SamplingParams(max_tokens=4, constraint=made)).result(60)
        assert answer["finish_reason"] in ("stop", "length")


def test_a_constraint_that_kills_its_compiler_is_one_line_and_other_answers_go_on(engine) -> None:
    beside = engine.submit("generate", PROMPT, None, SamplingParams(max_tokens=200, temperature=1.0))
    for _ in range(2):  # the second time it is known
        with pytest.raises(DataError, match="takes more stack") as refused:
            engine.submit("generate", PROMPT, None, SamplingParams(max_tokens=4, constraint=Constraint.lark(HIDDEN)))
        assert len(str(refused.value)) < 300
    good = SamplingParams(max_tokens=4, constraint=Constraint.choice(["yes", "no"]))
    assert engine.submit("generate", PROMPT, None, good).result(60)["text"] in ("yes", "no")
    assert beside.result(60)["tokens"] > 0


def test_without_the_helper_the_same_constraint_ends_the_process(tmp_path) -> None:
    program = (
        "import sys\n"
        "from turret.engine.constraint import Constraint\n"
        "from turret.engine.constraint import STACK, matcher_of, tokenizer_of, with_stack\n"
        "tokens = tokenizer_of(open(sys.argv[1]).read(), 400, [2])\n"
        "grammar = Constraint.lark(open(sys.argv[2]).read()).grammar\n"
        "print(with_stack(STACK, lambda: matcher_of(tokens, grammar)).is_error())\n"
    )
    (tmp_path / "tokenizer").write_text(byte_level.tokenizer().backend_tokenizer.to_str())
    statuses = {}
    for name, grammar in {"good": 'start: "a"', "killer": HIDDEN}.items():
        (tmp_path / name).write_text(grammar)
        command = [sys.executable, "-c", program, str(tmp_path / "tokenizer"), str(tmp_path / name)]
        statuses[name] = subprocess.run(command, capture_output=True, check=False).returncode
    assert statuses == {"good": 0, "killer": -signal.SIGSEGV}


@pytest.fixture
def helper() -> Iterator[Helper]:
    made = helper_process(byte_level.tokenizer().backend_tokenizer.to_str(), byte_level.VOCABULARY, [2], seconds=2)
    yield made
    made.close()


GOOD: Any = {"grammar": Constraint.choice(["yes", "no"]).grammar}
COMPILED: Any = {"error": None}


@pytest.mark.slow
def test_a_helper_that_somebody_kills_or_stops_is_replaced(helper) -> None:
    assert helper.ask(GOOD) == COMPILED
    first = helper.process.pid
    os.kill(first, signal.SIGKILL)
    assert helper.ask(GOOD) == COMPILED
    assert helper.process.pid != first
    os.kill(helper.process.pid, signal.SIGSTOP)
    answer = helper.ask(GOOD)
    assert answer == Died(late=True)
    assert "more than 5 seconds" in refusal(answer)
    assert helper.ask(GOOD) == COMPILED
    assert helper.started == 3


def test_a_helper_that_is_killed_every_time_is_an_error_of_the_engine(helper) -> None:
    assert helper.ask(GOOD) == COMPILED
    import threading

    over = threading.Event()

    def kill() -> None:
        while not over.is_set():
            with contextlib.suppress(AttributeError, ProcessLookupError):
                os.kill(helper.process.pid, signal.SIGKILL)
            time.sleep(0.001)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        with pytest.raises(EngineError, match="a constraint cannot be compiled"):
            helper.ask(GOOD)
    finally:
        over.set()
        killer.join()
    assert helper.ask(GOOD) == COMPILED


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_helper_has_a_limit_of_memory_none_of_the_environments_secrets_and_ends_with_its_parent(tmp_path) -> None:
    program = (
        "import sys\n"
        "from turret.engine.constraint import helper_process\n"
        "helper = helper_process(open(sys.argv[1]).read(), 400, [2])\n"
        "assert helper.ask({'grammar': sys.argv[2]}) == {'error': None}\n"
        "print(helper.process.pid, flush=True)\n"
        "input()\n"
    )
    (tmp_path / "tokenizer").write_text(byte_level.tokenizer().backend_tokenizer.to_str())
    command = [sys.executable, "-c", program, str(tmp_path / "tokenizer"), GOOD["grammar"]]
    environment = {**os.environ, "AWS_SECRET_ACCESS_KEY": "hidden"}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as parent:
        of_helper = Path("/proc") / parent.stdout.readline().strip()
        limits = (of_helper / "limits").read_text()
        assert "unlimited" not in next(line for line in limits.splitlines() if "address space" in line)
        assert b"hidden" not in (of_helper / "environ").read_bytes()
        parent.kill()
        parent.wait()
    until = time.monotonic() + 10
    while of_helper.exists() and "Z" not in (of_helper / "stat").read_text().rpartition(")")[2]:
        assert time.monotonic() < until
        time.sleep(0.02)


def test_a_constraint_that_was_compiled_before_asks_the_helper_nothing(base) -> None:
    from turret.engine.structured_output import COMPILED, Constraints

    constraints = Constraints(base.tokenizer, byte_level.VOCABULARY, [base.tokenizer.eos_token_id])
    many = [Constraint.choice([f"yes{number}", "no"]) for number in range(COMPILED + 1)]
    for each in many:
        constraints.compile_matcher(each)
    constraints.close()  # the helper starts again if it is asked
    for each in many:  # the first one is compiled again, without the helper
        constraints.compile_matcher(each)
    assert constraints._helper.started == 1
    constraints.compile_matcher(Constraint.choice(["another", "no"]))
    assert constraints._helper.started == 2
    constraints.close()


@pytest.mark.slow
def test_costly_constraints_that_stay_compiled_take_bounded_memory(base) -> None:
    """Each takes about 6 MiB; 64 of them, which is how many small ones stay, would take 370 MiB."""
    from turret.engine.structured_output import COMPILED_BYTES, Constraints

    constraints = Constraints(base.tokenizer, byte_level.VOCABULARY, [base.tokenizer.eos_token_id])
    for number in range(40):
        constraints.compile_matcher(Constraint.regex("a." * 20_000 + str(number)))
        if number == 10:
            memory = psutil.Process().memory_info().rss
    kept = sum(constraints.is_compiled(Constraint.regex("a." * 20_000 + str(number))) for number in range(40))
    assert 1 < kept <= COMPILED_BYTES // 40_000
    assert psutil.Process().memory_info().rss - memory < 64 << 20
    constraints.close()
