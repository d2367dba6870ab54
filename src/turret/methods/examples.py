"""The methods that the reference and `turret doctor --base` show: one of each kind, and some of PEFT's."""

from __future__ import annotations

from turret.methods import Full, Head, LoRA, Method, Peft, Prefix

SHOWN: dict[str, Method] = {  # one of each kind, by the name that `turret compare --methods` takes
    "lora": LoRA(),
    "prefix": Prefix(),
    "head": Head(),
    "full": Full(),
    "peft:DORA": Peft(peft_type="DORA"),
    "peft:IA3": Peft(peft_type="IA3"),
    "peft:VERA": Peft(peft_type="VERA"),
    "peft:LN_TUNING": Peft(peft_type="LN_TUNING"),
    "peft:LOHA": Peft(peft_type="LOHA"),
    "peft:OFT": Peft(peft_type="OFT"),
    "peft:PROMPT_TUNING": Peft(peft_type="PROMPT_TUNING"),
}
