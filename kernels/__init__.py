"""The modulated gradient step of ModGrad: one eager reference, one fused Triton implementation."""

from kernels.modulate import (modulate, modulate_reference, modulated_step, modulated_step_reference,
                              resolve_backend)

__all__ = ["modulate", "modulate_reference", "modulated_step", "modulated_step_reference", "resolve_backend"]
