"""Programs in Triton for a GPU: the small operations of a transformer, LoRA, and a decoding step's attention.

`usable(x)` says whether a GPU takes them; if so a caller takes `torch.ops.turret`, else the base's modules. Each
operation is one launch and has a reference in plain torch (`ops.formulas`).
"""

from turret.ops.gpu import operations
from turret.ops.gpu.available import planned, usable, why_not
from turret.ops.gpu.mixed import MixedLoRA

__all__ = ["MixedLoRA", "operations", "planned", "usable", "why_not"]
