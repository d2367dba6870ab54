"""What every test shares: one thread, no network, no cache of the user's."""

from __future__ import annotations

import gc
import os
import shutil
import sys
import tempfile
import uuid
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

# Before torch and the tokenizers are loaded: two workers with two threads each are slower than two with one.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
# Before oneDNN makes its first kernel. It would keep 1,024: half a gigabyte, in which a leak is not seen.
os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] = os.environ["LRU_CACHE_CAPACITY"] = "64"

import pytest
from new_catalogs import RecordedMigrations
from servers import BUCKET, PostgresServer, postgres, s3

# Stores flush every file to the disk. In memory that costs nothing, and a killed process loses no more than on a disk.
MEMORY, ENOUGH = Path("/dev/shm"), 8 << 30  # bytes
if "TMPDIR" not in os.environ and MEMORY.is_dir() and shutil.disk_usage(MEMORY).free > ENOUGH:
    os.environ["TMPDIR"] = tempfile.tempdir = str(MEMORY)

# Containers often set PYTHONDONTWRITEBYTECODE. Then every worker rewrites the assertions of all modules anew: 10 s.
sys.dont_write_bytecode = False


SECONDS = "turret/seconds"  # of each test file, as of its last run: `make check` reads them in the cache of pytest
_took: dict[str, float] = {}


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    file = report.nodeid.partition("::")[0]
    _took[file] = _took.get(file, 0.0) + report.duration


def pytest_sessionfinish(session: pytest.Session) -> None:
    cache = getattr(session.config, "cache", None)
    if cache is not None and "PYTEST_XDIST_WORKER" not in os.environ and not session.config.option.collectonly:
        kept: dict[str, float] = cache.get(SECONDS, {})
        cache.set(SECONDS, kept | {file: round(max(took, kept.get(file, 0.0)), 2) for file, took in _took.items()})


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="module", autouse=True)
def own_float32_products() -> None:
    """Loading a base may set torch's float32 products for the whole process; no other module's tests see that."""
    import torch

    products: Any = torch.backends.mkldnn.matmul
    products.fp32_precision = "none"


@pytest.fixture(scope="session", autouse=True)
def recorded_migrations() -> Iterator[RecordedMigrations]:
    """The catalogs of new stores are made quickly."""
    from turret import database

    recorded = RecordedMigrations()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(database, "_migrate", recorded)
        yield recorded


@pytest.fixture(scope="session", autouse=True)
def forked_proofs() -> Iterator[Callable[[Path, float], str] | None]:
    """Proofs take a tenth of the time. Gives what starts a fresh process for one; None if no test module needs any."""
    if "turret.train.proof" not in sys.modules:  # to import it takes seconds
        yield None
        return
    from forked_proofs import ForkedProofs

    from turret.train import proof

    forked = ForkedProofs()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(proof, "_run", forked)
        yield forked.run


@pytest.fixture(scope="session", autouse=True)
def turret_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache folder of this test session, shared by its workers; TURRET_CACHE in the environment wins."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "turret-cache"
    return Path(os.environ.setdefault("TURRET_CACHE", str(folder)))


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    """PostgreSQL, started for this process's tests; they are skipped where the machine has none."""
    with postgres() as server:
        yield server


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """An S3 server, started for this process's tests."""
    with s3() as address:
        yield address


@pytest.fixture
def new_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[..., str]]:
    """Makes the URL of a store that is not there yet: a new database, and files under a new prefix or in a folder."""
    with ExitStack() as made:

        def new(files: str = "s3") -> str:
            server = request.getfixturevalue("postgres_server")
            if files == "s3":
                request.getfixturevalue("s3_server")
                files = f"s3://{BUCKET}/{uuid.uuid4().hex}/prefix"
            return f"{server.url(made.enter_context(server.database()))}&files={files}&local={tmp_path / 'local'}"

        yield new


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Python looks for no garbage while modules are read, then seldom, and never among the modules and tests.

    That was a fifth of the time to read them, and a tenth of the whole time.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.collect()
        gc.freeze()
        gc.set_threshold(20_000, 20, 50)
        gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that need an accelerator are skipped, with a word, where there is none."""
    if not any(item.get_closest_marker("gpu") for item in items):
        return
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs an accelerator"))
