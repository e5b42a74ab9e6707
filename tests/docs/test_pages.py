"""The README and the pages of docs/ are correct: code runs, commands parse, links resolve."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from helpers.cases.toy_images import toy_images
from signmaml.cli import build_parser

ROOT = Path(__file__).resolve().parents[2]
README, NOTEBOOK = ROOT / "README.md", ROOT / "docs" / "tutorial.ipynb"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
OTHERS = [ROOT / name for name in ("CHANGELOG.md", "SECURITY.md", "benchmarks/README.md", "csrc/README.md")]
NOT_RUN = "<!-- not run: "
# Pages that train, which takes half a second or more.
SLOW = (
    "README.md",
    "docs/start.md",
    "docs/howto/own_data.md",
    "docs/howto/own_model.md",
    "docs/howto/predict.md",
    "docs/howto/resume.md",
)


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(path: Path, language: str) -> Iterator[tuple[str, bool]]:
    """The code blocks of a page in order, and whether each can run here."""
    text = path.read_text(encoding="utf-8")
    for found in re.finditer(rf"(?ms)^(?P<before>[^\n]*)\n(?P<indent> *)```{language}\n(?P<code>.*?)^ *```$", text):
        code = re.sub(rf"(?m)^{found['indent']}", "", found["code"])
        yield code, not found["before"].startswith(NOT_RUN)


def with_python() -> list[Any]:
    found = [path for path in PAGES if any(blocks(path, "python"))]
    return [
        pytest.param(path, id=name_of(path), marks=[pytest.mark.slow] if name_of(path) in SLOW else [])
        for path in found
    ]


@pytest.fixture
def in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gives the test its own working folder and cache, and small images in place of the fonts' glyphs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SIGNMAML_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("signmaml.data.glyphs", lambda split: toy_images(split, classes=6, size=28))


@pytest.mark.parametrize("page", with_python())
def test_python_blocks_run(page: Path, in_a_folder: None) -> None:
    """Top to bottom in one namespace, as a reader would type them; long loops are shortened."""
    names: dict[str, Any] = {"__name__": "__main__"}
    for number, (code, runs) in enumerate(blocks(page, "python")):
        code = code.replace("range(100)", "range(2)")
        compiled = compile(code, f"{name_of(page)}, block {number}", "exec")
        if runs:
            exec(compiled, names)


def test_readme_is_short() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 150


@pytest.mark.parametrize("page", [*PAGES, *OTHERS], ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    """Checks links to files; the site's strict build checks links to headings."""
    text = re.sub(r"(?ms)^ *```.*?^ *```$", "", page.read_text(encoding="utf-8"))
    targets = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", text)
    made_by_the_site = {"command_line.md", "configuration.md"}
    missing = [
        target
        for target in targets
        if not (page.parent / target).exists() and Path(target).name not in made_by_the_site
    ]
    assert missing == []


@pytest.mark.parametrize("page", [*PAGES, ROOT / "benchmarks" / "README.md"], ids=name_of)
def test_prose_fits_in_120_columns(page: Path) -> None:
    text = re.sub(r"(?ms)^ *```.*?^ *```$", "", page.read_text(encoding="utf-8"))
    lines = [line for line in text.splitlines() if not line.startswith(("|", "![", "Measured on ", "Not measured: "))]
    assert [line for line in lines if len(line) > 120] == []


def commands() -> Iterator[list[str]]:
    """Every `signmaml ...` that a page shows, without the words in front of it."""
    for page in PAGES:
        for code, _ in blocks(page, "sh"):
            for line in code.replace("\\\n", " ").splitlines():
                words = shlex.split(line.split("&&")[-1], comments=True)
                starts = [i for i, word in enumerate(words) if word.endswith("signmaml") and "=" not in word]
                if starts:
                    yield words[starts[-1] + 1 :]


@pytest.mark.slow
def test_commands_of_the_pages_are_understood() -> None:
    found = list(commands())
    assert len(found) >= 10
    for words in found:
        build_parser().parse_args(words)


def code_cells() -> list[dict[str, Any]]:
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def test_notebook_is_stored_as_executed_from_top_to_bottom() -> None:
    """The site shows the stored outputs."""
    assert [cell["execution_count"] for cell in code_cells()] == list(range(1, len(code_cells()) + 1))
    assert not any(output["output_type"] == "error" for cell in code_cells() for output in cell["outputs"])
    assert NOTEBOOK.stat().st_size < 200_000, "small outputs"
    assert str(Path.home()) not in NOTEBOOK.read_text(encoding="utf-8")


@pytest.mark.slow
def test_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbclient = pytest.importorskip("nbclient", reason="pip install '.[test]' brings nbclient and ipykernel")
    pytest.importorskip("ipykernel")
    import nbformat

    monkeypatch.setenv("SIGNMAML_CACHE", str(tmp_path / "cache"))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    said = "".join(
        output.get("text", "")
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if cell.cell_type == "code"
    )
    accuracies = [float(found) for found in re.findall(r"accuracy ([\d.]+)% \+-", said)]
    assert len(accuracies) == 2 and accuracies[0] > 70 and accuracies[1] < 35, "it learns, and guesses without adapting"
    right = re.search(r"(\d+) of 25 images answered correctly", said)
    assert right is not None and int(right[1]) > 12
