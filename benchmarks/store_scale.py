"""A store of a thousand versions answers as a store of ten does, and takes the room of its distinct tensors.

    python benchmarks/store_scale.py --report
    python benchmarks/store_scale.py                  # 10, 100 and 1000 versions; minutes
    python benchmarks/store_scale.py --versions 10 100
    python benchmarks/store_scale.py --servers        # on PostgreSQL and moto's S3, started for this
    python benchmarks/store_scale.py --versions 100 --url 'postgresql://…?files=s3://…' --kind 'PostgreSQL, S3'

A version is a bundle of LoRA's size with random weights; ten versions a name, and every fifth has the weights of an
earlier one, as a copied tenant has. Each verb is timed in this process on the full store, `--repeats` times; start-up
is the whole command `turret list NAME --json` in a process of its own. torch is not loaded.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import record
from safetensors.numpy import save_file

from turret.store import Store

NAME = "store_scale"
CLAIM = "a store of 1000 versions answers as one of 10 does, and takes the room of its distinct tensors"
VERBS = ("put", "get", "promote", "rollback", "list", "list of a name", "start-up", "verify")
A_NAME, SHARED = 10, 5  # versions a name; every how manieth shares its weights


def main() -> None:
    options = _options()
    if not options.report:
        with _servers(options) as new_url:
            for versions in options.versions:
                run = _measure(versions, new_url(), options)
                record.keep(NAME, CLAIM, run)
    print(report())


@contextmanager
def _servers(options: argparse.Namespace) -> Iterator[Callable[[], str | None]]:
    """What makes the URL of an empty store, or None for a folder."""
    if not options.servers:
        yield lambda: options.url
        return
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from servers import BUCKET, postgres, s3

    with ExitStack() as opened:
        server, _ = opened.enter_context(postgres()), opened.enter_context(s3())
        options.kind = "PostgreSQL, moto's S3"

        def new_url() -> str:
            name = opened.enter_context(server.database())
            return f"{server.url_with_password(name)}?files=s3://{BUCKET}/{name}&local={tempfile.gettempdir()}"

        yield new_url


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--versions", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--kilobytes", type=int, default=300, help="of weights a version (default 300)")
    parser.add_argument("--repeats", type=int, default=20, help="of each verb (default 20)")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--servers", action="store_true", help="on PostgreSQL and moto's S3, started for this")
    parser.add_argument("--url", help="a new, empty store in place of a folder; one number of versions")
    parser.add_argument("--kind", default="folder", help="what the table calls that store, such as 'PostgreSQL, S3'")
    parser.add_argument("--report", action="store_true", help="only print the table of what is kept")
    options = parser.parse_args()
    if options.url and (len(options.versions) != 1 or options.kind == "folder"):
        parser.error("--url needs one number of --versions, and --kind")
    if options.url and Store(options.url).list():
        parser.error("--url is a store that has versions already: make a new database")
    return options


def _key(run: Any) -> tuple[Any, ...]:
    return run.get("store", "folder"), run["versions"], run["kilobytes"], run["seed"]


def _measure(versions: int, url: str | None, options: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        root, beside = url or str(Path(folder, "store")), Path(folder, "beside")
        store, draw = Store(root), np.random.default_rng(options.seed)
        weights = _Weights(draw, options.kilobytes, beside / "weights")
        filled = [_put(store, f"tenant{n // A_NAME}", beside, weights.next(n)) for n in range(versions)]
        on_disk, database = (store.verify().bytes, None) if url else _sizes(Path(root))
        distinct, offered = weights.distinct, weights.all
        seconds = {verb: [] for verb in VERBS}
        chosen, name = random.Random(options.seed), "tenant0"
        for repeat in range(options.repeats):
            store = Store(root)  # a program that has just begun
            bundle = _bundle(beside, weights.next(1))
            seconds["put"].append(_timed(lambda store=store, bundle=bundle: store.put("other", bundle)))
            shutil.rmtree(bundle)
            one, out = f"tenant{chosen.randrange(max(versions // A_NAME, 1))}@1", beside / "out"
            seconds["get"].append(_timed(lambda store=store, one=one, out=out: store.materialize(one, out)))
            shutil.rmtree(out)
            number = 1 + repeat % 2
            moved = _timed(lambda store=store, n=number: store.promote(f"{name}@{n}", "production"))
            if repeat % 2:  # the other promotes find the alias where they want it
                seconds["promote"].append(moved)
                seconds["rollback"].append(_timed(lambda store=store: store.rollback(name)))
            seconds["list"].append(_timed(store.list))
            seconds["list of a name"].append(_timed(lambda store=store: store.list(name)))
        for _ in range(max(options.repeats // 4, 3)):
            command = [sys.executable, "-m", "turret", "list", name, "--json", "--store", root]
            seconds["start-up"].append(
                _timed(lambda command=command: subprocess.run(command, check=True, capture_output=True))
            )
        seconds["verify"].append(_timed(store.verify))
        return {
            "store": options.kind,
            "versions": versions,
            "kilobytes": options.kilobytes,
            "seed": options.seed,
            "put_while_filling": [round(each, 5) for each in filled],
            "seconds": {verb: [round(each, 5) for each in values] for verb, values in seconds.items()},
            "bytes": {"on_disk": on_disk, "database": database, "distinct_weights": distinct, "offered": offered},
            "machine": record.machine(threads=1),
        }


def _sizes(root: Path) -> tuple[int, int]:
    """Bytes of everything in the folder, and of its database."""
    sizes = {path: path.stat().st_size for path in root.rglob("*") if path.is_file()}
    return sum(sizes.values()), sum(size for path, size in sizes.items() if path.name.startswith("turret.db"))


class _Weights:
    """Files of weights, of which every fifth is an earlier one; counts what is distinct."""

    def __init__(self, draw: np.random.Generator, kilobytes: int, folder: Path) -> None:
        self.draw, self.numbers, self.folder = draw, kilobytes * 250, folder
        self.made: list[Path] = []
        self.distinct = self.all = 0
        folder.mkdir(parents=True)

    def next(self, number: int) -> Path:
        if number % SHARED == SHARED - 1:
            path = self.made[self.draw.integers(len(self.made))]
        else:
            path = self.folder / f"{len(self.made)}.safetensors"
            save_file({"lora": self.draw.normal(size=self.numbers).astype(np.float32)}, path)
            self.made.append(path)
            self.distinct += path.stat().st_size
        self.all += path.stat().st_size
        return path


def _bundle(beside: Path, weights: Path) -> Path:
    """A bundle whose manifest is its own, and of about the usual size."""
    bundle = Path(tempfile.mkdtemp(dir=beside)) / "bundle"
    bundle.mkdir()
    shutil.copy(weights, bundle / "adapter_model.safetensors")
    (bundle / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 8, "lora_alpha": 32}))
    files = {}
    for path in sorted(bundle.iterdir()):
        files[path.name] = {"sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "bytes": path.stat().st_size}
    manifest = {
        "format": 1,
        "base": {"id": "base", "fingerprint": f"sha256:{'0' * 64}"},
        "method": {"kind": "lora", "r": 8, "lora_alpha": 32},
        "task": {"kind": "classify", "labels": ["one", "two"]},
        "lineage": {"recipe": "# a recipe\n" * 60, "seed": bundle.parent.name},
        "files": files,
    }
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    (bundle / "manifest.json").write_text(json.dumps({**manifest, "digest": f"sha256:{digest}"}, indent=2))
    return bundle


def _put(store: Store, name: str, beside: Path, weights: Path) -> float:
    bundle = _bundle(beside, weights)
    seconds = _timed(lambda: store.put(name, bundle, metrics={"test": {"accuracy": 0.9, "loss": 0.3}}))
    shutil.rmtree(bundle.parent)
    return seconds


def _timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def report() -> str:
    """A row a store and number of versions, the newest run of each."""
    runs = sorted(record.newest(record.load(NAME), _key), key=lambda run: _key(run)[:2])
    header = [
        "store",
        "versions",
        *(f"{verb}, ms" for verb in VERBS),
        "weights offered, MB",
        "distinct, MB",
        "on disk, MB",
        "database, MB",
    ]
    rows = []
    for run in runs:
        count = run["bytes"]
        medians = [f"{1000 * statistics.median(run['seconds'][verb]):.1f}" for verb in VERBS]
        sizes = [count[key] for key in ("offered", "distinct_weights", "on_disk", "database")]
        sizes = ["" if size is None else f"{size / 1e6:.2f}" for size in sizes]
        rows.append([run.get("store", "folder"), run["versions"], *medians, *sizes])
    return record.table(header, rows)


if __name__ == "__main__":
    main()
