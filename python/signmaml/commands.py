"""The commands of `signmaml`; `cli` calls them with the parsed command line."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml
from torch import nn

from . import building, checkpoint, data, distributed, plots
from . import config as configs
from .config import TrainConfig
from .episodes import Sampler, draw
from .evaluation import Evaluation, default_chunk, evaluate_sampler, loss_for
from .loggers import clock, counting
from .options import EVALUATION_FIELDS, given_fields
from .presets import PRESETS
from .rates import InnerRates
from .results import FitResult
from .runs import RunFolder
from .trainer import MetaTrainer


def train(parsed: argparse.Namespace) -> int:
    """`signmaml train`."""
    config, out = training_config(parsed)
    if parsed.distributed and not distributed.launched():
        start_processes(parsed)
    for option in ("processes", "max_restarts"):
        if getattr(parsed, option) is not None:
            found = "none" if not parsed.distributed else "torchrun's own environment, which settles it"
            raise ValueError(f"--{option.replace('_', '-')}: expected --distributed with it, found {found}")
    resume = parsed.resume is not None or goes_on(config, parsed)
    settle_threads(config)
    group = parsed.group = distributed.join(config.device, parsed.timeout)
    check_same_configuration(config, group)
    trainer = MetaTrainer(config, out=out, progress=not parsed.quiet, group=group)
    if group.first and not parsed.quiet:
        print(trainer.describe(), flush=True)
    result = trainer.fit(resume=resume, overwrite=parsed.overwrite)
    if group.first:
        print(summary(result, trainer.run))
    group.close()
    return 0


def start_processes(parsed: argparse.Namespace) -> NoReturn:
    """Replaces this process by torchrun, which starts this command in several processes on this machine.

    Raises:
        ValueError: The number of processes is out of range, or not given and there is no CUDA device to count.
    """
    processes = torch.cuda.device_count() if parsed.processes is None else parsed.processes
    if processes < 1:
        raise ValueError(f"--processes: expected an integer >= 1 (there is no CUDA device to count), found {processes}")
    if (parsed.max_restarts or 0) < 0:
        raise ValueError(f"--max-restarts: expected an integer >= 0, found {parsed.max_restarts}")
    words = iter(parsed.words)
    kept = []
    for word in words:
        option, equals, _ = word.partition("=")
        if option in ("--processes", "--max-restarts"):
            if not equals:
                next(words)
        elif word != "--distributed":
            kept.append(word)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    torchrun += [f"--max-restarts={parsed.max_restarts or 0}", "-m", "signmaml", *kept]
    os.execv(sys.executable, torchrun)


def goes_on(config: TrainConfig, parsed: argparse.Namespace) -> bool:
    """Whether torchrun restarted this process and its predecessors had already begun a run.

    Raises:
        ValueError: Restarts are allowed, but the options do not name the run folder to continue in, or say to clear it.
    """
    if not distributed.restarts_allowed():
        return False
    if parsed.overwrite:
        raise ValueError("--overwrite: expected none with --max-restarts (a restart would erase the run), found one")
    if parsed.resume is None and config.out is None:
        raise ValueError("--out: expected a run folder with --max-restarts (a restart goes on in it), found none")
    return distributed.restarted() and config.out is not None and RunFolder(config.out).holds_run()


def check_same_configuration(config: TrainConfig, group: distributed.Group) -> None:
    """Raises ValueError if this process's configuration differs from rank 0's."""
    found = group.bytes_of_first(config.to_yaml().encode())
    first = TrainConfig.from_dict(yaml.safe_load(found.decode()))
    if first != config:
        changed = [
            f"{name}: {value!r} there, {getattr(config, name)!r} here"
            for name, value in vars(first).items()
            if value != getattr(config, name)
        ]
        raise ValueError(f"distributed: expected the configuration of process 0, found {'; '.join(changed)}")


def settle_threads(config: TrainConfig) -> None:
    """One CPU thread for small examples in plain PyTorch, unless OMP_NUM_THREADS says otherwise.

    A few 28 x 28 images are too little work for torch to parallelise: on two cores, a second thread saved a quarter of
    the time while the cores were idle, but made a run take six times as long when other programs used them. The native
    kernels give each thread whole tasks and do not wait for late threads, so they keep all threads.
    """
    known = data.DATASETS.get(config.data)
    side = config.image_size or (known.image_size if known else None)
    small = config.data == "sinusoid" or (side is not None and side <= 32)
    # No kernel differentiates through sharpness-aware steps, or knows rules.
    sharp = config.method == "maml" and config.sharpness_lower > 0
    in_torch = config.backend == "torch" or sharp or not config.takes_plain_steps()
    if small and in_torch and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)


def training_config(parsed: argparse.Namespace) -> tuple[TrainConfig, Path | None]:
    """The configuration that a command line specifies, and the run folder if one is to be resumed.

    Raises:
        ValueError, FileNotFoundError: Options contradict each other, or a file or value is bad.
    """
    given = given_fields(parsed)
    if parsed.resume is None:
        values = dict(PRESETS[parsed.preset]) if parsed.preset else {}
        if parsed.config:
            values |= configs.read_file(parsed.config)
        return TrainConfig.from_dict(values | given, "command line"), None
    for option in ("preset", "config", "overwrite"):
        if getattr(parsed, option):
            raise ValueError(f"--resume: expected no --{option} with it (the run has its configuration), found one")
    if "out" in given:
        raise ValueError("--resume: expected no --out with it (the run goes on in its folder), found one")
    return RunFolder(parsed.resume).read_config().replace(**given), Path(parsed.resume)


def summary(result: FitResult, run: RunFolder) -> str:
    """The last lines of a training: result, time, files."""
    lines = [] if result.test is None else [str(result.test)]
    best = ""
    if result.best is not None:
        scale, unit = (100, "%") if result.best.metric == "accuracy" else (1, "")
        value = f"{scale * result.best.value:.4g}{unit}"
        best = f"; best validation {result.best.metric} {value} at iteration {result.best.iteration}"
    lines.append(f"trained {result.iterations} iterations in {clock(result.seconds)}{best}")
    paths = (run.best, run.last, run.metrics, run.config, run.result, run.curves, run.episode, run.tensorboard)
    files = " ".join(path.name for path in paths if path.exists())
    return "\n".join([*lines, f"in {run.path}: {files}"])


def evaluate(parsed: argparse.Namespace) -> int:
    """`signmaml evaluate`."""
    stored, tensors, inner_rates = read_weights(parsed.weights, parsed.checkpoint)
    overrides = given_fields(parsed)
    assert set(overrides) <= set(EVALUATION_FIELDS)
    config = stored.replace(**overrides, test_queries=parsed.queries or stored.test_queries)
    settle_threads(config)
    device = building.resolve_device(config.device)
    sampler = building.make_sampler(config, None, parsed.split, device)
    model, rates = rebuild(config, stored, sampler, tensors, inner_rates, device)
    if "inner_lr" in overrides:
        rates = InnerRates(model, "none", config.inner_lr, config.inner_steps)
    with counting("evaluate", parsed.tasks, enabled=parsed.json != "-") as count:
        result = _evaluation(config, model, rates, sampler, parsed.split, parsed.tasks, count)
    text = json.dumps(result.to_dict(), indent=2)
    if parsed.json == "-":
        print(text)
        return 0
    print(result)
    if parsed.json:
        Path(parsed.json).write_text(text + "\n", encoding="utf-8")
    return 0


def _evaluation(
    config: TrainConfig, model: nn.Module, rates: InnerRates, sampler: Sampler, split: str, tasks: int, count: Any
) -> Evaluation:
    if tasks < 1:
        raise ValueError(f"--tasks: expected an integer >= 1, found {tasks}")
    return evaluate_sampler(
        model,
        sampler,
        tasks=tasks,
        chunk=default_chunk(next(model.parameters()).device),
        report={"data": config.data, "split": split},
        progress=count,
        **building.evaluation_arguments(config, rates, loss_for(draw(sampler, 0))),
    )


def read_weights(source: str, which: str) -> tuple[TrainConfig, dict[str, torch.Tensor], dict[str, Any] | None]:
    """Configuration, tensors of a weights file by name, and inner rates of a run's checkpoint or a weights file.

    Args:
        source: Run folder or file.
        which: "best" or "last", for a run folder.

    Raises:
        FileNotFoundError: There is no such run or file.
        ValueError: The file is damaged, or has no information about its run.
    """
    path = Path(source)
    if path.is_dir():
        run = RunFolder(path)
        path = run.best if which == "best" else run.last
        if not path.is_file():
            raise FileNotFoundError(f"run folder: expected {path.name} in {run.path}, found none (no checkpoint yet?)")
    tensors, metadata = checkpoint.load(path)
    if not isinstance(metadata.get("config"), dict) or "self_contained" not in metadata:
        raise ValueError(f"weights: expected a file that a run wrote, with its configuration, found {path}")
    if not metadata["self_contained"]:
        raise ValueError(
            f"weights: expected those of a run whose configuration names its model and data, found {path} of a run "
            "with a model, data or a loss of its own; load them in Python with signmaml.load_weights"
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
    return config, tensors, metadata.get("inner_rates")


def rebuild(
    config: TrainConfig,
    stored: TrainConfig,
    sampler: Sampler,
    tensors: dict[str, torch.Tensor],
    inner_rates: dict[str, Any] | None,
    device: torch.device,
) -> tuple[nn.Module, InnerRates]:
    """The trained model and its inner rates, from the result of `read_weights`.

    Args:
        config: Configuration of the evaluation.
        stored: Configuration of the run.
        sampler: Sampler of the examples that the model must accept.
        tensors: The tensors of the weights file.
        inner_rates: The rates as stored.
        device: Device for the model.

    Raises:
        ValueError: The weights belong to another network, or to fewer classes than asked for.
    """
    if config.ways > stored.ways:
        raise ValueError(f"ways: expected at most {stored.ways}, the trained network's, found {config.ways}")
    model = building.build_model(stored, sampler).to(device)
    checkpoint.copy_into(model.state_dict(), checkpoint.of_model(tensors), "the weights file")
    rates = InnerRates(model, stored.learn_inner_lr, stored.inner_lr, stored.inner_steps, stored.adapt)
    if inner_rates is not None:
        rates.load_json(inner_rates, tensors)
    return model, rates


def plot(parsed: argparse.Namespace) -> int:
    """`signmaml plot`."""
    runs = [RunFolder(path) for path in parsed.runs]
    for run in runs:
        if not run.metrics.is_file():
            raise FileNotFoundError(f"run folder: expected one with a metrics.jsonl, found none in {run.path}")
    if len(runs) > 1:
        out = Path(parsed.out or "curves.png")
        plots.draw_curves({str(run.path): run.metrics for run in runs}, out)
        print(out)
        return 0
    run = runs[0]
    out = Path(parsed.out) if parsed.out else run.curves
    plots.draw_curves(run.metrics, out)
    print(out)
    if not parsed.curves_only:
        _plot_episode(run, parsed.task)
    return 0


def _plot_episode(run: RunFolder, task: int) -> None:
    if task < 0:
        raise ValueError(f"--task: expected an integer >= 0, found {task}")
    config, tensors, inner_rates = read_weights(str(run.path), "best")
    device = building.resolve_device(config.device)
    sampler = building.make_sampler(config, None, "test", device)
    model, rates = rebuild(config, config, sampler, tensors, inner_rates, device)
    arguments = building.evaluation_arguments(config, rates, loss_for(draw(sampler, 0)))
    if plots.draw_task(
        model, sampler, run.episode, task=task, title=f"{config.data}/test, {config.method}", **arguments
    ):
        print(run.episode)


def info(parsed: argparse.Namespace) -> int:
    """`signmaml info`."""
    import signmaml_ext.info as native

    return native.main(["--json"] if parsed.json else [])


def data_list(parsed: argparse.Namespace) -> int:
    """`signmaml data list`."""
    for name, known in data.DATASETS.items():
        print(f"{name:<14} {known.summary}")
        if known.classes:
            counts = " / ".join(map(str, known.classes.values()))
            size = f"{known.images_per_class} images, {known.image_size} x {known.image_size} pixels"
            print(f"{'':<14} {counts} classes (train / val / test) of {size}")
        print(f"{'':<14} from: {known.origin}")
        here = ", ".join(data.complete_splits(name))
        if here or known.classes:
            absent = "no (signmaml data fetch gets it)" if known.download else "no (give --data-root)"
            print(f"{'':<14} here: {here or absent}")
    print(f"{'sinusoid':<14} regression of sine waves, drawn as it trains (train with --preset sinusoid)")
    print(f"\ncache folder: {data.cache_dir()}")
    return 0


def data_fetch(parsed: argparse.Namespace) -> int:
    """`signmaml data fetch`: downloads, draws or decodes the data that training would need."""
    for split in _splits_of(parsed):
        downloads = data.DATASETS[parsed.name].download
        images = data.load(parsed.name, split, root=parsed.data_root, image_size=parsed.image_size, download=downloads)
        print(f"{parsed.name}/{split}: {images.classes} classes, {len(images.images)} images of {_shape(images)}")
    return 0


def data_verify(parsed: argparse.Namespace) -> int:
    """`signmaml data verify`; returns 1 if there are problems."""
    building.check_data_name(parsed.name)
    reports = data.verify(parsed.name, root=parsed.data_root, image_size=parsed.image_size)
    for report in reports:
        found = f"{report.classes} classes, {report.images} images" if report.classes else "cannot be loaded"
        print(f"{parsed.name}/{report.split}: {found}: {'problems' if report.problems else 'complete'}")
        for problem in report.problems:
            print(f"  {problem}")
    return int(any(report.problems for report in reports))


def data_show(parsed: argparse.Namespace) -> int:
    """`signmaml data show`."""
    building.check_data_name(parsed.name)
    images = data.load(parsed.name, parsed.split, root=parsed.data_root, image_size=parsed.image_size)
    out = Path(parsed.out or f"{parsed.name}-{parsed.split}.png")
    plots.draw_images(images, out)
    print(out)
    return 0


def _splits_of(parsed: argparse.Namespace) -> tuple[str, ...]:
    """The splits of a set; for own images, those that exist."""
    building.check_data_name(parsed.name)
    if parsed.name == "folder" and parsed.data_root is not None:
        return data.complete_splits(parsed.name, parsed.data_root) or data.SPLITS
    return data.SPLITS


def _shape(images: data.ImageSet) -> str:
    channels, height, width = images.image_shape
    return f"{height} x {width} x {channels}"
