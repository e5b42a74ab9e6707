"""The MLP family: multilayer perceptrons.

On CUDA a team of threads computes one task, whose weights and activations stay on the chip through all inner steps and
the query pass; on the CPU each lane of a vector holds one task.
Definition: reference.py. Kernels: csrc/kernels/mlp_meta_step.cuh and mlp_second_order.cuh, csrc/cpu/mlp_meta_step.cpp.
"""

from .call import adapt, meta_gradients, why_not
from .spec import MlpSpec, read

__all__ = ["MlpSpec", "adapt", "meta_gradients", "read", "why_not"]
