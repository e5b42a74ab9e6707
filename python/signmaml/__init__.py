"""Training API of Sign-MAML: data, episodes, models, trainer, evaluation, checkpoints and a command line.

A thin layer on `signmaml_ext`, which computes the meta-steps. Everything is imported on first use, so that
`import signmaml` (and hence `signmaml --help`) does not wait for torch.

Example:
    >>> import signmaml
    >>> signmaml.TrainConfig(ways=5, shots=1).method
    'sign-maml'
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .checkpoint import load_weights, save_weights
    from .config import TrainConfig
    from .episodes import Episodes, EpisodeSampler, SinusoidSampler
    from .estimators import FewShotClassifier, FewShotRegressor
    from .evaluation import Evaluation, evaluate
    from .examples import ExampleFormat
    from .learner import Learner
    from .models import MLP, Conv4, load_learn2learn_state_dict
    from .tasks import TaskSampler
    from .tensors import TensorSampler
    from .trainer import MetaTrainer

_HOME = {
    "Conv4": "models",
    "Episodes": "episodes",
    "EpisodeSampler": "episodes",
    "Evaluation": "evaluation",
    "ExampleFormat": "examples",
    "FewShotClassifier": "estimators",
    "FewShotRegressor": "estimators",
    "Learner": "learner",
    "MLP": "models",
    "MetaTrainer": "trainer",
    "SinusoidSampler": "episodes",
    "TaskSampler": "tasks",
    "TensorSampler": "tensors",
    "TrainConfig": "config",
    "evaluate": "evaluation",
    "load_learn2learn_state_dict": "models",
    "load_weights": "checkpoint",
    "save_weights": "checkpoint",
}
_MODULES = ("checkpoint", "config", "data", "episodes", "evaluation", "loggers", "models", "plots", "trainer")

__all__ = [
    "MLP",
    "Conv4",
    "EpisodeSampler",
    "Episodes",
    "Evaluation",
    "ExampleFormat",
    "FewShotClassifier",
    "FewShotRegressor",
    "Learner",
    "MetaTrainer",
    "SinusoidSampler",
    "TaskSampler",
    "TensorSampler",
    "TrainConfig",
    "evaluate",
    "load_learn2learn_state_dict",
    "load_weights",
    "save_weights",
]


def version() -> str:
    """Version of the installed distribution, or "unknown" when run from sources that were never installed."""
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as installed_version

    try:
        return installed_version("signmaml_ext")
    except PackageNotFoundError:
        return "unknown"


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return version()
    if name in _HOME:
        return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    if name in _MODULES:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME, *_MODULES, "__version__"])
