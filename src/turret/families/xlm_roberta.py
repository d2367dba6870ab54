"""XLM-RoBERTa (Conneau et al. 2020): RoBERTa in a hundred languages."""

from __future__ import annotations

from turret.families.roberta import roberta_like

XLM_ROBERTA = roberta_like("xlm-roberta", "XLMRoberta")
