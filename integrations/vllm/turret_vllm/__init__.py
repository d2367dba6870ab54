"""vLLM answers with the adapters of a Turret store: a resolver of names, and a follower of aliases.

The environment has the store (TURRET_STORE), the tenant (TURRET_TENANT) and the folder of adapters that were read
(TURRET_VLLM_CACHE). vLLM keeps a resolved name for ever, so aliases need the follower, which VLLM_PLUGINS=turret loads.
Every adapter has a name and a path of its digest in vLLM, so its prefix cache never mixes two versions.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import json
import logging
import os
import struct
import tempfile
from argparse import Namespace
from pathlib import Path
from typing import Any

from turret.access import DEFAULT, Access, check_tenant
from turret.disk import private_folder
from turret.errors import NotFound, TurretError
from turret.families import FAMILIES
from turret.reference import Reference
from turret.store import Store, Version

log = logging.getLogger("vllm.turret")
POLL_SECONDS = 0.25
NOT_FOLLOWED = (
    "is an alias, which vLLM would keep for ever: start it with VLLM_PLUGINS=turret in its environment, ask for a "
    "version such as {}@3, or put `turret serve --engine vllm` in front"
)
# The dtypes of safetensors, as a fingerprint names them.
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I8": "int8", "U8": "uint8"}
HEADER_BYTES = 100 << 20


class Resolver:
    """Finds adapters in a store, and writes them into a folder for vLLM.

    Args:
        store: As the configured tenant sees it.
        folder: Of adapters, each in a folder named by its digest.
    """

    def __init__(self, store: Store, folder: Path) -> None:
        self.store, self.folder = store, folder
        self.follows = False  # whether aliases are followed

    @functools.cached_property
    def request_type(self) -> Any:
        from vllm.lora.request import LoRARequest

        return LoRARequest

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> Any:
        """The adapter that a name means, or None. Raises vLLM's error for one that it cannot serve."""
        try:
            return await asyncio.to_thread(self.found, base_model_name, lora_name)
        except NotFound:
            return None
        except TurretError as error:
            from vllm.exceptions import VLLMValidationError

            raise VLLMValidationError(str(error)) from None

    def found(self, base: str, name: str) -> Any:
        """The request for an adapter, whose files are written. Raises NotFound and Refused."""
        reference = Reference.parse(name)
        if reference.version is None and not self.follows:
            raise Refused(f"{name[:80]} {NOT_FOLLOWED.format(reference.name)}")
        version = self.store.resolve(str(reference))
        self.check(version, base)
        digest = version.digest.removeprefix("sha256:")
        place = self.folder / digest
        if not place.exists():
            with tempfile.TemporaryDirectory(dir=self.folder) as room:
                partial = Path(room) / digest
                self.store.materialize(str(version), partial)  # checks every file
                with contextlib.suppress(OSError):  # another process was quicker
                    partial.rename(place)
        return self.request_type(lora_name=f"{version}-{digest[:16]}", lora_int_id=1, lora_path=str(place))

    def check(self, version: Version, base: str) -> None:
        """Raise Refused for an adapter that vLLM cannot serve, or of another base."""
        method, task = version.method, version.task
        if method.get("kind") != "lora":
            kind = method.get("peft_type") or method.get("kind")  # DoRA and others are PEFT's
            raise Refused(f"{version} is {str(kind)[:40]}, and vLLM serves only plain LoRA: ask a server of turret")
        if "labels" in task:
            raise Refused(f"{version} classifies, and vLLM serves no heads of adapters: ask a server of turret")
        trained, served = version.base.get("fingerprint"), fingerprint_of(base)
        if trained != served:
            raise Refused(
                f"{version} was trained on other weights ({str(trained)[:19]}) than those that vLLM serves "
                f"({served[:19]}): serve the base {str(version.base.get('id'))[:80]}"
            )


class Refused(TurretError):
    """vLLM cannot serve an adapter."""


class AliasFollower:
    """Follows promotes and rollbacks in vLLM's API server: an endpoint plugin without routes."""

    name = "turret"
    required_tasks = ("generate",)

    def __init__(self) -> None:
        self._task: asyncio.Task[None] | None = None

    def attach_router(self, app: Any) -> None:
        """It has no routes."""

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """Begin to follow the aliases that clients name."""
        models, resolver = getattr(state, "openai_serving_models", None), registered()
        if engine_client is None or models is None or resolver is None:
            return
        resolver.follows = True
        self._task = asyncio.create_task(self._follow(resolver, models))

    async def _follow(self, resolver: Resolver, models: Any) -> None:
        seen, failing = -1, False
        while True:
            try:
                newest = await asyncio.to_thread(resolver.store.last_move)
                if newest != seen:
                    await self._move(resolver, models)
                    seen = newest
                failing = False
            except Exception as error:  # the store may be back at the next try
                if not failing:
                    log.error("turret: aliases are not followed now: %s", str(error)[:300])
                failing = True
            await asyncio.sleep(POLL_SECONDS)

    async def _move(self, resolver: Resolver, models: Any) -> None:
        """Let every name that is known here mean what it means in the store. Its new version is loaded first."""
        for name, old in list(models.lora_requests.items()):
            try:
                reference = Reference.parse(name)
            except TurretError:
                continue  # not one of ours
            try:
                new = await asyncio.to_thread(resolver.found, models.model_config.model, name)
            except NotFound:
                if models.lora_requests.get(name) is old and old.lora_path.startswith(str(resolver.folder)):
                    del models.lora_requests[name]
                continue
            except TurretError as error:
                log.error("turret: %s stays as it was: %s", name, str(error)[:300])
                continue
            if reference.version is not None or new.lora_path == old.lora_path:
                continue
            new.lora_int_id = models.lora_id_counter.inc(1)
            try:
                await models.engine_client.add_lora(new)
            except Exception as error:
                log.error("turret: %s stays as it was, its new version cannot be loaded: %s", name, str(error)[:300])
                continue
            models.lora_requests[name] = new
            log.info("turret: %s is %s now", name, new.lora_name)


# --- registration -----------------------------------------------------------------------------------------------------


def register() -> None:
    """Register the resolver with vLLM; the entry point of its general plugins. Does nothing without TURRET_STORE."""
    location = os.environ.get("TURRET_STORE")
    if not location or registered() is not None:
        return
    from vllm.lora.resolver import LoRAResolverRegistry

    tenant = os.environ.get("TURRET_TENANT") or DEFAULT
    store = Store(location).with_access(Access(check_tenant(tenant)))
    LoRAResolverRegistry.register_resolver("turret", Resolver(store, cache_folder()))


def cache_folder() -> Path:
    """The folder of adapters that were read: TURRET_VLLM_CACHE, or one that no other user can change.

    Raises:
        Refused: It cannot be made, or is another user's.
    """
    given = os.environ.get("TURRET_VLLM_CACHE")
    try:
        if not given:
            return private_folder(Path(tempfile.gettempdir()) / f"turret-vllm-{os.getuid()}")
        Path(given).mkdir(parents=True, exist_ok=True, mode=0o700)
        return Path(given)
    except OSError as error:
        where = str(error.filename)[:200]
        raise Refused(f"{where}: {error.strerror}: set TURRET_VLLM_CACHE to a folder that only you can write") from None


def registered() -> Resolver | None:
    """The resolver of this process."""
    from vllm.lora.resolver import LoRAResolverRegistry

    if "turret" not in LoRAResolverRegistry.get_supported_resolvers():
        return None
    found = LoRAResolverRegistry.get_resolver("turret")
    return found if isinstance(found, Resolver) else None


# --- the fingerprint of a base ----------------------------------------------------------------------------------------


@functools.cache
def fingerprint_of(base: str) -> str:
    """The fingerprint of a base's files, as `turret.bases.fingerprints` defines it, without torch.

    Args:
        base: A folder, or the id of a model that vLLM has fetched.

    Raises:
        Refused: The files are not there, or Turret does not know the architecture.
    """
    folder = Path(base) if Path(base).is_dir() else _fetched(base)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    family = FAMILIES.get(str(config.get("model_type")))
    if family is None:
        raise Refused(f"the architecture {str(config.get('model_type'))[:40]} of vLLM's base is not one of Turret's")
    excluded = (*family.beside_body, *family.body_excludes)
    tensors: dict[str, tuple[Path, int, dict[str, Any]]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        start, header = _header(path)
        for key, entry in header.items():
            name = key.removeprefix("model.")
            if key != "__metadata__" and not any(name == each or name.startswith(f"{each}.") for each in excluded):
                tensors[name] = path, start, entry
    digest = hashlib.sha256()
    for name, (path, start, entry) in sorted(tensors.items()):
        shape = ",".join(map(str, entry["shape"]))
        digest.update(f"{name} {DTYPES.get(entry['dtype'], entry['dtype'])} {shape}\n".encode())
        first, last = entry["data_offsets"]
        with path.open("rb") as file:
            file.seek(start + first)
            while first < last:
                block = file.read(min(1 << 26, last - first))
                if not block:
                    raise Refused(f"{path.name} of vLLM's base is cut off: fetch it again")
                digest.update(block)
                first += len(block)
    return f"sha256:{digest.hexdigest()}"


def _header(path: Path) -> tuple[int, dict[str, Any]]:
    """(where the tensors start, the header) of a file of safetensors."""
    with path.open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        if size > HEADER_BYTES:
            raise Refused(f"{path.name} of vLLM's base has a header of {size} bytes: fetch it again")
        return 8 + size, dict(json.loads(file.read(size)))


def _fetched(base: str) -> Path:
    """The folder of a model of the Hub that vLLM has fetched."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(base, local_files_only=True))
    except Exception as error:
        raise Refused(f"the files of vLLM's base {base[:80]} are not here ({type(error).__name__})") from None
