"""`TrainConfig`: everything that determines a training run, as one checked, documented, printable value.

Values come from the defaults, a preset, a YAML or TOML file and the command line; later sources win.
Nothing here imports torch.
"""

from __future__ import annotations

import dataclasses
import difflib
import sys
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from . import networks
from .values import Kind, Rule, converted, kind_of

METHODS = ("sign-maml", "fo-maml", "maml")
MAX_FILE_BYTES, MAX_FILE_DEPTH = 2**20, 20  # limits for a configuration file
LEARNED_RATES = ("none", "scalar", "per-step", "per-layer", "per-layer-per-step", "per-parameter")
# The inner rules, and the methods whose steps they make.
INNER_RULES = {
    "plain": METHODS,
    "signum": ("sign-maml",),
    "lion": ("sign-maml",),
    "momentum": ("fo-maml", "maml"),
    "adam": ("fo-maml", "maml"),
}
# Random changes of training images.
AUGMENTATIONS = ("flip", "crop")
ADAPTED_RATES = ("none", "alpha-maml", "multiplicative")


def _option(default: Any, help: str, **limits: Any) -> Any:
    return field(default=default, metadata={"rule": Rule(help, **limits)})


@dataclass(frozen=True, repr=False)
class TrainConfig:
    """Configuration of one training run; checked on construction.

    `describe()` and `signmaml train --help` describe every field with its range and default.

    Raises:
        ValueError: A field has the wrong type or is outside its range, or two fields contradict each other. The
            message names the field, what was expected and what was found.

    Example:
        >>> TrainConfig(ways=20)
        TrainConfig(ways=20)
        >>> TrainConfig(ways=1)
        Traceback (most recent call last):
        ValueError: ways: expected an integer >= 2, found 1
    """

    data: str = _option("glyphs", "data set (see 'signmaml data list'), 'folder' for own images, or 'sinusoid'")
    data_root: str | None = _option(None, "where the data set lies on disk; none: the cache folder")
    image_size: int | None = _option(None, "height and width of the images in pixels; none: the set's usual", least=1)
    split_by: str | None = _option(
        None,
        "how own images are split: shares of classes such as 70:15:15, 'images' (same classes, other images), a file "
        "or a folder of lists; none: by folders",
    )
    min_images: int = _option(1, "leave out classes of own images that have fewer", least=1)
    skip_damaged: bool = _option(False, "leave out own images that cannot be decoded")
    rotations: bool | None = _option(
        None, "train on classes rotated by 90, 180, 270 degrees as classes of their own; none: as is usual for the set"
    )
    augment: tuple[str, ...] | None = _option(
        None,
        "random changes of training images: mirrored left to right, shifted by up to an eighth; none: as they are",
        choices=AUGMENTATIONS,
    )
    normalize: str = _option("zero-one", "pixel values: 0..1, -1..1, or 0..255", choices=("zero-one", "signed", "raw"))

    ways: int = _option(5, "classes in a task (N)", least=2)
    shots: int = _option(1, "support examples a class (K-shot)", least=1)
    queries: int = _option(5, "query examples a class when training", least=1)
    tasks: int = _option(4, "tasks in a meta-batch (T)", least=1)

    model: str = _option(
        "conv4",
        "network: convN (N blocks), convN-W1-...-WN (a width a block), resnet12, resnet12-W-W-W-W or mlp",
    )
    filters: int = _option(32, "channels of every block of a convN whose name says no widths", least=1)
    pooling: str = _option("max", "how convN halves the image", choices=("max", "stride"))
    norm: str = _option("batch", "normalisation in convN and resnet12", choices=networks.NORMS)
    activation: str | None = _option(
        None, "nonlinearity; none: leaky-relu in resnet12, relu in the others", choices=networks.ACTIVATIONS
    )
    hidden: tuple[int, ...] = _option((40, 40), "widths of the MLP's hidden layers", least=1)

    method: str = _option("sign-maml", "meta-learning algorithm", choices=METHODS)
    inner_lr: float = _option(0.01, "inner learning rate (alpha); sign steps want about 1/10 of MAML's", above=0)
    inner_steps: int = _option(3, "inner steps when training; 0 trains jointly without adaptation", least=0)
    test_steps: int | None = _option(None, "inner steps in validation and test; none: as inner_steps", least=0)
    learn_inner_lr: str = _option("none", "meta-learn inner rates, starting at inner_lr", choices=LEARNED_RATES)
    adapt: tuple[str, ...] | None = _option(
        None, "name patterns of the parameters that the inner loop moves (ANIL: classifier); none: all"
    )

    inner_rule: str = _option(
        "plain",
        "what inner steps move along; signum and lion for sign-maml, momentum and adam for the others",
        choices=tuple(INNER_RULES),
    )
    inner_momentum: float | None = _option(
        None, "weight of earlier gradients in inner_rule (lion, adam: beta1), below 1; none: 0.9", least=0
    )
    inner_eps: float | None = _option(
        None, "eps of inner_rule adam; none: 1e-8, but method maml wants about 1e-3", above=0
    )
    inner_weight_decay: float = _option(
        0.0, "decoupled weight decay (lambda): an inner step scales parameters by 1 - inner_lr lambda", least=0
    )

    sharpness_lower: float = _option(
        0.0,
        "Sharp-MAML: radius in which an inner step takes its gradient at the sharpest place; 0: none",
        least=0,
    )
    sharpness_upper: float = _option(
        0.0, "Sharp-MAML: radius in which an iteration takes its meta-gradient so, in a second pass; 0: none", least=0
    )
    sharpness_norm: str = _option("l2", "norm of both radii: as published, or by signs", choices=("l2", "linf"))
    sharpness_adaptive: bool = _option(False, "whether radii are relative to each parameter's size")

    iterations: int = _option(400, "meta-iterations", least=1, on_resume=True)
    outer_lr: float = _option(0.006, "outer learning rate (beta)", above=0)
    outer_optimizer: str = _option("adam", "what takes the outer steps", choices=("adam", "adamw", "sgd"))
    outer_weight_decay: float | None = _option(
        None, "decoupled weight decay of adamw; inner rates that are learned have none; none: 0.01", least=0
    )
    clip_gradient: float | None = _option(
        None, "greatest l2 norm of an outer gradient, which is scaled down to it; none: any", above=0
    )
    average: float | None = _option(
        None,
        "decay of a moving average of the weights, which is validated and tested in their place; none: none",
        least=0,
    )
    multi_step_loss: int = _option(
        0,
        "MAML++: iterations in which the query losses after all inner steps count, the earlier ones less and less; "
        "0: the last one alone",
        least=0,
    )
    first_order_for: int = _option(
        0, "MAML++'s derivative-order annealing: iterations of method maml that begin as fo-maml", least=0
    )
    warmup: int = _option(0, "iterations over which outer_lr rises from 0 to its schedule", least=0)
    schedule: str = _option(
        "cosine", "outer learning rate over time; cosine falls to 0", choices=("constant", "cosine")
    )
    adapt_rates: str = _option(
        "none", "change inner_lr and outer_lr online by their hypergradients", choices=ADAPTED_RATES
    )
    inner_hyper_lr: float | None = _option(
        None, "a0 of alpha-maml, k of multiplicative; none: k 0.1, a0 0.1 inner_lr^2; 0: inner_lr stays", least=0
    )
    outer_hyper_lr: float | None = _option(
        None, "b0 of alpha-maml, k of multiplicative; none: k 0.3, b0 0.3 outer_lr^2; 0: outer_lr stays", least=0
    )

    validate_every: int = _option(100, "iterations between validations; 0: never", least=0)
    patience: int = _option(
        0, "stop early after so many validations without a better one; 0: never", least=0, on_resume=True
    )
    validate_tasks: int = _option(100, "tasks of a validation, the same every time", least=1)
    test_tasks: int = _option(600, "tasks of the test at the end; 0: no test", least=0)
    test_queries: int | None = _option(None, "query examples a class in validation and test; none: as queries", least=1)

    seed: int = _option(0, "seed of weights, tasks and dropout", least=0)
    device: str = _option("auto", "auto, cpu, cuda, cuda:INDEX or INDEX", on_resume=True)
    backend: str = _option("auto", "what computes the meta-step (see 'signmaml info')")
    graph: bool | None = _option(
        None, "replay each training iteration as one CUDA graph; none: where that is possible", on_resume=True
    )
    precision: str = _option("fp32", "arithmetic of the inner loop", choices=("fp32", "tf32", "bf16"))
    nonfinite: str = _option(
        "propagate", "tasks that turn NaN or Inf: pass on, stop, or leave out", choices=("propagate", "raise", "skip")
    )
    batch_norm: str = _option(
        "batch", "BatchNorm by statistics of each set, or queries by their support set's", choices=("batch", "support")
    )

    log_every: int = _option(10, "iterations between lines of metrics.jsonl", least=1, on_resume=True)
    checkpoint_every: int = _option(100, "iterations between checkpoints", least=1, on_resume=True)
    tensorboard: bool | None = _option(None, "write TensorBoard events; none: if it is installed", on_resume=True)
    wandb: bool = _option(False, "log to Weights & Biases, if it is installed", on_resume=True)
    mlflow: bool = _option(False, "log to MLflow, if it is installed", on_resume=True)
    out: str | None = _option(None, "run folder; none: the first free of runs/DATA, runs/DATA-2, ...", on_resume=True)

    def __post_init__(self) -> None:
        for name, kind in kinds().items():
            value = converted(name, getattr(self, name), kind, rule_of(name))
            object.__setattr__(self, name, value)
        object.__setattr__(self, "data", self.data.replace("-", "_"))
        if self.device.isdecimal():
            object.__setattr__(self, "device", f"cuda:{self.device}")
        if self.augment is not None:  # in one order, each once
            object.__setattr__(self, "augment", tuple(name for name in AUGMENTATIONS if name in self.augment))
        self._check_combinations()

    def _check_combinations(self) -> None:
        if self.device not in ("auto", "cpu", "cuda") and not self.device.removeprefix("cuda:").isdecimal():
            raise ValueError(f"device: expected auto, cpu, cuda, cuda:INDEX or INDEX, found {self.device!r}")
        if self.data == "folder" and self.data_root is None:
            raise ValueError("data_root: expected the folder that holds the images for data 'folder', found none")
        for name, none in (("split_by", None), ("min_images", 1), ("skip_damaged", False)):
            if self.data != "folder" and getattr(self, name) != none:
                raise ValueError(f"{name}: expected {none!r} for data {self.data!r}, found {getattr(self, name)!r}")
        if self.augment is not None and not self.augment:
            raise ValueError("augment: expected none or at least one name, found an empty list")
        if self.augment and self.data == "sinusoid":
            raise ValueError(f"augment: expected none for data 'sinusoid', which has no images, found {self.augment}")
        self._check_outer_loop()
        self._check_model()
        if self.learn_inner_lr != "none" and self.inner_steps == 0:
            raise ValueError(f"inner_steps: expected at least 1 for learn_inner_lr {self.learn_inner_lr!r}, found 0")
        if self.adapt is not None and not self.adapt:
            raise ValueError("adapt: expected none or at least one name pattern, found an empty list")
        self._check_inner_rule()
        self._check_adapted_rates()

    def _check_outer_loop(self) -> None:
        if self.average is not None and self.average >= 1:
            raise ValueError(f"average: expected a number below 1, found {self.average!r}")
        if self.outer_weight_decay is not None and self.outer_optimizer != "adamw":
            raise ValueError(
                f"outer_weight_decay: expected none with outer_optimizer {self.outer_optimizer!r}, found "
                f"{self.outer_weight_decay!r}"
            )
        if self.multi_step_loss > 0 and self.inner_steps == 0:
            raise ValueError(
                f"multi_step_loss: expected 0 with inner_steps 0 (there is one query loss), found "
                f"{self.multi_step_loss!r}"
            )
        if self.first_order_for > 0 and self.method != "maml":
            raise ValueError(
                f"first_order_for: expected 0 for method {self.method!r}, whose gradients are of first order, found "
                f"{self.first_order_for!r}"
            )
        if self.patience > 0 and self.validate_every == 0:
            raise ValueError(f"patience: expected 0 without validations (validate_every 0), found {self.patience!r}")
        if self.adapt_rates != "none" and self.outer_optimizer == "adamw":
            raise ValueError(
                f"outer_optimizer: expected 'adam' or 'sgd' with adapt_rates {self.adapt_rates!r}, found 'adamw'"
            )
        if self.adapt_rates != "none" and self.average is not None:
            raise ValueError(
                f"average: expected none with adapt_rates {self.adapt_rates!r}, whose rates are those of the last "
                f"iteration, found {self.average!r}"
            )
        if self.adapt_rates != "none" and self.clip_gradient is not None:
            raise ValueError(
                f"clip_gradient: expected none with adapt_rates {self.adapt_rates!r}, whose hypergradients are those "
                f"of whole gradients, found {self.clip_gradient!r}"
            )

    def _check_model(self) -> None:
        kind = networks.named(self.model).kind
        if self.data == "sinusoid" and kind != "mlp":
            raise ValueError(f"model: expected 'mlp' for data 'sinusoid', found {self.model!r}")
        if self.norm != "batch" and kind == "mlp":
            raise ValueError(f"norm: expected 'batch', the default, for 'mlp' (it has no norm), found {self.norm!r}")
        if self.pooling != "max" and kind == "resnet12":
            raise ValueError(f"pooling: expected 'max' for model {self.model!r}, found {self.pooling!r}")

    def _check_inner_rule(self) -> None:
        if self.method not in INNER_RULES[self.inner_rule]:
            fitting = ", ".join(repr(rule) for rule, methods in INNER_RULES.items() if self.method in methods)
            raise ValueError(
                f"inner_rule: expected one of {fitting} for method {self.method!r}, found {self.inner_rule!r}"
            )
        if self.inner_momentum is not None and self.inner_rule == "plain":
            raise ValueError(f"inner_momentum: expected none with inner_rule 'plain', found {self.inner_momentum!r}")
        if self.inner_momentum is not None and self.inner_momentum >= 1:
            raise ValueError(f"inner_momentum: expected a number below 1, found {self.inner_momentum!r}")
        if self.inner_eps is not None and self.inner_rule != "adam":
            raise ValueError(f"inner_eps: expected none with inner_rule {self.inner_rule!r}, found {self.inner_eps!r}")

    def _check_adapted_rates(self) -> None:
        hyper = {name: getattr(self, name) for name in ("inner_hyper_lr", "outer_hyper_lr")}
        if self.adapt_rates == "none":
            for name, value in hyper.items():
                if value is not None:
                    raise ValueError(f"{name}: expected none without adapt_rates, found {value!r}")
            return
        if self.learn_inner_lr != "none":
            raise ValueError(
                f"learn_inner_lr: expected 'none' with adapt_rates {self.adapt_rates!r} (both change the inner rate), "
                f"found {self.learn_inner_lr!r}"
            )
        if set(hyper.values()) == {0}:
            raise ValueError(f"adapt_rates: expected 'none' where both hyper-rates are 0, found {self.adapt_rates!r}")
        if self.inner_steps == 0 and self.inner_hyper_lr != 0:
            raise ValueError(
                f"inner_hyper_lr: expected 0 with inner_steps 0 (no step uses inner_lr), found {self.inner_hyper_lr!r}"
            )

    def takes_plain_steps(self) -> bool:
        """Whether inner steps have neither a rule nor weight decay."""
        return self.inner_rule == "plain" and self.inner_weight_decay == 0

    def adapts_inner_lr(self) -> bool:
        """Whether training changes the inner rate online."""
        return self.adapt_rates != "none" and self.inner_hyper_lr != 0

    def __repr__(self) -> str:
        """The fields that differ from their defaults; `to_yaml` has all fields."""
        changed = [f"{f.name}={getattr(self, f.name)!r}" for f in fields(self) if getattr(self, f.name) != f.default]
        return f"TrainConfig({', '.join(changed)})"

    def evaluation_steps(self) -> int:
        """Inner steps in validation and test."""
        return self.inner_steps if self.test_steps is None else self.test_steps

    def evaluation_queries(self) -> int:
        """Query examples per class in validation and test."""
        return self.queries if self.test_queries is None else self.test_queries

    def replace(self, **changes: Any) -> TrainConfig:
        """A checked copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values for JSON and YAML."""
        values = dataclasses.asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str = "configuration") -> TrainConfig:
        """A configuration from plain values; fields not given keep their defaults.

        Raises:
            ValueError: An unknown field (the message suggests the nearest), or a bad value.
        """
        return cls(**check_names(values, source))

    def to_yaml(self) -> str:
        """This configuration as YAML, with its description above each field."""
        import yaml

        lines = []
        for name, value in self.to_dict().items():
            lines.append(f"# {rule_of(name).help}")
            flow = None if isinstance(value, list) else False  # [a, b] on one line
            lines.append(yaml.safe_dump({name: value}, default_flow_style=flow, allow_unicode=True).rstrip())
        return "\n".join(lines) + "\n"


def rule_of(name: str) -> Rule:
    """Help, range and choices of one field."""
    for entry in dataclasses.fields(TrainConfig):
        if entry.name == name:
            rule: Rule = entry.metadata["rule"]
            return rule
    raise KeyError(name)


def kinds() -> dict[str, Kind]:
    """The type of every field."""
    return {name: kind_of(hint) for name, hint in typing.get_type_hints(TrainConfig).items()}


def describe(name: str) -> str:
    """One line about a field: help, choices or range.

    Example:
        >>> describe("ways")
        'classes in a task (N); at least 2'
    """
    rule = rule_of(name)
    if rule.choices:
        return f"{rule.help}: {', '.join(rule.choices)}"
    if rule.above is not None:
        return f"{rule.help}; above {rule.above:g}"
    return rule.help if rule.least is None else f"{rule.help}; at least {rule.least:g}"


# Names of fields in other programs.
_WORDS = {
    "alpha": ("inner_lr",), "fast_lr": ("inner_lr",), "step_size": ("inner_lr",), "update_lr": ("inner_lr",),
    "lr": ("outer_lr", "inner_lr"), "learning_rate": ("outer_lr", "inner_lr"), "beta": ("outer_lr",),
    "meta_lr": ("outer_lr",), "epochs": ("iterations",), "num_iterations": ("iterations",), "max_iter": ("iterations",),
    "batch_size": ("tasks",), "meta_batch_size": ("tasks",), "num_tasks": ("tasks",), "tasks_per_batch": ("tasks",),
    "way": ("ways",), "n_way": ("ways",), "num_ways": ("ways",), "num_classes": ("ways",),
    "shot": ("shots",), "k_shot": ("shots",), "num_shots": ("shots",), "query": ("queries",), "k_query": ("queries",),
    "num_steps": ("inner_steps",), "update_step": ("inner_steps",), "adaptation_steps": ("inner_steps",),
    "steps": ("inner_steps", "iterations"), "update_step_test": ("test_steps",), "algorithm": ("method",),
    "dataset": ("data",), "root": ("data_root",), "data_dir": ("data_root",), "gpu": ("device",), "arch": ("model",),
    "network": ("model",), "backbone": ("model",), "architecture": ("model",), "widths": ("model", "filters"),
    "normalization": ("norm",), "norm_layer": ("norm",), "nonlinearity": ("activation",),
    "channels": ("filters",), "hidden_size": ("filters", "hidden"),
    "amp": ("precision",), "dtype": ("precision",), "output": ("out",), "output_dir": ("out",), "save_dir": ("out",),
    "log_dir": ("out",), "random_seed": ("seed",), "eval_every": ("validate_every",),
    "save_every": ("checkpoint_every",), "optimizer": ("outer_optimizer",), "alpha_maml": ("adapt_rates",),
    "momentum": ("inner_momentum",), "weight_decay": ("inner_weight_decay",), "inner_optimizer": ("inner_rule",),
    "hypergrad_lr": ("inner_hyper_lr", "outer_hyper_lr"), "hyper_lr": ("inner_hyper_lr", "outer_hyper_lr"),
}  # fmt: skip


def nearest(word: str) -> tuple[str, ...]:
    """The fields that an unknown word may mean: by its meaning in other programs, else by similar spelling."""
    known = [entry.name for entry in dataclasses.fields(TrainConfig) if entry.name != word]
    word = word.replace("-", "_")
    swapped = tuple(name for name in known if sorted(name) == sorted(word))  # letters in another order
    return _WORDS.get(word) or swapped or tuple(difflib.get_close_matches(word, known, n=1))


def check_names(values: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Returns the values if all their keys are fields.

    Raises:
        ValueError: With the nearest field's name for each unknown one.
    """
    known = [entry.name for entry in dataclasses.fields(TrainConfig)]
    complaints = []
    for key in values:
        if key not in known:
            near = " or ".join(map(repr, nearest(str(key))))
            complaints.append(f"{key!r}" + (f" (did you mean {near}?)" if near else ""))
    if complaints:
        raise ValueError(f"{source}: expected fields of TrainConfig, found {', '.join(complaints)}")
    return dict(values)


def read_file(path: str | Path) -> dict[str, Any]:
    """The plain values of a YAML (.yaml, .yml) or TOML (.toml) file.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is not YAML or TOML, is not a table, or has unknown fields.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"configuration file: expected a .yaml or .toml file, found nothing at {path}")
    if path.stat().st_size > MAX_FILE_BYTES:
        raise ValueError(f"{path}: expected at most {MAX_FILE_BYTES} bytes, found {path.stat().st_size}")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected text in UTF-8, found {error}") from error
    if path.suffix in (".yaml", ".yml"):
        values = parse_yaml(text, path)
    elif path.suffix == ".toml":
        values = _parse_toml(text, path)
    else:
        raise ValueError(f"configuration file: expected a name ending in .yaml, .yml or .toml, found {path.name!r}")
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected lines 'field: value', found a {type(values).__name__}")
    return check_names(values, str(path))


def parse_yaml(text: str, path: Path) -> Any:
    """The values of YAML from a file that may be hostile.

    Raises:
        ValueError: It is no YAML, nested too deep, or has aliases.
    """
    import yaml

    try:
        depth = 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            # Reject aliases: they are useless here, and a few lines of them can expand beyond memory.
            if isinstance(event, yaml.AliasEvent):
                raise ValueError(f"{path}: expected YAML without aliases, found one")
            # Limit the depth: the parser's time grows with its square.
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > MAX_FILE_DEPTH:
                raise ValueError(f"{path}: expected YAML, found lists or tables nested too deep")
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: expected YAML, found {' '.join(str(error).split())}") from error


def _parse_toml(text: str, path: Path) -> Any:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib

    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path}: expected TOML, found {error}") from error
    except RecursionError:
        raise ValueError(f"{path}: expected TOML, found lists or tables nested too deep") from None


def differences(old: TrainConfig, new: TrainConfig) -> list[str]:
    """Forbidden changes of a resumed run: one line "field: old -> new" for each such field that differs."""
    return [
        f"{entry.name}: {getattr(old, entry.name)!r} -> {getattr(new, entry.name)!r}"
        for entry in dataclasses.fields(TrainConfig)
        if not rule_of(entry.name).on_resume and getattr(old, entry.name) != getattr(new, entry.name)
    ]
