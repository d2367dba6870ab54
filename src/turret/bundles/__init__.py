"""Adapters on disk: the bundle's files and manifest, archives, and bundles that come from outside.

A bundle is a folder of JSON and safetensors, readable by PEFT where the method is PEFT's. Nothing in it is executed.
"""

from turret.bundles.bundle import read_bundle, read_manifest, save, save_bundle

__all__ = ["read_bundle", "read_manifest", "save", "save_bundle"]
