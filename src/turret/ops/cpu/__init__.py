"""Kernels in C for CPUs: the small operations of a transformer, LoRA, attention, and products of few tokens.

`compiled.library()` gives the operations by them, or None if this machine has none; every caller then computes in
torch. `TURRET_KERNELS=off` switches them off.
"""
