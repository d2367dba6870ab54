"""mT5 (Xue et al. 2021): T5 in a hundred languages."""

from __future__ import annotations

from turret.families.t5 import t5_like

MT5 = t5_like("mt5", "MT5")
