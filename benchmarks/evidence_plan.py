"""What `evidence.py` runs: settings, methods, the rule that chooses rates, and every training run as a job.

**The rule.** Each of the three base methods gets the same search, on the validation classes of a data set's 5-way
1-shot setting: five inner rates, half a decade apart, at the outer rate 0.003; then the outer rates 0.001 and 0.01 at
the best inner rate. Every run of the search has SEARCH_ITERATIONS iterations and seed 0. The highest validation
accuracy wins; of two equal ones, the first. The other settings of that data set take the rates found. Variants of a
method take the rates of that method: the sign variants those of Sign-MAML, ANIL those of MAML. A setting with official
values takes those, without a search.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from signmaml.config import TrainConfig
from signmaml.presets import PRESETS

OUTER_LR, OTHER_OUTER_LRS = 0.003, (0.001, 0.01)
INNER_LRS: dict[str, tuple[float, ...]] = {
    "sign-maml": (0.001, 0.003, 0.01, 0.03, 0.1),
    "fo-maml": (0.01, 0.03, 0.1, 0.3, 1.0),
    "maml": (0.01, 0.03, 0.1, 0.3, 1.0),
}
SEARCH_ITERATIONS, SEARCH_VALIDATIONS, SEARCH_TASKS = 1000, 4, 300
SEEDS = (0, 1, 2)
# The learner whose weights are in examples/: its setting and method. Omniglot's licence, MIT, allows it.
EXAMPLE = ("omniglot_5w1s", "sign-maml")
# What may keep a learner below published numbers, or below another: one change at a time of a method's run on
# CAUSES_OF, with seed 0; by the change's name: the method, the change in words, the fields.
CAUSES_OF = "cifar_fs_5w1s"
CAUSES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "longer": ("fo-maml", "4 times the iterations", {"iterations": 20_000, "validate_every": 2000}),
    "queries": ("fo-maml", "15 training queries a class, not 5", {"queries": 15}),
    "wider": ("fo-maml", "64 filters, not 32", {"filters": 64}),
    "batch": ("fo-maml", "16 tasks in a meta-batch, not 4", {"tasks": 16}),
    "augmented": ("fo-maml", "images mirrored and shifted at random", {"augment": ("flip", "crop")}),
    "average": ("fo-maml", "averaged weights, decay 0.999", {"average": 0.999}),
    "sign_outer_rate": ("sign-maml", "outer rate 0.01", {"outer_lr": 0.01}),
}
# Which methods are compared on the same tasks: the first less the second.
PAIRS = (
    ("sign-maml", "fo-maml"),
    ("sign-maml", "maml"),
    ("fo-maml", "maml"),
    ("sharp", "sign-maml"),
    ("alpha", "sign-maml"),
    ("learned", "sign-maml"),
    ("anil", "maml"),
)


@dataclass(frozen=True)
class Method:
    """A compared method.

    Attributes:
        title: Its name in tables.
        base: The method whose rates it takes: a key of INNER_LRS.
        fields: What it changes in the configuration.
    """

    title: str
    base: str
    fields: Mapping[str, Any]


METHODS: dict[str, Method] = {
    "sign-maml": Method("Sign-MAML", "sign-maml", {"method": "sign-maml"}),
    "fo-maml": Method("FO-MAML", "fo-maml", {"method": "fo-maml"}),
    "maml": Method("MAML", "maml", {"method": "maml"}),
    "sharp": Method(
        "Sharp-MAML (sign)",
        "sign-maml",
        {"method": "sign-maml", "sharpness_lower": 0.05, "sharpness_upper": 0.05},
    ),
    "alpha": Method("Alpha MAML (sign)", "sign-maml", {"method": "sign-maml", "adapt_rates": "alpha-maml"}),
    "learned": Method(
        "Sign-MAML, learned rates", "sign-maml", {"method": "sign-maml", "learn_inner_lr": "per-layer-per-step"}
    ),
    "anil": Method("ANIL", "maml", {"method": "maml", "adapt": ("classifier*",)}),
}


@dataclass(frozen=True)
class Setting:
    """A data set, a number of ways and shots, and how long every method trains.

    Attributes:
        name: Its name in file names.
        title: Its name in tables.
        folder: Where its images lie below the folder of all data; empty: the set needs none.
        fields: The configuration that all methods share.
        search: The setting whose search chose the rates; None: `rates` are official.
        rates: By base method, the official inner rate.
        methods: Which methods run here.
        test_queries: Query images a class in the tests: first what the tables show, then what the published protocol
            has if that is another number.
        curves: Whether seed 0 is also tested over inner steps and over shots.
    """

    name: str
    title: str
    folder: str
    fields: Mapping[str, Any]
    search: str | None
    methods: tuple[str, ...] = tuple(METHODS)
    rates: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
    test_queries: tuple[int, ...] = (15,)
    curves: bool = False

    def config(self, method: str, inner_lr: float, outer_lr: float, seed: int) -> TrainConfig:
        """The configuration of one run; its data lie in the folder that `data_root` will name."""
        common = {
            "test_queries": self.test_queries[0],
            "test_tasks": 0,
            "tensorboard": False,
            "log_every": 100,
            "checkpoint_every": 250,
        }
        chosen = {"inner_lr": inner_lr, "outer_lr": outer_lr, "seed": seed}
        return TrainConfig(**{**common, **self.fields, **METHODS[method].fields, **chosen})


# 20,000 tasks of training in meta-batches of four; five inner steps, in training and in the tests.
_SHORT = {
    "ways": 5,
    "shots": 1,
    "queries": 5,
    "tasks": 4,
    "filters": 32,
    "inner_steps": 5,
    "iterations": 5000,
    "schedule": "cosine",
    "validate_every": 500,
    "validate_tasks": 300,
}
_OFFICIAL_RATES = MappingProxyType({"sign-maml": 0.0035, "fo-maml": 0.1, "maml": 0.14})

SETTINGS: dict[str, Setting] = {
    setting.name: setting
    for setting in (
        Setting(
            "fc100_5w1s", "FC100, 5-way 1-shot", "fc100", {**_SHORT, "data": "fc100"}, search="fc100_5w1s", curves=True
        ),
        Setting(
            "cifar_fs_5w1s",
            "CIFAR-FS, 5-way 1-shot",
            "cifar-fs",
            {**_SHORT, "data": "cifar_fs"},
            search="cifar_fs_5w1s",
            curves=True,
        ),
        Setting(
            "omniglot_5w1s",
            "Omniglot, 5-way 1-shot",
            "omniglot",
            {**_SHORT, "data": "omniglot"},
            search="omniglot_5w1s",
            test_queries=(15, 1),
        ),
        Setting(
            "fc100_5w5s", "FC100, 5-way 5-shot", "fc100", {**_SHORT, "data": "fc100", "shots": 5}, search="fc100_5w1s"
        ),
        Setting(
            "cifar_fs_5w5s",
            "CIFAR-FS, 5-way 5-shot",
            "cifar-fs",
            {**_SHORT, "data": "cifar_fs", "shots": 5},
            search="cifar_fs_5w1s",
        ),
        Setting(
            "omniglot_20w1s",
            "Omniglot, 20-way 1-shot",
            "omniglot",
            {**_SHORT, "data": "omniglot", "ways": 20},
            search="omniglot_5w1s",
            test_queries=(15, 1),
        ),
        Setting(
            "mini_imagenet_5w1s",
            "mini-ImageNet, 5-way 1-shot, official",
            "mini-imagenet",
            {**PRESETS["official"], "test_tasks": 0},
            search=None,
            methods=("sign-maml", "fo-maml", "maml"),
            rates=_OFFICIAL_RATES,
            test_queries=(15, 1),
            curves=True,
        ),
    )
}


@dataclass(frozen=True)
class Job:
    """One training run.

    Attributes:
        name: Its folder below the work folder.
        setting: Its setting's name.
        method: Its method's name.
        seed: Of weights and tasks.
        rates: The inner and the outer rate; an entry is None until the search has chosen it.
        trial: Whether it belongs to a search.
        changes: Fields of the configuration that differ from the setting's.
    """

    name: str
    setting: str
    method: str
    seed: int
    rates: tuple[float | None, float | None]
    trial: bool = False
    changes: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))


def trial(setting: str, method: str, inner_lr: float | None, outer_lr: float) -> Job:
    """A run of the search; `inner_lr` None: the best of the first stage."""
    named = "best" if inner_lr is None else f"{inner_lr:g}"
    name = f"search/{setting}/{method}/inner_{named}_outer_{outer_lr:g}"
    return Job(name, setting, method, 0, (inner_lr, outer_lr), trial=True)


def first_trials(setting: str, method: str) -> list[Job]:
    """The search's first stage: inner rates."""
    return [trial(setting, method, inner_lr, OUTER_LR) for inner_lr in INNER_LRS[method]]


def second_trials(setting: str, method: str) -> list[Job]:
    """The search's second stage: other outer rates at the best inner rate."""
    return [trial(setting, method, None, outer_lr) for outer_lr in OTHER_OUTER_LRS]


def run_of(setting: str, method: str, seed: int) -> Job:
    """A run whose learner is tested."""
    official = SETTINGS[setting].rates.get(METHODS[method].base)
    outer = None if official is None else SETTINGS[setting].fields["outer_lr"]
    return Job(f"runs/{setting}/{method}/seed_{seed}", setting, method, seed, (official, outer))


def cause(name: str) -> Job:
    """A run with one change."""
    method, _, changes = CAUSES[name]
    run = run_of(CAUSES_OF, method, 0)
    return dataclasses.replace(run, name=f"causes/{name}", changes=MappingProxyType(changes))


def jobs() -> Iterator[Job]:
    """All jobs in the order in which they are worth having: a comparison of everything first, then more seeds."""
    searched = [name for name, setting in SETTINGS.items() if setting.search == name]
    for name in searched:
        for method in INNER_LRS:
            yield from first_trials(name, method)
    for name in searched:
        for method in INNER_LRS:
            yield from second_trials(name, method)
    runs = [run for run in itertools.product(SEEDS, SETTINGS, METHODS) if run[2] in SETTINGS[run[1]].methods]
    # Within a seed: the settings that were searched, in each the base methods; then the others likewise.
    runs.sort(key=lambda run: (run[0], run[1] not in searched, run[2] not in INNER_LRS))
    for seed, name, method in runs:
        yield run_of(name, method, seed)
    for name in CAUSES:
        yield cause(name)
