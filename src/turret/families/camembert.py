"""CamemBERT (Martin et al. 2020): RoBERTa in French."""

from __future__ import annotations

from turret.families.roberta import roberta_like

CAMEMBERT = roberta_like("camembert", "Camembert")
