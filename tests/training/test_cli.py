"""The command `signmaml`, mostly inside this process: what it prints, writes, and returns."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.cases.toy_images import write_class_folders
from signmaml import checkpoint, cli
from signmaml.config import TrainConfig
from signmaml.options import given_fields
from signmaml.presets import PRESETS
from signmaml.runs import RunFolder

TINY = shlex.split(
    "--ways 3 --queries 3 --tasks 2 --model mlp --hidden 16 --iterations 6 --validate-every 3 --validate-tasks 4 "
    "--test-tasks 6 --log-every 2 --checkpoint-every 2 --device cpu --no-tensorboard"
)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_class_folders(tmp_path_factory.mktemp("images"), classes=5, images=8)


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> object:
    """Decoded images are cached in a folder of this module's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SIGNMAML_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, images: Path) -> Path:
    """A finished run."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    assert cli.main(train_words(images, folder)) == 0
    return folder


def train_words(images: Path, out: Path, *more: str) -> list[str]:
    return ["train", "--data", "folder", "--data-root", str(images), "--out", str(out), *TINY, *more]


def test_train_says_what_it_will_do_and_what_it_did(
    tmp_path: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(train_words(images, tmp_path / "run", "--inner_lr=0.02")) == 0
    said = capsys.readouterr().out
    for words in (
        "data     folder: 3-way 1-shot", "         train 5 classes, 40 images", "         test 5 classes, ",
        "model    MLP, 4,163 parameters", "sign-maml: 3 inner steps of 0.02",
        "backend  cpu, mlp (", "all tasks in one native call", "device   cpu", f"folder   {tmp_path / 'run'}",
        "iteration 3/6", "test accuracy", "95% t-interval",
        "6 tasks", "trained 6 iterations in 0:0", "best validation accuracy", "best.safetensors", "curves.png",
    ):  # fmt: skip
        assert words in said, words
    assert RunFolder(tmp_path / "run").read_config().inner_lr == 0.02
    assert (tmp_path / "run" / "episode.png").is_file()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "name"),
    [
        ("--model resnet12-4-4-6-8", "ResNet12, 3,"),
        ("--model conv3-4-6-8 --norm group --activation silu", "Conv4, "),
        ("--model conv2 --filters 4 --norm none --pooling stride", "Conv4, "),
        ("--model mlp --activation tanh", "MLP, 4,163 parameters"),
    ],
)
def test_other_networks_from_training_to_evaluation(
    tmp_path: Path, images: Path, capsys: pytest.CaptureFixture[str], words: str, name: str
) -> None:
    assert cli.main(train_words(images, tmp_path / "run", *words.split())) == 0
    assert f"model    {name}" in capsys.readouterr().out
    stored = json.loads((tmp_path / "run" / "result.json").read_text())["test"]
    for source in (tmp_path / "run", tmp_path / "run" / "best.safetensors"):
        assert cli.main(["evaluate", str(source), "--tasks", "6", "--json", "-"]) == 0
        assert json.loads(capsys.readouterr().out) == stored


def test_quiet_prints_the_result_alone(tmp_path: Path, images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(train_words(images, tmp_path / "run", "--quiet")) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("test accuracy") and "iteration 3/6" not in captured.out
    assert captured.err == ""


def test_configuration_comes_from_preset_then_file_then_options(tmp_path: Path) -> None:
    (tmp_path / "own.toml").write_text("shots = 4\nqueries = 6\n")
    words = shlex.split(f"train --preset sinusoid --config {tmp_path / 'own.toml'} --queries 7 --hidden 3 4")
    from signmaml import commands

    config, out = commands.training_config(cli.build_parser().parse_args(words))
    assert out is None
    assert (config.data, config.shots, config.queries, config.hidden) == ("sinusoid", 4, 7, (3, 4))
    assert config.inner_steps == PRESETS["sinusoid"]["inner_steps"]


def test_every_field_has_an_option() -> None:
    parsed = cli.build_parser().parse_args(
        shlex.split("train --rotations --no-tensorboard --test-steps none --adapt a.* b.* --seed 4 --outer-lr 1e-4")
    )
    given = given_fields(parsed)
    assert given == {
        "rotations": True, "tensorboard": False, "test_steps": None, "adapt": ["a.*", "b.*"], "seed": 4,
        "outer_lr": 1e-4,
    }  # fmt: skip
    for name in ("adapt", "augment"):
        assert given_fields(cli.build_parser().parse_args(["train", f"--{name}", "none"])) == {name: None}
    assert TrainConfig.from_dict(given)


def test_help_is_fast_and_complete() -> None:
    """It does not import torch, and describes every field of the configuration."""
    code = (
        "import sys; from signmaml import cli\n"
        "try: cli.main(['train', '--help', 'all'])\n"
        "except SystemExit as end: print('code', end.code, 'torch' in sys.modules)"
    )
    environment = {**os.environ, "COLUMNS": "200"}
    shown = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    ).stdout
    assert shown.endswith("code 0 False\n")
    for name in TrainConfig.__dataclass_fields__:
        assert f"--{name.replace('_', '-')} " in shown, name


def shown_by(words: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as end:
        cli.main(words.split())
    assert end.value.code == 0
    return capsys.readouterr().out


@pytest.mark.slow
def test_help_of_train_fits_a_screen(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The overview names every option once, and every group explains its own."""
    monkeypatch.setenv("COLUMNS", "80")
    overview = shown_by("train --help", capsys)
    assert len(overview.splitlines()) < 40 and shown_by("train -h", capsys) == overview
    parser = cli.build_parser()._commands()["train"]
    listed = overview.split("others:")[0]
    assert sorted(re.findall(r"--[a-z-]+(?=[,\n])", listed)) == sorted(
        action.option_strings[0] for group in parser.named_groups.values() for action in group._group_actions
    )
    assert {f"--{name.replace('_', '-')}" for name in TrainConfig.__dataclass_fields__} <= set(
        re.findall(r"--[a-z-]+(?=[,\n])", listed)
    )
    for name, group in parser.named_groups.items():
        text = shown_by(f"train --help {name}", capsys)
        assert len(text.splitlines()) < 45, name
        assert all(f"\n  {action.option_strings[0]}" in text for action in group._group_actions)


def test_a_group_of_help_that_does_not_exist(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["train", "--help", "oter"])
    assert end.value.code == 2
    assert "--help: expected one of start, processes, data, " in (said := capsys.readouterr().err)
    assert "found oter (did you mean outer?)" in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("train --inner-rl 3", "there is no --inner-rl (did you mean --inner-lr?)"),
        ("train --lr 3", "there is no --lr (did you mean --outer-lr or --inner-lr?)"),
        ("train --meta-lr 3", "there is no --meta-lr (did you mean --outer-lr?)"),
        ("train --epochs 3", "there is no --epochs (did you mean --iterations?)"),
        ("train --batch-size=3", "there is no --batch-size=3 (did you mean --tasks?)"),
        ("train --zzz 3", "there is no --zzz\n"),
        ("train --alpha-maml", "there is no --alpha-maml (did you mean --adapt-rates?)"),
        ("evaluate r --epochs 3", "there is no --epochs\n"),
        ("evaluate r --filters 3", "there is no --filters here; it belongs behind train\n"),
        ("--ways=3 train", "there is no --ways=3 here; it belongs behind train or evaluate\n"),
        ("train --device 99", "found 'cuda:99'"),
        ("train --device gpu", "device: expected auto, cpu, cuda, cuda:INDEX or INDEX, found 'gpu'"),
        ("train --ways 5000", "ways: expected an integer in 2..735 (classes in glyphs/train), found 5000"),
        ("train --ways one", "ways: expected an integer, found 'one'"),
        ("train --method sign", "(did you mean 'sign-maml'?)"),
        ("train --model resnet18", "'resnet12-W-W-W-W', 'mlp', found 'resnet18' (did you mean 'resnet12'?)"),
        ("train --model conv4-64-96", "model: expected widths of blocks, 1 or 4 of them, found 2 in 'conv4-64-96'"),
        ("train --model mlp --norm group", "norm: expected 'batch'"),
        ("train --backbone conv4", "there is no --backbone (did you mean --model?)"),
        ("train --data nothing", "'nothing'"),
        ("train --data folder", "data_root: expected the folder"),
        ("train --data folder --data-root /nowhere", "/nowhere"),
        ("train --config nowhere.yaml", "found nothing at nowhere.yaml"),
        ("train --resume nowhere", "config.yaml"),
        ("train --resume nowhere --preset omniglot", "--resume: expected no --preset"),
        ("train --device cuda:77", "device: expected"),
        ("evaluate nowhere", "nowhere"),
        ("evaluate nowhere --tasks 0", "--tasks: expected an integer >= 1, found 0"),
        ("evaluate nowhere --json .", "--json: expected a file, found the folder ."),
        ("evaluate nowhere --json no/a.json", "--json: expected a file in an existing folder, found none at no/a.json"),
        ("evaluate nowhere --json /dev/null", "--json: expected an ordinary file, found the special file /dev/null"),
        ("plot nowhere", "metrics.jsonl"),
        ("plot nowhere --task -1", "--task: expected an integer >= 0, found -1"),
        ("plot nowhere --out .", "--out: expected a file, found the folder ."),
        ("data show glyphs --out no/a.png", "--out: expected a file in an existing folder, found none at no/a.png"),
        ("fly", "fly"),
        ("data fetch nothing", "nothing"),
        ("", "COMMAND"),
    ],
)
def test_user_errors_are_one_line_and_code_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        code = cli.main(words.split())
    except SystemExit as end:  # raised by argparse
        code = end.code if isinstance(end.code, int) else -1
    captured = capsys.readouterr()
    assert code == 2
    assert message in captured.err and "Traceback" not in captured.err
    assert not list(tmp_path.iterdir())  # no file was created


def test_other_errors_are_code_1_and_debug_shows_where(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("the unexpected")

    monkeypatch.setattr("signmaml.trainer.MetaTrainer._train_step", broken)
    assert cli.main(train_words(images, tmp_path / "a")) == 1
    said = capsys.readouterr().err
    assert "RuntimeError: the unexpected" in said and "--debug" in said and "Traceback" not in said
    assert cli.main(train_words(images, tmp_path / "b", "--debug")) == 1
    said = capsys.readouterr().err
    assert "Traceback" in said and "in broken" in said


@pytest.mark.slow
def test_ctrl_c_is_130(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import signal

    from signmaml.trainer import MetaTrainer

    step = MetaTrainer._train_step

    def step_and_interrupt(trainer: MetaTrainer) -> None:
        step(trainer)
        if trainer.iteration == 3:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(MetaTrainer, "_train_step", step_and_interrupt)
    folder = tmp_path / "run"
    assert cli.main(train_words(images, folder)) == 130
    said = capsys.readouterr().err
    assert "stopped after iteration 3 of 6" in said and f"signmaml train --resume {folder}" in said
    monkeypatch.undo()
    assert cli.main(["train", "--resume", str(folder)]) == 0
    assert checkpoint.load(folder / "last.safetensors")[1]["iteration"] == 6


@pytest.mark.slow
def test_a_run_folder_is_not_overwritten_unasked(run: Path, images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(train_words(images, run)) == 2
    assert "--overwrite" in capsys.readouterr().err


def test_resume_refuses_another_configuration(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--resume", str(run), "--inner-lr", "0.5"]) == 2
    assert "inner_lr: 0.01 -> 0.5" in capsys.readouterr().err


@pytest.mark.slow
def test_run_folders_are_numbered(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = [word for word in train_words(images, tmp_path) if word not in ("--out", str(tmp_path))]
    for _ in range(2):
        assert cli.main([*words, "--quiet"]) == 0
    first, second = sorted(path.name for path in (tmp_path / "runs").iterdir())
    assert second == f"{first}-2"


def test_evaluate_repeats_the_test_of_the_run(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stored = json.loads((run / "result.json").read_text())["test"]
    assert cli.main(["evaluate", str(run), "--tasks", "6", "--json", str(tmp_path / "e.json")]) == 0
    said = capsys.readouterr().out
    assert "test accuracy" in said and "protocol: 3-way 1-shot, 3 queries a class, folder/test" in said
    assert json.loads((tmp_path / "e.json").read_text()) == stored
    assert cli.main(["evaluate", str(run / "best.safetensors"), "--tasks", "6", "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out) == stored


@pytest.mark.slow
def test_rates_that_are_adapted_from_training_to_evaluation(
    tmp_path: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = shlex.split("--adapt-rates alpha-maml --inner-hyper-lr 1e-3 --outer-optimizer sgd --outer-lr 0.1")
    assert cli.main(train_words(images, tmp_path / "run", *words)) == 0
    assert "SGD 0.1 cosine, rates adapted online (alpha-maml)" in capsys.readouterr().out
    stored = json.loads((tmp_path / "run" / "result.json").read_text())["test"]
    assert isinstance(stored["inner_lr"], float) and stored["inner_lr"] != pytest.approx(0.01, rel=1e-3)
    for source in (tmp_path / "run", tmp_path / "run" / "best.safetensors"):
        assert cli.main(["evaluate", str(source), "--tasks", "6", "--json", "-"]) == 0
        assert json.loads(capsys.readouterr().out) == stored
    _, last = checkpoint.load(tmp_path / "run" / "last.safetensors")
    words = ["evaluate", str(tmp_path / "run"), "--checkpoint", "last", "--tasks", "6", "--json", "-"]
    assert cli.main(words) == 0
    assert json.loads(capsys.readouterr().out)["inner_lr"] == last["inner_rates"]["start"]


def test_evaluate_another_protocol(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["evaluate", str(run), "--checkpoint", "last", "--split", "val", "--tasks", "5", "--queries", "2"]
    words += ["--ways", "2", "--shots", "3", "--test-steps", "7", "--inner-lr", "0.005", "--seed", "8", "--json", "-"]
    assert cli.main(words) == 0
    found = json.loads(capsys.readouterr().out)
    expected = {
        "split": "val", "tasks": 5, "queries": 2, "ways": 2, "shots": 3, "test_steps": 7, "inner_lr": 0.005, "seed": 8,
    }  # fmt: skip
    assert {name: found[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--ways 4 --head trained", "more than the 3 classes"),
        ("--tasks 0", "--tasks"),
        ("--shots 9", "at least 12 images"),
    ],
)
def test_evaluate_refuses(run: Path, capsys: pytest.CaptureFixture[str], words: str, message: str) -> None:
    assert cli.main(["evaluate", str(run), *words.split()]) == 2
    assert message in capsys.readouterr().err


def test_plot_draws_again_and_compares(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("curves.png", "episode.png"):
        (run / name).unlink()
    assert cli.main(["plot", str(run), "--task", "3"]) == 0
    assert (run / "curves.png").is_file() and (run / "episode.png").is_file()
    assert cli.main(["plot", str(run), str(run), "--out", str(tmp_path / "both.png")]) == 0
    assert (tmp_path / "both.png").is_file()
    assert str(tmp_path / "both.png") in capsys.readouterr().out


def test_data_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["data", "list"]) == 0
    said = capsys.readouterr().out
    for name in ("glyphs", "omniglot", "fc100", "cifar_fs", "mini_imagenet", "folder", "sinusoid"):
        assert name in said


@pytest.mark.slow
def test_data_of_a_folder(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    root = ["--data-root", str(images)]
    assert cli.main(["data", "fetch", "folder", *root]) == 0
    assert "folder/test: 5 classes, 40 images" in capsys.readouterr().out
    assert cli.main(["data", "verify", "folder", *root]) == 0
    assert "complete" in capsys.readouterr().out
    assert cli.main(["data", "show", "folder", *root, "--split", "val"]) == 0
    assert (tmp_path / "folder-val.png").is_file()


def test_data_verify_finds_damage(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = write_class_folders(tmp_path / "broken", classes=3, images=2)
    picture = next((broken / "val").glob("*/00.png"))
    picture.write_bytes(picture.read_bytes()[:-30])
    assert cli.main(["data", "verify", "folder", "--data-root", str(broken)]) == 1
    assert picture.name in capsys.readouterr().out


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info"]) == 0
    assert "torch" in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out.startswith("signmaml ")


@pytest.mark.slow
def test_as_a_program(tmp_path: Path, images: Path) -> None:
    """The console script's exit code, and no traceback, from a process of its own."""
    words = ["train", "--data", "folder", "--data-root", str(images), "--ways", "99"]
    command = [sys.executable, "-m", "signmaml.cli", *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("signmaml: ways: expected") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("shtab", reason="pip install '.[test]' brings shtab")
    assert cli.main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert all(word in script for word in ("predict", "--inner-lr", "--transductive", "signmaml"))


def test_bash_completes_commands_and_options(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("shtab", reason="pip install '.[test]' brings shtab")
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("there is no bash")
    cli.main(["completion", "bash"])
    script = tmp_path / "complete.sh"
    script.write_text(capsys.readouterr().out)

    def completed(*words: str) -> set[str]:
        typed = " ".join(map(shlex.quote, words))
        asked = (
            f"source {shlex.quote(str(script))}; COMP_WORDS=({typed}); COMP_CWORD={len(words) - 1}; _shtab_signmaml; "
        )
        line = asked + 'printf "%s\\n" "${COMPREPLY[@]}"'
        return set(subprocess.run([bash, "-c", line], capture_output=True, text=True, check=True).stdout.split())

    assert completed("signmaml", "pre") == {"predict"}
    assert completed("signmaml", "predict", "--trans") == {"--transductive"}
    assert "--inner-lr" in completed("signmaml", "train", "--inner")


def test_completion_without_shtab(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert cli.main(["completion", "bash"]) == 2
    assert "expected the package shtab, found none; pip install shtab" in capsys.readouterr().err
