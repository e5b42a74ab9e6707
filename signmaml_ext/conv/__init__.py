"""The Conv-N family: blocks of conv3x3, BatchNorm, ReLU and a halving, then one linear classifier.

Definition: reference.py. Kernels: csrc/cpu/conv_meta_step.cpp; CUDA's are csrc/kernels/conv_*.cuh.
"""

from .call import adapt, meta_gradients, shape_of, why_not
from .spec import ConvBlockSpec, ConvSpec, read

__all__ = ["ConvBlockSpec", "ConvSpec", "adapt", "meta_gradients", "read", "shape_of", "why_not"]
