"""Malicious files: nothing in them is executed, nothing is written outside, and the message names the file."""

from __future__ import annotations

import io
import json
import os
import pickle
import stat
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from helpers.programs.toy_run import toy_trainer
from signmaml import checkpoint
from signmaml import config as configs
from signmaml.cli import main
from signmaml.data import fc100, folder, mini_imagenet
from signmaml.models import MLP
from signmaml.runs import RunFolder


class Bomb:
    """Unpickling it creates a file called `executed` in the current folder."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, ("touch executed",)


@pytest.fixture(autouse=True)
def nothing_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Checks after every test that loading a file has run no command."""
    place = tmp_path / "place"
    place.mkdir()
    monkeypatch.chdir(place)
    monkeypatch.setenv("SIGNMAML_CACHE", str(tmp_path / "cache"))
    yield
    assert not (place / "executed").exists(), "a file's content was executed"


def png(width: int = 8, height: int = 8) -> bytes:
    """A PNG that is valid except for its size: it has the data of one row only."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(width + 1)))
        + chunk(b"IEND", b"")
    )


def good_png() -> bytes:
    buffer = io.BytesIO()
    Image.linear_gradient("L").resize((8, 8)).save(buffer, "PNG")
    return buffer.getvalue()


def load(root: Path) -> Any:
    return folder(root, "train", image_size=8, progress=False)


def tree(root: Path, content: bytes) -> Path:
    for name in "abc":
        (root / name).mkdir(parents=True)
        (root / name / "1.png").write_bytes(content)
    return root


# ---------------------------------------------------------------------------------------------------------------------
# Pickles


def pickles() -> dict[str, bytes]:
    npz, npy, zipped = io.BytesIO(), io.BytesIO(), io.BytesIO()
    np.savez(npz, images=np.array([Bomb()], dtype=object))
    np.save(npy, np.array([Bomb()], dtype=object), allow_pickle=True)
    torch.save({"weight": Bomb()}, zipped)
    return {
        "pickle.pt": pickle.dumps(Bomb()),
        "torch.pt": zipped.getvalue(),
        "npz.npz": npz.getvalue(),
        "npy.npy": npy.getvalue(),
    }


@pytest.mark.parametrize("name", pickles())
def test_pickles_are_no_weights(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(pickles()[name])
    model = MLP(3, 2)
    with pytest.raises(ValueError, match=f"expected a complete safetensors file, found .*{name}"):
        checkpoint.load_weights(model, path)
    assert main(["evaluate", str(path)]) == 2


@pytest.mark.parametrize("name", pickles())
def test_pickles_are_no_state_to_resume(tmp_path: Path, name: str) -> None:
    toy_trainer(tmp_path / "run", 2).fit()
    (tmp_path / "run" / "last.safetensors").write_bytes(pickles()[name])
    with pytest.raises(ValueError, match="expected a complete safetensors file"):
        toy_trainer(tmp_path / "run", 4).fit(resume=True)


@pytest.mark.parametrize("name", pickles())
def test_pickles_are_no_images(tmp_path: Path, name: str) -> None:
    tree(tmp_path / "set", pickles()[name])
    with pytest.raises(ValueError, match=r"cannot decode 'a/1.png'|cannot decode"):
        load(tmp_path / "set")
    # Without an image's suffix they are left out.
    other = tree(tmp_path / "other", good_png())
    (other / "a" / name).write_bytes(pickles()[name])
    with pytest.warns(UserWarning, match="1 files are not images and left out"):
        load(other)


def test_a_pickle_in_the_place_of_cifars_is_refused_by_its_checksum(tmp_path: Path) -> None:
    release = tmp_path / "cifar-100-python"
    release.mkdir()
    for name in ("train", "test", "meta"):
        (release / name).write_bytes(pickle.dumps(Bomb()))
    with pytest.raises((ValueError, ImportError), match=r"refused|torchvision"):
        fc100("train", root=tmp_path, progress=False)


def test_a_pickle_of_mini_imagenet_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "mini-imagenet-cache-train.pkl").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ValueError, match="mini_imagenet"):
        mini_imagenet("train", root=tmp_path, progress=False)


# ---------------------------------------------------------------------------------------------------------------------
# Archives


def archive(
    path: Path, members: dict[str, bytes], change: Callable[[zipfile.ZipInfo], None] = lambda info: None
) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in members.items():
            info = zipfile.ZipInfo(name)
            info.compress_type = zipfile.ZIP_DEFLATED
            change(info)
            file.writestr(info, content)
    return path


@pytest.mark.parametrize(
    "name", ["../out.png", "a/../../out.png", "/tmp/out.png", "..\\out.png", "C:\\out.png", "\\\\host\\out.png"]
)
def test_paths_that_climb_out(tmp_path: Path, name: str) -> None:
    root = archive(tmp_path / "set.zip", {**{f"{c}/1.png": good_png() for c in "abc"}, name: good_png()})
    with pytest.raises(ValueError, match=r"set\.zip: refused, it holds a path outside the archive"):
        load(root)
    assert not list(tmp_path.rglob("out.png"))


def test_a_link_in_an_archive_is_not_followed(tmp_path: Path) -> None:
    secret = tmp_path / "secret.png"
    secret.write_bytes(good_png())

    def as_link(info: zipfile.ZipInfo) -> None:
        if info.filename == "a/1.png":
            info.external_attr = (stat.S_IFLNK | 0o777) << 16

    members = {"a/1.png": str(secret).encode(), "b/1.png": good_png(), "c/1.png": good_png()}
    with pytest.raises(ValueError, match=r"cannot decode 'a/1.png'"):
        load(archive(tmp_path / "set.zip", members, as_link))


@pytest.mark.slow
def test_an_archive_that_expands_without_end(tmp_path: Path) -> None:
    """1.1 GB of zeros in 1 MB, and the same with a zip directory that states a smaller size."""
    path = tmp_path / "set.zip"
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file,
        file.open("a/1.png", "w", force_zip64=True) as member,
    ):
        for _ in range(275):
            member.write(bytes(2**22))
    with pytest.raises(ValueError, match=r"refused, \d+ bytes expand to 1153433600, more than 200 times"):
        load(path)
    content = path.read_bytes()
    lying = content.replace(struct.pack("<I", 275 * 2**22), struct.pack("<I", 1000))
    assert lying != content
    path.write_bytes(lying)
    with pytest.raises(ValueError, match=r"cannot decode|expected|refused"):
        load(path)


def test_a_compression_that_nobody_knows(tmp_path: Path) -> None:
    path = archive(tmp_path / "set.zip", {f"{c}/1.png": good_png() for c in "abc"})
    content = bytearray(path.read_bytes())
    for method in (content.index(b"PK\1\2") + 10, content.index(b"PK\3\4") + 8):  # of the first member
        assert content[method] == zipfile.ZIP_DEFLATED
        content[method] = 9
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"found a/1\.png: .*compression"):
        load(path)


def test_a_list_of_images_that_is_damaged(tmp_path: Path) -> None:
    listing = b"filename,label\n" + b"".join(f"{n}.png,n{n % 2:08}\n".encode() for n in range(4))
    path = archive(tmp_path / "set.zip", {**{f"images/{n}.png": good_png() for n in range(4)}, "train.csv": listing})
    content = bytearray(path.read_bytes())
    content[content.index(b"train.csv") + len("train.csv") + 9] ^= 0xFF  # within the compressed rows
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"found train\.csv"):
        mini_imagenet("train", root=path, progress=False)


def test_archives_in_archives_are_not_opened(tmp_path: Path) -> None:
    inner = archive(tmp_path / "inner.zip", {f"{c}/1.png": good_png() for c in "abc"}).read_bytes()
    with pytest.raises(ValueError, match="expected one folder of images a class, found no images and 1 other files"):
        load(archive(tmp_path / "set.zip", {"inner.zip": inner}))


# ---------------------------------------------------------------------------------------------------------------------
# Images


@pytest.mark.parametrize("size", [(60000, 60000), (2**31 - 1, 1), (2**31 - 1, 2**31 - 1), (20000, 10000)])
def test_pictures_that_expand_without_end(tmp_path: Path, size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"cannot decode '[abc]/1.png'"):
        load(
            tree(
                tmp_path / "set",
                png(*size) if size[0] < 2**20 else png().replace(struct.pack(">II", 8, 8), struct.pack(">II", *size)),
            )
        )


@pytest.mark.parametrize(
    "content",
    [
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n(executed) (w) file\n",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"II*\0" + bytes(60),
    ],
)
def test_formats_with_a_language_or_libraries_of_their_own_are_not_opened(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(ValueError, match=r"cannot decode"):
        load(tree(tmp_path / "set", content))


def test_devices_and_pipes_in_a_folder_are_not_read(tmp_path: Path) -> None:
    root = tree(tmp_path / "set", good_png())
    os.mkfifo(root / "a" / "2.png")
    (root / "b" / "2.png").symlink_to("/dev/zero")
    assert load(root).images.shape[0] == 1  # reading either would never end


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints


def whole_state(folder_path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    toy_trainer(folder_path, 2).fit()
    return checkpoint.load(folder_path / "last.safetensors")


def changed_states() -> dict[str, Callable[[dict[str, torch.Tensor], dict[str, Any]], None]]:
    def set_(name: str, value: Any) -> Callable[[dict[str, torch.Tensor], dict[str, Any]], None]:
        return lambda tensors, metadata: metadata.update({name: value})

    return {
        "no weight": lambda t, m: t.__delitem__("model.features.weight"),
        "weight of another shape": lambda t, m: t.update({"model.features.weight": torch.zeros(3)}),
        "weight of another type": lambda t, m: t.update({"model.features.weight": t["model.features.weight"].double()}),
        "one too many": lambda t, m: t.update({"model.surplus": torch.zeros(3)}),
        "of no part": lambda t, m: t.update({"surplus": torch.zeros(3)}),
        "adam of another": lambda t, m: t.update({"adam.head.weight.exp_avg": torch.zeros(3)}),
        "adam without its square": lambda t, m: t.__delitem__("adam.features.weight.exp_avg_sq"),
        "adam of another type": lambda t, m: t.update({"adam.features.weight.exp_avg": torch.zeros(20, 256).int()}),
        "adam with an entry of its own": lambda t, m: t.update({"adam.features.weight.evil": torch.zeros(20, 256)}),
        "adam's step a matrix": lambda t, m: t.update({"adam.features.weight.step": torch.zeros(2, 2)}),
        "window of another shape": lambda t, m: t.update({"window": torch.zeros(4)}),
        "iteration negative": set_("iteration", -3),
        "iteration no number": set_("iteration", "2"),
        "iteration too large": set_("iteration", 10**9),
        "seconds no number": set_("seconds", None),
        "best of another form": set_("best", {"rm": "-rf"}),
        "best no table": set_("best", [1]),
    }


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor], dict[str, Any]]:
    path = tmp_path_factory.mktemp("state") / "run"
    return (path, *whole_state(path))


@pytest.mark.parametrize("case", changed_states())
def test_states_that_do_not_fit_are_refused_and_change_nothing(state: Any, case: str) -> None:
    path, tensors, metadata = state
    tensors, metadata = dict(tensors), {k: v for k, v in metadata.items() if k not in ("kind", "version")}
    changed_states()[case](tensors, metadata)
    last = path / "last.safetensors"
    good = last.read_bytes()
    checkpoint.save(last, tensors, kind="training", metadata=metadata)
    bad = last.read_bytes()
    trainer = toy_trainer(path, 4)
    before = [p.detach().clone() for p in trainer._trained.values()]
    with pytest.raises(ValueError, match=r"checkpoint: expected|iterations: expected"):
        trainer.fit(resume=True)
    assert all(torch.equal(a, b) for a, b in zip(before, trainer._trained.values(), strict=True))
    assert not trainer.optimizer.state
    assert last.read_bytes() == bad, "what was refused is still there to be looked at"
    last.write_bytes(good)


@pytest.mark.parametrize("missing", ["iteration", "seconds", "best"])
def test_states_without_an_entry(state: Any, missing: str) -> None:
    path, tensors, metadata = state
    last = path / "last.safetensors"
    good = last.read_bytes()
    kept = {k: v for k, v in metadata.items() if k not in ("kind", "version", missing)}
    checkpoint.save(last, tensors, kind="training", metadata=kept)
    with pytest.raises(ValueError, match=f"checkpoint: expected .*{missing}"):
        toy_trainer(path, 4).fit(resume=True)
    last.write_bytes(good)


@pytest.mark.parametrize(
    "metadata",
    [
        {"config": 3},
        {"config": {"ways": "x"}, "self_contained": True},
        {"config": {}, "self_contained": True, "inner_rates": {"evil": 1}},
        {"config": {"data": "sinusoid", "model": "mlp"}},
    ],
)
def test_weights_whose_story_is_nonsense(
    tmp_path: Path, metadata: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint.save_weights(nn.Linear(2, 2), tmp_path / "w.safetensors", metadata)
    assert main(["evaluate", str(tmp_path / "w.safetensors"), "--tasks", "1"]) == 2
    assert "expected" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text", ["[]", "3", '{"version": 1}', '{"version": 1, "kind": ["weights"]}', "null", "[" * 100_000]
)
def test_headers_that_are_no_header(tmp_path: Path, text: str) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "x", metadata={"signmaml": text})
    with pytest.raises(ValueError, match="checkpoint: expected"):
        checkpoint.load(tmp_path / "x", kind="weights")


def test_a_header_that_claims_more_than_there_is(tmp_path: Path) -> None:
    header = {"a": {"dtype": "F32", "shape": [2**31, 2**31], "data_offsets": [0, 2**64 - 4]}}
    for length in (len(json.dumps(header)), 2**63, 2**64 - 1):
        (tmp_path / "x").write_bytes(struct.pack("<Q", length) + json.dumps(header).encode() + bytes(64))
        with pytest.raises(ValueError, match="expected a complete safetensors file"):
            checkpoint.load(tmp_path / "x")


# ---------------------------------------------------------------------------------------------------------------------
# Configurations


def nested_aliases() -> str:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)]
    return "\n".join([*lines, "ways: *a11"])


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "c.yaml",
            "ways: !!python/object/apply:os.system ['touch executed']",
            "expected YAML, found could not determine",
        ),
        (
            "c.yaml",
            "!!python/object/new:subprocess.check_call [['touch', 'executed']]",
            "expected YAML, found could not",
        ),
        ("c.yaml", "ways: !!python/name:os.system", "expected YAML, found could not determine a constructor"),
        ("c.yaml", nested_aliases(), "expected YAML without aliases, found one"),
        ("c.yaml", "ways: " + "[" * 20_000, "nested too deep"),
        ("c.toml", "ways = " + "[" * 20_000, "nested too deep|expected TOML"),
        ("c.yaml", "ways: " + "9" * 5000, "expected|limit"),
        ("c.yaml", "ways: 2001-01-01", "ways: expected an integer"),
        ("c.yaml", "? [a, b]\n: 3", "expected"),
        ("c.yaml", "x" * 2**21, "expected at most 1048576 bytes"),
    ],
)
def test_configurations_that_build_things(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, text: str, message: str
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        configs.TrainConfig.from_dict(configs.read_file(tmp_path / name))
    assert main(["train", "--config", str(tmp_path / name)]) == 2
    assert len(capsys.readouterr().err) < 5000
    run = RunFolder(tmp_path / "run")
    run.path.mkdir()
    run.config.write_text(text)
    if name.endswith("yaml"):
        assert main(["train", "--resume", str(run.path)]) == 2
