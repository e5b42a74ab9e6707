"""Pages of the site that have their source elsewhere: the notebook, files of the repository, the command line's help.

mkdocs calls `on_files` and `on_page_markdown` (mkdocs.yml). Nothing here imports torch or the compiled module.
"""

from __future__ import annotations

import base64
import json
import os
import re
import sys
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
COMMANDS = ("train", "evaluate", "plot", "data", "info")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that are made here."""
    for page, source in ELSEWHERE.items():
        add(files, config, page, (ROOT / source).read_text(encoding="utf-8"))
    page, pictures = from_notebook(ROOT / "docs" / "tutorial.ipynb")
    add(files, config, "tutorial.md", page)
    for name, picture in pictures.items():
        add(files, config, name, picture)
    add(files, config, "reference/command_line.md", command_line())
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


def command_line() -> str:
    """What `signmaml COMMAND --help` prints, for every command."""
    sys.path.insert(0, str(ROOT / "python"))
    os.environ["COLUMNS"] = "100"
    os.environ["NO_COLOR"] = "1"  # newer versions of argparse print colours
    try:
        from signmaml.cli import build_parser
    finally:
        sys.path.remove(str(ROOT / "python"))
    parser = build_parser()
    commands = parser._commands()
    parts = [
        "# Command line",
        "`signmaml COMMAND --help` prints the same text. Values in brackets are the defaults.",
        f"```text\n{parser.format_help().rstrip()}\n```",
    ]
    for name in COMMANDS:
        parts.append(f"## `signmaml {name}`\n\n```text\n{commands[name].format_help().rstrip()}\n```")
        for action, below in commands[name]._commands().items():
            parts.append(f"### `signmaml {name} {action}`\n\n```text\n{below.format_help().rstrip()}\n```")
    return "\n\n".join(parts) + "\n"
