"""The method `lora`."""

from turret.methods.lora.config import LoRA

__all__ = ["LoRA"]
