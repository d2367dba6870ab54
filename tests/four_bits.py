"""What tests of bases in 4 bits share: the mark that skips them without bitsandbytes, and a small base on disk."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import small_models

from turret import bases
from turret.bases import Base

needs_bitsandbytes = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")


def base_in_four_bits(family: str, folder: Path, task: Any = "classify", **settings: Any) -> Base:
    """A two-layer base, loaded in nf4 and float32."""
    path = folder / family if (folder / family).exists() else small_models.save_base(family, folder / family)
    usual = {"num_labels": 3, "dtype": "float32", "quantization": "nf4"}
    return bases.load(str(path), task=task, **usual | settings)
