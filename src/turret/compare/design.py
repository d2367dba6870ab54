"""The rows of a comparison, its trainings with their order, and its power.

All trainings share the data, the split (`data.seed`) and the evaluation. They differ in method, seed, epochs (each
method has its own number, unless the recipe sets one) and, for learning curves, in the number of training examples.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Literal

import numpy as np
from scipy.special import stdtrit

from turret.compare import report_text
from turret.compare.verdict import HIGH, LOW, variance_components
from turret.errors import RecipeError
from turret.json_types import JsonObject
from turret.methods import METHODS, method_named
from turret.recipe import Recipe
from turret.statistics import Floats, smallest
from turret.tasks import task_of

TRAINED = ("full", "lora", "prefix")  # compared by default
UNTRAINED = {  # kind -> what answers
    "base": "the bare base",
    "linear": "a logistic regression on the frozen base's features",
    "lead": "the first sentence of the text",
    "nearest": "the answer of the nearest training text",
}
OF_TRAIN = ("lr", "epochs")  # settings of a method that belong to the recipe's [train]


@dataclass(frozen=True)
class Candidate:
    """One method with its settings: a row of the comparison."""

    spec: str  # as the command has it: "lora:r=4"
    kind: str  # full, lora, prefix, head, peft, or a key of UNTRAINED
    recipe: Recipe  # of its training, without seed and data; of UNTRAINED, it says how the base is loaded

    @property
    def label(self) -> str:
        """The name in a report: `lora r=4`."""
        named = method_named(self.kind).named_by is not None  # "peft:IA3" reads as IA3
        return (self.spec.removeprefix(f"{self.kind}:") if named else self.spec).replace(":", " ", 1).replace(",", " ")

    @property
    def slug(self) -> str:
        """The name in a file's name."""
        return re.sub(r"[^a-z0-9]+", "-", self.spec.lower()).strip("-")[:60]

    @property
    def trains(self) -> bool:
        """Whether a training makes it. The other rows have no version."""
        return self.kind not in UNTRAINED

    def at(self, epochs: int) -> Candidate:
        """The same method trained for so many epochs."""
        spec = f"{self.spec}{',' if ':' in self.spec else ':'}epochs={epochs}"
        return Candidate(spec, self.kind, self.recipe.changed(train={"epochs": epochs}))


def is_floor(kind: str) -> bool:
    """Whether a row shows the least that a method must beat: the bare base, or the head alone."""
    return kind == "base" or method_named(kind).head_alone


def candidates(
    text: str | None, recipe: Recipe, kind: str, lr: float | Literal["auto"] | None = None
) -> list[Candidate]:
    """The rows that `text` names, such as `base,linear,full,lora:r=4/8,r=16`. Raises RecipeError.

    Methods are separated by commas. A colon comes before the first setting and commas before further ones. Slashes
    separate numbers that are tried one by one.

        base                         the bare base; an encoder that classifies has an untrained head
        linear, lead, nearest        baselines that train nothing, for some tasks
        full, lora, prefix, head     the recipe's settings if it trains that method, else the defaults
        lora:r=4,lora_alpha=8        settings by their names in a recipe, and lr and epochs
        lora:r=4/8/16                three rows
        lora:target_modules=query+value
        peft:IA3, peft:VERA,r=64     a method of PEFT by its name there, with PEFT's settings

    Args:
        text: the methods; None: those that are usual for the task.
        recipe: its settings and learning rate hold for its own method; other methods use their defaults.
        kind: of the task.
        lr: a learning rate for all methods, or "auto".
    """
    generates, baselines = task_of(kind).generates, task_of(kind).baselines
    named = list(_split(text or _usual(recipe, baselines)))
    rows: dict[str, Candidate] = {}
    for method, settings in named:
        if name := method_named(method).named_by:
            settings = _settings_with_name(method, name, settings, recipe)
        if method in UNTRAINED and method not in ("base", *baselines):
            raise RecipeError(f"{method}: task {kind} has no such baseline: expected {', '.join(('base', *baselines))}")
        if method_named(method).head_alone and generates:
            raise RecipeError(f"{method}: the base of task {kind} has no head to train alone: leave {method} out")
        for chosen in _expand_settings(settings):
            row = _candidate(method, chosen, recipe, lr)
            rows.setdefault(row.spec, row)
    if not rows:
        raise RecipeError(f"no method to compare: give some, such as {_usual(recipe, baselines)}")
    return list(rows.values())


def with_equal_epochs(rows: Sequence[Candidate], against: str, epochs: Callable[[Candidate], int]) -> list[Candidate]:
    """The rows, and the baseline trained for as many epochs as each other method, where they differ.

    Args:
        against: spec or kind of the baseline.
        epochs: of a training.
    """
    judged = next((row for row in rows if row.spec == against), None)
    judged = judged or next((row for row in rows if row.kind == against), None)
    if judged is None or not judged.trains:
        return list(rows)
    wanted = sorted({epochs(row) for row in rows if row.trains and not method_named(row.kind).head_alone})
    more = [judged.at(each) for each in wanted if each != epochs(judged)]
    known = {row.spec for row in rows}
    return [*rows, *(row for row in more if row.spec not in known)]


def _usual(recipe: Recipe, baselines: Sequence[str]) -> str:
    """The rows that are usual for the task, of methods that train on the recipe's base."""
    quantized = recipe.base_quantization is not None
    trained = (each for each in TRAINED if not (quantized and METHODS[each].not_quantized))
    return ",".join(("base", *baselines, *trained))


def _split(text: str) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """("lora", [("r", "4"), ...]) for each method."""
    methods: list[tuple[str, list[tuple[str, str]]]] = []
    for part in filter(None, (each.strip() for each in text.split(","))):
        head, colon, rest = part.partition(":")
        if colon or "=" not in part:
            methods.append((_kind(head.strip()), []))
            part = rest.strip()
            if part and "=" not in part and (name := method_named(methods[-1][0]).named_by):
                part = f"{name}={part}"
            if not part:
                continue
        if not methods:
            raise RecipeError(f"{_short(part)}: a setting belongs after its method, such as lora:{_short(part)}")
        key, equals, value = part.partition("=")
        if not equals or not key.strip() or not value.strip():
            raise RecipeError(f"{_short(part)}: expected SETTING=VALUE after {methods[-1][0]}:, such as lora:r=4")
        methods[-1][1].append((key.strip(), value.strip()))
    yield from methods


def _kind(word: str) -> str:
    kinds = dict.fromkeys((*UNTRAINED, *TRAINED, *METHODS))
    if word not in kinds:
        raise RecipeError(
            f"{_short(word)} is not a method to compare: expected {', '.join(kinds)}, or peft:NAME for one of PEFT's"
        )
    return word


def _settings_with_name(
    method: str, name: str, settings: list[tuple[str, str]], recipe: Recipe
) -> list[tuple[str, str]]:
    """The settings with the method's name first: the given one, else the recipe's."""
    names = [value for key, value in settings if key == name]
    if not names and method == recipe.method.kind:
        names = [getattr(recipe.method, name)]
    if len(names) != 1:
        raise RecipeError(f"{method}: expected one {method_named(method).named_as}")
    return [(name, names[0].upper().replace("-", "_")), *(pair for pair in settings if pair[0] != name)]


def _expand_settings(settings: list[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
    """The settings once for each combination of numbers that slashes separate."""
    choices = []
    for key, value in settings:
        parts = value.split("/")
        many = len(parts) > 1 and all(re.fullmatch(r"[0-9.eE+-]+", part) for part in parts)
        choices.append([(key, part) for part in parts] if many else [(key, value)])
    yield from (list(each) for each in itertools.product(*choices))


def _candidate(
    method: str, settings: list[tuple[str, str]], recipe: Recipe, lr: float | Literal["auto"] | None
) -> Candidate:
    name = method_named(method).named_by
    parts = [value if key == name else f"{key}={value}" for key, value in settings]
    spec = method + (":" + ",".join(parts) if parts else "")
    if method in UNTRAINED:
        if settings:
            raise RecipeError(f"{_short(spec)}: {method} is not trained and has no settings: give {method} alone")
        return Candidate(method, method, _changed_recipe(recipe, {"method": "head", "train.lr": "none"}))
    own = method == recipe.method.kind and (name is None or dict(settings)[name] == getattr(recipe.method, name))
    if not own:  # start from the method's defaults
        recipe = recipe.model_copy(update={"method": METHODS[method].model_construct()})
    rate = lr if lr is not None else recipe.train.lr if own else None
    if rate is None and recipe.train.lr == "auto":
        rate = "auto"
    changes = {"method": method, "train.lr": "none" if rate is None else str(rate)}
    for key, value in settings:
        path = f"train.{key}" if key in OF_TRAIN else f"method.{key}"
        changes[path] = value.replace("+", ",") if key.endswith("_modules") else value
    try:
        return Candidate(spec, method, _changed_recipe(recipe, changes))
    except RecipeError as error:
        raise RecipeError(f"{_short(spec)}: {error}") from None


def _changed_recipe(recipe: Recipe, changes: dict[str, str]) -> Recipe:
    return recipe.with_overrides(changes).changed(train={"init_from": None})  # every method starts from the base


def _short(text: str) -> str:
    return ascii(text[:60])[1:-1]


# --- design -----------------------------------------------------------------------------------------------------------


MOST_SEEDS = 100


@dataclass(frozen=True)
class Cell:
    """One training of the comparison, or one evaluation of the bare base."""

    candidate: Candidate
    seed: int
    fraction: float  # of the training examples
    recipe: Recipe
    content: str | None = None  # digest of its data; None: what `data.source` says tells the data

    @property
    def key(self) -> str:
        """The name of its folder, which depends on its recipe, and not on where its data lies if that has a digest."""
        recipe = self.recipe.without_trackers()
        if self.content is not None:
            recipe = recipe.changed(data={"source": self.content})
        text = recipe.to_toml()
        digest = hashlib.sha256(f"{self.candidate.kind}\n{text}".encode()).hexdigest()
        return f"{self.candidate.slug}-seed{self.seed}-{self.fraction:g}-{digest[:8]}"

    def __str__(self) -> str:
        part = "" if self.fraction == 1 else f", {100 * self.fraction:g}% of the training examples"
        return f"{self.candidate.label}, seed {self.seed}{part}"


@dataclass(frozen=True)
class Design:
    """The whole comparison, before anything has run."""

    recipe: Recipe
    candidates: tuple[Candidate, ...]
    seeds: tuple[int, ...]
    fractions: tuple[float, ...]  # largest first
    against: str  # spec of the baseline
    margin: float  # points
    train: int  # training examples at fraction 1
    twins: frozenset[str] = frozenset()  # specs of the rows that train the baseline for other methods' epochs
    composition: str | None = None  # whose parts are compared with it, as they are stored; None: trainings

    def cells(self) -> Iterator[Cell]:
        """The cells in the order in which they run: all methods of one seed first, so that an early stop is fair."""
        for seed in self.seeds:
            for fraction in self.fractions:
                for candidate in self.candidates:
                    if fraction == self.fractions[0] or (candidate.kind != "base" and not self.is_twin(candidate)):
                        yield Cell(candidate, seed, fraction, self._recipe(candidate, seed, fraction))

    def is_twin(self, candidate: Candidate) -> bool:
        """Whether a row is the baseline trained for another number of epochs."""
        return candidate.spec in self.twins

    def _recipe(self, candidate: Candidate, seed: int, fraction: float) -> Recipe:
        data = {"seed": self.recipe.split_seed}
        if fraction < 1:
            data["train"] = max(1, round(fraction * self.train))
        return candidate.recipe.changed(seed=seed, data=data)


@dataclass(frozen=True)
class PlannedDesign:
    """A planned comparison: its trainings, and the difference that it can decide."""

    name: str
    methods: tuple[str, ...]
    against: str
    trainings: int
    missing: int  # trainings that have not run
    power: Power
    folder: str

    def as_json(self) -> JsonObject:
        """The plan as JSON."""
        return {**asdict(self), "power": self.power.as_json()}


def design(
    recipe: Recipe,
    rows: Sequence[Candidate],
    *,
    seeds: int,
    fractions: Sequence[float],
    against: str,
    margin: float,
    train: int,
    twins: Sequence[str] = (),
) -> Design:
    """A checked design. Raises RecipeError.

    Args:
        seeds: number of seeds, counted up from the recipe's.
        fractions: shares of the training examples.
        against: spec of the baseline; it must be one of the rows.
        margin: points.
        train: number of training examples at fraction 1.
        twins: specs of the rows that train the baseline for other methods' epochs.
    """
    if not 1 <= seeds <= MOST_SEEDS:
        raise RecipeError(f"--seeds {seeds}: expected 1 to {MOST_SEEDS}, and at least 2 for a verdict")
    if not 0 < margin <= 50:
        raise RecipeError(f"--margin {margin:g}: expected points above 0 and at most 50, such as 1")
    wrong = [each for each in fractions if not 0 < each <= 1]
    if wrong or not fractions:
        raise RecipeError(
            f"--fractions {wrong[0] if wrong else ''}: expected shares of the training examples such as 0.1,0.25,1"
        )
    if len(set(fractions)) > 1 and isinstance(recipe.data.train, str):
        raise RecipeError(f"--fractions cannot take a part of the split {recipe.data.train!r}: leave data.train out")
    sized = [row for row in rows if row.trains]
    judged = [row.spec for row in rows if row.spec == against] or [row.spec for row in rows if row.kind == against]
    if not judged:
        raise RecipeError(
            f"the baseline is {against}, which is not among the methods: add it to --methods, "
            f"or say --against {sized[0].spec if sized else 'full'}"
        )
    return Design(
        recipe=recipe,
        candidates=tuple(rows),
        seeds=tuple((recipe.seed + place) % 2**32 for place in range(seeds)),
        fractions=tuple(sorted(set(fractions), reverse=True)),
        against=judged[0],
        margin=margin,
        train=train,
        twins=frozenset(twins),
    )


# --- power ------------------------------------------------------------------------------------------------------------
# The power of a design before anything is trained: how often `judge` would call two equal methods `within`.
#
# The verdict's interval is simulated on d: (S, N), the difference of two methods' scores, with the variances of
# `verdict.Components`. They are measured on earlier trainings, or assumed if there are none.


DRAWS, RESAMPLES = 1000, 300
ENOUGH = 0.8  # of designs like this one reach a verdict: the usual power
MOST_ADVISED = 50
MOST_EXAMPLES = 200_000
WITHIN = 0.05  # of the advice


@dataclass(frozen=True)
class Spread:
    """How much the difference of two methods varies, as standard deviations in points."""

    seeds: float  # from training to training, beyond what the test examples explain
    examples: float  # from example to example, the same in all trainings
    rest: float  # unexplained by both
    apart: float  # share of the examples on which the methods differ with some seed
    source: str  # "measured ..." or "assumed ..."

    @classmethod
    def assumed(cls, kind: str) -> Spread:
        """The spread before anything has run. kind: of the task."""
        if task_of(kind).right_or_wrong:
            source = "assumed: 0.8 points per seed, 1 example in 10 right for one method only"
            return cls(0.8, 100 * math.sqrt(0.06), 100 * math.sqrt(0.04), 0.2, source)
        return cls(0.8, 8.0, 12.0, 1.0, "assumed: 0.8 points per seed, 14 points per example")

    @classmethod
    def measured(cls, differences: Sequence[Floats]) -> Spread | None:
        """The spread of pairs of rows that have run; None if no pair has two seeds. differences: (S, N) each."""
        usable = [d for d in differences if d.shape[0] > 1 and d.shape[1] > 1]
        if not usable:
            return None
        parts = [variance_components(100 * d) for d in usable]
        seeds, examples, rest = (
            math.sqrt(float(np.mean(variances)))
            for variances in zip(
                *((each.between_seeds, each.between_examples, each.rest) for each in parts), strict=True
            )
        )
        apart = float(np.mean([(d != 0).any(0).mean() for d in usable]))
        count = max(d.shape[0] for d in usable)
        return cls(seeds, examples, rest, max(apart, 0.01), f"measured on the {count} seeds that have run")


@dataclass(frozen=True)
class Power:
    """What one design can decide."""

    seeds: int
    examples: int
    margin: float
    within: float  # how often equal methods would be judged as good
    at_ten_times: float  # the same with ten times the test examples
    decides: float | None  # points: the margin within which equal methods would be judged as good in 8 of 10 cases
    shows_worse: float | None  # points: a method that is truly this far behind would be judged worse in 8 of 10 cases
    more_examples: int | None  # further test examples for 8 of 10, with these seeds
    more_seeds: int | None  # further seeds for 8 of 10, with these examples
    both: tuple[int, int] | None  # (further seeds, further examples) if neither alone is enough
    spread: Spread

    def as_json(self) -> JsonObject:
        """The fields, and the sentences for people."""
        return {**asdict(self), "sentences": list(self.sentences())}

    def sentences(self) -> tuple[str, ...]:
        """For people: what the design can decide, what would be enough, and the spread behind it."""
        if self.decides is None or self.shows_worse is None:
            return ("one seed decides nothing; give at least two",)
        more = report_text.rounded_estimate(10 * self.examples)
        first = (
            f"if two methods are equally good, {self.seeds} seeds and {self.examples:,} test examples show that they "
            f"are within {_points(self.margin)} in {report_text.share(self.within)} of comparisons; {more} test "
            f"examples would in {report_text.share(self.at_ten_times)}"
        )
        second = (
            f"8 of 10 comparisons like this one show equal methods to be within {_points(self.decides)}, and a method "
            f"that is {_points(self.shows_worse)} behind to be worse"
        )
        return (first, second, self.advice(), f"the spread of the differences is {self.spread.source}")

    def advice(self) -> str:
        """What would be enough to decide within the margin."""
        if self.within >= ENOUGH:
            return "enough for this margin"
        options = []
        if self.more_examples is not None:
            options.append(f"about {report_text.rounded_estimate(self.more_examples)} more test examples")
        if self.more_seeds is not None:
            options.append(f"about {self.more_seeds} more seeds")
        if self.both is not None and not options:
            seeds, examples = self.both
            options.append(f"about {seeds} more seeds and {report_text.rounded_estimate(examples)} more test examples")
        if not options:
            return f"widen the margin to {_points(self.decides or self.margin)}"
        return f"{', or '.join(options)} would decide within {_points(self.margin)}"


def power(spread: Spread, seeds: int, examples: int, margin: float) -> Power:
    """The power of a design with so many seeds per method and test examples. margin: points."""

    def reached(seeds: int, examples: int) -> float:
        return float((simulate_intervals(spread, seeds, examples)[0] <= margin).mean()) if seeds > 1 else 0.0

    if seeds < 2:
        return Power(seeds, examples, margin, 0.0, 0.0, None, None, None, None, None, spread)
    below, above = simulate_intervals(spread, seeds, examples)
    within = float((below <= margin).mean())
    more_examples = more_seeds = both = None
    if within < ENOUGH:
        more_examples = _more_examples(reached, seeds, examples)
        more_seeds = smallest(
            lambda more: reached(seeds + more, examples) >= ENOUGH, most=MOST_ADVISED - seeds, within=WITHIN
        )
        if more_examples is None and more_seeds is None:
            both = _both(reached, seeds, examples)
    return Power(
        seeds=seeds,
        examples=examples,
        margin=margin,
        within=within,
        at_ten_times=reached(seeds, 10 * examples),
        decides=float(np.quantile(below, ENOUGH)),
        shows_worse=margin + float(np.quantile(above, ENOUGH)),
        more_examples=more_examples,
        more_seeds=more_seeds,
        both=both,
        spread=spread,
    )


def simulate_intervals(spread: Spread, seeds: int, examples: int) -> tuple[Floats, Floats]:
    """Simulate DRAWS intervals of two equal methods with at least two seeds.

    The random numbers are the same in every call, so more seeds or examples never decide less by chance.

    Returns:
        Minus the lower ends and the upper ends (DRAWS,), in points.
    """
    rng = np.random.default_rng(0)
    rest = spread.rest**2
    rows = math.sqrt(spread.seeds**2 + rest / examples) * rng.standard_normal((DRAWS, seeds))  # (D, S)
    own = spread.examples**2 + rest / seeds  # variance of a column's mean
    added = 2 * (own / spread.apart) / examples  # by `with_pseudo_examples`
    columns = own * rng.chisquare(max(1, examples - 1), DRAWS) / max(1, examples - 1) + added  # (D,)
    middle = rows.mean(1) + math.sqrt(spread.examples**2 / examples) * rng.standard_normal(DRAWS)
    weights = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=RESAMPLES) / seeds  # (R, S)
    noise = rng.permutation(_normal(RESAMPLES))  # (R,)
    drawn = math.sqrt(seeds / (seeds - 1)) * (rows @ weights.T - rows.mean(1, keepdims=True))
    drawn += np.sqrt(columns / examples)[:, None] * noise  # (D, R)
    low, high = np.quantile(drawn, [LOW, HIGH], axis=1)
    wider = _quantile(rows.var(1, ddof=1), columns, rest, seeds, examples)
    return -(middle + wider * low), middle + wider * high


def _quantile(rows: Floats, columns: Floats, rest: float, seeds: int, examples: int) -> Floats:
    """The width of the interval relative to a normal's, by the t quantile with Satterthwaite's degrees of freedom."""
    by_seeds = np.maximum(0.0, rows - rest / examples) / seeds + rest / (seeds * examples)
    by_examples = np.maximum(0.0, columns - rest / seeds) / examples + rest / (seeds * examples)
    below = by_seeds**2 / (seeds - 1) + by_examples**2 / max(1, examples - 1)
    freedom = np.maximum(1.0, (by_seeds + by_examples) ** 2 / np.maximum(below, 1e-300))
    return stdtrit(freedom, HIGH) / NormalDist().inv_cdf(HIGH)


def _normal(count: int) -> Floats:
    normal = NormalDist()
    return np.array([normal.inv_cdf((place + 0.5) / count) for place in range(count)])


def _both(reached: Callable[[int, int], float], seeds: int, examples: int) -> tuple[int, int] | None:
    """(further seeds, further examples): the fewest examples with 2, 4 or 8 times the seeds."""
    for factor in (2, 4, 8):
        many = min(MOST_ADVISED, factor * seeds)
        more = _more_examples(reached, many, examples)
        if more is not None:
            return many - seeds, more
    return None


def _more_examples(reached: Callable[[int, int], float], seeds: int, examples: int) -> int | None:
    """The fewest further examples that are enough with so many seeds; None if none are.

    The search doubles them, because with two seeds many more examples can be worse again.
    """
    return smallest(lambda more: reached(seeds, examples + more) >= ENOUGH, most=MOST_EXAMPLES, within=WITHIN)


def _points(value: float) -> str:
    number = f"{value:.2g}" if value < 10 else f"{value:.0f}"
    return f"{number} point{'' if number == '1' else 's'}"
