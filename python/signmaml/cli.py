"""The command `signmaml`: train, evaluate, predict, plot, report, data, info, completion.

This module parses the command line and reports errors; `commands` does the work. Help and usage errors do not import
torch.

Exit codes: 0 success; 1 failure; 2 the request cannot be served (usage, configuration, data); 130 and 143 stopped by
SIGINT and SIGTERM.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import errno
import os
import shutil
import sys
import textwrap
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn

from . import config as configs
from . import version
from .config import TrainConfig
from .options import EVALUATION_FIELDS, PREDICTION_FIELDS
from .presets import PRESETS

# Errors that the user can fix; their messages say what was expected and what was found.
USER_ERRORS = (
    ValueError,
    FileNotFoundError,
    FileExistsError,
    NotADirectoryError,
    IsADirectoryError,
    PermissionError,
    BlockingIOError,
    ModuleNotFoundError,
)
# Likewise: a disk that is full, over quota or read-only.
USER_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)

# Heading of each group of options, its name behind --help, and the first field of TrainConfig in it.
_GROUPS = (
    ("data", "data", "data"),
    ("tasks", "tasks", "ways"),
    ("model", "model", "model"),
    ("inner loop", "inner", "method"),
    ("sharpness (Sharp-MAML)", "sharpness", "sharpness_lower"),
    ("outer loop", "outer", "iterations"),
    ("validation and test", "validation", "validate_every"),
    ("how it is computed", "computing", "seed"),
    ("records", "records", "log_every"),
)

_EXAMPLES = """\
examples:
  signmaml train                                    a few-shot learner of characters, about a minute on a CPU
  signmaml train --preset omniglot --data-root DIR  the same on Omniglot's images
  signmaml train --data folder --data-root DIR      own images: DIR/CLASS/*.png, or DIR/{train,val,test}/CLASS/*
  signmaml train --resume runs/NAME                 continue a run that was stopped
  signmaml train --distributed --processes 8        8 processes here; more machines: docs/howto/distributed.md
  signmaml evaluate runs/NAME --tasks 1000          test accuracy with its 95% interval
  signmaml predict runs/NAME --support examples --query new_images
                                                    classes of new images, from examples/CLASS/*.png
  signmaml plot runs/A runs/B --out both.png        compare two runs
"""

_PREDICT_EXAMPLES = """\
examples:
  signmaml predict runs/NAME --support examples --query new_images       examples/CLASS/*.png
  signmaml predict runs/NAME --support examples --query a.png b.png --json -
  signmaml predict runs/NAME --support examples --query new_images --csv answers.csv --sheet answers.png
"""


class Parser(argparse.ArgumentParser):
    """Reports an error in one line and suggests the nearest existing option.

    Attributes:
        words: The words being parsed, for messages.
    """

    words: Sequence[str] = ()

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.named_groups: dict[str, Any] = {}  # by their names behind --help

    def add_named_group(self, name: str, heading: str) -> Any:
        """A group of options that `--help NAME` shows."""
        self.named_groups[name] = self.add_argument_group(heading)
        return self.named_groups[name]

    def format_overview(self) -> str:
        """The groups and the names of their options."""
        width, columns = max(map(len, self.named_groups)) + 2, min(100, shutil.get_terminal_size().columns)
        lines = [f"usage: {self.prog} [OPTION ...]", "", str(self.description), ""]
        lines.append(f"groups of options; '{self.prog} --help GROUP' explains one, '--help all' all of them:")
        for name, group in self.named_groups.items():
            text = ", ".join(action.option_strings[0] for action in group._group_actions)
            indent = " " * (width + 2)
            first = f"  {name:<{width}}"
            lines.append(
                textwrap.fill(text, columns, initial_indent=first, subsequent_indent=indent, break_on_hyphens=False)
            )
        others = [action.option_strings[-1] for action in self._optionals._group_actions]
        return "\n".join([*lines, f"  others: {', '.join(others)}", "", str(self.epilog)])

    def format_group(self, name: str) -> str:
        """The help of one group."""
        group, formatter = self.named_groups[name], self._get_formatter()
        formatter.start_section(group.title)
        formatter.add_arguments(group._group_actions)
        formatter.end_section()
        return formatter.format_help()

    def error(self, message: str) -> NoReturn:
        unknown = message.removeprefix("unrecognized arguments: ")
        if unknown != message:
            word = unknown.split()[0] if unknown.split() else repr(unknown)
            message = f"there is no {word}{self._hint(word.split('=')[0])}"
        print(f"{self.prog}: {message}\n'{self.prog} --help' lists what there is.", file=sys.stderr)
        raise SystemExit(2)

    def _hint(self, word: str) -> str:
        """A suggestion for an unknown option."""
        commands = self._commands()
        elsewhere = [name for name, parser in commands.items() if word in parser.option_names()]
        if elsewhere:
            return f" here; it belongs behind {' or '.join(elsewhere)}"
        asked = next((commands[name] for name in self.words if name in commands), self)
        names = asked.option_names()
        near = [f"--{name.replace('_', '-')}" for name in configs.nearest(word.removeprefix("--"))]
        near = [name for name in near if name in names] or difflib.get_close_matches(word, names, n=1)
        return f" (did you mean {' or '.join(near)}?)" if near and word not in near else ""

    def _commands(self) -> dict[str, Parser]:
        actions = [action for action in self._actions if isinstance(action, argparse._SubParsersAction)]
        return {name: parser for action in actions for name, parser in action.choices.items()}

    def option_names(self) -> list[str]:
        """Options of this command, or of all subcommands."""
        names: list[str] = []
        for action in self._actions:
            names += action.option_strings
        for parser in self._commands().values():
            names += parser.option_names()
        return names


class _HelpInGroups(argparse.Action):
    """`--help`: the groups of options; `--help GROUP`: one of them; `--help all`: everything."""

    def __init__(self, option_strings: Sequence[str], dest: str, **options: Any) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs="?", metavar="GROUP", **options)

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        if values is None:
            print(parser.format_overview(), end="")
        elif values == "all":
            print(parser.format_help(), end="")
        elif values in parser.named_groups:
            print(parser.format_group(values), end="")
        else:
            names = [*parser.named_groups, "all"]
            near = difflib.get_close_matches(values, names, n=1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            parser.error(f"--help: expected one of {', '.join(names)}, found {values}{hint}")
        parser.exit()


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        arguments: The words after `signmaml`; None: those of the process.

    Returns:
        The exit code; see the module. If the process has joined others, ends the process instead of returning.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    words = [_with_dashes(word) for word in words]
    parser = build_parser()
    parser.words = words
    parsed = parser.parse_args(words)
    parsed.words = words
    parsed.group = None  # the processes that the command joined
    code = _code_of(parsed)
    if parsed.group is not None and parsed.group.size > 1:
        from .distributed import leave

        leave(code)
    return code


def _code_of(parsed: argparse.Namespace) -> int:
    try:
        return int(parsed.run(parsed))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the pipe is closed; discard the rest
        return 1
    except KeyboardInterrupt as error:
        print(f"\nsignmaml: {error or 'interrupted'}", file=sys.stderr)
        return getattr(error, "exit_code", 130)
    except Exception as error:
        return _report(error, parsed.debug)


def _report(error: Exception, debug: bool) -> int:
    if debug:
        traceback.print_exception(error)
    # Several processes may fail for different reasons, so name the process.
    name = "signmaml" if int(os.environ.get("WORLD_SIZE", "1")) == 1 else f"signmaml, process {os.environ.get('RANK')}"
    if isinstance(error, USER_ERRORS) or (isinstance(error, OSError) and error.errno in USER_ERRNOS):
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    hint = "" if debug else "\n(run again with --debug to see where)"
    print(f"{name}: {type(error).__name__}: {error}{hint}", file=sys.stderr)
    return 1


def build_parser() -> Parser:
    """The parser of the whole command line."""
    parser = Parser(
        prog="signmaml",
        description="Meta-train few-shot learners with Sign-MAML, FO-MAML or MAML; test and look at them.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"signmaml {version()}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_train(commands)
    _add_evaluate(commands)
    _add_predict(commands)
    _add_plot(commands)
    report = _command(commands, "report", "report", "write one HTML page about a run")
    report.add_argument("run_folder", metavar="RUN", help="run folder, also of a run that has not ended")
    report.add_argument("--out", metavar="FILE", help="where the page goes (RUN/report.html)")
    _add_data(commands)
    info = _command(commands, "info", "info", "versions, devices, and which backends can be used")
    info.add_argument("--json", action="store_true", help="print JSON")
    completion = _command(commands, None, "completion", "print a script that completes commands and options in a shell")
    completion.add_argument("shell", choices=("bash", "zsh"), help="the shell; the script goes into its startup")
    completion.set_defaults(run=_completion)
    return parser


def _completion(parsed: argparse.Namespace) -> int:
    """`signmaml completion`."""
    try:
        import shtab
    except ImportError as error:
        raise ModuleNotFoundError(
            "completion: expected the package shtab, found none; pip install shtab brings it"
        ) from error
    print(shtab.complete(build_parser(), shell=parsed.shell))
    return 0


def _add_train(commands: Any) -> None:
    parser = _command(
        commands, "train", "train", "meta-train a model, test it, draw plots", epilog=_EXAMPLES, in_groups=True
    )
    start = parser.add_named_group("start", "where the configuration comes from (later ones win)")
    start.add_argument("--preset", choices=sorted(PRESETS), help=f"start from {', '.join(sorted(PRESETS))}")
    start.add_argument("--config", metavar="FILE", help="YAML or TOML file with any of the fields below")
    start.add_argument("--resume", metavar="RUN", help="continue the run in this folder, exactly where it stopped")
    start.add_argument("--overwrite", action="store_true", help="replace a run that is in the run folder")
    start.add_argument("--quiet", action="store_true", help="no progress, only the result")
    several = parser.add_named_group(
        "processes", "several processes (or start them yourself: torchrun ... -m signmaml train)"
    )
    several.add_argument(
        "--distributed", action="store_true", help="train in several processes; starts torchrun unless it runs inside"
    )
    several.add_argument("--processes", type=int, metavar="INT", help="how many to start (one a CUDA device)")
    several.add_argument(
        "--max-restarts", type=int, metavar="INT", help="how often to go on from the last checkpoint after a loss (0)"
    )
    several.add_argument(
        "--timeout", type=float, default=600.0, metavar="SECONDS", help="how long to wait for another process (600)"
    )
    group_at = {first: (name, heading) for heading, name, first in _GROUPS}
    group = start
    for entry in dataclasses.fields(TrainConfig):
        if entry.name in group_at:
            group = parser.add_named_group(*group_at[entry.name])
        add_field(group, entry.name)


def _add_evaluate(commands: Any) -> None:
    parser = _command(commands, "evaluate", "evaluate", "test a trained model on many tasks")
    parser.add_argument("weights", metavar="RUN", help="run folder, or a weights file such as RUN/best.safetensors")
    parser.add_argument("--checkpoint", choices=("best", "last"), default="best", help="of a run folder (best)")
    parser.add_argument("--split", choices=("train", "val", "test"), default="test", help="classes to draw from (test)")
    parser.add_argument("--tasks", type=int, default=1000, metavar="INT", help="number of tasks (1000)")
    parser.add_argument("--queries", type=int, metavar="INT", help="query examples a class (the run's)")
    _add_head(parser)
    parser.add_argument("--json", metavar="FILE", help="also write the result to a JSON file; - for stdout alone")
    group = parser.add_argument_group("other than the run was configured")
    for name in EVALUATION_FIELDS:
        add_field(group, name, with_default=False)


def _add_predict(commands: Any) -> None:
    parser = _command(
        commands,
        "predict",
        "predict",
        "classify new images, from a few examples of each class",
        epilog=_PREDICT_EXAMPLES,
    )
    parser.add_argument(
        "weights", metavar="RUN", help="run folder, a weights file, or what --save wrote (then without --support)"
    )
    parser.add_argument("--support", metavar="DIR", help="examples: a folder or .zip with one folder a class")
    parser.add_argument(
        "--query", metavar="PATH", nargs="+", required=True, help="images to classify: files, folders or .zip files"
    )
    parser.add_argument("--checkpoint", choices=("best", "last"), help="of a run folder (best)")
    _add_head(parser)
    parser.add_argument(
        "--transductive",
        action="store_true",
        help="BatchNorm by the query images together, not by the support set: better for many images of all classes "
        "alike, wrong for few or for one class",
    )
    parser.add_argument(
        "--invert",
        action=argparse.BooleanOptionalAction,
        help="invert images first, as dark ink on white for a network trained on Omniglot (as in the run)",
    )
    results = parser.add_argument_group("results, beside the table")
    results.add_argument("--csv", metavar="FILE", help="also write a CSV file; - for stdout alone")
    results.add_argument("--json", metavar="FILE", help="also write a JSON file; - for stdout alone")
    results.add_argument("--sheet", metavar="FILE", help="also draw support and query images, a PNG file")
    results.add_argument("--save", metavar="FILE", help="also write the adapted learner, a .safetensors file")
    results.add_argument(
        "--export", metavar="FILE", help="also write the adapted network, as .pt2, .onnx, .safetensors"
    )
    group = parser.add_argument_group("other than the run was configured")
    for name in PREDICTION_FIELDS:
        add_field(group, name, with_default=False)


def _add_head(parser: Any) -> None:
    parser.add_argument(
        "--head",
        choices=("auto", "trained", "prototypes"),
        default="auto",
        help="what the last layer starts from: as trained (its first rows for fewer classes), or the classes' "
        "prototypes; auto: as trained for as many classes as in training, else prototypes",
    )


def _add_plot(commands: Any) -> None:
    parser = _command(commands, "plot", "plot", "draw training curves, and one episode with predictions")
    parser.add_argument("runs", metavar="RUN", nargs="+", help="run folder; with several, their curves are compared")
    parser.add_argument("--out", metavar="FILE", help="where the curves go (RUN/curves.png; curves.png for several)")
    parser.add_argument("--task", type=int, default=0, metavar="INT", help="which test task to show in RUN/episode.png")
    parser.add_argument("--curves-only", action="store_true", help="do not load data and model for the episode")


def _add_data(commands: Any) -> None:
    parser = _command(commands, None, "data", "list, fetch, verify and show data sets")
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    _command(actions, "data_list", "list", "the data sets that can be named, and which are here")
    for name, summary in (
        ("fetch", "get a data set: download, or build"),
        ("verify", "check that a data set is complete"),
        ("show", "draw a sheet of its images"),
    ):
        action = _command(actions, f"data_{name}", name, summary)
        action.add_argument(
            "name", type=lambda name: name.replace("-", "_"), help="data set; 'signmaml data list' shows the names"
        )
        action.add_argument("--data-root", metavar="DIR", help="where it lies on disk (the cache folder)")
        action.add_argument("--image-size", type=int, metavar="INT", help="pixels (the set's usual)")
        own = action.add_argument_group("own images")
        for field in ("split_by", "min_images", "skip_damaged"):
            add_field(own, field, with_default=False)
        if name == "show":
            action.add_argument("--split", choices=("train", "val", "test"), default="train", help="(train)")
            action.add_argument("--out", metavar="FILE", help="PNG file (NAME-SPLIT.png)")


def _command(
    commands: Any, run: str | None, name: str, summary: str, epilog: str | None = None, in_groups: bool = False
) -> Parser:
    """Adds a command; `in_groups`: its help shows one group of options at a time."""
    parser: Parser = commands.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        add_help=not in_groups,
    )
    if in_groups:
        parser.add_argument(
            "-h", "--help", action=_HelpInGroups, help="list the groups of options, or show one of them, or all"
        )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    if run is not None:
        parser.set_defaults(run=lambda parsed: _run(run, parsed))
    return parser


def _run(name: str, parsed: argparse.Namespace) -> int:
    from . import commands

    code: int = getattr(commands, name)(parsed)
    return code


def add_field(group: Any, name: str, *, with_default: bool = True) -> None:
    """Adds the option of one field of `TrainConfig`, derived from its type, rule and default."""
    kind = configs.kinds()[name]
    rule = configs.rule_of(name)
    default = _default_text(next(f.default for f in dataclasses.fields(TrainConfig) if f.name == name))
    text = (f"{configs.describe(name)} [{default}]" if with_default else configs.describe(name)).replace("%", "%%")
    options: dict[str, Any] = {"dest": f"field_{name}", "default": argparse.SUPPRESS, "help": text}
    flag = f"--{name.replace('_', '-')}"
    if kind.item is bool:
        group.add_argument(flag, action=argparse.BooleanOptionalAction, **options)
        return
    noun = {int: "INT", float: "NUMBER"}.get(kind.item, "TEXT")
    metavar = "NAME" if rule.choices else noun
    group.add_argument(flag, metavar=metavar, nargs="+" if kind.many else None, **options)


def _default_text(default: Any) -> str:
    if default is None:
        return "none"
    if isinstance(default, bool):
        return "yes" if default else "no"
    return " ".join(map(str, default)) if isinstance(default, tuple) else str(default)


def _with_dashes(word: str) -> str:
    """Turns --inner_lr=1 into --inner-lr=1; values stay unchanged."""
    if not word.startswith("--"):
        return word
    option, equals, value = word.partition("=")
    return option.replace("_", "-") + equals + value


if __name__ == "__main__":
    sys.exit(main())
