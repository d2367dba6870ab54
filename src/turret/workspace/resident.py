"""Where a training computes: in a process of its own, or beside others on a base that stays in memory.

Trainings on one resident base share its weights. Each has a model of its own, and one thread runs their steps in turn.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar, NamedTuple, TypedDict, TypeVar, Unpack

import torch

from turret import bases, process
from turret.bases import Base, ChosenDevice
from turret.bases.base import Digests, Dtype, dtype_on
from turret.bases.device import Machine, this_machine
from turret.bases.meta_model import room_to_answer
from turret.bases.quantized import Quantization
from turret.bases.sharded import digest_of
from turret.bases.shared import share
from turret.engine.pass_thread import PassThread
from turret.errors import Interrupted, TrainingError
from turret.families.family import HeadKind
from turret.recipe import Recipe
from turret.recipe.default_base import AUTO
from turret.tasks import Task
from turret.tasks.tokens import tokenizer_digest
from turret.train import memory
from turret.workspace import prepared
from turret.workspace.child_process import STOPPED, why_alone
from turret.workspace.results import Planned

if TYPE_CHECKING:
    from turret.engine.core import Engine

T = TypeVar("T")
Key = tuple[Hashable, ...]  # the base's name first


class TrainingBase(NamedTuple):
    """The base that a training needs: the recipe's, for a task with these labels."""

    recipe: Recipe
    task: type[Task]
    labels: Sequence[str]
    device: ChosenDevice


class ToAnswer(TypedDict):
    """How a base is loaded to answer with, as `bases.load` takes it."""

    task: HeadKind
    num_labels: int | None
    dtype: Dtype
    quantization: Quantization
    device: str


class OwnProcess:
    """A process for one training: it loads its base, measures the plan, and proves the bundle in a fresh process."""

    stays: ClassVar[bool] = False  # whether the base stays in memory for others

    def model_for(self, needed: TrainingBase) -> Base:
        """A training's base, with nothing attached."""
        return prepared.load_base(*needed)

    def has(self, needed: TrainingBase) -> bool:
        """Whether a training's base is in memory."""
        return False

    def load(self, base: str, **how: Unpack[ToAnswer]) -> Base:
        """A base to answer with, with nothing attached."""
        return bases.load(base, **how)

    def machine(self) -> Machine | None:
        """The devices to choose from, with the memory that is free for a training; None: as they are now."""
        return None

    def run(self, work: Callable[[], T], tenant: str = "") -> T:
        """Run a part of a training that computes. tenant: whose training it is."""
        return work()

    def let_go(self, wanted: Collection[str]) -> None:
        """Free the bases whose name is not among those that are wanted."""

    def admitted(self, plan: Callable[[], Planned]) -> Planned:
        """The plan of a training that is about to begin."""
        return plan()


ALONE = OwnProcess()


@dataclass
class ResidentBases(OwnProcess):
    """The bases that stay in memory, and the thread that computes on them.

    Args:
        thread: in which several trainings take turns. None: there is one at a time, and its own thread computes.
    """

    stays: ClassVar[bool] = True
    thread: PassThread | None = field(default_factory=PassThread)
    _bases: dict[Key, Base] = field(default_factory=dict)

    def model_for(self, needed: TrainingBase) -> Base:
        """A training's base as a model of its own. Loads the base if it is not in memory, or changed on disk."""
        recipe, task, labels, _ = needed
        if (reason := why_alone(recipe)) is not None:
            raise TrainingError(f"this training cannot share its base: {reason}; run it in a process of its own")
        load = lambda: prepared.load_base(*needed._replace(labels=()))
        return self.run(lambda: self._model(_key_of(needed), load, task.num_labels(labels), recipe.seed))

    def has(self, needed: TrainingBase) -> bool:
        """Whether a training's base is in memory."""
        return _key_of(needed) in self._bases

    def load(self, base: str, **how: Unpack[ToAnswer]) -> Base:
        """The same as a model of its own. A base that is in memory on a GPU needs no more room there."""
        task, dtype, quantization = how["task"], how["dtype"], how["quantization"]

        def needed(at: torch.device) -> int:
            if _key(base, task, dtype, quantization, at) in self._bases:
                return 0
            return room_to_answer(bases.resolve(base), dtype_on(at, dtype), packed=quantization != "none")

        chosen = bases.choose_device(how["device"], needed, self.machine())
        key = _key(base, task, dtype, quantization, chosen.device)
        load = lambda: bases.load(base, task=task, dtype=dtype, quantization=quantization, device=chosen)
        return self.run(lambda: self._model(key, load, how["num_labels"]))

    def _model(self, key: Key, load: Callable[[], Base], num_labels: int | None, seed: int = 42) -> Base:
        if key not in self._bases:
            self._bases[key] = with_digests(load())
            process.release()  # what loading needed; a training does not do it again
        return share(self._bases[key], num_labels=num_labels, seed=seed)

    def machine(self) -> Machine | None:
        return machine_of(list(self._bases.values()))

    def run(self, work: Callable[[], T], tenant: str = "") -> T:
        """Run a part of a training in the thread, when its tenant's turn comes."""
        return work() if self.thread is None else self.thread.run(work, tenant)

    def let_go(self, wanted: Collection[str]) -> None:
        """Free the bases whose name is not among those that are wanted."""
        self.run(lambda: self._let_go(wanted))

    def _let_go(self, wanted: Collection[str]) -> None:
        for key in [key for key in self._bases if key[0] not in wanted]:
            del self._bases[key]
        process.release()

    def close(self) -> None:
        """End the thread and free all bases. Trainings that still run raise Draining."""
        if self.thread is not None:
            self.thread.close()
        self._bases.clear()


def with_digests(base: Base) -> Base:
    """A base that stays in memory, with what each training on it would hash again."""
    own = [*base.model.parameters(), *base.model.buffers()]
    tensors = {each.data_ptr(): digest_of(each) for each in own}
    return replace(base, digests=Digests(tensors, tokenizer_digest(base.tokenizer)))


def _key(base: str, task: str, dtype: Dtype, quantization: Quantization, device: torch.device) -> Key:
    """What a base in memory is known by. A file that changed makes another key."""
    files = [(path, path.stat().st_mtime_ns, path.stat().st_size) for path in bases.resolve(base).weights]
    return (base, task, dtype_on(device, dtype), quantization, device, *files)


def _key_of(needed: TrainingBase) -> Key:
    recipe, task, _, device = needed
    return _key(recipe.base, task.head, recipe.train.dtype, recipe.base_quantization or "none", device.device)


def machine_of(bases: Iterable[Base]) -> Machine | None:
    """The devices to choose from: what these bases take is free for a training of them. None: as they are now."""
    held = Counter[torch.device]()
    for base in bases:
        held[base.model.device] += base.bytes
    return None if all(device.type == "cpu" for device in held) else with_room(this_machine(), held)


def with_room(machine: Machine, held: Mapping[torch.device, int]) -> Machine:
    """A machine whose GPUs have more free memory. held: how much, in bytes."""
    return replace(machine, gpus=tuple(replace(gpu, free=gpu.free + held.get(gpu.device, 0)) for gpu in machine.gpus))


@dataclass
class ServingBase(OwnProcess):
    """The base that an engine serves: trainings take turns with its answers.

    Args:
        engine: gives the base and the thread.
    """

    engine: Engine
    stays: ClassVar[bool] = True

    @cached_property
    def base(self) -> Base:
        """The engine's base, hashed once for all trainings."""
        return self.run(lambda: with_digests(self.engine.base))

    def model_for(self, needed: TrainingBase) -> Base:
        """The engine's base as a model of its own. Raises TrainingError if the training needs another one."""
        base, (recipe, task, labels, _) = self.engine.base, needed
        precision = dtype_on(base.model.device, recipe.train.dtype)
        head = base.family.head_for(task.head)
        headless = head == "embed"  # whatever head the base has can be taken off
        wanted = (bases.resolve(recipe.base).folder, precision, recipe.base_quantization or "none")
        served = (base.folder, base.dtype, base.quantization)
        if (reason := why_alone(recipe)) is None and (wanted != served or not (headless or head == base.head)):
            reason = f"it needs {recipe.base} for {task.head}, and {base.id} serves here in {base.dtype}"
        if reason is not None:
            raise TrainingError(f"this training cannot run beside these answers: {reason}; use turret worker")
        shared, labelled = self.base, task.num_labels(labels)
        return self.run(lambda: share(shared, num_labels=labelled, seed=recipe.seed, headless=headless))

    def has(self, needed: TrainingBase) -> bool:
        """Whether the base is in memory: always."""
        return True

    def let_go(self, wanted: Collection[str]) -> None:
        """The base stays: it serves."""

    def machine(self) -> Machine | None:
        return machine_of([self.engine.base])

    def run(self, work: Callable[[], T], tenant: str = "") -> T:
        """Run a part of a training between passes of answers."""
        return self.engine.run(work, tenant)


ROOM_SECONDS = 0.2  # between two looks whether there is room


class Room:
    """The memory that trainings in one process share: a training begins when its plan fits beside the others."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._seats: list[Seat] = []

    @contextmanager
    def taken_by(self, seat: Seat) -> Iterator[None]:
        """Count a training among those that run, for the length of the block."""
        with self._changed:
            self._seats.append(seat)
        try:
            yield
        finally:
            with self._changed:
                self._seats.remove(seat)
                self._changed.notify_all()

    def wait(self, own: Seat, needed: int, device: torch.device, *, begins: bool) -> bool:
        """Wait until so many bytes are free, or no other training has begun. Returns whether it waited.

        Args:
            begins: the training begins now, and will use these bytes.
        """
        waited = False
        with self._changed:
            while True:
                others = [each for each in self._seats if each is not own and each.begun]
                if not others or needed <= memory.available(device) - sum(each.promised for each in others):
                    break
                waited = own.waits = True
                self._changed.wait(ROOM_SECONDS)
                own.require_wanted()
            own.waits = False
            if begins:
                own.begun, own.promised = True, needed
        return waited


@dataclass(eq=False)
class Seat(OwnProcess):
    """The place of one training on bases that it shares with others.

    Args:
        wanted: the names of the bases that queued and running trainings want.
        stop: whether it shall end.
    """

    stays: ClassVar[bool] = True
    shared: ResidentBases | ServingBase
    room: Room
    wanted: Callable[[], Collection[str]]
    stop: Callable[[], bool]
    base: str = ""  # the name of its own
    waits: bool = False  # for its turn, for room, or for its data
    begun: bool = False  # it has a plan that fits
    promised: int = 0  # bytes that its plan needs and that it does not use yet
    device: torch.device = memory.CPU

    def model_for(self, needed: TrainingBase) -> Base:
        """As `ResidentBases.model_for`. Before a base is loaded, those that nobody wants are let go."""
        self.base, self.device = needed.recipe.base, needed.device.device
        if not self.shared.has(needed):
            self._make_room(needed.recipe, needed.device)
        return self.run(lambda: self.shared.model_for(needed))

    def machine(self) -> Machine | None:
        """As `ResidentBases.machine`."""
        return self.shared.machine()

    def has(self, needed: TrainingBase) -> bool:
        """As `ResidentBases.has`."""
        return self.shared.has(needed)

    def _make_room(self, recipe: Recipe, device: ChosenDevice) -> None:
        wanted = self.wanted()
        if AUTO not in wanted:
            self.run(lambda: self.shared.let_go(wanted))
        packed = recipe.base_quantization is not None
        dtype = dtype_on(device.device, recipe.train.dtype)
        needed = room_to_answer(bases.resolve(recipe.base), dtype, packed=packed)
        if not self.begun:
            self.room.wait(self, needed, device.device, begins=False)
        if needed > memory.available(device.device):
            self.run(lambda: self.shared.let_go({recipe.base}))

    def run(self, work: Callable[[], T], tenant: str = "") -> T:
        """As `ResidentBases.run`."""

        def begin() -> T:
            self.waits = False
            return work()

        self.waits = True
        try:
            return self.shared.run(begin, tenant)
        finally:
            self.waits = False

    def admitted(self, plan: Callable[[], Planned]) -> Planned:
        """The plan, once it fits beside the others, or once no other training runs."""
        planned = plan()
        needed = 0 if planned.plan.memory is None else planned.plan.memory.above_base
        waited = self.room.wait(self, needed, self.device, begins=True)
        return plan() if waited or planned.plan.refused else planned

    def settle(self) -> None:
        """Its first step is done: the system counts its memory."""
        self.promised = 0

    def require_wanted(self) -> None:
        """Raise Interrupted if the training shall end."""
        if self.stop():
            raise Interrupted(STOPPED)
