"""`signmaml report`: one page about a run, whole in itself."""

from __future__ import annotations

import html.parser
import json
import math
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest

from helpers.cases.toy_images import write_class_folders
from signmaml import cli
from signmaml.report import write_report
from signmaml.runs import RunFolder

TINY = shlex.split(
    "--ways 3 --queries 3 --tasks 2 --model mlp --hidden 16 --iterations 60 --validate-every 2 --validate-tasks 4 "
    "--test-tasks 6 --log-every 5 --device cpu --no-tensorboard --quiet"
)


class Page(html.parser.HTMLParser):
    """Checks that tags are balanced, and collects text, tables and what the page would fetch."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.rows: list[list[str]] = []
        self.marked: list[int] = []
        self.sources: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.sources += [str(values[name]) for name in ("src", "href") if name in values]
        if tag == "tr":
            self.rows.append([])
            if values.get("class") == "best":
                self.marked.append(len(self.rows) - 1)
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)
        if self.open and {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data

    def __str__(self) -> str:
        return "".join(self.text)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("report")
    images = write_class_folders(place / "images", classes=5, images=8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SIGNMAML_CACHE", str(place / "cache"))
        words = ["train", "--data", "folder", "--data-root", str(images), "--out", str(place / "run <b>"), *TINY]
        assert cli.main(words) == 0
    return place / "run <b>"


def test_the_page_holds_the_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", str(run)]) == 0
    assert capsys.readouterr().out.strip() == str(run / "report.html")
    page = Page(run / "report.html")
    result = json.loads((run / "result.json").read_text())
    test = result["test"]
    for words in (
        "run <b>", "sign-maml on folder: 3-way 1-shot, mlp", f"test accuracy {100 * test['mean']:.4g}%",
        "3-way 1-shot, 3 queries a class, folder/test", "60 of 60 meta-iterations", "4,163 parameters",
        "of 30 shown, the best marked", "settings at their defaults",
    ):  # fmt: skip
        assert words in str(page), words
    assert all(source.startswith("data:image/png;base64,") for source in page.sources) and len(page.sources) == 2
    values = {row[0]: row[1] for row in page.rows if len(row) == 3}
    assert values["ways"] == "3" and values["tensorboard"] == "no" and values["hidden"] == "16"
    assert values["adapt"] == "none" and len(values) > 50


def test_the_best_validation_is_marked(run: Path) -> None:
    write_report(RunFolder(run), run / "page.html")
    page = Page(run / "page.html")
    best = json.loads((run / "result.json").read_text())["validation"]
    (marked,) = (page.rows[i] for i in page.marked)
    assert marked[0] == str(best["iteration"]) and marked[1].startswith(f"{100 * best['value']:.2f}%")
    iterations = [int(row[0]) for row in page.rows if row and re.fullmatch(r"\d+", row[0])]
    assert iterations == sorted(iterations) and {2, 60, best["iteration"]} <= set(iterations)
    assert 20 <= len(iterations) <= 21


def test_a_run_that_has_not_ended(run: Path, tmp_path: Path) -> None:
    young = tmp_path / "young"
    young.mkdir()
    for name in ("config.yaml", "metrics.jsonl"):
        shutil.copy(run / name, young)
    write_report(RunFolder(young), tmp_path / "page.html")
    page = Page(tmp_path / "page.html")
    assert "the run has not ended" in str(page) and len(page.sources) == 1, "curves drawn from the metrics"
    assert sorted(path.name for path in young.iterdir()) == ["config.yaml", "metrics.jsonl"]
    (young / "metrics.jsonl").unlink()
    write_report(RunFolder(young), tmp_path / "page.html")
    assert "0 of 60 meta-iterations" in str(Page(tmp_path / "page.html"))


def test_a_run_that_goes_on_after_an_end_does_not_show_the_old_result(run: Path, tmp_path: Path) -> None:
    longer = tmp_path / "longer"
    shutil.copytree(run, longer)
    text = (longer / "config.yaml").read_text()
    (longer / "config.yaml").write_text(text.replace("\niterations: 60\n", "\niterations: 90\n"))
    write_report(RunFolder(longer), tmp_path / "page.html")
    page = str(Page(tmp_path / "page.html"))
    assert "the run has not ended" in page and "60 of 90 meta-iterations" in page and "test accuracy" not in page


def test_numbers_that_are_none(run: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(run, broken)
    records = [json.loads(line) for line in (broken / "metrics.jsonl").read_text().splitlines()]
    for record in records:
        if record["split"] == "val":
            record |= {"accuracy": None, "loss": None, "ci95": None} if record["iteration"] != 8 else {}
    (broken / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    result: dict[str, Any] = json.loads((broken / "result.json").read_text())
    result["test"] |= {"mean": None, "ci95": None, "loss": None}
    (broken / "result.json").write_text(json.dumps(result))
    write_report(RunFolder(broken), tmp_path / "page.html")
    page = Page(tmp_path / "page.html")
    assert "test result: not a number" in str(page) and "3-way 1-shot" in str(page)
    (marked,) = (page.rows[i] for i in page.marked)
    assert marked[0] == "8" and any(row[1] == "not a number" for row in page.rows if len(row) == 3)
    assert not math.isnan(float(marked[2]))


@pytest.mark.slow
def test_regression(tmp_path: Path) -> None:
    words = "train --preset sinusoid --iterations 6 --validate-every 2 --validate-tasks 4 --test-tasks 4 --device cpu"
    assert cli.main([*words.split(), "--quiet", "--no-tensorboard", "--out", str(tmp_path / "waves")]) == 0
    assert cli.main(["report", str(tmp_path / "waves"), "--out", str(tmp_path / "page.html")]) == 0
    page = Page(tmp_path / "page.html")
    assert "test mean squared error" in str(page) and "support and" in str(page)
    losses = {int(row[0]): float(row[1]) for row in page.rows if len(row) == 2 and row[0].isdecimal()}
    (marked,) = (page.rows[i] for i in page.marked)
    assert losses[int(marked[0])] == min(losses.values()) and list(losses) == [2, 4, 6]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("nowhere", "run folder: expected one with a config.yaml, found none in nowhere"),
        ("{run} --out {run}/no/page.html", "--out: expected a file in an existing folder"),
        ("{damaged}", "report: expected JSON in"),
        ("{listed}", "report: expected an object in"),
    ],
)
def test_mistakes(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: str, message: str) -> None:
    places = {"run": shlex.quote(str(run))}
    for name, content in (("damaged", "{"), ("listed", "[1]")):
        shutil.copytree(run, tmp_path / name)
        (tmp_path / name / "result.json").write_text(content)
        places[name] = shlex.quote(str(tmp_path / name))
    words = words.replace("{run}/no/page.html", str(tmp_path / "no" / "page.html"))
    assert cli.main(["report", *shlex.split(words.format(**places))]) == 2
    assert message in capsys.readouterr().err
