"""The modulated gradient step of ModGrad (one eager reference, one fused Triton implementation), and layers whose second
derivatives are cheap."""

from kernels.layers import batch_norm, conv2d
from kernels.modulate import (modulate, modulate_reference, modulated_step, modulated_step_reference,
                              resolve_backend)

__all__ = ["batch_norm", "conv2d", "modulate", "modulate_reference", "modulated_step", "modulated_step_reference",
           "resolve_backend"]
