"""Mutation testing of the modules where a silent mistake costs most: would the tests notice a changed line?

cosmic-ray changes one operator, number or keyword at a time in a clone of the working tree. The module's tests must
fail each time. A sample of the mutants runs, drawn with a seed. `make mutants` uses cosmic-ray's Python.

    .venv/mutants/bin/python release/mutants.py [NAME...] [--most 20] [--seed 0]
"""

from __future__ import annotations

import argparse
import ast
import os
import random
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cosmic_ray.commands import init
from cosmic_ray.mutating import mutate_and_test
from cosmic_ray.work_db import WorkDB, use_db
from cosmic_ray.work_item import MutationSpec

ROOT = Path(__file__).parents[1]
TIMEOUT = 120.0  # seconds of a mutant's tests; an endless loop counts as noticed


@dataclass(frozen=True)
class Target:
    """A module, and the tests that answer for it."""

    module: str
    tests: tuple[str, ...]
    words: str = ""  # of the tests that run, as for pytest's -k


IN_FOLDER = "not url"  # the store in a folder alone: its logic is the same on PostgreSQL, and a mutant takes seconds
TARGETS = {
    "lora": Target(
        "adapters/lora.py",
        (
            "adapters/test_lora.py",
            "adapters/test_start.py",
            "bundles/test_mixing.py",
            "adapters/test_four_bits.py",
            "bundles/test_trained_whole.py",
            "exchange/test_other_methods.py",
        ),
    ),
    "hooks": Target(
        "adapters/hooks.py",
        (
            "adapters/test_lora.py",
            "adapters/test_prefix.py",
            "adapters/test_dropout.py",
            "adapters/test_through_peft.py",
            "adapters/test_full.py",
            "engine/test_mixtures.py",
        ),
    ),
    "alias-history": Target(
        "store/aliases.py", ("store/test_aliases.py", "store/test_tenants.py", "store/test_verify.py"), IN_FOLDER
    ),
    "statistics": Target(
        "statistics.py",
        (
            "experiments/test_e_process.py",
            "experiments/test_evidence.py",
            "experiments/test_checks.py",
            "experiments/test_risk_control.py",
            "compare/test_evidence.py",
            "compare/test_power.py",
        ),
    ),
    "verdicts": Target(
        "compare/verdict.py", ("compare/test_report.py", "compare/test_evidence.py", "compare/test_power.py")
    ),
    "limits": Target(
        "server/limits.py",
        (
            "server/test_limits.py",
            "server/test_connections.py",
            "server/test_fairness.py",
            "server/test_quotas.py",
            "server/test_replicas.py",
            "test_generated_reference.py",
        ),
        IN_FOLDER,
    ),
    "scopes": Target(
        "server/auth.py",
        (
            "server/test_auth.py",
            "server/test_console_access.py",
            "server/test_control.py",
            "server/test_cross_origin.py",
        ),
    ),
    "patterns": Target("access.py", ("store/test_tenants.py",), IN_FOLDER),
    "resume": Target("train/checkpoint.py", ("train/test_checkpoint.py",)),
    "upkeep": Target("store/upkeep.py", ("store/test_gc.py", "store/test_verify.py"), IN_FOLDER),
    "leases": Target("store/leases.py", ("store/test_leases.py",), IN_FOLDER),
    "jobs": Target("store/jobs.py", ("store/test_queue.py", "store/test_batches.py"), IN_FOLDER),
}


def survivors(target: Target, tree: Path, most: int, seed: int) -> tuple[int, list[str]]:
    """How many mutants ran, and the changes of those that no test noticed.

    Raises SystemExit where the tests fail before anything is changed.
    """
    tests = [f"tests/{name}" for name in target.tests]
    command = [str(ROOT / ".venv/bin/python"), "-m", "pytest", "-n0", "-x", "-q", "-m", "not slow and not gpu", *tests]
    command += ["-k", target.words] if target.words else []
    unchanged = subprocess.run(command, capture_output=True, text=True, check=False)
    if unchanged.returncode:
        last = (unchanged.stdout + unchanged.stderr).strip().splitlines()[-1:]
        raise SystemExit(f"the tests of {target.module} fail as they are: {' '.join(last)}: {shlex.join(command)}")
    chosen = _sample(tree / "src" / "turret" / target.module, tree / "mutants.sqlite", most, seed)
    results = [mutate_and_test([change], shlex.join(command), TIMEOUT) for change in chosen]
    return len(results), [str(result.diff) for result in results if not result.is_killed]


def _sample(module: Path, database: Path, most: int, seed: int) -> list[MutationSpec]:
    """At most so many changes of the module, drawn with the seed. None is within a type hint."""
    hints = list(_annotations(ast.parse(module.read_text(encoding="utf-8"))))
    with use_db(str(database), WorkDB.Mode.create) as db:
        init([module], db, {})
        changes = [item.mutations[0] for item in db.work_items]
    real = [change for change in changes if not any(_within(change, *hint) for hint in hints)]
    real.sort(key=lambda change: (change.start_pos, change.operator_name, change.occurrence))
    return random.Random(seed).sample(real, min(most, len(real)))


def _annotations(tree: ast.AST) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """(start, end) of every type hint: they are strings at run time, so a change of one changes nothing."""
    for node in ast.walk(tree):
        for hint in (getattr(node, "annotation", None), getattr(node, "returns", None)):
            if isinstance(hint, ast.expr):
                yield (hint.lineno, hint.col_offset), (hint.end_lineno or 0, hint.end_col_offset or 0)


def _within(change: MutationSpec, start: tuple[int, int], end: tuple[int, int]) -> bool:
    return start <= tuple(change.start_pos) and tuple(change.end_pos) <= end


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(TARGETS)}; all if left out")
    parser.add_argument("--most", type=int, default=20, help="mutants a module")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    alive = 0
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(tree)], check=True)
        os.chdir(tree)
        os.environ["PYTHONPATH"] = str(tree / "src")
        for name in options.names or TARGETS:
            ran, changes = survivors(TARGETS[name], tree, options.most, options.seed)
            print(f"{name}: {ran} mutants, {len(changes)} survived", flush=True)
            for change in changes:
                print(change, flush=True)
            alive += len(changes)
    sys.exit(1 if alive else 0)


if __name__ == "__main__":
    main()
