"""`signmaml report`: one self-contained HTML page about a run, with its result, curves, sheets and configuration."""

from __future__ import annotations

import base64
import dataclasses
import json
import math
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from . import config as configs
from .config import TrainConfig
from .files import write_atomically
from .loggers import clock, read_metrics
from .runs import RunFolder

# Shown of a longer list of validations: evenly spaced ones, with the first, the last and the best.
_MOST_VALIDATIONS = 20

_STYLE = """
:root { color-scheme: light dark; --ink: #1d2330; --paper: #fff; --faint: #667085; --line: #e3e6ec; --mark: #e45756; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e8ee; --paper: #14171f; --faint: #98a2b3; --line: #2b303c; }
  img { background: #fff; border-radius: 6px; }
}
body { font: 16px/1.55 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 0; }
main { max-width: 62rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.7rem; margin: 0 0 .2rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.4rem 0 .6rem; }
.faint { color: var(--faint); font-size: .92rem; }
.score { font-size: 1.45rem; font-weight: 600; margin: 1.2rem 0 .2rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92rem; }
th, td { text-align: left; padding: .3rem 1rem .3rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--faint); font-weight: 500; }
tr.best td { color: var(--mark); font-weight: 600; }
img { max-width: 100%; height: auto; display: block; }
code { font-size: .9em; overflow-wrap: anywhere; }
summary { cursor: pointer; margin: .8rem 0; }
"""


def write_report(run: RunFolder, out: Path) -> None:
    """Writes the page of a run, also of one that has not ended.

    Args:
        run: The run's folder, with at least its configuration.
        out: HTML file to write; it needs no other file.

    Raises:
        FileNotFoundError: No run was started there.
        ValueError: A file of the run is damaged.
        OSError: Writing failed; a previous file is untouched.
    """
    config, records = run.read_config(), read_metrics(run.metrics)
    result = _result_of(run)
    if result and (result.get("iterations", 0) < _done(records) or not _is_of(result, config)):
        result = {}  # of an earlier end, before the run went on
    parts = [
        *_heading(run, config, records, result),
        *_picture(_curves(run, bool(result), records), "Training", "Accuracy and loss over the meta-iterations"),
        *_validations(records),
        *_picture(_content(run.episode), "One task", "One task: what the learner sees, and what it predicts"),
        *_configuration(config),
        *_files(run),
    ]
    page = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(str(run.path))}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(parts)
        + "\n</main>\n</body>\n</html>\n"
    )
    write_atomically(out, page)


def _result_of(run: RunFolder) -> dict[str, Any]:
    """result.json; empty if the run has not ended."""
    if not run.result.is_file():
        return {}
    try:
        found = json.loads(run.result.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"report: expected JSON in {run.result}, found {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"report: expected an object in {run.result}, found {type(found).__name__}")
    return found


def _done(records: Sequence[Mapping[str, Any]]) -> int:
    """Meta-iterations done, as far as they are recorded."""
    return max((record["iteration"] for record in records), default=0)


def _is_of(result: Mapping[str, Any], config: TrainConfig) -> bool:
    """Whether a result is of a run of this length."""
    found = result.get("config")
    return not isinstance(found, dict) or found.get("iterations", config.iterations) == config.iterations


def _heading(
    run: RunFolder, config: TrainConfig, records: Sequence[Mapping[str, Any]], result: Mapping[str, Any]
) -> list[str]:
    setting = "" if config.data == "sinusoid" else f"{config.ways}-way {config.shots}-shot, "
    what = f"{config.method} on {config.data}: {setting}{config.model}"
    lines = [f"<h1>{escape(str(run.path))}</h1>", f'<p class="faint">{escape(what)}</p>']
    test = result.get("test")
    if test:
        lines += [f'<p class="score">test {_score(test)}</p>', f'<p class="faint">{escape(_protocol(test))}</p>']
    facts = [f"{result.get('iterations', _done(records)):,} of {config.iterations:,} meta-iterations"]
    if "train_seconds" in result:
        facts.append(f"{clock(result['train_seconds'])} of training")
    if "parameters" in result:
        facts.append(f"{result['parameters']:,} parameters")
    facts += [str(result[name]) for name in ("device",) if name in result]
    facts += [f"{name} {version}" for name, version in result.get("versions", {}).items()]
    if not result:
        facts.append("the run has not ended")
    return [*lines, f"<p>{escape(', '.join(facts))}</p>"]


def _score(test: Mapping[str, Any]) -> str:
    mean, half = test.get("mean"), test.get("ci95")
    if mean is None:
        return "result: not a number"
    accuracy = test.get("metric") == "accuracy"
    scale, unit = (100, "%") if accuracy else (1, "")
    interval = "" if half is None else f" ± {scale * half:.2g}{unit}"
    return f"{'accuracy' if accuracy else 'mean squared error'} {scale * mean:.4g}{unit}{interval}"


def _protocol(test: Mapping[str, Any]) -> str:
    """The settings of a test, in one line."""
    from .evaluation import Evaluation  # here: it imports torch

    known = {field.name for field in dataclasses.fields(Evaluation)}
    missing = [name for name in ("ways", "shots", "queries", "tasks", "method") if name not in test]
    if missing:
        return ""
    numbers = {
        name: math.nan if test[name] is None else test[name] for name in ("mean", "ci95", "loss") if name in test
    }
    try:
        return Evaluation(**{name: value for name, value in {**test, **numbers}.items() if name in known}).protocol()
    except TypeError:  # of another version, with other fields
        return ""


def _curves(run: RunFolder, ended: bool, records: Sequence[Mapping[str, Any]]) -> bytes | None:
    """curves.png, or those of a run that has not ended, drawn anew."""
    if ended or not records:
        return _content(run.curves)
    from .plots import draw_curves  # here: matplotlib takes long to import

    with tempfile.TemporaryDirectory() as folder:
        draw_curves(run.metrics, Path(folder) / "curves.png")
        return (Path(folder) / "curves.png").read_bytes()


def _content(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def _picture(png: bytes | None, title: str, text: str) -> list[str]:
    if png is None:
        return []
    data = base64.b64encode(png).decode("ascii")
    return [f"<h2>{title}</h2>", f'<img alt="{escape(text)}" src="data:image/png;base64,{data}">']


def _validations(records: Sequence[Mapping[str, Any]]) -> list[str]:
    found = [record for record in records if record.get("split") == "val"]
    if not found:
        return []
    accurate = any(record.get("accuracy") is not None for record in found)
    numbers = [record.get("accuracy" if accurate else "loss") for record in found]
    goodness = [-math.inf if n is None else n if accurate else -n for n in numbers]
    best = goodness.index(max(goodness))  # of equal ones the earlier, as in training
    shown = _spread(len(found), best)
    rows = []
    for i in shown:
        record = found[i]
        cells = [f"{record['iteration']:,}"]
        if accurate:
            cells += [_percent(record.get("accuracy"), record.get("ci95"))]
        cells.append("not a number" if record.get("loss") is None else f"{record['loss']:.4g}")
        rows.append((cells, i == best))
    left = "" if len(shown) == len(found) else f" ({len(shown)} of {len(found)} shown, the best marked)"
    heads = ["iteration", *(["accuracy"] if accurate else []), "loss"]
    return [f"<h2>Validation{left}</h2>", _table(heads, rows)]


def _spread(count: int, best: int) -> list[int]:
    """Which of so many validations to show."""
    if count <= _MOST_VALIDATIONS:
        return list(range(count))
    steps = _MOST_VALIDATIONS - 1
    return sorted({round(i * (count - 1) / steps) for i in range(_MOST_VALIDATIONS)} | {best})


def _percent(mean: float | None, half: float | None) -> str:
    if mean is None:
        return "not a number"
    return f"{100 * mean:.2f}%" + ("" if half is None else f" ± {100 * half:.2f}%")


def _configuration(config: TrainConfig) -> list[str]:
    changed: list[tuple[list[str], bool]] = []
    usual: list[tuple[list[str], bool]] = []
    for field in dataclasses.fields(TrainConfig):
        value = getattr(config, field.name)
        row = ([f"<code>{field.name}</code>", escape(_value(value)), escape(configs.rule_of(field.name).help)], False)
        (usual if value == field.default else changed).append(row)
    heads = ["field", "value", "what it is"]
    lines = ["<h2>Configuration</h2>"]
    lines += [_table(heads, changed, escaped=True)] if changed else ["<p>All settings are the defaults.</p>"]
    return [*lines, f"<details><summary>{len(usual)} settings at their defaults</summary>",
            _table(heads, usual, escaped=True), "</details>"]  # fmt: skip


def _value(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _files(run: RunFolder) -> list[str]:
    paths = (run.config, run.metrics, run.best, run.last, run.result, run.curves, run.episode)
    rows = [([f"<code>{path.name}</code>", f"{path.stat().st_size:,}"], False) for path in paths if path.is_file()]
    return ["<h2>Files</h2>", _table(["file", "bytes"], rows, escaped=True)]


def _table(heads: Iterable[str], rows: Iterable[tuple[list[str], bool]], *, escaped: bool = False) -> str:
    top = "".join(f"<th>{escape(head)}</th>" for head in heads)
    body = []
    for cells, marked in rows:
        text = "".join(f"<td>{cell if escaped else escape(cell)}</td>" for cell in cells)
        body.append(f'<tr class="best">{text}</tr>' if marked else f"<tr>{text}</tr>")
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'
