"""The modulated gradient step of ModGrad (an eager reference, closed forms for CPUs, fused Triton kernels), and layers
whose second derivatives are cheap."""

from kernels.block_gpu import takes_blocks, task_blocks
from kernels.layers import batch_norm, conv2d
from kernels.modulate import (modulate, modulate_reference, modulated_step, modulated_step_reference,
                              resolve_backend)
from kernels.pooling import norm_pool, takes_norm_pool
from kernels.products import linear
from kernels.stem import first_block, first_blocks, takes_first_block

__all__ = ["batch_norm", "conv2d", "first_block", "first_blocks", "linear", "modulate", "modulate_reference", "modulated_step",
           "modulated_step_reference", "norm_pool", "resolve_backend", "takes_blocks", "takes_first_block", "takes_norm_pool",
           "task_blocks"]
