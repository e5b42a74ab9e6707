"""Pages of the site that have their source elsewhere: the notebook, files of the repository, the command line's help.

mkdocs calls `on_files` and `on_page_markdown` (mkdocs.yml). Nothing here imports torch or the compiled module.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]

# Pages whose files lie outside docs/.
ELSEWHERE = {
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
    "native_core.md": "csrc/README.md",
    "security.md": "SECURITY.md",
}
COMMANDS = ("train", "evaluate", "predict", "plot", "report", "data", "info", "completion")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that are made here."""
    for page, source in ELSEWHERE.items():
        add(files, config, page, (ROOT / source).read_text(encoding="utf-8"))
    page, pictures = from_notebook(ROOT / "docs" / "tutorial.ipynb")
    add(files, config, "tutorial.md", page)
    for name, picture in pictures.items():
        add(files, config, name, picture)
    with without_installing():
        add(files, config, "reference/command_line.md", command_line())
        add(files, config, "reference/configuration.md", configuration())
    return files


def add(files: Files, config: MkDocsConfig, name: str, content: str | bytes) -> None:
    files.append(File.generated(config, name, content=content))


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Makes links between files of the repository links between pages; to files that are no page, plain text."""
    name = page.file.src_uri
    folder = os.path.dirname(ELSEWHERE.get(name, f"docs/{name}"))
    pages = {path: elsewhere for elsewhere, path in ELSEWHERE.items()} | {"docs/tutorial.ipynb": "tutorial.md"}

    def link(match: re.Match[str]) -> str:
        path = os.path.normpath(os.path.join(folder, match[2]))
        target = pages.get(path) or path.removeprefix("docs/")
        if target == path:
            return match[1]
        return f"[{match[1]}]({os.path.relpath(target, os.path.dirname(name))}{match[3] or ''})"

    return re.sub(r"(?<!!)\[([^][]+)\]\((?!https?:|#)([^)#\s]+)(#[^)]*)?\)", link, markdown)


def from_notebook(path: Path) -> tuple[str, dict[str, bytes]]:
    """A page of the notebook's cells with the outputs that are stored in it, and its pictures by file name."""
    parts: list[str] = []
    pictures: dict[str, bytes] = {}
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            parts.append(shown(output, pictures))
    return "\n\n".join(parts), pictures


def shown(output: dict[str, Any], pictures: dict[str, bytes]) -> str:
    """One output of a cell: a picture or text."""
    data = output.get("data", {})
    if "image/png" in data:
        name = f"tutorial_{len(pictures) + 1}.png"
        pictures[name] = base64.b64decode("".join(data["image/png"]))
        return f"![Output of the cell above]({name})"
    text = "".join(output.get("text") or data.get("text/plain", ""))
    return f'<div class="cell-output" markdown>\n\n```text\n{text.rstrip()}\n```\n\n</div>'


@contextlib.contextmanager
def without_installing() -> Iterator[None]:
    """The command line and the configuration import no torch, so they can be asked without a build."""
    sys.path.insert(0, str(ROOT / "python"))
    try:
        yield
    finally:
        sys.path.remove(str(ROOT / "python"))


def command_line() -> str:
    """What `signmaml COMMAND --help` prints, for every command."""
    from signmaml.cli import build_parser

    os.environ["COLUMNS"] = "100"
    os.environ["NO_COLOR"] = "1"  # newer versions of argparse print colours
    parser = build_parser()
    commands = parser._commands()
    parts = [
        "# Command line",
        "`signmaml COMMAND --help` prints the same text, `signmaml train --help` by groups. Values in brackets are the "
        "defaults.",
        f"```text\n{parser.format_help().rstrip()}\n```",
    ]
    for name in COMMANDS:
        parts.append(f"## `signmaml {name}`\n\n```text\n{commands[name].format_help().rstrip()}\n```")
        for action, below in commands[name]._commands().items():
            parts.append(f"### `signmaml {name} {action}`\n\n```text\n{below.format_help().rstrip()}\n```")
    return "\n\n".join(parts) + "\n"


def configuration() -> str:
    """All fields of `TrainConfig`, and the presets."""
    from signmaml.config import TrainConfig, describe, rule_of
    from signmaml.presets import PRESETS

    lines = ["| field | default | what |", "|---|---|---|"]
    for name, value in TrainConfig().to_dict().items():
        resumed = " *" if rule_of(name).on_resume else ""
        lines.append(f"| `{name}`{resumed} | `{json.dumps(value)}` | {describe(name).replace('|', '&#124;')} |")
    parts = [
        "# Configuration",
        "Every field of `signmaml.TrainConfig`. On the command line `inner_lr` is `--inner-lr`. Values come from the "
        "defaults, then `--preset`, then `--config` (a YAML or TOML file), then the command line; later ones win.",
        "\n".join(lines),
        "Fields with a star may change when a run is [resumed](../howto/resume.md).",
        "## Presets",
    ]
    for name, values in PRESETS.items():
        chosen = "\n".join(f"{field}: {json.dumps(value)}" for field, value in values.items())
        parts.append(f"### `{name}`\n\n```yaml\n{chosen}\n```")
    return "\n\n".join(parts) + "\n"
