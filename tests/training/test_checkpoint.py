"""Files that survive crashes, and checkpoints that refuse what does not fit."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from signmaml import checkpoint, files
from signmaml.models import MLP


def test_weights_round_trip_is_exact(tmp_path: Path) -> None:
    model, path = MLP(3, 2), tmp_path / "w.safetensors"
    checkpoint.save_weights(model, path, {"note": 0.1})
    other = MLP(3, 2)
    assert checkpoint.load_weights(other, path)["note"] == 0.1
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert set(load_file(path)) == set(model.state_dict())  # any safetensors reader can use it


def test_weights_of_another_program_load(tmp_path: Path) -> None:
    model, path = MLP(3, 2), tmp_path / "w.safetensors"
    save_file(model.state_dict(), path)
    other = MLP(3, 2)
    assert checkpoint.load_weights(other, path) == {}
    assert torch.equal(other.classifier.weight, model.classifier.weight)
    with pytest.raises(ValueError, match="of another program"):
        checkpoint.load(path, kind="training")


def test_buffers_scalars_and_tied_parameters_survive(tmp_path: Path) -> None:
    def tied() -> nn.Module:
        model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
        model[2].weight = model[0].weight
        return model

    model, path = tied(), tmp_path / "w.safetensors"
    model(torch.randn(8, 4))
    checkpoint.save_weights(model, path)
    other = tied()
    checkpoint.load_weights(other, path)
    assert other[1].num_batches_tracked == 1
    assert torch.equal(other[1].running_mean, model[1].running_mean)
    assert torch.equal(other[0].weight, model[0].weight) and other[2].weight is other[0].weight


def test_differences_are_listed_and_nothing_changes(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    model = MLP(3, 2)
    tensors = model.state_dict()
    del tensors["classifier.bias"]
    tensors["surplus"] = torch.zeros(1)
    tensors["features.0.bias"] = tensors["features.0.bias"].double()
    tensors["features.1.weight"] = torch.zeros(2, 2)
    checkpoint.save(path, tensors, kind="weights", metadata={})
    other = MLP(3, 2)
    before = [p.clone() for p in other.parameters()]
    with pytest.raises(ValueError) as error:
        checkpoint.load_weights(other, path)
    for words in (
        "nothing for 'classifier.bias'",
        "unexpected 'surplus'",
        "'features.0.bias' is float64 [40], the model's is float32 [40]",
        "'features.1.weight' is float32 [2, 2], the model's is float32 [40, 40]",
    ):
        assert words in str(error.value)
    assert all(torch.equal(a, b) for a, b in zip(before, other.parameters(), strict=True))


def test_every_truncation_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    checkpoint.save_weights(MLP(3, 2, hidden=(4,)), path)
    content = path.read_bytes()
    for length in (0, 1, 7, 8, 20, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match="truncated or of another format"):
            checkpoint.load(path)


@pytest.mark.parametrize("content", [b"PK\x03\x04 a zip file", b"\x80\x02}q\x00.", os.urandom(500), b"\xff" * 64])
def test_foreign_files_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="expected a complete safetensors file"):
        checkpoint.load(path)


def test_kind_and_version_are_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.safetensors"
    checkpoint.save(path, {"a": torch.zeros(1)}, kind="training", metadata={})
    with pytest.raises(ValueError, match="expected a weights file, found a training file"):
        checkpoint.load(path, kind="weights")
    with pytest.raises(ValueError, match="expected a weights file, found a training file"):
        checkpoint.load_weights(MLP(1, 1), path)
    monkeypatch.setattr(checkpoint, "FORMAT_VERSION", 2)
    with pytest.raises(ValueError, match="expected format version 2, found 1"):
        checkpoint.load(path)
    save_file({"a": torch.zeros(1)}, path, metadata={"signmaml": "{not json"})
    with pytest.raises(ValueError, match="damaged"):
        checkpoint.load(path)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="found nothing at"):
        checkpoint.load(tmp_path / "none.safetensors")


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_a_failed_write_leaves_the_previous_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    path = tmp_path / "w.safetensors"
    checkpoint.save_weights(MLP(1, 1), path)
    good = path.read_bytes()

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, function, fail)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save_weights(MLP(1, 1), path)
    monkeypatch.undo()
    assert path.read_bytes() == good
    assert [p.name for p in tmp_path.iterdir()] == ["w.safetensors"]


def test_text_is_written_as_utf8(tmp_path: Path) -> None:
    files.write_atomically(tmp_path / "t", "\u03b1 = 0.01\n")
    assert (tmp_path / "t").read_bytes() == b"\xce\xb1 = 0.01\n"


def test_leftovers_of_killed_writers_go(tmp_path: Path) -> None:
    (tmp_path / ".last.safetensors.123.tmp").touch()
    (tmp_path / "keep.txt").touch()
    files.remove_leftovers(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["keep.txt"]


def test_a_folder_has_one_owner_until_it_dies(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib; from signmaml import files\n"
        f"with files.exclusive(pathlib.Path({str(tmp_path)!r})):\n"
        "    print('held', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdout is not None and holder.stdin is not None
    assert holder.stdout.readline() == b"held\n"
    with pytest.raises(BlockingIOError, match=f"in use by process {holder.pid}"), files.exclusive(tmp_path):
        pass
    holder.kill()
    holder.wait()
    with files.exclusive(tmp_path):
        pass
    holder.stdin.close()
    holder.stdout.close()


def test_first_free_folder(tmp_path: Path) -> None:
    names = [files.first_free(tmp_path / "runs" / "toy").name for _ in range(3)]
    assert names == ["toy", "toy-2", "toy-3"]
