"""`Learner`: a meta-trained model with everything that it takes to adapt it to new classes."""

from __future__ import annotations

import copy
import hashlib
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeGuard, cast

import torch
from torch import Tensor, nn

from signmaml_ext.lazy import cached_property

from . import building, checkpoint
from .config import METHODS, TrainConfig
from .data.arguments import plain_label
from .evaluation import EvaluationArguments, Rates
from .examples import ExampleFormat, as_inputs
from .heads import Head, check_head, first_rows, head_of, prototype_head, rates_for_head, with_head
from .rates import InnerRates
from .runs import RunFolder

Place = str | os.PathLike[str]
_MOST_TWINS = 64


@dataclass(frozen=True)
class Stored:
    """A weights file, or the checkpoint of a run, read.

    Attributes:
        path: The file.
        config: The run's configuration.
        tensors: The tensors of a weights file by name.
        inner_rates: The inner rates as stored; None if the file has none.
        example: The format of the run's examples; None if the run had a sampler of its own.
    """

    path: Path
    config: TrainConfig
    tensors: dict[str, Tensor]
    inner_rates: dict[str, Any] | None
    example: ExampleFormat | None

    def network(self, shape: tuple[int, ...]) -> nn.Module:
        """The configuration's network for inputs of a shape, with the weights."""
        targets = next((t for name, t in self.tensors.items() if name == "classifier.bias"), None)
        model = building.build_network(self.config, shape, 1 if targets is None else len(targets))
        return self.fill(model)

    def fill(self, model: nn.Module) -> nn.Module:
        """Copies the weights into a model.

        Raises:
            ValueError: It is another network.
        """
        checkpoint.copy_into(model.state_dict(), checkpoint.of_model(self.tensors), str(self.path))
        return model

    def rates(self, model: nn.Module) -> InnerRates:
        """The run's inner rates, for a model on its device."""
        config = self.config
        rates = InnerRates(model, config.learn_inner_lr, config.inner_lr, config.inner_steps, config.adapt)
        if self.inner_rates is not None:
            rates.load_json(self.inner_rates, self.tensors)
        return rates


def read_weights(source: Place, which: str = "best", *, own: bool = False) -> Stored:
    """Reads a run folder or a file of one.

    Args:
        source: Run folder or file.
        which: "best" or "last", for a run folder.
        own: Whether the caller has the model, so that one that the configuration does not name is accepted.

    Raises:
        FileNotFoundError: There is no such run or file.
        ValueError: The file is damaged, or has no information about its run.
    """
    if which not in ("best", "last"):
        raise ValueError(f"checkpoint: expected 'best' or 'last', found {which!r}")
    path = Path(source).expanduser()
    if path.is_dir():
        run = RunFolder(path)
        path = run.best if which == "best" else run.last
        if not path.is_file():
            raise FileNotFoundError(f"run folder: expected {path.name} in {run.path}, found none (no checkpoint yet?)")
    tensors, metadata = checkpoint.load(path)
    if not isinstance(metadata.get("config"), dict) or "self_contained" not in metadata:
        raise ValueError(f"weights: expected a file that a run wrote, with its configuration, found {path}")
    if not metadata["self_contained"] and not own:
        raise ValueError(
            f"weights: expected those of a run whose configuration names its model and data, found {path} of a run "
            "with a model, data or a loss of its own; load them in Python with signmaml.load_weights, or with "
            "signmaml.Learner.load and model="
        )
    config = TrainConfig.from_dict(metadata["config"], str(path))
    if metadata["kind"] == "training":
        # As in a weights file.
        names = {"model.": "", "rates.": checkpoint.BESIDE_WEIGHTS}
        tensors = {
            new + name.removeprefix(old): tensor
            for name, tensor in tensors.items()
            for old, new in names.items()
            if name.startswith(old)
        }
    example = metadata.get("example")
    return Stored(
        path,
        config,
        tensors,
        metadata.get("inner_rates"),
        None if example is None else ExampleFormat.from_json(example),
    )


@dataclass(eq=False)
class _Known:
    """What is known of a model: its head, whether it takes integers, and copies of it with other heads by thread and
    number of classes.

    A copy is made once, since the package verifies a module when it first meets it.
    """

    head: Head | None = None
    takes_integers: bool | None = None
    twins: dict[tuple[int, int], nn.Module] = field(default_factory=dict)

    def with_head(self, model: nn.Module, name: str, layer: nn.Linear) -> nn.Module:
        key = (threading.get_ident(), layer.out_features)
        twin = self.twins.get(key)
        if twin is None:
            if len(self.twins) >= _MOST_TWINS:
                self.twins.clear()
            twin = self.twins[key] = with_head(model, name, layer)
        twin.get_submodule(name).load_state_dict(layer.state_dict())
        return twin

    def __getstate__(self) -> dict[str, Any]:
        return {"head": self.head, "takes_integers": self.takes_integers, "twins": {}}


@dataclass(frozen=True, eq=False, repr=False)
class Learner:
    """A meta-trained model with everything that it takes to adapt it to new classes; nothing changes it.

    Make one with `load` or `of`, and give it to `FewShotClassifier` or `FewShotRegressor`. Copies (also those of
    scikit-learn's `clone`) are the same object, so any number of classifiers share one model.

    Attributes:
        model: The model, in evaluation mode.
        arguments: How it adapts; for `signmaml_ext.evaluate`. A loss of None is the usual one of what it is used for.
        example: How examples become inputs; None: they must be the inputs.
        config: The configuration of its run, as far as it names a network, and of how it adapts; None for a module.
        source: Where it comes from, in words.
        how: How it adapted, in words, if it is of a file of an adapted network: then it has no trained weights, and
            adapts no more. None: it is not.

    Example:
        >>> import signmaml
        >>> Learner.of(signmaml.MLP(8, 3), inner_lr=0.01, inner_steps=5)
        Learner(MLP: sign-maml, 5 steps of 0.01)
    """

    model: nn.Module
    arguments: EvaluationArguments
    example: ExampleFormat | None
    config: TrainConfig | None
    source: str
    how: str | None = None
    _known: _Known = field(default_factory=lambda: _Known())

    @classmethod
    def load(
        cls,
        source: Place,
        checkpoint: str = "best",
        *,
        device: str = "auto",
        model: nn.Module | None = None,
        example: ExampleFormat | None = None,
        **overrides: Any,
    ) -> Learner:
        """The learner that a run trained.

        Args:
            source: Run folder, or a weights file such as RUN/best.safetensors.
            checkpoint: "best" or "last", for a run folder.
            device: "auto", "cpu", "cuda" or "cuda:INDEX".
            model: The module that the weights belong to, for a run with a model of its own; a copy is used.
            example: How examples become inputs; None: as in the run.
            **overrides: Fields of `TrainConfig` that adapting may take otherwise than the run: `inner_lr`,
                `test_steps`, `method`, `backend`, `precision` and those of sharpness and inner rules.

        Raises:
            FileNotFoundError: There is no such run or file.
            ValueError: The file is damaged; the weights are another model's; the run had a model of its own and
                `model` is None; an override is out of range.
        """
        stored = read_weights(source, checkpoint, own=model is not None)
        foreign = sorted(set(overrides) - set(_OVERRIDES))
        if foreign:
            raise ValueError(f"overrides: expected any of {', '.join(_OVERRIDES)}, found {', '.join(foreign)}")
        config = stored.config.replace(**overrides)
        example = example or stored.example
        if model is not None:
            network = stored.fill(copy.deepcopy(model))
        elif example is not None:
            network = stored.network(example.shape)
        else:
            raise ValueError(
                f"example: expected the format of the run's examples in {stored.path}, found none; give example="
            )
        network.to(building.resolve_device(device))
        rates = stored.rates(network)
        if "inner_lr" in overrides:
            rates = InnerRates(network, "none", config.inner_lr, config.inner_steps)
        usual = "mse" if config.data == "sinusoid" else "cross_entropy"
        arguments = building.evaluation_arguments(config, rates, usual)
        if model is not None:
            arguments["loss"] = None  # the run may have had another
        return cls(network.eval(), arguments, example, None if model is not None else config, str(source))

    @classmethod
    def of(
        cls,
        model: nn.Module,
        *,
        inner_lr: Rates,
        inner_steps: int,
        example: ExampleFormat | None = None,
        **options: Any,
    ) -> Learner:
        """The learner of a module.

        Args:
            model: The meta-trained module; a copy is used, on its device.
            inner_lr: As in `signmaml_ext.adapt`, like `inner_steps`.
            inner_steps: Inner steps.
            example: How image files, PIL images and uint8 arrays become inputs; None: examples are the inputs.
            **options: `method`, `loss`, `adapt`, `batch_norm`, `backend`, `precision`, `sharpness` and
                `inner_rule`, as in `signmaml_ext.adapt`.

        Raises:
            TypeError, ValueError: An argument has the wrong type or an unknown name.
        """
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a torch.nn.Module, found {type(model).__name__}")
        if example is not None and not isinstance(example, ExampleFormat):
            raise TypeError(f"example: expected an ExampleFormat or None, found {type(example).__name__}")
        inner_lr, inner_steps = _plain_number(inner_lr), _plain_number(inner_steps)
        foreign = sorted(set(options) - set(_OPTIONS))
        if foreign:
            raise ValueError(f"options: expected any of {', '.join(_OPTIONS)}, found {', '.join(foreign)}")
        arguments = {**_OPTIONS, **options, "nonfinite": "raise", "inner_lr": inner_lr, "inner_steps": inner_steps}
        _check_steps(inner_lr, inner_steps, arguments["method"])
        twin = copy.deepcopy(model).eval()
        return cls(twin, cast(EvaluationArguments, arguments), example, None, type(model).__name__)

    def __repr__(self) -> str:
        return f"Learner({self.source}: {self.in_words()})"

    def in_words(self) -> str:
        """How it adapts, such as "sign-maml, 3 steps of 0.01"."""
        if self.how is not None:
            return self.how
        rate, steps = self.arguments["inner_lr"], self.arguments["inner_steps"]
        each = f"{float(rate):g}" if _is_one_number(rate) else "learned rates"
        return f"{self.arguments['method']}, {steps} step{'s' * (steps != 1)} of {each}"

    def __deepcopy__(self, memo: dict[int, Any]) -> Learner:
        return self

    def __copy__(self) -> Learner:
        return self

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the weights and inner rates, as hexadecimal digits."""
        digest = hashlib.sha256()
        rate = self.arguments["inner_lr"]
        rates = rate if isinstance(rate, Mapping) else {"": rate}
        tensors = dict(self.model.state_dict())
        for name, value in rates.items():
            value = float(value) if _is_one_number(value) else value
            tensors[f"rate/{name}"] = torch.as_tensor(value, dtype=torch.float64, device="cpu")
        for name, tensor in tensors.items():
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def changed(self, *, inner_lr: Rates | None = None, inner_steps: int | None = None, loss: Any = None) -> Learner:
        """This learner with another rate, number of steps or loss; it shares the model.

        Raises:
            ValueError: Learned rates are for another number of steps.
        """
        inner_lr, inner_steps = _plain_number(inner_lr), _plain_number(inner_steps)
        if inner_lr is None and inner_steps is None and loss in (None, self.arguments["loss"]):
            return self
        own = self.arguments
        _check_steps(
            own["inner_lr"] if inner_lr is None else inner_lr,
            own["inner_steps"] if inner_steps is None else inner_steps,
            own["method"],
        )
        arguments: EvaluationArguments = {**self.arguments}
        if inner_lr is not None:
            arguments["inner_lr"] = inner_lr
        if inner_steps is not None:
            rates = arguments["inner_lr"]
            if inner_lr is None and not _is_one_number(rates) and inner_steps != arguments["inner_steps"]:
                raise ValueError(
                    f"inner_steps: expected {arguments['inner_steps']} with the learned rates, found {inner_steps}"
                )
            arguments["inner_steps"] = inner_steps
        if loss is not None:
            arguments["loss"] = loss
        how = self.how if inner_lr is None and inner_steps is None else None
        return Learner(self.model, arguments, self.example, self.config, self.source, how, self._known)

    def inputs(self, examples: Any, name: str = "X") -> Tensor:
        """Examples of any kind as the model's inputs `[n, ...]`, on its device; see `ExampleFormat.inputs`.

        Raises:
            TypeError, ValueError, FileNotFoundError: As `ExampleFormat.inputs`.
        """
        x = as_inputs(examples, self.example, name).to(self.device)
        dtype = next(self.model.parameters()).dtype
        if not x.is_floating_point() and not x.is_complex() and not self._takes(x):
            x = x.to(dtype)
        if x.is_floating_point() and x.dtype != dtype:
            x = x.to(dtype)
            if not bool(x.isfinite().all()):
                raise ValueError(
                    f"{name}: expected numbers that {str(dtype).removeprefix('torch.')} holds, found larger"
                )
        return x

    def _takes(self, x: Tensor) -> bool:
        """Whether the model takes integers, as an embedding does; most others want floating-point numbers."""
        if self._known.takes_integers is None:
            one, dtype = x[:1], next(self.model.parameters()).dtype
            if self._runs_on(one):
                self._known.takes_integers = True
            elif self._runs_on(one.to(dtype)):
                self._known.takes_integers = False
            else:  # neither: what is wrong is something else, and the forward will say it
                return True
        return self._known.takes_integers

    def _runs_on(self, x: Tensor) -> bool:
        with torch.no_grad():
            try:
                self.model(x)
            except (RuntimeError, TypeError, ValueError, IndexError):
                return False
        return True

    def start(self, x: Tensor, y: Tensor, ways: int, head: str = "auto") -> tuple[nn.Module, Rates, str | None]:
        """What a task's inner loop starts from.

        Args:
            x: `[S, ...]`, the inputs of the support set.
            y: `[S]` int64 in 0..ways-1, each of them at least once.
            ways: Classes of the task.
            head: "trained": the first rows of the trained head; "prototypes": rows made from the support set (see
                `signmaml.heads`); "auto": the trained head for as many classes as it has, else prototypes.

        Returns:
            The model, which shares the learner's tensors, and whose head is good until this thread's next call; its
            inner rates; and the name of its head, if that is not the trained one as a whole.

        Raises:
            ValueError: The head cannot be had.
        """
        prototypes = self.takes_prototypes(x, ways, head)
        rates, end = self.arguments["inner_lr"], self.head(x)
        if end.outputs == ways and not prototypes:
            return self.model, rates, None
        if end.name is None:
            raise ValueError(
                f"head: expected a model whose prediction is the output of an nn.Linear, for heads of other than its "
                f"{end.outputs} classes, found {type(self.model).__name__}"
            )
        if not prototypes:
            trained = self.model.get_submodule(end.name)
            assert isinstance(trained, nn.Linear)
            layer = first_rows(trained, ways)
        else:
            layer = prototype_head(self.model, end.name, x, y, ways, self.arguments)
        model = self._known.with_head(self.model, end.name, layer)
        return model, rates_for_head(rates, self.model, end.name, None if prototypes else ways), end.name

    def takes_prototypes(self, x: Tensor, ways: int, head: str) -> bool:
        """Whether tasks of so many classes have heads of their own in `start`, where `x` are some inputs `[n, ...]`."""
        return check_head(head) == "prototypes" or (head == "auto" and self.head(x).outputs != ways)

    def head(self, x: Tensor) -> Head:
        """The end of the model, found by running it once on some inputs `[n, ...]`.

        Raises:
            ValueError: It does not predict `[n, outputs]`, or does not take such inputs.
        """
        if self._known.head is None:
            try:
                self._known.head = head_of(self.model, x)
            except (RuntimeError, IndexError) as error:
                shape, dtype = list(x.shape), str(x.dtype).removeprefix("torch.")
                raise ValueError(
                    f"X: expected examples that {type(self.model).__name__} takes, found {dtype} {shape}: {error}"
                ) from error
        return self._known.head

    def has_batch_norm(self) -> bool:
        """Whether the transductive and the inductive prediction differ."""
        return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in self.model.modules())


def _is_one_number(rate: Any) -> TypeGuard[float | Tensor]:
    return isinstance(rate, (int, float)) or (isinstance(rate, Tensor) and rate.numel() == 1)


def _check_steps(inner_lr: Any, inner_steps: Any, method: Any) -> None:
    if not isinstance(inner_lr, (int, float, Tensor, Mapping)) or isinstance(inner_lr, bool):
        raise TypeError(f"inner_lr: expected a number, a tensor or a mapping, found {type(inner_lr).__name__}")
    if isinstance(inner_steps, bool) or not isinstance(inner_steps, int):
        raise TypeError(f"inner_steps: expected an integer, found {inner_steps!r}")
    if inner_steps < 0:
        raise ValueError(f"inner_steps: expected an integer >= 0, found {inner_steps}")
    if method not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(map(repr, METHODS))}, found {method!r}")


def network_of(config: TrainConfig, example: ExampleFormat, device: str | None, source: str) -> Learner:
    """A learner with a configuration's network and no trained weights, into which adapted ones are then loaded."""
    outputs = 1 if config.data == "sinusoid" else config.ways
    model = building.build_network(config, example.shape, outputs).to(building.resolve_device(device or "auto"))
    rates = InnerRates(model, "none", config.inner_lr, config.inner_steps)
    loss = "mse" if config.data == "sinusoid" else "cross_entropy"
    arguments = building.evaluation_arguments(config, rates, loss)
    return Learner(model.eval(), arguments, example, config, source)


def as_learner(learner: Learner | nn.Module | Place, device: str | None = None, **changes: Any) -> Learner:
    """A learner from what users give: a `Learner`, a run folder or weights file, or a module.

    Args:
        learner: One of them.
        device: For a run; None: "auto".
        **changes: `inner_lr` and `inner_steps`, each possibly None; a module needs both.

    Raises:
        TypeError, ValueError, FileNotFoundError: As `Learner.load` and `Learner.of`.
    """
    if isinstance(learner, Learner):
        return learner.changed(**changes)
    if isinstance(learner, (str, os.PathLike)):
        return _loaded(*_latest(learner), device or "auto").changed(**changes)
    if not isinstance(learner, nn.Module):
        raise TypeError(
            f"learner: expected a run folder, a weights file, a module or a Learner, found {type(learner).__name__}"
        )
    for name, value in changes.items():
        if value is None:
            raise ValueError(f"{name}: expected a value for a module as the learner, found None")
    return Learner.of(learner, **changes)


def _plain_number(value: Any) -> Any:
    """A number of NumPy, as searches over parameters give them, as Python's own."""
    return value if isinstance(value, Tensor) else plain_label(value)


def _latest(source: Place) -> tuple[str, int, int]:
    """A run's best weights, or a file, with what changes when the file does."""
    path = Path(source).expanduser()
    if path.is_dir():
        best = RunFolder(path).best
        path = best if best.is_file() else path
    status = path.stat() if path.exists() else None
    return str(path), status.st_mtime_ns if status else 0, status.st_size if status else 0


@lru_cache(maxsize=4)
def _loaded(path: str, _: int, __: int, device: str) -> Learner:
    """Few, so that a search over parameters does not read a run again for every fit."""
    return Learner.load(path, device=device)


_OPTIONS: dict[str, Any] = {
    "method": "sign-maml", "loss": None, "adapt": None, "batch_norm": "batch", "backend": "auto", "precision": "fp32",
    "sharpness": None, "inner_rule": None,
}  # fmt: skip
_OVERRIDES = (
    "inner_lr", "test_steps", "method", "backend", "precision", "sharpness_lower",
    "sharpness_norm", "sharpness_adaptive", "inner_rule", "inner_momentum", "inner_eps", "inner_weight_decay",
)  # fmt: skip
