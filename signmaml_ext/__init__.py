"""Meta-training of few-shot learners with sign steps: `meta_step`, `adapt`, `evaluate`, `explain`.

Sign-MAML (Fan, Ram, Liu 2021) is MAML whose inner loop takes signSGD steps; because the derivative of the sign is 0,
the query gradient at the adapted weights is the exact meta-gradient.
"""

from ._loader import VERSION as __version__  # first: a broken installation gets its explanation here
from .api import adapt, evaluate, explain, meta_step
from .dispatch import Explanation
from .graphs import GraphRefused
from .inner_rules import Adam, InnerRule, Lion, Momentum, Plain, Signum
from .ops import compact_sign_step_, meta_accumulate_, sign_step_
from .results import CompactParams, EvaluateResult, MetaStepResult
from .sharpness import Sharpness, perturbed

__all__ = [
    "Adam",
    "CompactParams",
    "EvaluateResult",
    "Explanation",
    "GraphRefused",
    "InnerRule",
    "Lion",
    "MetaStepResult",
    "Momentum",
    "Plain",
    "Sharpness",
    "Signum",
    "__version__",
    "adapt",
    "compact_sign_step_",
    "evaluate",
    "explain",
    "meta_accumulate_",
    "meta_step",
    "perturbed",
    "sign_step_",
]
