"""The method `lora`."""

from turret.methods.lora.spec import LoRA

__all__ = ["LoRA"]
