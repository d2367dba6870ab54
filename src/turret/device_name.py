"""The names of the devices on which a base computes, for recipes, commands and Python."""

from __future__ import annotations

import re

DEVICES = "auto, cpu, cuda, cuda:1 or mps"  # for error texts
_NAME = re.compile(r"auto|cpu|mps|cuda(:\d{1,3})?")


def is_device(name: str) -> bool:
    """Whether a device can have this name, on some machine."""
    return _NAME.fullmatch(name) is not None
