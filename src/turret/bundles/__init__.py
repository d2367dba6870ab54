"""Adapters on disk: the files and manifest of a bundle, archives, and adapters from outside.

A bundle is a folder of JSON and safetensors, readable by PEFT where the method is PEFT's. No code in it is executed.
"""

from turret.bundles.bundle import load, read_bundle, save, save_bundle

__all__ = ["load", "read_bundle", "save", "save_bundle"]
