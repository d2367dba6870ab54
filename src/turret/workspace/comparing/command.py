"""The command line that makes a report again: every setting of the recipe and of the request that is not a default."""

from __future__ import annotations

import json
import platform
import shlex
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch

from turret import quantized
from turret.json_types import JsonObject, JsonValue
from turret.recipe import Data, Recipe
from turret.transformer import Model
from turret.workspace.machine import installed

# --- provenance -------------------------------------------------------------------------------------------------------
# Date, device, precision and versions of a training, for its report. Runs in the process of that training.


PACKAGES = ("turret", "torch", "transformers", "peft")


def provenance(model: Model, int8: bool) -> JsonObject:
    """Date, device, threads, precision, versions and commit."""
    weight = next(model.parameters())
    kinds = sorted({str(each.dtype).removeprefix("torch.") for each in model.parameters() if each.is_floating_point()})
    packed = ", weights in 4 bits" if quantized.any_packed(model) else ""
    precision = " and ".join(kinds) + packed + (", products in int8" if int8 else "")
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
        "device": _device(weight.device),
        "threads": torch.get_num_threads(),
        "precision": precision,
        "versions": {"python": platform.python_version(), **{name: installed(name) for name in PACKAGES}},
        "commit": commit(Path(__file__).parents[4]),
    }


def commit(folder: Path) -> str | None:
    """The commit of a source checkout; None for an installed package."""
    if not (folder / ".git").exists():
        return None
    try:
        result = subprocess.run(
            ["git", "-C", str(folder), "rev-parse", "--short=12", "HEAD"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip() or None


def _device(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type}, {_processor()}"


def _processor() -> str:
    """The processor's name with family and model number, because one name covers several generations."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return platform.processor() or platform.machine()
    pairs = (line.split(":", 1) for line in path.read_text(encoding="utf-8").splitlines() if ":" in line)
    info = {key.strip(): value.strip() for key, value in pairs}
    name = info.get("model name", platform.machine())
    return f"{name} (family {info['cpu family']}, model {info['model']})" if "cpu family" in info else name


# --- command ----------------------------------------------------------------------------------------------------------


def command(verb: str, recipe: Recipe, options: Mapping[str, str | int | float | None]) -> str:
    """`turret compare DATA --base B --name N --set train.epochs=1 --seeds 5`.

    Args:
        options: name -> value; True is written as a flag, None and False are left out.
    """
    words = ["turret", verb, recipe.data.source, "--base", recipe.base, "--name", recipe.name]
    words += ["--seed", str(recipe.seed)]
    for key, value in _changes(recipe):
        words += ["--set", f"{key}={value}"]
    for name, option in options.items():
        if option is not None and option is not False:
            words += [f"--{name}"] if option is True else [f"--{name}", str(option)]
    return shlex.join(words)


def _changes(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """(key, value) of every setting that is not the default, as `--set` reads them."""
    defaults = Recipe(name=recipe.name, base=recipe.base, data=Data(source=recipe.data.source))
    if recipe.method.kind != defaults.method.kind:
        yield "method", recipe.method.kind
    for table in ("data", "task", "method", "train"):
        settings = getattr(recipe, table)
        default = type(settings).model_construct() if table == "method" else getattr(defaults, table)
        for key, value in settings.model_dump(mode="json").items():
            if key != "kind" and value != _as_json(getattr(default, key, None)):
                yield from _texts(f"{table}.{key}", value)
        if table == "task" and settings.kind is not None:
            yield "task.kind", settings.kind


def _as_json(value: JsonValue) -> JsonValue:
    return list(value) if isinstance(value, tuple) else value


def _texts(key: str, value: JsonValue) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for name, number in value.items():
            yield f"{key}.{name}", f"{number:g}"
    elif value is None:
        yield key, "none"
    elif isinstance(value, (bool, Sequence)) and not isinstance(value, str):
        yield key, json.dumps(value)
    else:
        yield key, str(value)
