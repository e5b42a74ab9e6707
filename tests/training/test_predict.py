"""`signmaml predict`, and `evaluate` for other numbers of classes: what they print, write and refuse."""

from __future__ import annotations

import csv
import json
import shlex
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from helpers.cases.toy_images import write_class_folders
from signmaml import FewShotClassifier, checkpoint, cli
from signmaml.prediction import read_queries, read_support

TINY = shlex.split(
    "--ways 3 --queries 3 --tasks 2 --model conv2 --filters 4 --iterations 6 --validate-every 3 --validate-tasks 4 "
    "--test-tasks 6 --log-every 2 --checkpoint-every 2 --device cpu --no-tensorboard --quiet"
)


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> object:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SIGNMAML_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_class_folders(tmp_path_factory.mktemp("images"), classes=5, images=8)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, images: Path) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    assert cli.main(["train", "--data", "folder", "--data-root", str(images), "--out", str(folder), *TINY]) == 0
    return folder


@pytest.fixture
def sets(tmp_path: Path, images: Path) -> tuple[Path, Path]:
    """A support and a query folder of four classes, two and three images each."""
    for place in sorted((images / "test").iterdir())[:4]:
        files = sorted(place.iterdir())
        for part, chosen in (("support", files[:2]), ("query", files[2:5])):
            (tmp_path / part / place.name).mkdir(parents=True)
            for file in chosen:
                shutil.copy(file, tmp_path / part / place.name)
    return tmp_path / "support", tmp_path / "query"


def predict(run: Path, support: Path | None, *more: object) -> list[str]:
    given = [] if support is None else ["--support", str(support)]
    return ["predict", str(run), *given, *map(str, more)]


def test_the_table_and_what_was_done(
    run: Path, sets: tuple[Path, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    support, query = sets
    assert cli.main(predict(run, support, "--query", query)) == 0
    said = capsys.readouterr().out
    lines = said.splitlines()
    assert lines[0].split() == ["file", "class", "probability"]
    rows = [line.split() for line in lines[1:13]]
    classifier = FewShotClassifier(run)
    files = sorted(query.rglob("*.png"))
    shots = sorted(support.rglob("*.png"))
    classifier.fit(shots, [file.parent.name for file in shots])
    expected = classifier.predict_proba(files)
    assert [row[0] for row in rows] == [str(file) for file in files]
    assert [row[1] for row in rows] == list(classifier.predict(files))
    assert [row[2] for row in rows] == [f"{row.max():.3f}" for row in expected]
    right = sum(row[1] == file.parent.name for row, file in zip(rows, files, strict=True))
    for words in (
        "12 images, 4 classes", "head from prototypes", "sign-maml, 3 steps of 0.01", "BatchNorm on the support set",
        "images as 16 x 16 grey", f"{right} of 12 ({100 * right / 12:.1f}%) agree with the name of their folder",
    ):  # fmt: skip
        assert words in said, words


@pytest.mark.slow
def test_csv_json_and_sheet(
    run: Path, sets: tuple[Path, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    support, query = sets
    out = support.parent
    files = out / "a.csv", out / "a.json", out / "a.png"
    flags = [word for pair in zip(("--csv", "--json", "--sheet"), files, strict=True) for word in pair]
    assert cli.main(predict(run, support, "--query", query, *flags)) == 0
    table = capsys.readouterr().out
    rows = list(csv.DictReader(files[0].read_text().splitlines()))
    report = json.loads(files[1].read_text())
    classes = sorted(place.name for place in support.iterdir())
    assert report["classes"] == classes and len(rows) == len(report["images"]) == 12
    for row, entry in zip(rows, report["images"], strict=True):
        assert (row["file"], row["class"], row["folder's class"]) == (entry["file"], entry["class"], entry["folder"])
        assert entry["file"] in table and Path(entry["file"]).is_file()
        assert float(row["probability"]) == pytest.approx(entry["probability"], rel=1e-5)
        assert sum(entry["probabilities"].values()) == pytest.approx(1)
        assert max(entry["probabilities"], key=entry["probabilities"].get) == entry["class"]
        assert [float(row[f"p({name})"]) for name in classes] == pytest.approx(
            list(entry["probabilities"].values()), rel=1e-5
        )
    with Image.open(files[2]) as sheet:
        pixels = np.asarray(sheet.convert("L"))
    assert pixels.shape[0] > 400 and pixels.std() > 10
    for flag, parse in (("--json", json.loads), ("--csv", lambda text: list(csv.reader(text.splitlines())))):
        assert cli.main(predict(run, support, "--query", query, flag, "-")) == 0
        assert parse(capsys.readouterr().out)


def test_single_files_archives_and_folders_mix(
    run: Path, sets: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    support, query = sets
    packed = support.parent / "support.zip"
    with zipfile.ZipFile(packed, "w") as archive:
        for file in support.rglob("*.png"):
            archive.write(file, f"top/{file.relative_to(support)}")
    one = next(query.rglob("*.png"))
    assert cli.main(predict(run, packed, "--query", one, query, "--json", "-")) == 0
    from_zip = json.loads(capsys.readouterr().out)
    assert len(from_zip["images"]) == 13 and "folder" not in from_zip["images"][0]
    assert cli.main(predict(run, support, "--query", one, query, "--json", "-")) == 0
    assert json.loads(capsys.readouterr().out)["images"] == from_zip["images"]
    assert cli.main(predict(run, support, "--query", packed, "--json", "-")) == 0
    assert len(json.loads(capsys.readouterr().out)["images"]) == 8


@pytest.mark.slow
def test_options_change_how_it_is_done(run: Path, sets: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    support, query = sets
    shutil.rmtree(sorted(support.iterdir())[-1])

    def found(*more: str) -> dict:
        assert cli.main(predict(run, support, "--query", query, "--json", "-", *more)) == 0
        return json.loads(capsys.readouterr().out)

    plain = found()
    assert plain["head"] == "head as trained"  # three classes, as in training
    changed = {
        "head": found("--head", "prototypes"),
        "batch_norm": found("--transductive"),
        "examples": found("--invert"),
        "steps": found("--inner-lr", "0.1", "--test-steps", "5"),
    }
    for name, other in changed.items():
        assert other[name] != plain[name] and other["images"] != plain["images"], name
    assert found("--no-invert")["images"] == plain["images"] == found("--checkpoint", "best")["images"]


@pytest.mark.slow
def test_a_saved_learner_answers_again(run: Path, sets: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    support, query = sets
    saved = support.parent / "adapted.safetensors"
    assert cli.main(predict(run, support, "--query", query, "--json", "-", "--save", saved)) == 0
    first = json.loads(capsys.readouterr().out)
    sheet = support.parent / "again.png"
    assert cli.main(predict(saved, None, "--query", query, "--json", "-", "--sheet", sheet)) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["images"] == first["images"] and sheet.is_file()
    assert again["head"] == first["head"] and again["batch_norm"] == first["batch_norm"]
    for words, name in ((["--support", support], "support"), (["--transductive"], "transductive"),
                        (["--inner-lr", "1"], "inner-lr"), (["--head", "trained"], "head"), (["--no-invert"], "invert"),
                        (["--checkpoint", "last"], "checkpoint")):  # fmt: skip
        assert cli.main(predict(saved, None, "--query", query, *words)) == 2
        assert f"--{name}: expected none with an adapted learner" in capsys.readouterr().err


def test_the_adapted_network_is_exported(run: Path, sets: tuple[Path, Path]) -> None:
    support, query = sets
    place = support.parent / "net.safetensors"
    assert cli.main(predict(run, support, "--query", query, "--export", place)) == 0
    tensors, metadata = checkpoint.load(place, kind="weights")
    files, names = _shots(support)
    own = FewShotClassifier(run).fit(files, names).module().state_dict()
    assert metadata["classes"] == sorted(set(names)) and tensors.keys() == own.keys()


def test_query_images_that_are_support_images_are_reported(
    run: Path, sets: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(predict(run, sets[0], "--query", sets[0])) == 0
    assert "8 of 8 query images are support images too" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("{run} --query {query}", "--support: expected a folder with examples of each class, found none"),
        (
            "{run} --support nowhere --query {query}",
            "--support: expected a folder or a .zip archive, found nothing at nowhere",
        ),
        (
            "{run} --support {query} --query nowhere",
            "--query: expected a folder or a .zip archive, found nothing at nowhere",
        ),
        ("{run} --support {one} --query {query}", "found 3 images directly in it"),
        ("{run} --support {images} --query {query}", "found folders of splits: test, train, val; give one of them"),
        ("{run} --support {query} --query {text}", "--query: expected an image, a folder or a .zip, found"),
        ("{run} --support {query} --query {empty}", "--query: expected images in"),
        ("{run} --support {query} --query {bad}", "cannot decode"),
        ("{run} --support {query} --query {query} --csv - --json -", "--csv, --json: expected at most one of them"),
        ("{run} --support {query} --query {query} --export {empty}/a.foo", "export: expected a name ending in"),
        (
            "{run} --support {query} --query {query} --csv {empty}/a --json {empty}/a",
            "a file of its own for each result",
        ),
        ("{run} --support {query} --query {query} --head trained", "more than the 3 classes of the trained head"),
        ("{empty} --support {query} --query {query}", "expected best.safetensors in"),
        ("{text} --support {query} --query {query}", "expected a complete safetensors file"),
        ("{run} --support {alone} --query {query}", "at least 2 classes in"),
        ("{run} --support {query} --query {query} --inner-lr -3", "inner_lr: expected a number > 0, found -3.0"),
        (
            "{run} --support {query} --query {query} --sheet {empty}/no/a.png",
            "--sheet: expected a file in an existing folder",
        ),
    ],
)
def test_mistakes_get_one_clear_line(
    run: Path, sets: tuple[Path, Path], images: Path, capsys: pytest.CaptureFixture[str], words: str, message: str
) -> None:
    place = sets[0].parent
    places = {name: place / name for name in ("empty", "alone")}
    places["empty"].mkdir()
    one = sorted(sets[1].iterdir())[0]
    shutil.copytree(one, places["alone"] / "a")
    text, bad = place / "notes.txt", place / "bad.png"
    text.write_text("no image")
    bad.write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    line = words.format(run=run, query=sets[1], one=one, images=images, text=text, bad=bad, **places)
    assert cli.main(["predict", *shlex.split(line)]) == 2
    said = capsys.readouterr().err.strip()
    assert message in said and len(said.splitlines()) == 1


def test_a_run_of_regression_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = "--preset sinusoid --iterations 2 --validate-every 0 --test-tasks 0 --device cpu --no-tensorboard --quiet"
    assert cli.main(["train", *shlex.split(words), "--out", str(tmp_path / "waves")]) == 0
    capsys.readouterr()
    assert cli.main(predict(tmp_path / "waves", tmp_path, "--query", tmp_path)) == 2
    assert "predict: expected a learner of images" in capsys.readouterr().err


def test_evaluate_has_no_heads_for_regression(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = "--preset sinusoid --iterations 2 --validate-every 0 --test-tasks 0 --device cpu --no-tensorboard --quiet"
    assert cli.main(["train", *shlex.split(words), "--out", str(tmp_path / "waves")]) == 0
    assert cli.main(["evaluate", str(tmp_path / "waves"), "--tasks", "2", "--head", "prototypes"]) == 2
    assert "--head: expected 'auto' for regression" in capsys.readouterr().err


@pytest.mark.slow
def test_a_saved_learner_says_how_it_was_adapted(
    run: Path, sets: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    support, query = sets
    saved = support.parent / "adapted.safetensors"
    words = ["--query", query, "--json", "-"]
    assert cli.main(predict(run, support, *words, "--test-steps", "9", "--save", saved)) == 0
    first = json.loads(capsys.readouterr().out)
    assert cli.main(predict(saved, None, *words)) == 0
    again = json.loads(capsys.readouterr().out)
    assert first["steps"] == again["steps"] == "sign-maml, 9 steps of 0.01" and first["images"] == again["images"]


def test_sets_are_read_in_order(sets: tuple[Path, Path], run: Path) -> None:
    example = FewShotClassifier(run).fit(*_shots(sets[0])).example()
    support = read_support(sets[0], example)
    assert support.labels == sorted(support.labels) and len(support.files) == len(support.labels) == 8
    queries = read_queries([str(sets[1])], example)
    assert queries.names == [str(file) for file in sorted(sets[1].rglob("*.png"))]
    torch.testing.assert_close(queries.inputs, example.inputs(queries.files))


def _shots(support: Path) -> tuple[list[Path], list[str]]:
    files = sorted(support.rglob("*.png"))
    return files, [file.parent.name for file in files]


# ---- evaluate


@pytest.mark.parametrize(
    ("words", "head"),
    [("--ways 3", None), ("--ways 5", "prototypes"), ("--ways 2", "prototypes"), ("--ways 2 --head trained", None),
     ("--ways 3 --head prototypes", "prototypes")],
)  # fmt: skip
def test_evaluate_serves_any_number_of_classes(
    run: Path, capsys: pytest.CaptureFixture[str], words: str, head: str | None
) -> None:
    line = ["evaluate", str(run), "--tasks", "4", *shlex.split(words)]
    assert cli.main([*line, "--json", "-"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["head"] == (head or "trained") and result["ways"] == int(words.split()[1])
    assert cli.main(line) == 0
    said = capsys.readouterr().out
    assert (f"head from {head}" in said) if head else ("head" not in said)


def test_evaluate_with_prototypes_is_what_the_classifier_does(
    run: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from signmaml.data import folder
    from signmaml.episodes import EpisodeSampler

    words = ["evaluate", str(run), "--tasks", "3", "--ways", "4", "--batch-norm", "support", "--json", "-"]
    assert cli.main(words) == 0
    found = json.loads(capsys.readouterr().out)
    sampler = EpisodeSampler(folder(images, "test", progress=False), ways=4, shots=1, queries=3, tasks=3)
    shares = []
    for task in range(3):
        support_x, support_y, query_x, query_y = (part[0] for part in sampler.draw_tasks(task, 1))
        classifier = FewShotClassifier(run, device="cpu").fit(support_x, support_y)
        shares.append(classifier.score(query_x, query_y))
    assert found["mean"] == pytest.approx(np.mean(shares), abs=1e-6)


def test_the_trained_head_has_no_rows_for_more_classes(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["evaluate", str(run), "--ways", "4", "--head", "trained"]) == 2
    assert "more than the 3 classes of the trained head" in capsys.readouterr().err
