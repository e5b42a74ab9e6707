"""The commands of `signmaml`; `cli` calls them with the parsed command line."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml
from torch import nn

from . import building, data, distributed
from . import config as configs
from .config import TrainConfig
from .data.folder import Selection
from .episodes import Episodes, Sampler, draw
from .estimators import FewShotClassifier, is_adapted
from .evaluation import Evaluation, Rates, default_chunk, evaluate_sampler, loss_for
from .examples import ExampleFormat
from .export import check_place
from .files import write_atomically
from .learner import Learner, Stored, read_weights
from .loggers import clock, counting
from .options import EVALUATION_FIELDS, given_fields
from .prediction import Predictions, Support, json_of, predictions, read_queries, read_support, with_inversion
from .presets import PRESETS
from .report import write_report
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
    paths = (
        run.best,
        run.last,
        run.metrics,
        run.config,
        run.result,
        run.curves,
        run.episode,
        run.tensorboard,
        run.tracking,
    )
    files = " ".join(path.name for path in paths if path.exists())
    return "\n".join([*lines, f"in {run.path}: {files}"])


def _output(option: str, path: str) -> Path:
    """A file that can be written, as far as its folder says; checked before the work that it is to hold."""
    out = Path(path)
    if out.is_dir():
        raise IsADirectoryError(f"{option}: expected a file, found the folder {out}")
    if out.exists() and not out.is_file():  # such as /dev/null, which a whole new file would replace
        raise ValueError(f"{option}: expected an ordinary file, found the special file {out}")
    if not out.parent.is_dir():
        raise FileNotFoundError(f"{option}: expected a file in an existing folder, found none at {out}")
    return out


def evaluate(parsed: argparse.Namespace) -> int:
    """`signmaml evaluate`."""
    if parsed.tasks < 1:
        raise ValueError(f"--tasks: expected an integer >= 1, found {parsed.tasks}")
    written = _output("--json", parsed.json) if parsed.json not in (None, "-") else None
    stored = read_weights(parsed.weights, parsed.checkpoint)
    overrides = given_fields(parsed)
    assert set(overrides) <= set(EVALUATION_FIELDS)
    config = stored.config.replace(**overrides, test_queries=parsed.queries or stored.config.test_queries)
    settle_threads(config)
    device = building.resolve_device(config.device)
    sampler = building.make_sampler(config, None, parsed.split, device)
    learner = trained_on(config, stored, sampler, device)
    if "inner_lr" in overrides:
        learner = learner.changed(inner_lr=config.inner_lr)
    with counting("evaluate", parsed.tasks, enabled=parsed.json != "-") as count:
        result = _evaluation(config, learner, sampler, parsed, count)
    text = json.dumps(result.to_dict(), indent=2)
    if parsed.json == "-":
        print(text)
        return 0
    print(result)
    if written is not None:
        written.write_text(text + "\n", encoding="utf-8")
    return 0


def _evaluation(
    config: TrainConfig, learner: Learner, sampler: Sampler, parsed: argparse.Namespace, count: Any
) -> Evaluation:
    model, start, arguments = learner.model, None, learner.arguments
    episodes = draw(sampler, 0)
    if episodes.support_y.dtype != torch.int64 and parsed.head != "auto":
        raise ValueError(f"--head: expected 'auto' for regression, which has no classes, found {parsed.head!r}")
    if episodes.support_y.dtype == torch.int64:
        ways = config.ways

        def start_of(episodes: Episodes) -> tuple[nn.Module, Rates]:
            return learner.start(episodes.support_x[0], episodes.support_y[0], ways, parsed.head)[:2]

        if learner.takes_prototypes(episodes.support_x[0], ways, parsed.head):
            start = start_of
        else:
            model, rates = start_of(episodes.part(0, 1))
            arguments = {**arguments, "inner_lr": rates}
    return evaluate_sampler(
        model,
        sampler,
        tasks=parsed.tasks,
        chunk=default_chunk(learner.device),
        report={"data": config.data, "split": parsed.split},
        progress=count,
        start=start,
        **arguments,
    )


def trained_on(config: TrainConfig, stored: Stored, sampler: Sampler, device: torch.device) -> Learner:
    """A stored run's learner for the examples of a sampler, which adapts as `config` says."""
    episodes = draw(sampler, 0)
    shape = tuple(episodes.support_x.shape[2:])
    model = stored.network(shape).to(device).eval()
    arguments = building.evaluation_arguments(config, stored.rates(model), loss_for(episodes))
    return Learner(model, arguments, stored.example, stored.config, str(stored.path))


def predict(parsed: argparse.Namespace) -> int:
    """`signmaml predict`."""
    if parsed.json == parsed.csv == "-":
        raise ValueError("--csv, --json: expected at most one of them on stdout, found both")
    for name in ("csv", "json", "sheet", "save", "export"):  # before any work
        if getattr(parsed, name) not in (None, "-"):
            _output(f"--{name}", getattr(parsed, name))
    places = [place for place in (parsed.csv, parsed.json, parsed.sheet, parsed.save, parsed.export) if place]
    twice = [place for place in places if places.count(place) > 1]
    if twice:
        raise ValueError(f"predict: expected a file of its own for each result, found {twice[0]} twice")
    if parsed.export:
        check_place(Path(parsed.export))
    classifier, support, how = _classifier(parsed)
    queries = read_queries(parsed.query, _format_of_images(classifier.example(), parsed.weights))
    shared = 0 if support is None else sum(file in support.files for file in queries.files)
    if shared:
        print(f"signmaml: {shared} of {len(queries.files)} query images are support images too", file=sys.stderr)
    found = predictions(classifier, queries, how)
    results = {parsed.json: json_of, parsed.csv: Predictions.to_csv}
    written = {place: make(found) for place, make in results.items() if place is not None}
    if parsed.sheet:
        from . import sheets

        sheets.draw_predictions(found, queries.inputs, support, Path(parsed.sheet), title=str(how["learner"]))
    if parsed.save:
        classifier.save(parsed.save)
    if parsed.export:
        classifier.export(parsed.export)
    for place, text in written.items():
        if place != "-":
            write_atomically(place, text)
    print(written["-"].rstrip("\n") if "-" in written else found)
    return 0


def _classifier(parsed: argparse.Namespace) -> tuple[FewShotClassifier, Support | None, dict[str, Any]]:
    """The adapted classifier, the support set that it was adapted to now, and both in words."""
    overrides = given_fields(parsed)
    device = overrides.pop("device", None)
    if is_adapted(parsed.weights):
        own = {"support": None, "transductive": False, "invert": None, "checkpoint": None}
        given = [name for name, none in own.items() if getattr(parsed, name) != none]
        if given or overrides or parsed.head != "auto":
            word = (given or sorted(overrides) or ["head"])[0].replace("_", "-")
            raise ValueError(f"--{word}: expected none with an adapted learner, which is as it was saved, found one")
        classifier = FewShotClassifier.load(parsed.weights, device=device)
        return classifier, None, {"learner": parsed.weights, **classifier.in_words()}
    if parsed.support is None:
        raise ValueError("--support: expected a folder with examples of each class, found none")
    learner = Learner.load(parsed.weights, parsed.checkpoint or "best", device=device or "auto", **overrides)
    example = with_inversion(_format_of_images(learner.example, parsed.weights), parsed.invert)
    learner = dataclasses.replace(learner, example=example)
    if learner.config is not None:
        settle_threads(learner.config)
    support = read_support(parsed.support, example)
    classifier = FewShotClassifier(learner, head=parsed.head, transductive=parsed.transductive)
    classifier.fit(support.inputs, support.labels)
    return classifier, support, {"learner": f"{parsed.weights}", **classifier.in_words()}


def _format_of_images(example: ExampleFormat | None, weights: str) -> ExampleFormat:
    if example is None or example.decoding is None:
        found = "none" if example is None else str(example)
        raise ValueError(f"predict: expected a learner of images, whose format is stored, found {found} in {weights}")
    return example


def plot(parsed: argparse.Namespace) -> int:
    """`signmaml plot`."""
    if parsed.task < 0:
        raise ValueError(f"--task: expected an integer >= 0, found {parsed.task}")
    chosen = _output("--out", parsed.out) if parsed.out else None
    from . import plots  # here: matplotlib takes long to import

    runs = [RunFolder(path) for path in parsed.runs]
    for run in runs:
        if not run.metrics.is_file():
            raise FileNotFoundError(f"run folder: expected one with a metrics.jsonl, found none in {run.path}")
    if len(runs) > 1:
        out = chosen or Path("curves.png")
        plots.draw_curves({str(run.path): run.metrics for run in runs}, out)
        print(out)
        return 0
    run = runs[0]
    out = chosen or run.curves
    plots.draw_curves(run.metrics, out)
    print(out)
    if not parsed.curves_only:
        _plot_episode(run, parsed.task)
    return 0


def _plot_episode(run: RunFolder, task: int) -> None:
    from . import plots

    stored = read_weights(run.path)
    config = stored.config
    device = building.resolve_device(config.device)
    sampler = building.make_sampler(config, None, "test", device)
    learner = trained_on(config, stored, sampler, device)
    title = f"{config.data}/test, {config.method}"
    if plots.draw_task(learner.model, sampler, run.episode, task=task, title=title, **learner.arguments):
        print(run.episode)


def report(parsed: argparse.Namespace) -> int:
    """`signmaml report`."""
    run = RunFolder(parsed.run_folder)
    out = _output("--out", parsed.out) if parsed.out else run.path / "report.html"
    write_report(run, out)
    print(out)
    return 0


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
            each = known.images_per_class or "various numbers of"
            size = f"{each} images, {known.image_size} x {known.image_size} pixels"
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
        images = data.load(
            parsed.name,
            split,
            root=parsed.data_root,
            image_size=parsed.image_size,
            download=downloads,
            **given_fields(parsed),
        )
        print(f"{parsed.name}/{split}: {images.classes} classes, {len(images.images)} images of {_shape(images)}")
    return 0


def data_verify(parsed: argparse.Namespace) -> int:
    """`signmaml data verify`; returns 1 if there are problems."""
    building.check_data_name(parsed.name)
    selection = _selection(parsed)
    reports = data.verify(parsed.name, root=parsed.data_root, image_size=parsed.image_size, selection=selection)
    for report in reports:
        found = f"{report.classes} classes, {report.images} images" if report.classes else "cannot be loaded"
        print(f"{parsed.name}/{report.split}: {found}: {'problems' if report.problems else 'complete'}")
        for problem in report.problems:
            print(f"  {problem}")
    return int(any(report.problems for report in reports))


def data_show(parsed: argparse.Namespace) -> int:
    """`signmaml data show`."""
    from . import plots

    building.check_data_name(parsed.name)
    out = _output("--out", parsed.out or f"{parsed.name}-{parsed.split}.png")
    images = data.load(
        parsed.name, parsed.split, root=parsed.data_root, image_size=parsed.image_size, **given_fields(parsed)
    )
    plots.draw_images(images, out)
    print(out)
    return 0


def _splits_of(parsed: argparse.Namespace) -> tuple[str, ...]:
    """The splits of a set; for own images, those that exist."""
    building.check_data_name(parsed.name)
    if parsed.name == "folder" and parsed.data_root is not None:
        splits = data.complete_splits(parsed.name, parsed.data_root, selection=_selection(parsed))
        return splits or data.SPLITS
    return data.SPLITS


def _selection(parsed: argparse.Namespace) -> Selection:
    """How a command line selects among own images.

    Raises:
        ValueError: It does, but the set is another.
    """
    given = given_fields(parsed)
    if given and parsed.name != "folder":
        raise ValueError(f"{next(iter(given))}: expected none for {parsed.name!r}, whose splits are fixed, found one")
    return Selection(**given)


def _shape(images: data.ImageSet) -> str:
    channels, height, width = images.image_shape
    return f"{height} x {width} x {channels}"
