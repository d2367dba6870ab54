"""64 clients of five tenants with 50 adapters of a decoder: texts, JSON, embeddings and labels, and all of it moves."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import byte_level
import pytest
import small_models
from server.conftest import Running
from server.mixed_requests import Alone, Mixture, alone
from server.storm import ADAPTERS, SOAK_SECONDS, OnlyBugs, Tenant, storm

import turret
from turret.engine import Engine, Limits, SamplingParams
from turret.server.services import ServerSettings
from turret.store import Version
from turret.workspace import Workspace

TENANTS = ("amberfox", "cobaltowl", "jadeheron", "rubyotter", "violetmoth")
FEW = 60  # requests a minute of the last tenant, which is refused most of them
METHODS = (
    turret.LoRA(r=4, lora_alpha=8, init_lora_weights=False),
    turret.LoRA(r=2, lora_alpha=4, init_lora_weights=False, target_modules="all-linear"),
    turret.Prefix(num_virtual_tokens=3, reparametrize=False),
)


class House:
    """Ten adapters of each tenant, five of them of names that all tenants have; the last of both five classify."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.seed = folder, 0
        self.base = byte_level.save_base(folder / "base")
        self.workspace = Workspace(folder / "store")
        self.known: dict[str, Alone] = {}
        self.tenants = [self.tenant(word) for word in TENANTS]
        self.classifiers = [name for each in self.tenants for name in each.names if name.endswith("4")]

    def bundle(self, name: str) -> Path:
        """An adapter that no other one equals."""
        self.seed += 1
        save = byte_level.save_classifier if name.endswith("4") else byte_level.save_adapter
        method, room = METHODS[self.seed % 3], {} if name.endswith("4") else {"max_tokens": 96}
        return save(self.folder / f"bundle-{self.seed}", self.base, self.seed, method, **room)

    def tenant(self, word: str) -> Tenant:
        workspace, known = Workspace(self.folder / "store", word), dict[str, str]()
        names = [f"{start}{number}" for start in ("n", f"{word}-") for number in range(ADAPTERS // len(TENANTS) // 2)]
        for name in names:
            for _ in range(2):
                version = workspace.store.put(name, self.bundle(name))
                known[str(version)] = version.digest
            workspace.promote(f"{name}@1", "production")
        spare = {name: self.bundle(name) for name in (names[0], names[4], names[5])}

        def put(name: str) -> Version:
            return workspace.store.put(name, spare[name])

        quota = {"requests_per_minute": FEW} if word == TENANTS[-1] else {}
        token = workspace.tokens.create("all", ["infer", "admin"], **quota)[1]
        return Tenant(workspace, names, put, known, token, list(spare))

    def engine(self) -> Engine:
        """An engine with room for about half of the adapters, after it has answered for each version alone."""
        room = sum(self.tenants[0].workspace.resolve(f"{name}@1").bytes for name in self.tenants[0].names)
        engine = self.workspace.engine(str(self.base), dtype="float32", limits=Limits(memory=room * 5 // 2))
        self.known[""] = alone(engine, None, classifies=False)
        for tenant in self.tenants:
            word, spares = tenant.workspace.store.access.tenant, [tenant.put(name) for name in tenant.replaced]
            for version in tenant.workspace.list():
                self.known[version.digest] = alone(engine, f"{word}/{version}", classifies=version.name[-1] == "4")
            for version in spares:
                tenant.workspace.delete(str(version))
        return engine

    def add_bad(self, tenant: Tenant) -> None:
        """A version of another base, which the engine refuses."""
        other = small_models.save_base("qwen3", self.folder / "other", seed=7)
        bundle = byte_level.save_adapter(self.folder / "bad", other, 1)
        tenant.bad = str(tenant.workspace.store.put("bad", bundle))

    def mixture(self) -> Mixture:
        own = {}
        for word, tenant in zip(TENANTS, self.tenants, strict=True):
            own[word] = [name for name in tenant.names if name.startswith(word)]
        foreign = {word: [name for other in TENANTS if other != word for name in own[other]] for word in TENANTS}
        return Mixture("base", self.known, self.classifiers, foreign)


@pytest.mark.slow
def test_for_minutes_every_answer_is_right_and_nobody_gets_what_is_anothers(tmp_path) -> None:
    house = House(tmp_path)
    engine, mixture = house.engine(), house.mixture()
    house.add_bad(house.tenants[0])
    running = Running(house.workspace, engine, ServerSettings(), SamplingParams, OnlyBugs())
    try:
        storm(running.start(), house.tenants, mixture, seconds=SOAK_SECONDS)
        stats = engine.stats()
    finally:
        running.stop()
    told = sum((each.counts for each in house.tenants), start=Counter[str]())
    print(f"{dict(told)}, {stats.evictions} evictions, {stats.loads} loads")
    assert stats.evictions > 0
    assert told["valid"] > 0.9 * told["structured"] > 0
    assert house.tenants[-1].counts["refused"] > 0
    for tenant in house.tenants[:-1]:
        for kind in ("completion", "chat", "structured", "embedding", "labels", "own_base", "stranger", "leaving"):
            assert tenant.counts[kind] > 0, kind
