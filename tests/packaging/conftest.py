"""Builds shared by several tests; each is made once."""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from helpers.programs.installs import Environment, copy_source, need_network, run

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@dataclass(frozen=True)
class Distributions:
    sdist: Path
    wheel: Path
    log: str


@pytest.fixture(scope="session", autouse=True)
def _network(tmp_path_factory: pytest.TempPathFactory) -> None:
    need_network(tmp_path_factory.mktemp("download"))


@pytest.fixture(scope="session")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source tree in which nothing is ever built."""
    return copy_source(tmp_path_factory.mktemp("clone") / "signmaml_ext")


@pytest.fixture
def source(clone: Path, tmp_path: Path) -> Path:
    """A source tree to build in."""
    return Path(shutil.copytree(clone, tmp_path / "source"))


@pytest.fixture
def bare(tmp_path: Path) -> Environment:
    """An environment with nothing in it, torch included."""
    return Environment.create(tmp_path / "environment")


@pytest.fixture(scope="session")
def build_requirements(clone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the build requirements of pyproject.toml, for builds without build isolation."""
    folder = tmp_path_factory.mktemp("requirements")
    project = tomllib.loads((clone / "pyproject.toml").read_text())
    run(sys.executable, "-m", "pip", "install", "--target", folder, *project["build-system"]["requires"])
    return folder


@pytest.fixture(scope="session")
def distributions(clone: Path, tmp_path_factory: pytest.TempPathFactory) -> Distributions:
    """What `python -m build` makes: an sdist, and a wheel from the sdist, with CUDA where there is an nvcc.

    Built for one architecture instead of the default ones to save time; the suite's own environment has those.
    """
    folder = tmp_path_factory.mktemp("distributions")
    source = shutil.copytree(clone, folder / "source")
    done = run(sys.executable, "-m", "build", "--outdir", folder / "dist", source, TORCH_CUDA_ARCH_LIST="9.0")
    (sdist,) = folder.glob("dist/*.tar.gz")
    (wheel,) = folder.glob("dist/*.whl")
    return Distributions(sdist, wheel, done.stdout)


@pytest.fixture(scope="session")
def installed(distributions: Distributions, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """An environment with the wheel, and torch."""
    environment = Environment.create(tmp_path_factory.mktemp("installed"))
    environment.pip_install("--no-deps", distributions.wheel)
    environment.lend_torch()
    return environment
