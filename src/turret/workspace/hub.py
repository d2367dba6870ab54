"""Versions to and from the Hub: `Workspace.hub`. Loads no torch before a method is called."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from turret.arguments import checked_methods
from turret.json_types import Plain
from turret.recipe import name_from
from turret.store import Store
from turret.workspace.progress import Say, silent
from turret.workspace.results import Imported, Pushed


@checked_methods
class Hub:
    """The Hub as a place for the versions of a store.

    The token is huggingface_hub's: HF_TOKEN, or what `hf auth login` stored. HF_ENDPOINT names another Hub.
    """

    def __init__(self, store: Store) -> None:
        self._store = store

    def push(
        self,
        reference: str,
        hub_id: str,
        *,
        form: Literal["peft", "merged", "gguf"] = "peft",
        public: bool = False,
        force: bool = False,
        on_stage: Say | None = None,
    ) -> Pushed:
        """Write a version into a repository of the Hub, in one commit.

        Args:
            hub_id: OWNER/NAME. A repository that is not there is created.
            form: as for `export`.
            public: make a new repository public; default: private. That of an old one stays as it is.
            force: also into a repository whose files turret did not write.

        Raises:
            HubError: the Hub cannot be reached or refuses, or the repository holds something else.
        """
        from turret.workspace import exporting

        say = on_stage or silent
        return exporting.push(self._store, reference, hub_id, form, public=public, force=force, say=say)

    def pull(
        self,
        hub_id: str,
        name: str | None = None,
        *,
        revision: str | None = None,
        base: str | None = None,
        task: str | None = None,
        labels: Sequence[str] | None = None,
        settings: Mapping[str, Plain] | None = None,
        rank: int | None = None,
        base_quantization: Literal["none", "nf4"] = "none",
        device: str = "auto",
        on_stage: Say | None = None,
    ) -> Imported:
        """Fetch an adapter from the Hub, check it as `import_adapter` does, and store it.

        Args:
            hub_id: OWNER/NAME.
            name: of the adapter in the store; default: made from the id.
            revision: a branch, a tag or a commit.
            base_quantization: for a PEFT folder: of the base that the adapter was trained on.
            device: where it is checked.

        Raises:
            HubError: there is no such repository, or neither the Hub nor its cache has it.
            AdapterError: it is broken, does not fit its base, or has no effect.
        """
        from turret.bundles.fetch import check_id
        from turret.workspace import importing

        request = importing.ImportRequest(
            base,
            task,
            labels,
            settings,
            rank,
            quantization=base_quantization,
            device=device,
            revision=revision,
            pulled=True,
        )
        named = name or name_from(check_id(hub_id))
        return importing.import_adapter(self._store, hub_id, named, request, on_stage or silent)
