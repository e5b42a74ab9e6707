"""The family of layer programs: networks of usual layers, in chains or with sums of branches, of any kinds and sizes.

A native call computes the loss of all tasks and its gradient, another how that changes along a direction. The steps are
those of flat.py, so every rate, sharpness and task state is served. Steps by a rule, and sharpness-aware ones that are
differentiated, are those of reference.py, which is also the definition. Kernels: csrc/cpu/layers_pass.cpp.
"""

from .call import adapt, meta_gradients, why_not
from .spec import Block, LayersSpec, read

__all__ = ["Block", "LayersSpec", "adapt", "meta_gradients", "read", "why_not"]
