"""mBART (Liu et al. 2020): BART in many languages."""

from __future__ import annotations

from turret.families.bart import bart_like

MBART = bart_like("mbart", "MBart")
