"""Where a training computes, and what it has in memory before its first step: its device and its base.

It computes in a process of its own, or beside others on a base that stays in memory. Trainings on one resident base
share its weights. Each has a model of its own, and one thread runs their steps in turn. In a process of its own, the
base is whole or in parts (`train.shard`).
"""

from __future__ import annotations

import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, NamedTuple, TypedDict, TypeVar, Unpack

import torch

from turret import bases, bundles, process
from turret.adapters import Adapter, StoredAdapter
from turret.bases import Base, ChosenDevice, choose_device
from turret.bases.base import Digests, Dtype, dtype_on, share_weights
from turret.bases.device import CPU, Gpu, Machine, gigabytes, this_machine
from turret.bases.meta_model import room_to_answer, skeleton
from turret.bases.quantized import QUANTIZATIONS, Quantization
from turret.bases.sharded import digest_of, gather_once, load_in_parts, parts_of
from turret.data import Dataset
from turret.engine.scheduler import TrainingTurns
from turret.errors import AdapterError, Interrupted, PreflightRefused, TrainingError, UnknownFamily
from turret.families.family import HeadKind
from turret.ops.table import why_no_gpu_feature
from turret.recipe import AUTO, Data, Recipe
from turret.reference import Reference
from turret.store import Store, Version
from turret.tasks import Task, stored_task
from turret.tasks.tokens import tokenizer_digest
from turret.train import distributed, memory
from turret.train.memory import Work, in_parts, predict_on_gpu, refusal
from turret.train.training_plan import Prediction
from turret.workspace.child_process import STOPPED, why_alone
from turret.workspace.results import Planned

if TYPE_CHECKING:
    from turret.engine.core import Engine


GPU_PASSES = (16384, 8192, 4096)  # tokens of a training pass on a GPU, the most that fit
GPU_SHARE = 0.6  # of the memory beside weights and optimizer states; the rest is for uneven lengths and gaps
UNPREDICTED = 1.5  # times the room to answer: a training whose memory cannot be predicted from shapes


@dataclass(frozen=True)
class PreparedTraining:
    """Everything that a training needs, in memory."""

    recipe: Recipe  # with every default filled in
    dataset: Dataset
    base: Base
    bare: Base  # with nothing attached while `base` trains, to be asked; `base` itself if it lies in parts
    task: Task
    notes: list[str]
    load_seconds: float
    resident: int  # bytes of the process after the base was loaded
    start: StoredAdapter | None  # the version that `train.init_from` names
    device: ChosenDevice  # where the base is, and why

    @property
    def parts(self) -> tuple[Recipe, Base, Task, Dataset]:
        """The positional arguments of `turret.train`'s functions."""
        return self.recipe, self.base, self.task, self.dataset


# --- device -----------------------------------------------------------------------------------------------------------
# A GPU takes a training if the predicted memory of the whole training fits there.


def choose_for(recipe: Recipe, task: type[Task], labels: Sequence[str], machine: Machine | None = None) -> ChosenDevice:
    """The device of a training, before its base is read.

    Args:
        recipe: `train.device` names the device; None: auto.
        task: of the data.
        labels: of a classifier.
        machine: the devices to choose from; None: those of this machine.

    Raises:
        DeviceError: the device is not there.
        PreflightRefused: the weights and the trained states do not fit on the GPU that the recipe names.
    """
    name = recipe.train.device or AUTO
    if name in ("cpu", "mps"):
        return choose_device(name, machine=machine)
    machine = this_machine() if machine is None else machine
    gpus = {gpu.device: gpu for gpu in machine.gpus}
    chosen = choose_device(name, lambda at: _needed_memory(recipe, task, labels, gpus[at]), machine)
    gpu = gpus.get(chosen.device)
    if gpu is not None and name != AUTO:
        predicted = predicted_for(recipe, task, labels, gpu.device)
        problem = None if predicted is None else refusal(predicted, gpu.free, recipe.base, str(gpu.device))
        if problem is not None:
            raise PreflightRefused(problem)
    return chosen


def checkpoints_for(
    recipe: Recipe, task: type[Task], labels: Sequence[str], device: torch.device, machine: Machine | None = None
) -> str | None:
    """Why the layers of a training on a GPU are checkpointed, though the recipe leaves it open; None if they are not.

    Args:
        recipe: `train.checkpoint_layers`, if it is set, decides.
        device: the one that `choose_for` chose.
        machine: its devices; None: those of this machine.
    """
    if device.type != "cuda" or recipe.train.checkpoint_layers is not None or recipe.train.shard is not None:
        return None
    machine = this_machine() if machine is None else machine
    free = next(gpu.free for gpu in machine.gpus if gpu.device == device)
    whole = predicted_for(recipe, task, labels, device)
    if whole is None or whole.total <= free:
        return None
    return f"about {gigabytes(whole.total)} would be needed without it, and {gigabytes(free)} are free"


def pass_tokens_for(
    recipe: Recipe,
    task: type[Task],
    labels: Sequence[str],
    device: torch.device,
    machine: Machine | None = None,
    *,
    checkpointed: bool = False,
) -> int | None:
    """Tokens of a training pass on a GPU: the most that take a share of its free memory, as the plan predicts them.

    A pass of the few hundred tokens that suit a CPU would leave a GPU waiting for launches.

    Args:
        device: the one that `choose_for` chose.
        machine: its devices; None: those of this machine.
        checkpointed: whether its layers are.

    Returns:
        None if the recipe decides, on a CPU, for a base in parts, and if not even the fewest tokens fit.
    """
    if device.type != "cuda" or recipe.train.micro_batch_tokens is not None or recipe.train.shard is not None:
        return None
    machine = this_machine() if machine is None else machine
    free = next(gpu.free for gpu in machine.gpus if gpu.device == device)
    for most in GPU_PASSES:
        asked = recipe.with_overrides({"train.micro_batch_tokens": str(most)})
        predicted = predicted_for(asked, task, labels, device, checkpointed=checkpointed)
        if predicted is None:
            return None
        if predicted.activations <= GPU_SHARE * (free - (predicted.total - predicted.activations)):
            return most
    return None


def predicted_for(
    recipe: Recipe,
    task: type[Task],
    labels: Sequence[str],
    device: torch.device,
    *,
    parts: int = 1,
    checkpointed: bool | None = None,
    work: Work | None = None,
) -> Prediction | None:
    """The predicted memory of a recipe's training on a GPU; None if it cannot be told from shapes alone.

    Args:
        parts: in how many parts the layers of the base lie, with `train.shard`.
        checkpointed: whether its layers are checkpointed; None: as the recipe says.
        work: its largest pass; None: of texts that are all as long as the recipe allows.

    Raises:
        BaseModelError: the base cannot be found.
    """
    source = bases.resolve(recipe.base)
    if checkpointed is None:
        checkpointed = bool(recipe.train.checkpoint_layers)
    shape = recipe.model_copy(update={"name": "shape", "seed": 0, "data": Data(source="-")})  # the rest decides
    try:
        outputs = task.num_labels(labels)
        return _predict_memory(source.folder, shape.to_toml(), task, outputs, device, parts, checkpointed, work)
    except (UnknownFamily, AdapterError, NotImplementedError, RuntimeError, TypeError):
        return None  # such as a module that needs numbers; the plan measures it on the GPU


@lru_cache(maxsize=64)
def _predict_memory(
    _folder: Path,
    shape: str,
    task: type[Task],
    outputs: int | None,
    device: torch.device,
    parts: int,
    checkpointed: bool,
    work: Work | None,
) -> Prediction:
    """The predicted memory of a training on the base in a folder. shape: its recipe (TOML), without name and data."""
    recipe = Recipe.from_toml(shape)
    model = skeleton(bases.resolve(recipe.base), task.head, outputs)
    dtype = dtype_on(device, recipe.train.dtype)
    predicted = predict_on_gpu(
        model,
        recipe.method,
        work or Work.of(recipe, model),
        dtype,
        nf4=recipe.base_quantization == "nf4",
        optimizer=recipe.train.optimizer,
        checkpointed=checkpointed,
        attention=why_no_gpu_feature("attention", device, dtype) is None,
    )
    return predicted if parts == 1 else in_parts(predicted, model, parts)


def _needed_memory(recipe: Recipe, task: type[Task], labels: Sequence[str], gpu: Gpu) -> int:
    """Bytes that a training needs on a GPU, with its layers checkpointed if it would not fit otherwise."""
    predicted = predicted_for(recipe, task, labels, gpu.device)
    if predicted is not None and predicted.total > gpu.free and recipe.train.checkpoint_layers is None:
        predicted = predicted_for(recipe, task, labels, gpu.device, checkpointed=True) or predicted
    if predicted is not None:
        return predicted.total
    packed = recipe.base_quantization is not None
    room = room_to_answer(bases.resolve(recipe.base), dtype_on(gpu.device, recipe.train.dtype), packed=packed)
    return round(UNPREDICTED * room)


# --- base -------------------------------------------------------------------------------------------------------------


def connect_parts(recipe: Recipe, here: distributed.Processes) -> None:
    """Connect the processes for a base in parts, if the recipe asks for it. All must call it at the same time.

    Raises:
        TrainingError: there is one process.
    """
    if recipe.train.shard is None:
        return
    if here.size == 1:
        raise TrainingError(
            f'train.shard = "{recipe.train.shard}" divides a base among several processes, and this is one: start it '
            f"with `{distributed.LAUNCH}`, which prints the plan too, or leave train.shard out"
        )
    distributed.mesh()


def base_of(recipe: Recipe, task: type[Task], labels: Sequence[str], device: ChosenDevice) -> Base:
    """A recipe's base: whole, or this process's part of it."""
    head, outputs, dtype, seed = task.head, task.num_labels(labels), recipe.train.dtype, recipe.seed
    if recipe.train.shard is not None:
        mesh = distributed.mesh()
        return load_in_parts(
            recipe.base, task=head, mesh=mesh, device=device, num_labels=outputs, dtype=dtype, seed=seed
        )
    return bases.load(
        recipe.base,
        task=head,
        num_labels=outputs,
        dtype=dtype,
        seed=seed,
        quantization=recipe.base_quantization or "none",
        device=device,
    )


def gather_parts(ready: PreparedTraining) -> None:
    """Make the first pass of a base in parts, in all processes."""
    if parts_of(ready.base.model) > 1:
        gather_once(ready.base.model)


def proof_device(ready: PreparedTraining) -> ChosenDevice:
    """Where the proof loads the base, whole and in one process: the CPU, if the base is in parts."""
    return ChosenDevice(CPU, "the whole base") if parts_of(ready.base.model) > 1 else ready.device


# --- one thread for the passes of trainings ---------------------------------------------------------------------------
# Trainings take turns there, pass by pass, while each has a thread of its own for everything else.


T = TypeVar("T")


class PassThread:
    """Runs parts of trainings one after another. The tenant that was given the fewest seconds goes next.

    torch's thread pool belongs to the thread that computes, so passes of many threads would each start one.
    """

    def __init__(self) -> None:
        self._turns = TrainingTurns(1.0)
        self._wake = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._loop, name="turret-passes", daemon=True)
        self._thread.start()

    def run(self, work: Callable[[], T], tenant: str = "") -> T:
        """Run a part of a training in the thread when its turn comes. Returns its result, or raises its error.

        Args:
            tenant: Whose training it belongs to.

        Raises:
            Draining: The thread was closed before the turn came.
        """
        if threading.current_thread() is self._thread:
            return work()
        return self._turns.run(work, tenant, self._wake, lambda: self._closing)

    def close(self) -> None:
        """End the thread after the part that runs now. Parts that wait raise Draining."""
        with self._wake:
            self._closing = True
            self._turns.abandon()
            self._wake.notify_all()
        self._thread.join()

    @process.keep_freed()
    def _loop(self) -> None:
        while True:
            with self._wake:
                while not self._closing and (taken := self._turns.take(answers_wait=False)) is None:
                    self._wake.wait()
                if self._closing:
                    return
            assert taken is not None
            tenant, part = taken
            started = time.monotonic()
            with torch.inference_mode(False), torch.enable_grad():
                part.run()
            with self._wake:
                self._turns.end_part(tenant, time.monotonic() - started)


# --- a place ----------------------------------------------------------------------------------------------------------


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
        return base_of(*needed)

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

    def admit_plan(self, plan: Callable[[], Planned]) -> Planned:
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
        key = _key_of(needed)

        def model() -> Base:
            if key not in self._bases:
                self._bases[key] = with_digests(base_of(*needed._replace(labels=())))
                process.release_memory()  # what loading needed; a training does not do it again
            return share_weights(self._bases[key], num_labels=task.num_labels(labels), seed=recipe.seed)

        return self.run(model)

    def has(self, needed: TrainingBase) -> bool:
        """Whether a training's base is in memory."""
        return _key_of(needed) in self._bases

    def load(self, base: str, **how: Unpack[ToAnswer]) -> Base:
        """A base in memory as a model of its own, which needs no more room there. Another is loaded, and not kept."""
        task, dtype, quantization = how["task"], how["dtype"], how["quantization"]

        def needed(at: torch.device) -> int:
            if _key(base, task, dtype, quantization, at) in self._bases:
                return 0
            return room_to_answer(bases.resolve(base), dtype_on(at, dtype), packed=quantization != "none")

        chosen = bases.choose_device(how["device"], needed, self.machine())
        key = _key(base, task, dtype, quantization, chosen.device)
        labels = how["num_labels"]
        if (kept := self._bases.get(key)) is None:
            return bases.load(base, task=task, num_labels=labels, dtype=dtype, quantization=quantization, device=chosen)
        return self.run(lambda: share_weights(kept, num_labels=labels))

    def machine(self) -> Machine | None:
        return machine_of(list(self._bases.values()))

    def run(self, work: Callable[[], T], tenant: str = "") -> T:
        """Run a part of a training in the thread, when its tenant's turn comes."""
        return work() if self.thread is None else self.thread.run(work, tenant)

    def let_go(self, wanted: Collection[str]) -> None:
        """Free the bases whose name is not among those that are wanted. Called in the thread."""
        for key in [key for key in self._bases if key[0] not in wanted]:
            del self._bases[key]
        process.release_memory()

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
        return self.run(lambda: share_weights(shared, num_labels=labelled, seed=recipe.seed, headless=headless))

    def has(self, needed: TrainingBase) -> bool:
        """Whether the base is in memory: always."""
        return True

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
    device: torch.device = CPU

    def model_for(self, needed: TrainingBase) -> Base:
        """As `ResidentBases.model_for`. Before a base is loaded, those that nobody wants are let go."""
        self.base, self.device = needed.recipe.base, needed.device.device
        if not self.shared.has(needed):
            self._make_room(needed.recipe, needed.device)
        return self.run(lambda: self.shared.model_for(needed))

    def load(self, base: str, **how: Unpack[ToAnswer]) -> Base:
        """As `ResidentBases.load`."""
        return self.run(lambda: self.shared.load(base, **how))

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

    def admit_plan(self, plan: Callable[[], Planned]) -> Planned:
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


# --- adapters of the store --------------------------------------------------------------------------------------------


def read_adapter(store: Store, reference: str | Reference) -> tuple[Version, Adapter]:
    """Read a version. Raises NotFound if it does not exist, Corrupt if its files are damaged."""
    with tempfile.TemporaryDirectory(prefix="turret-") as folder:
        bundle = Path(folder) / "bundle"
        return store.materialize(reference, bundle), bundles.read_bundle(bundle)


def load_base(
    adapter: Adapter,
    dtype: Dtype = "auto",
    quantization: Quantization | None = None,
    device: str = "cpu",
    place: OwnProcess = ALONE,
) -> Base:
    """Load the base of an adapter that stores its task. The caller checks the base's fingerprint.

    Args:
        quantization: None: as the adapter was trained.
        place: where the base may be in memory already.
    """
    task, labels = stored_task(adapter.task), adapter.task.get("labels") or ()
    return place.load(
        adapter.base.id,
        task=task.head,
        num_labels=task.num_labels(labels),
        dtype=dtype,
        quantization=quantization_of(adapter) if quantization is None else quantization,
        device=device,
    )


def quantization_of(adapter: Adapter) -> Quantization:
    """How the weights of its base were packed during training. Raises AdapterError if this version does not know it."""
    kept = adapter.base.quantization or "none"
    if kept not in QUANTIZATIONS:
        raise AdapterError(
            f"the adapter was trained on {adapter.base.id} in {kept[:40]}: this version knows "
            f"{', '.join(QUANTIZATIONS)}; upgrade turret"
        )
    return QUANTIZATIONS[kept]
