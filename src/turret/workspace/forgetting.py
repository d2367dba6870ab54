"""Forgetting: how much worse the base predicts texts with an adapter than without it.

Measured are neutral texts, and examples of the other tasks in the store that generate on the same base. The loss per
token with the adapter is compared with that of slot 0, the bare base, on the same tokens. Only a version that generates
has a number: a classifier answers through a head of its own, so it has no loss per token that could grow.

With d_i the difference of a text's summed losses and n_i its number of tokens, the increase is `sum d_i / sum n_i`. Its
95% interval is a percentile bootstrap over texts. Source: Efron and Tibshirani 1993, An Introduction to the Bootstrap.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from turret import adapters
from turret.adapters import packed
from turret.errors import TurretError
from turret.recipe import Recipe
from turret.reference import Reference
from turret.store import Store, Version
from turret.tasks import stored_task, task_from_spec
from turret.tasks.shapes import Metrics, MetricValue
from turret.train.batches import EncodedRows, spread
from turret.train.evaluation import evaluating, example_losses
from turret.transformer import Model, Tokenizer
from turret.workspace.progress import Say, silent
from turret.workspace.reading import read_dataset

# --- neutral texts ----------------------------------------------------------------------------------------------------
# Neutral paragraphs, written for this package, to measure forgetting.
#
# No task is about them. If the base predicts them worse with an adapter than without it, the adapter made it forget.


PARAGRAPHS = (
    "The harbour wakes before the town does. Fishermen untie their boats in the dark, and the first thing anyone "
    "hears is the slow knock of an engine that has been repaired more often than its owner likes to admit. By the "
    "time the bakery opens, the boats are specks near the horizon, and the gulls have gone with them. Nothing "
    "else happens for an hour, which is what most people who live there say they like about the place.",
    "A good knife needs surprisingly little care. Wash it by hand, dry it at once, and keep it where its edge "
    "touches nothing hard. Most of the damage to kitchen knives is done in drawers and dishwashers rather than on "
    "food. When it no longer slices a ripe tomato under its own weight, draw it a few times along a stone, at the "
    "same angle on both sides, and test it on paper before you go on cooking.",
    "Rivers rarely run straight for long. Where the current is faster, on the outside of a bend, the bank is worn "
    "away; where it is slower, on the inside, sand and gravel settle. So every bend grows, and the river wanders "
    "across its valley over the centuries. Sometimes a loop becomes so narrow that a flood cuts through its neck, "
    "and the old bend is left behind as a still, curved lake.",
    "When my grandmother taught me to play chess, she let me take back as many moves as I wanted, on the "
    "condition that I explained what I had overlooked. The games took whole afternoons. I lost all of them, but I "
    "learned to say what I had been thinking, which turned out to be more useful later than any opening. She kept "
    "the board on top of the piano, and nobody else was allowed to dust it.",
    "Before you paint a wall, wash it. Grease and dust keep the paint from holding, however good it is, and a "
    "single coat on a clean surface lasts longer than three on a dirty one. Fill the holes, let the filler dry "
    "completely, and sand it until you can no longer feel the edge with your fingertips. Then cover the floor, "
    "open a window, and begin at the top.",
    "The library was built with money from a factory that no longer exists. Its reading room has tall windows to "
    "the north, so that the light is even all day, and long oak tables with a brass lamp at each seat. Children "
    "come after school because it is warm; students come before examinations because it is quiet; and a few older "
    "men come every morning for the newspapers, which they read from the last page to the first.",
    "The last bus leaves the square at ten past eleven, and the driver waits a minute longer if he sees "
    "someone running. He has done the route for so many years that he knows which lights will be on in which "
    "houses, and he notices when one of them stays dark.",
    "Bread needs less work than time. Mix flour, water, salt and a little yeast in the evening, cover the "
    "bowl, and leave it on the table. By morning the dough has doubled. Fold it twice, let it rest while the "
    "oven heats, and bake it until the crust sounds hollow when you knock on it.",
    "Swifts spend almost their whole lives in the air. They eat, drink and even sleep on the wing, and they "
    "land only to nest. When a storm comes they fly around it, sometimes for hundreds of kilometres, and "
    "return when the sky has cleared and the insects are up again.",
    "My brother keeps every key he has ever owned in a wooden box under the stairs. Most of them open nothing "
    "any more: bicycles that were stolen, flats that were given up, a cupboard that was burned. He says that "
    "he will throw them away when he moves, and then he moves and takes the box along.",
    "A path through a meadow is made by those who walk it. First the grass is only bent, then it is worn thin, "
    "and after a summer there is bare earth. If nobody comes for a year the clover closes over it, and in two "
    "years you would have to know where it was to find it.",
    "The first telescopes showed their makers more than they had asked for. The moon turned out to have "
    "mountains, the sun had spots, and one of the planets had companions of its own. It took some time until "
    "people agreed that these things had been there all along and were not made by the glass.",
    "On Saturdays the market fills the street from the church to the bridge. The cheese is at the upper end, "
    "where it is cool, and the flowers are by the water. In between you can buy socks, honey, second-hand "
    "books and a soup that is different every week and always called the same.",
    "To fold a map the way it was folded before, look for the creases that bend towards you. Close the long "
    "ones first, as you would close an accordion, and then the short ones. If it resists, you have turned one "
    "of them over; open it again and start from the side with the title.",
    "Snow changes the sound of a town. Steps become soft, cars seem further away, and a voice at the end of "
    "the road is suddenly clear. Children notice it before they look out of the window. By noon the ploughs "
    "have been through, and everything sounds as it did the day before.",
    "The old clockmaker had two rules. He never set a clock by another clock, only by the signal on the radio, "
    "and he never told a customer that a repair was easy. When people asked why, he showed them the drawer "
    "with the screws that somebody else had dropped, and then closed it again.",
    "A compost heap works best if it is fed in layers: something green and wet, then something brown and dry. "
    "Turn it every few weeks so that air gets in. It should be warm in the middle and smell of forest. If it "
    "smells of anything else, add leaves and wait.",
    "The ferry crosses the lake in forty minutes, and there is nothing to do on board but look. The mountains "
    "on the far side grow slowly and never quite arrive. Halfway over, the engine changes its tone, and the "
    "regular passengers put down their newspapers, because the coffee is served then and at no other time.",
    "Languages borrow words as neighbours borrow tools, and not all of them come back. Sailors brought some, "
    "cooks brought many, and a few arrived with a single book that everybody happened to read. After a "
    "generation nobody hears that they were foreign, and somebody writes a letter to complain about the new "
    "ones.",
    "She learned to swim late, in a river, from an aunt who did not believe in pools. The trick, the aunt "
    "said, was to let the water carry you and to be polite to it. Years later she could still feel that river "
    "in every stroke, even in the sea, where the water carries you anyway.",
    "A good chair is harder to make than a good table. The table only has to stand still, but the chair is "
    "pushed, tilted and sat on by people of every shape. The joints must give a little and never come loose, "
    "and the back has to hold you without reminding you that it is there.",
    "Before there were weather reports, people watched what was nearest: the swallows, the smoke, the knees of "
    "the oldest man in the village. Much of it was nonsense, and some of it was not. Low swallows follow low "
    "insects, and insects fly low when the air is damp, so rain is often on its way.",
    "The lighthouse has been empty since the lamp was made to turn on without help. Twice a year two "
    "technicians come by boat, oil a hinge, change a battery and sign the book. In the kitchen there is still "
    "a calendar from the last winter that anyone lived there, open at the month of March.",
    "If you want to draw a hand, do not begin with the fingers. Look at the whole shape, as if it were a "
    "mitten, and draw that first. Then divide it. Most hands that look wrong have fingers that were drawn one "
    "after the other, each of them correct, and together too long for the palm.",
)


# --- forgetting -------------------------------------------------------------------------------------------------------


LEAD = 24  # tokens of a neutral text that are given; the others are predicted
MOST_TOKENS = 256  # of a neutral text
EXAMPLES = 32  # of another task
MOST_TASKS = 16
RESAMPLES = 2000
LEVEL = 0.95
SEED = 42
Losses = tuple[Sequence[float], Sequence[int]]  # the summed loss of each text, and its number of tokens


@dataclass(frozen=True)
class Increase:
    """The increase of the loss per token on some texts, with its interval."""

    increase: float
    low: float
    high: float
    loss: float  # per token, with the adapter
    base_loss: float
    texts: int

    @classmethod
    def of(cls, own: Losses, bare: Losses) -> Increase:
        """Compare the losses of the same texts with the adapter and without it."""
        tokens = np.asarray(own[1], dtype=float)  # (N,)
        more = np.asarray(own[0], dtype=float) - np.asarray(bare[0], dtype=float)
        drawn = np.random.RandomState(SEED).randint(len(tokens), size=(RESAMPLES, len(tokens)))
        means = more[drawn].sum(1) / tokens[drawn].sum(1)
        low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        total = float(tokens.sum())
        return cls(
            increase=float(more.sum()) / total,
            low=float(low),
            high=float(high),
            loss=float(sum(own[0])) / total,
            base_loss=float(sum(bare[0])) / total,
            texts=len(tokens),
        )


@dataclass(frozen=True)
class Forgetting:
    """The forgetting of one version, as its metrics keep it.

    Args:
        neutral: on neutral texts.
        tasks: by the version of another task; None: not measured yet.
        skipped: why a task could not be measured, by its version.
    """

    neutral: Increase
    tasks: Mapping[str, Increase] | None = None
    skipped: Mapping[str, str] = field(default_factory=dict)

    def as_json(self) -> Metrics:
        """The metrics of the split `forgetting`. `tasks` is the largest increase; 0 if there is no other task."""
        found: dict[str, MetricValue] = _numbers("neutral", self.neutral)
        if self.tasks is not None:
            worst = max(self.tasks.values(), key=lambda each: each.increase, default=None)
            found |= (
                {"tasks": 0.0, "tasks_low": 0.0, "tasks_high": 0.0}
                if worst is None
                else {
                    "tasks": worst.increase,
                    "tasks_low": worst.low,
                    "tasks_high": worst.high,
                }
            )
            found["against"] = {version: vars(each) for version, each in self.tasks.items()}
            found["skipped"] = dict(self.skipped)
        return found


def _numbers(name: str, each: Increase) -> dict[str, MetricValue]:
    return {
        name: each.increase,
        f"{name}_low": each.low,
        f"{name}_high": each.high,
        f"{name}_loss": each.loss,
        f"{name}_base_loss": each.base_loss,
        f"{name}_texts": each.texts,
    }


def is_defined(version: Version) -> bool:
    """Whether a version has forgetting: one that classifies answers through a head of its own."""
    return stored_task(version.task).generates


def on_neutral_texts(model: Model, tokenizer: Tokenizer) -> Forgetting:
    """The forgetting on neutral texts of the attached adapter."""
    sources, targets = [], []
    for paragraph in PARAGRAPHS:
        ids = torch.tensor(tokenizer(paragraph)["input_ids"], dtype=torch.long)[:MOST_TOKENS]
        lead = min(LEAD, len(ids) // 2)
        sources.append(ids[:lead])
        targets.append(ids[lead:])
    losses: list[Losses] = []
    for slot in (adapters.ATTACHED, adapters.BARE):
        sums = []
        with evaluating(model, slot):
            for source, target in zip(sources, targets, strict=True):
                sums.append(_summed_loss(packed.target_states(model, [source], [target]), target, model))
        losses.append((sums, [len(target) for target in targets]))
    return Forgetting(Increase.of(*losses))


def _summed_loss(states: Tensor, target: Tensor, model: Model) -> float:
    """The loss of a text, summed over its T tokens. The logits of a large vocabulary are not in memory at once.

    Args:
        states: (T, D), each before its target token.
        target: (T,) int64.
    """
    most = packed.targets_at_once(model)
    parts = zip(torch.split(states, most), torch.split(target.to(states.device), most), strict=True)
    entropy = torch.nn.functional.cross_entropy
    return sum(
        float(entropy(packed.vocabulary_logits(model, each).float(), ids, reduction="sum")) for each, ids in parts
    )


def on_other_tasks(
    store: Store, version: Version, model: Model, tokenizer: Tokenizer, neutral: Increase, say: Say = silent
) -> Forgetting:
    """The forgetting on the other tasks of the store as well. model: with the version's adapter attached."""
    found, skipped = dict[str, Increase](), dict[str, str]()
    for other in others(store, version):
        say(f"measuring forgetting on {other}")
        try:
            found[str(other)] = _on_task(store, other, model, tokenizer)
        except TurretError as error:  # its data may be gone, and then nothing can be measured on it
            skipped[str(other)] = str(error)
    return Forgetting(neutral, found, skipped)


def others(store: Store, version: Version) -> list[Version]:
    """The version in use of every other name that generates on the same base, at most `MOST_TASKS`.

    Those with an alias come first, then the newest.
    """
    base = version.base.get("fingerprint")
    names = dict.fromkeys(each.name for each in store.list() if each.name != version.name and each.comparison is None)
    found = sorted((store.resolve(Reference(name)) for name in names), key=lambda each: each.created, reverse=True)
    fitting = [
        each
        for each in sorted(found, key=lambda each: not each.aliases)
        if each.base.get("fingerprint") == base and is_defined(each) and isinstance(each.lineage.get("recipe"), str)
    ]
    return fitting[:MOST_TASKS]


def is_current(measured: Metrics, expected: Sequence[Version]) -> bool:
    """Whether stored metrics of forgetting cover these versions of other tasks."""
    seen = {each for name in ("against", "skipped") if isinstance(part := measured.get(name), Mapping) for each in part}
    return "tasks" in measured and seen == {str(each) for each in expected}


def _on_task(store: Store, other: Version, model: Model, tokenizer: Tokenizer) -> Increase:
    """On test examples of another version's task, as that task writes its prompts."""
    recipe = Recipe.from_toml(str(other.lineage["recipe"]))
    dataset = read_dataset(store, recipe)
    examples = dataset.test or dataset.validation or dataset.train
    its_task = task_from_spec(other.task, tokenizer)
    items = EncodedRows(its_task, [examples[place] for place in spread(len(examples), EXAMPLES)])
    own = example_losses(model, its_task, items)
    return Increase.of(own, example_losses(model, its_task, items, slot=adapters.BARE))
