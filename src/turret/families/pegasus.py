"""Pegasus (Zhang et al. 2020): an encoder-decoder that was trained to summarize. It has no classifier."""

from __future__ import annotations

from turret.families.bart import bart_like

PEGASUS = bart_like("pegasus", "Pegasus", head_modules=())
