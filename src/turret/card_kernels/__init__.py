"""Programs in Triton for a card: the small operations of a transformer, LoRA, and a decoding step's attention.

`usable(x)` says whether a card takes them; if so a caller takes `torch.ops.turret`, else the base's modules. Each
operation is one launch and has a reference in plain torch (`reference`).
"""

from turret.card_kernels import operations
from turret.card_kernels.available import planned, usable, why_not
from turret.card_kernels.mixed import MixedLoRA, copied, real_card

__all__ = ["MixedLoRA", "copied", "operations", "planned", "real_card", "usable", "why_not"]
