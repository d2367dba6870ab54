"""Makes a process ready to prove bundles, once: `forked_proofs.py` forks proofs from it."""

import gc
import importlib

from transformers.conversion_mapping import get_checkpoint_conversion_mapping

for name in ("turret.train.proof", "transformers.models.bert.modeling_bert"):
    importlib.import_module(name)
get_checkpoint_conversion_mapping("bert")  # builds the table of all models: half of the time of a small proof
gc.freeze()
