"""`FewShotClassifier` and `FewShotRegressor`: meta-trained learners under scikit-learn's conventions.

scikit-learn itself is not needed; with it they work in pipelines, searches and cross-validation.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from . import checkpoint
from .adapted import Adapted, CountedState, Counts, FullState, adapt_tasks, check_task_state, prepared
from .config import TrainConfig
from .data.arguments import a_few, plain_label
from .evaluation import EvaluationArguments
from .examples import ExampleFormat
from .heads import check_head, rates_for_head, with_stored_rows
from .learner import Learner, as_learner, network_of

_Self = TypeVar("_Self", bound="_FewShotEstimator")
_Classifier = TypeVar("_Classifier", bound="FewShotClassifier")
_Regressor = TypeVar("_Regressor", bound="FewShotRegressor")


class NotFittedError(ValueError, AttributeError):
    """The estimator predicts only after `fit`; scikit-learn's error of this name has the same base classes."""


class _FewShotEstimator:
    """What classifier and regressor share; scikit-learn's protocol without its base classes."""

    learner: Any
    inner_lr: Any
    inner_steps: int | None
    transductive: bool
    task_state: str
    device: str | None

    _estimator_type = ""
    _loss = ""
    _adapted: Adapted | None = None
    _learner: Learner
    _input: Tensor | None = None  # an input like those of fit, of zeros

    @classmethod
    def _parameters(cls) -> list[str]:
        return list(inspect.signature(cls).parameters)

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """The arguments of the constructor by name."""
        return {name: getattr(self, name) for name in self._parameters()}

    def set_params(self: _Self, **params: Any) -> _Self:
        """Changes arguments of the constructor; they act on the next `fit`.

        Raises:
            ValueError: There is no such argument.
        """
        known = self._parameters()
        for name, value in params.items():
            if name not in known:
                raise ValueError(f"set_params: expected any of {', '.join(known)}, found {name!r}")
            setattr(self, name, value)
        return self

    def __repr__(self) -> str:
        changed = []
        for name, parameter in inspect.signature(type(self)).parameters.items():
            value = getattr(self, name)
            usual = value is parameter.default or (isinstance(value, (str, float)) and value == parameter.default)
            if not usual:
                changed.append(f"{name}={value!r}")
        return f"{type(self).__name__}({', '.join(changed)})"

    def __sklearn_is_fitted__(self) -> bool:
        return self._adapted is not None

    def __sklearn_tags__(self) -> Any:
        from sklearn.utils import ClassifierTags, InputTags, RegressorTags, Tags, TargetTags

        classifier = self._estimator_type == "classifier"
        return Tags(
            estimator_type=self._estimator_type,
            target_tags=TargetTags(required=True),
            classifier_tags=ClassifierTags() if classifier else None,
            regressor_tags=None if classifier else RegressorTags(),
            input_tags=InputTags(three_d_array=True, two_d_array=True, string=True),
        )

    def module(self) -> nn.Module:
        """The adapted model as a plain module in evaluation mode.

        It takes inputs as the model does and returns scores `[n, classes]`, or predictions. Unless `transductive`, its
        BatchNorms hold the support set's statistics as their running ones. It is a copy, to do with as you like.

        Raises:
            NotFittedError: Before `fit`.
        """
        return copy.deepcopy(self._fitted().module())

    def _fitted(self) -> Adapted:
        if self._adapted is None:
            raise NotFittedError(f"{type(self).__name__}: expected a call of fit first, found none")
        return self._adapted

    def example(self) -> ExampleFormat | None:
        """How examples become inputs; None if they must be the inputs.

        Raises:
            NotFittedError: Before `fit`.
        """
        self._fitted()
        return self._learner.example

    def in_words(self) -> dict[str, str]:
        """How it was adapted, in words by name.

        Raises:
            NotFittedError: Before `fit`.
        """
        adapted, learner = self._fitted(), self._learner
        words = {"steps": learner.in_words()}
        if learner.has_batch_norm():
            sources = {True: "the images predicted together (transductive)", False: "the support set"}
            running = learner.arguments["batch_norm"] == "running" and not adapted.transductive
            words["batch_norm"] = f"BatchNorm on {'training data' if running else sources[adapted.transductive]}"
        if learner.example is not None:
            words["examples"] = str(learner.example)
        return words

    def _outputs(self, X: Any) -> Tensor:
        adapted, learner = self._fitted(), self._learner
        x = learner.inputs(X)
        if self._input is not None and x.ndim != self._input.ndim:
            sizes = ", ".join(map(str, self._input.shape[1:]))
            raise ValueError(f"X: expected examples [n, {sizes}] as in fit, found shape {list(x.shape)}")
        if adapted.transductive and learner.has_batch_norm() and len(x) < 2:
            raise ValueError(
                "X: expected at least 2 examples for a transductive prediction, which normalises them by their own "
                f"statistics, found {len(x)}"
            )
        return adapted.predict(x).cpu()

    def _settle(self) -> Learner:
        """The learner with this estimator's changes.

        Raises:
            TypeError, ValueError, FileNotFoundError: An argument of the constructor is out of range.
        """
        if not isinstance(self.transductive, bool):
            raise TypeError(f"transductive: expected True or False, found {self.transductive!r}")
        check_task_state(self.task_state)
        if isinstance(self.learner, Learner) and self.learner.how is not None:
            raise ValueError(
                f"learner: expected one with trained weights, found {self.learner!r} of a file that holds an adapted "
                "network alone; set_params(learner=...) gives it one"
            )
        learner = as_learner(self.learner, self.device, inner_lr=self.inner_lr, inner_steps=self.inner_steps)
        loss = learner.arguments["loss"]
        if isinstance(loss, str) and loss != self._loss:
            wanted = "classes" if self._loss == "cross_entropy" else "numbers"
            raise ValueError(f"learner: expected one that predicts {wanted}, found {learner!r} with loss {loss!r}")
        return learner.changed(loss=loss or self._loss)

    # ---- Files

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the adapted learner as a safetensors file, without pickling anything.

        With ``task_state="full"`` the file is complete if the learner came from a run, and else needs the module to
        load. With "int8" it holds one byte a parameter and needs the learner.

        Args:
            path: File to write; its folder must exist.

        Raises:
            NotFittedError: Before `fit`.
            TypeError: Class labels are neither strings nor integers.
            OSError: Writing failed; a previous file at `path` is untouched.
        """
        adapted, learner = self._fitted(), self._learner
        numbers = {"inner_lr": plain_label(self.inner_lr), "inner_steps": plain_label(self.inner_steps)}
        strange = [n for n, v in numbers.items() if v is not None and not isinstance(v, (int, float))]
        state = "int8" if isinstance(adapted, CountedState) else "full"  # of the fit, not of a later set_params
        if strange and state == "int8":
            raise TypeError(f"save: expected {strange[0]} as a number, or rates as part of a Learner, for int8 steps")
        metadata = {
            "estimator": type(self).__name__,
            "parameters": {n: v for n, v in numbers.items() if v is not None and n not in strange},
            "steps": learner.in_words(),
            "transductive": adapted.transductive,
            "task_state": state,
            "precision": learner.arguments["precision"],
            "batch_norm": learner.arguments["batch_norm"],
            "head_name": adapted.head if isinstance(adapted, CountedState) else None,
            "learner": learner.digest,
            "source": learner.source,
            "config": None if learner.config is None else learner.config.to_dict(),
            "example": None if learner.example is None else learner.example.to_json(),
            "input": None if self._input is None else _input_to_json(self._input),
            **self._metadata(),
        }
        checkpoint.save(Path(path), adapted.tensors(), kind="adapted", metadata=metadata)

    def export(self, path: str | os.PathLike[str], X: Any = None, *, probabilities: bool = False) -> None:
        """Writes the adapted network for other programs: its state dict, a program of torch.export, or ONNX.

        Args:
            path: ``*.safetensors``, ``*.pt2`` or ``*.onnx``; see `signmaml.export.export`. The file also says the
                classes.
            X: Some examples, for the inputs' shape; None: those of `fit`, or of the learner's format.
            probabilities: Whether the softmax is part of the network (.pt2 and .onnx).

        Raises:
            NotFittedError: Before `fit`.
            ValueError, TypeError, FileNotFoundError, ModuleNotFoundError, RuntimeError: As `signmaml.export.export`;
                or nothing says the inputs' shape.
        """
        from .export import export

        adapted, learner = self._fitted(), self._learner
        if probabilities and self._estimator_type != "classifier":
            raise ValueError("probabilities: expected False for regression, found True")
        if adapted.transductive and learner.has_batch_norm():
            raise ValueError(
                "export: expected an inductive learner, since a transductive network predicts otherwise for every set "
                "of examples, found transductive=True"
            )
        if X is not None:
            x = learner.inputs(X)
        elif self._input is not None:
            x = self._input.contiguous()
        elif learner.example is not None:
            x = torch.zeros(1, *learner.example.shape, dtype=next(adapted.module().parameters()).dtype, device="cpu")
        else:
            raise ValueError("X: expected some examples, since the file of this learner says no shape, found none")
        export(self.module(), path, x, probabilities=probabilities, metadata=self._export_metadata())

    def _export_metadata(self) -> dict[str, Any]:
        example = self._learner.example
        return {"example": None if example is None else example.to_json()}

    @classmethod
    def load(
        cls: type[_Self],
        path: str | os.PathLike[str],
        learner: Learner | nn.Module | str | os.PathLike[str] | None = None,
        *,
        device: str | None = None,
    ) -> _Self:
        """Reads what `save` wrote.

        Args:
            path: The file.
            learner: The learner it was adapted from; None where the file is complete (see `save`).
            device: As in the constructor.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: The file is damaged or another estimator's; it is not complete and no learner is given; the
                learner is another one.
        """
        tensors, stored = checkpoint.load(Path(path), kind="adapted")
        if stored.get("estimator") != cls.__name__:
            raise ValueError(f"load: expected a {cls.__name__}, found a {stored.get('estimator')} in {path}")
        wanted = {**_FewShotEstimator._HEADER, **cls._HEADER}
        absent = [name for name, kind in wanted.items() if not isinstance(stored.get(name, ...), kind)]
        if absent:
            raise ValueError(f"load: expected an adapted learner, found a damaged header in {path}: {absent[0]}")
        return cls._restored(tensors, stored, learner, device)

    _HEADER: ClassVar[dict[str, Any]] = {
        "parameters": dict, "steps": str, "transductive": bool, "task_state": str, "head_name": (str, type(None)),
        "learner": str, "source": str, "config": (dict, type(None)), "example": (dict, type(None)), "precision": str,
        "batch_norm": str,
    }  # fmt: skip

    @classmethod
    def _restored(
        cls: type[_Self], tensors: dict[str, Tensor], stored: Mapping[str, Any], learner: Any, device: str | None
    ) -> _Self:
        parameters = dict(stored["parameters"])
        counted = stored["task_state"] == "int8"
        if learner is not None:
            given = {n: parameters.get(n) for n in ("inner_lr", "inner_steps")}
            if isinstance(learner, nn.Module) and not counted:  # which gives its structure alone
                given = {"inner_lr": 0.0, "inner_steps": 0}
            found = as_learner(learner, device, **given)
        elif not counted and stored["config"] is not None and stored["example"] is not None:
            config, example = TrainConfig.from_dict(stored["config"]), ExampleFormat.from_json(stored["example"])
            found = network_of(config, example, device, stored["source"])
        else:
            kind = "int8 steps" if counted else "a module's parameters"
            raise ValueError(f"load: expected learner= for a file that holds {kind}, found none")
        if counted and found.digest != stored["learner"]:
            raise ValueError(
                f"load: expected the learner that it was adapted from ({stored['source']}), found {found!r}"
            )
        if not counted:
            arguments: EvaluationArguments = {**found.arguments}
            arguments["precision"], arguments["batch_norm"] = stored["precision"], stored["batch_norm"]
            found = dataclasses.replace(found, arguments=arguments, how=stored["steps"])
        own = {
            "learner": found if learner is None else learner, "transductive": stored["transductive"],
            "task_state": stored["task_state"], "device": device, **parameters,
        }  # fmt: skip
        estimator = cls(**own)
        moved = {name: tensor.to(found.device) for name, tensor in tensors.items()}
        estimator._learner = found
        estimator._adapted = estimator._state_of(moved, stored, found)
        if stored.get("input") is not None:  # absent from older files
            estimator._input = _input_from_json(stored["input"], found.device)
        return estimator

    def _metadata(self) -> dict[str, Any]:
        return {}

    def _state_of(self, tensors: Mapping[str, Tensor], stored: Mapping[str, Any], learner: Learner) -> Adapted:
        transductive = stored["transductive"]
        if stored["task_state"] == "full":
            return FullState(
                prepared(with_stored_rows(learner.model, tensors), tensors), learner.arguments, transductive
            )
        parts: dict[str, dict[str, Tensor]] = {"steps": {}, "statistics": {}, "head": {}}
        for name, tensor in tensors.items():
            part, _, rest = name.partition("/")
            parts.get(part, {})[rest] = tensor
        head, rates = stored["head_name"], learner.arguments["inner_lr"]
        shapes = {name: tuple(p.shape) for name, p in learner.model.named_parameters()}
        shapes |= {name: tuple(tensor.shape) for name, tensor in parts["head"].items()}
        if head is not None and f"{head}.weight".lstrip(".") not in parts["head"]:
            raise ValueError(f"load: expected the weight of the head {head!r} in the file, found none")
        if any(shapes.get(name) != tuple(steps.shape) for name, steps in parts["steps"].items()):
            raise ValueError("load: expected steps of the learner's parameters in the file, found others")
        if head is not None:
            own = parts["head"][f"{head}.weight".lstrip(".")]
            rates = rates_for_head(rates, learner.model, head, None if stored.get("prototypes") else len(own))
        return CountedState(learner, Counts(**parts), transductive, rates, head)


class FewShotClassifier(_FewShotEstimator):
    """Learns new classes from a few examples of each, with a meta-trained learner.

    `fit` adapts the learner to a support set; `predict` and `predict_proba` classify. The conventions are
    scikit-learn's (`get_params`, `set_params`, `score`, `classes_`, `clone`), and so it works in a `Pipeline`, in
    `cross_val_score` and in `GridSearchCV`. scikit-learn is not needed.

    Examples are paths of image files, PIL images, uint8 arrays of images, or arrays and tensors of the model's inputs;
    `signmaml.examples.ExampleFormat.inputs` has the rules. Images become inputs as in training.

    Args:
        learner: Run folder or weights file of `signmaml train`, a `Learner`, or a module (a copy of which is used).
        inner_lr: Inner learning rate; None: the learner's. A module needs it.
        inner_steps: Inner steps, likewise.
        head: How the head begins: "trained", "prototypes", or "auto": the trained one for as many classes as it has,
            else prototypes; see `signmaml.heads`. With the trained head the order of the classes has an influence.
        transductive: False: BatchNorm normalises by the support set, so that the answer for an example depends on it
            and the support set alone. True: by the examples that are predicted together, as in MAML's published tests;
            usually better where they are many and of all classes alike, and wrong where they are few or of one class.
            Without BatchNorm both are the same.
        task_state: "full", or "int8": the fitted classifier keeps one byte a parameter and shares the rest with all
            that use the same `Learner`. For sign-maml.
        device: Where a run is loaded: "auto", "cpu", "cuda" or "cuda:INDEX"; None: "auto". A module stays where it is.

    Attributes:
        classes_: The labels, sorted; after `fit`.

    Raises:
        TypeError, ValueError, FileNotFoundError: On `fit` and `predict`, for what does not fit.

    Determinism: `fit` draws nothing at random.

    Example:
        >>> import torch, signmaml
        >>> net = signmaml.MLP(8, 3)  # meta-trained, in earnest
        >>> x, y = torch.randn(6, 8), ["ant", "bee", "cat"] * 2
        >>> classifier = FewShotClassifier(net, inner_lr=0.01, inner_steps=5).fit(x, y)
        >>> classifier.predict_proba(x).shape, [str(label) for label in classifier.classes_]
        ((6, 3), ['ant', 'bee', 'cat'])
    """

    _estimator_type = "classifier"
    _loss = "cross_entropy"
    _HEADER: ClassVar[dict[str, Any]] = {"classes": list, "head": str, "prototypes": bool}
    classes_: np.ndarray

    def __init__(
        self,
        learner: Learner | nn.Module | str | os.PathLike[str],
        *,
        inner_lr: Any = None,
        inner_steps: int | None = None,
        head: str = "auto",
        transductive: bool = False,
        task_state: str = "full",
        device: str | None = None,
    ) -> None:
        self.learner = learner
        self.inner_lr = inner_lr
        self.inner_steps = inner_steps
        self.head = head
        self.transductive = transductive
        self.task_state = task_state
        self.device = device

    def fit(self: _Classifier, X: Any, y: Any) -> _Classifier:
        """Adapts to a support set.

        Args:
            X: n examples, of at least two classes.
            y: Their n labels: strings, integers or other values that can be sorted.

        Raises:
            TypeError, ValueError, FileNotFoundError: An argument does not fit, or one of the constructor's.
            FloatingPointError: The inner loop met a NaN or an Inf.
        """
        return self._take(self._fit_all([(X, y)])[0])

    def fit_each(self: _Classifier, tasks: Iterable[tuple[Any, Any]]) -> list[_Classifier]:
        """Adapts to several support sets, each with classes of its own; this classifier stays as it is.

        Tasks of one size that start from the trained head are adapted together.

        Args:
            tasks: Pairs (X, y), as for `fit`.

        Returns:
            A fitted classifier for each, with this one's arguments.

        Raises:
            TypeError, ValueError, FileNotFoundError, FloatingPointError: As `fit`.
        """
        return [type(self)(**self.get_params())._take(fitted) for fitted in self._fit_all(list(tasks))]

    def _take(self: _Classifier, fitted: tuple[Learner, np.ndarray, Adapted, Tensor]) -> _Classifier:
        self._learner, self.classes_, self._adapted, self._input = fitted
        return self

    def in_words(self) -> dict[str, str]:
        words = super().in_words()
        return {"head": "head from prototypes" if self._fitted().prototypes else "head as trained", **words}

    def _fit_all(self, tasks: Sequence[tuple[Any, Any]]) -> list[tuple[Learner, np.ndarray, Adapted, Tensor]]:
        check_head(self.head)
        learner = self._settle()
        sets = [_support(learner, X, y) for X, y in tasks]
        found: list[tuple[Learner, np.ndarray, Adapted, Tensor] | None] = [None] * len(sets)
        sizes: dict[tuple[int, tuple[int, ...]], list[int]] = {}
        for number, (x, _, classes) in enumerate(sets):
            sizes.setdefault((len(classes), tuple(x.shape)), []).append(number)
        for (ways, _), numbers in sizes.items():
            adapted = adapt_tasks(
                learner,
                torch.stack([sets[n][0] for n in numbers]),
                torch.stack([sets[n][1] for n in numbers]),
                ways=ways,
                head=self.head,
                transductive=self.transductive,
                task_state=self.task_state,
            )
            for number, state in zip(numbers, adapted, strict=True):
                found[number] = (learner, sets[number][2], state, torch.zeros_like(sets[number][0][:1]))
        return [entry for entry in found if entry is not None]

    def decision_function(self, X: Any) -> np.ndarray:
        """The scores `[n, classes]` before the softmax.

        Raises:
            NotFittedError: Before `fit`.
            TypeError, ValueError, FileNotFoundError: `X` does not fit.
        """
        return self._outputs(X).numpy()

    def predict_proba(self, X: Any) -> np.ndarray:
        """The probabilities `[n, classes]`, in the order of `classes_`; a row's sum is 1. Errors: `decision_function`.

        They are the softmax of the scores, and not calibrated.
        """
        return self._outputs(X).double().softmax(-1).numpy()

    def predict_log_proba(self, X: Any) -> np.ndarray:
        """The logarithms of `predict_proba`."""
        return self._outputs(X).double().log_softmax(-1).numpy()

    def predict(self, X: Any) -> np.ndarray:
        """The labels `[n]`. Errors: `decision_function`."""
        scores = self._outputs(X)
        return self.classes_[scores.argmax(-1).numpy()]

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """The mean accuracy. Errors: `decision_function`."""
        labels, found = _labels(y), self.predict(X)
        if len(labels) != len(found):
            raise ValueError(f"y: expected {len(found)} labels, one for each example of X, found {len(labels)}")
        if _kinds(labels) - _kinds(self.classes_):
            wanted = " and ".join(sorted(_kinds(self.classes_)))
            raise TypeError(f"y: expected {wanted} as in fit, found {' and '.join(sorted(_kinds(labels)))}")
        return float(np.average(found == labels, weights=_weights(sample_weight, len(found))))

    def _export_metadata(self) -> dict[str, Any]:
        return {"classes": [str(label) for label in self.classes_.tolist()], **super()._export_metadata()}

    def _metadata(self) -> dict[str, Any]:
        labels = self.classes_.tolist()
        if not all(isinstance(label, (str, int)) for label in labels):
            raise TypeError(
                f"save: expected labels that are strings or integers, found {a_few([repr(label) for label in labels])}"
            )
        return {"classes": labels, "head": self.head, "prototypes": self._fitted().prototypes}

    def _state_of(self, tensors: Mapping[str, Tensor], stored: Mapping[str, Any], learner: Learner) -> Adapted:
        self.classes_ = _as_array(stored["classes"])
        self.head = stored["head"]
        state = super()._state_of(tensors, stored, learner)
        state.prototypes = stored["prototypes"]
        return state


class FewShotRegressor(_FewShotEstimator):
    """Learns a new function from a few points, with a meta-trained learner; scikit-learn's conventions.

    As `FewShotClassifier`, without heads and classes; the learner's loss is the mean squared error.

    Args:
        learner: As in `FewShotClassifier`, like the following.
        inner_lr: Inner learning rate; None: the learner's.
        inner_steps: Inner steps, likewise.
        transductive: Whether BatchNorm normalises by the examples that are predicted together.
        task_state: "full" or "int8".
        device: Where a run is loaded.

    Example:
        >>> import numpy as np, signmaml
        >>> net = signmaml.MLP(1, 1)  # meta-trained, in earnest
        >>> x = np.linspace(-5, 5, 10)[:, None]
        >>> FewShotRegressor(net, inner_lr=0.01, inner_steps=5).fit(x, np.sin(x[:, 0])).predict(x).shape
        (10,)
    """

    _estimator_type = "regressor"
    _loss = "mse"
    _HEADER: ClassVar[dict[str, Any]] = {"one": bool}

    def __init__(
        self,
        learner: Learner | nn.Module | str | os.PathLike[str],
        *,
        inner_lr: Any = None,
        inner_steps: int | None = None,
        transductive: bool = False,
        task_state: str = "full",
        device: str | None = None,
    ) -> None:
        self.learner = learner
        self.inner_lr = inner_lr
        self.inner_steps = inner_steps
        self.transductive = transductive
        self.task_state = task_state
        self.device = device

    def fit(self: _Regressor, X: Any, y: Any) -> _Regressor:
        """Adapts to the points of one function.

        Args:
            X: n examples.
            y: Their targets, `[n]` or `[n, targets]`.

        Raises:
            TypeError, ValueError, FileNotFoundError: An argument does not fit, or one of the constructor's.
            FloatingPointError: The inner loop met a NaN or an Inf.
        """
        learner = self._settle()
        x = learner.inputs(X)
        targets = torch.from_numpy(_numbers(y))
        if targets.ndim not in (1, 2):
            raise ValueError(f"y: expected targets [n] or [n, targets], found {list(targets.shape)}")
        if len(targets) != len(x):
            raise ValueError(f"y: expected {len(x)} targets, one for each example of X, found {len(targets)}")
        rows = targets.to(next(learner.model.parameters()).dtype).reshape(len(x), -1).to(learner.device)
        if not bool(rows.isfinite().all()):
            raise ValueError(f"y: expected finite targets of {rows.dtype}, found NaN, Inf or larger ones")
        (adapted,) = adapt_tasks(
            learner,
            x[None],
            rows[None],
            ways=None,
            head="trained",
            transductive=self.transductive,
            task_state=self.task_state,
        )
        self._learner, self._adapted, self._one = learner, adapted, targets.ndim == 1
        self._input = torch.zeros_like(x[:1])
        return self

    _one: bool

    def predict(self, X: Any) -> np.ndarray:
        """The predictions, `[n]` or `[n, targets]` as the targets of `fit` were.

        Raises:
            NotFittedError: Before `fit`.
            TypeError, ValueError, FileNotFoundError: `X` does not fit.
        """
        outputs = self._outputs(X).numpy()
        return outputs[:, 0] if self._one else outputs

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """The coefficient of determination R^2, the mean over targets; NaN if all targets are equal."""
        truth, found = _numbers(y), np.asarray(self.predict(X), dtype=np.float64)
        if truth.shape != found.shape:
            raise ValueError(f"y: expected targets {list(found.shape)} as in fit, found {list(truth.shape)}")
        truth, found = truth.reshape(len(truth), -1), found.reshape(len(found), -1)
        given = _weights(sample_weight, len(truth))
        weights = np.ones(len(truth)) if given is None else given
        mean = np.average(truth, axis=0, weights=weights)
        left = np.average((truth - found) ** 2, axis=0, weights=weights)
        spread = np.average((truth - mean) ** 2, axis=0, weights=weights)
        with np.errstate(divide="ignore", invalid="ignore"):
            return float(np.mean(np.where(spread > 0, 1 - left / spread, np.nan)))

    def _metadata(self) -> dict[str, Any]:
        return {"one": self._one}

    def _state_of(self, tensors: Mapping[str, Tensor], stored: Mapping[str, Any], learner: Learner) -> Adapted:
        self._one = bool(stored["one"])
        return super()._state_of(tensors, stored, learner)


def _input_to_json(x: Tensor) -> dict[str, Any]:
    """Sizes and dtype of one input; ``x`` is a batch of one."""
    return {"sizes": list(x.shape[1:]), "dtype": str(x.dtype).removeprefix("torch.")}


def _input_from_json(stored: Any, device: torch.device) -> Tensor:
    """A batch of one input of zeros, from what `_input_to_json` returned. It takes no memory, whatever a file says.

    Raises:
        ValueError: It is something else.
    """
    found = stored if isinstance(stored, Mapping) else {}
    sizes, kind = found.get("sizes"), getattr(torch, str(found.get("dtype")), None)
    whole = isinstance(sizes, list) and all(type(size) is int and size >= 1 for size in sizes)
    if not isinstance(sizes, list) or not whole or math.prod(sizes) >= 2**40 or not isinstance(kind, torch.dtype):
        raise ValueError(f"load: expected the sizes and the dtype of an input, found {stored!r}")
    return torch.zeros((), dtype=kind, device=device).expand(1, *sizes)


def is_adapted(path: str | os.PathLike[str]) -> bool:
    """Whether a file was written by `save`; a folder or another file was not."""
    return Path(path).is_file() and checkpoint.kind_of(Path(path)) == "adapted"


def _support(learner: Learner, X: Any, y: Any) -> tuple[Tensor, Tensor, np.ndarray]:
    """Inputs, labels 0..ways-1 and classes of a support set."""
    labels = _labels(y)
    x = learner.inputs(X)
    if len(labels) != len(x):
        raise ValueError(f"y: expected {len(x)} labels, one for each example of X, found {len(labels)}")
    try:
        classes, numbers = np.unique(labels, return_inverse=True)
    except TypeError as error:
        raise TypeError(f"y: expected labels that can be sorted, found others: {error}") from error
    if len(classes) < 2:
        raise ValueError(f"y: expected at least 2 classes, found {len(classes)}")
    return x, torch.from_numpy(numbers.astype(np.int64)).to(learner.device), classes


def _labels(y: Any) -> np.ndarray:
    if hasattr(y, "to_numpy"):
        y = y.to_numpy()
    if isinstance(y, Tensor):
        y = y.detach().cpu().numpy()
    if isinstance(y, np.ndarray) and y.dtype != object:
        labels = y
    elif isinstance(y, (str, bytes)) or not isinstance(y, Iterable):
        raise TypeError(f"y: expected labels, one for each example, found {type(y).__name__}")
    else:
        labels = _as_array([plain_label(label) for label in y])
    if labels.ndim != 1:
        raise ValueError(f"y: expected labels [n], found shape {list(labels.shape)}")
    numbers = [labels] if labels.dtype != object else [np.array(v) for v in labels if isinstance(v, (float, complex))]
    for values in numbers:
        if values.dtype.kind == "c":
            raise TypeError("y: expected class labels, found complex numbers")
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            raise ValueError("y: expected class labels, found NaN or Inf")
        if values.dtype.kind == "f" and not np.all(values == np.floor(values)):
            raise ValueError("y: expected class labels, found fractions; FewShotRegressor takes numbers")
    return labels


def _kinds(labels: np.ndarray) -> set[str]:
    """The kinds of labels, of which two are never equal."""
    kinds = set()
    for label in labels.tolist():
        text = isinstance(label, (str, bytes))
        kinds.add(type(label).__name__ if text or isinstance(label, tuple) else "numbers")
    return kinds


def _numbers(y: Any, name: str = "y") -> np.ndarray:
    """Targets, or weights, as float64.

    Raises:
        TypeError: They are no real numbers.
    """
    array = np.asarray(y.detach().cpu() if isinstance(y, Tensor) else y)
    if array.dtype.kind not in ("iuf" if name == "y" else "iufb"):
        raise TypeError(f"{name}: expected real numbers, found {array.dtype}")
    return array.astype(np.float64)


def _weights(sample_weight: Any, count: int) -> np.ndarray | None:
    if sample_weight is None:
        return None
    weights = _numbers(sample_weight, "sample_weight")
    if weights.shape != (count,):
        raise ValueError(f"sample_weight: expected {count} numbers, one for each example, found {list(weights.shape)}")
    return weights


def _as_array(labels: list[Any]) -> np.ndarray:
    """Labels of one kind as an array of it, others as objects."""
    if all(isinstance(label, (str, np.str_)) for label in labels) or all(
        type(label) in (int, bool) for label in labels
    ):
        found = np.asarray(labels)
        if found.dtype.kind in "iubU":  # integers of 64 bits and more would become floats, and some of them equal
            return found
    array = np.empty(len(labels), dtype=object)
    array[:] = labels
    return array
