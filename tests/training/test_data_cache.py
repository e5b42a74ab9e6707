"""The cache of decoded sets: damage is noticed and repaired, nothing half-written is ever seen."""

from __future__ import annotations

import os
import stat
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.cases.images import random_set
from signmaml.data import ImageSet, cache_dir
from signmaml.data.cache import cache_path, cached, content_digest

KEY = {"name": "random", "split": "train", "source": "x"}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    place = tmp_path / "cache"
    monkeypatch.setenv("SIGNMAML_CACHE", str(place))
    return place


class Builder:
    """Counts how often it is called."""

    def __init__(self, *sizes: int) -> None:
        self.images = random_set(sizes or (3, 5, 2), channels=3)
        self.calls = 0

    def __call__(self) -> ImageSet:
        self.calls += 1
        return self.images


def same(one: ImageSet, other: ImageSet) -> bool:
    return (one.name, one.split, content_digest(one)) == (other.name, other.split, content_digest(other))


def test_what_was_built_once_is_read(folder: Path) -> None:
    build = Builder()
    first, second = cached(KEY, build), cached(KEY, build)
    assert build.calls == 1
    assert same(first, second) and same(second, build.images)
    assert torch.equal(second.images, build.images.images) and second.class_names == build.images.class_names
    assert [path.name for path in folder.iterdir()] == [cache_path(KEY).name]


@pytest.mark.parametrize("change", [{"source": "y"}, {"split": "val"}, {"image_size": 28}])
def test_another_key_is_another_file(change: dict[str, Any]) -> None:
    build = Builder()
    cached(KEY, build)
    cached(KEY | change, build)
    assert build.calls == 2


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def flip_a_pixel(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-40] ^= 1
    path.write_bytes(content)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def put_another_set_there(path: Path) -> None:
    cached(KEY | {"source": "other"}, Builder(9))
    os.replace(cache_path(KEY | {"source": "other"}), path)


@pytest.mark.parametrize("damage", [truncate, flip_a_pixel, empty, put_another_set_there])
def test_a_damaged_file_is_reported_and_built_again(damage: Callable[[Path], None]) -> None:
    build = Builder()
    cached(KEY, build)
    damage(cache_path(KEY))
    with pytest.warns(UserWarning, match="cannot be used .*building it again"):
        repaired = cached(KEY, build)
    assert build.calls == 2 and same(repaired, build.images)
    assert same(cached(KEY, build), build.images) and build.calls == 2


def test_a_folder_that_cannot_be_written_costs_only_the_cache(folder: Path) -> None:
    folder.write_text("a file where the folder should be")
    build = Builder()
    with pytest.warns(UserWarning, match="random/train is not cached: "):
        assert same(cached(KEY, build), build.images)
    assert folder.read_text() == "a file where the folder should be"


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="nothing is read-only for root")
def test_a_read_only_folder_costs_only_the_cache(folder: Path) -> None:
    folder.mkdir()
    folder.chmod(0o500)
    try:
        with pytest.warns(UserWarning, match="random/train is not cached: "):
            cached(KEY, Builder())
    finally:
        folder.chmod(0o700)


def test_a_full_disk_leaves_nothing_behind(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.warns(UserWarning, match="No space left"):
        cached(KEY, Builder())
    assert list(folder.iterdir()) == []


def test_builders_at_the_same_time_do_not_disturb_each_other(folder: Path) -> None:
    barrier = threading.Barrier(8)

    def build() -> ImageSet:
        barrier.wait(timeout=60)  # all of them build, then all of them write
        return random_set([3, 5, 2], channels=3)

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda _: cached(KEY, build), range(8)))
    assert all(same(result, results[0]) for result in results)
    assert [path.name for path in folder.iterdir()] == [cache_path(KEY).name]
    assert same(cached(KEY, Builder()), results[0])


def test_what_killed_writers_left_is_removed_after_a_day(folder: Path) -> None:
    folder.mkdir()
    old, young = folder / ".a-1.tmp", folder / ".b-2.tmp"
    for path in (old, young):
        path.write_bytes(b"half")
    os.utime(old, (time.time() - 100_000,) * 2)
    cached(KEY, Builder())
    assert not old.exists() and young.exists()


@pytest.mark.skipif(os.name != "posix", reason="POSIX permissions")
def test_files_have_the_usual_permissions(folder: Path) -> None:
    cached(KEY, Builder())
    usual = folder / "usual"
    usual.touch()
    assert stat.S_IMODE(cache_path(KEY).stat().st_mode) == stat.S_IMODE(usual.stat().st_mode)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"SIGNMAML_CACHE": "/a/b", "XDG_CACHE_HOME": "/x"}, "/a/b"),
        ({"SIGNMAML_CACHE": "~/c"}, "/home/me/c"),
        ({"XDG_CACHE_HOME": "/x"}, "/x/signmaml"),
        ({"XDG_CACHE_HOME": "relative"}, "/home/me/.cache/signmaml"),
        ({}, "/home/me/.cache/signmaml"),
    ],
)
def test_where_the_cache_is(environment: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SIGNMAML_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"HOME": "/home/me", **environment}.items():
        monkeypatch.setenv(name, value)
    assert cache_dir() == Path(expected)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"images": torch.zeros(4, 1, 2, 2)}, TypeError, "images: expected dtype torch.uint8"),
        ({"images": torch.zeros(4, 2, 2, dtype=torch.uint8)}, ValueError, r"images: expected shape \[M, C, H, W\]"),
        (
            {"class_sizes": torch.tensor([2, 2], dtype=torch.int32)},
            TypeError,
            "class_sizes: expected dtype torch.int64",
        ),
        ({"class_sizes": torch.tensor([4])}, ValueError, r"class_sizes: expected shape \[2\]"),
        ({"class_sizes": torch.tensor([4, 0])}, ValueError, "at least 1 image a class, found 0 for 'b'"),
        ({"class_sizes": torch.tensor([2, 3])}, ValueError, r"expected the sum 4 \(images\), found 5"),
        ({"class_names": ("a", "a")}, ValueError, "class_names: expected different names"),
        ({"class_names": (), "class_sizes": torch.zeros(0, dtype=torch.int64)}, ValueError, "at least one class"),
    ],
)
def test_an_image_set_checks_itself(change: dict[str, Any], error: type[Exception], message: str) -> None:
    parts: dict[str, Any] = {
        "images": torch.zeros(4, 1, 2, 2, dtype=torch.uint8),
        "class_names": ("a", "b"),
        "class_sizes": torch.tensor([2, 2]),
    }
    with pytest.raises(error, match=message):
        ImageSet(name="n", split="train", **(parts | change))
