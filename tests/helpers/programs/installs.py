"""Copies of the source tree, bare environments, and the programs that build and install into them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.programs import shared

ROOT = Path(__file__).resolve().parents[3]

# Variables that the build reads; the tests set them explicitly.
SWITCHES = (
    "FORCE_CUDA",
    "SIGNMAML_NO_CUDA",
    "SIGNMAML_DEBUG",
    "SIGNMAML_EMULATED",
    "SIGNMAML_CPU_ISA",
    "TORCH_CUDA_ARCH_LIST",
    "MAX_JOBS",
    "CUDACXX",
    "CUDA_HOME",
    "CUDA_PATH",
    "CUDAHOSTCXX",
)
GENERATED = ("*.so", "*.egg-info", "__pycache__", "*.pyc")
# Folders that builds, runs and tools leave in the root.
LEFT_BEHIND = {"build", "dist", "runs", "data", "venv"}


def copy_source(target: Path) -> Path:
    """Copies the source tree as in a fresh clone, without hidden files except .clang-format."""

    def unwanted(folder: str, names: list[str]) -> set[str]:
        generated = shutil.ignore_patterns(*GENERATED)(folder, names)
        if Path(folder) != ROOT:
            return generated
        hidden = {name for name in names if name.startswith(".") and name != ".clang-format"}
        return generated | hidden | LEFT_BEHIND

    shutil.copytree(ROOT, target, ignore=unwanted)
    return target


def environment(**changes: str) -> dict[str, str]:
    """This process's environment without the switches and without anything that redirects imports, plus `changes`.

    Python writes no bytecode, because that would change the source trees under test. Builds share compiled objects.
    """
    dropped = {*SWITCHES, "PYTHONPATH", "PYTHONHOME", "PYTHONSAFEPATH", "VIRTUAL_ENV"}
    kept = {name: value for name, value in os.environ.items() if name not in dropped}
    return kept | shared.launcher() | {"PYTHONDONTWRITEBYTECODE": "1"} | changes


def without_nvcc() -> dict[str, str]:
    """Changes to the environment that hide every nvcc."""
    kept = [
        folder
        for folder in os.environ["PATH"].split(os.pathsep)
        if not shutil.which("nvcc", path=folder) or shutil.which("c++", path=folder)
    ]
    return {"PATH": os.pathsep.join(kept), "CUDA_HOME": "/no/cuda"}


def has_nvcc() -> bool:
    return shutil.which("nvcc") is not None or shutil.which("nvcc", path="/usr/local/cuda/bin") is not None


def run(
    *command: str | Path, cwd: Path | str = "/", fails: bool = False, **changes: str
) -> subprocess.CompletedProcess[str]:
    """Runs a program to completion, with stderr in stdout."""
    done = subprocess.run(
        [str(word) for word in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=cwd,
        env=environment(**changes),
    )
    words = " ".join(map(str, command))
    assert (done.returncode != 0) == fails, f"{words} ended with {done.returncode}:\n{done.stdout[-6000:]}"
    return done


@dataclass(frozen=True)
class Environment:
    """A separate virtual environment, managed with `pip` of this process's Python."""

    folder: Path

    @classmethod
    def create(cls, folder: Path) -> Environment:
        run(sys.executable, "-m", "venv", "--without-pip", folder)
        return cls(folder)

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    @property
    def site_packages(self) -> Path:
        return Path(sysconfig.get_path("purelib", "venv", {"base": str(self.folder)}))

    def pip_install(self, *arguments: str | Path, fails: bool = False, **changes: str) -> str:
        """Runs `pip install` and returns its output."""
        command = [sys.executable, "-m", "pip", "--python", self.python, "install", *arguments]
        return run(*command, fails=fails, **changes).stdout

    def lend(self, *folders: Path | str) -> None:
        """Lets the environment import from these folders too; its own packages come first."""
        lines = "".join(f"{folder}\n" for folder in folders)
        with (self.site_packages / "lent.pth").open("a") as file:
            file.write(lines)

    def lend_torch(self) -> None:
        """Lends the packages of this process's environment: torch and the other dependencies, but not this package.

        The lent folder is searched before the paths of an editable install, so it must not contain this package.
        """
        lent = self.folder / "lent"
        lent.mkdir(exist_ok=True)
        for place in {Path(torch.__file__).parents[1], Path(sysconfig.get_path("purelib"))}:
            for entry in place.iterdir():
                own = entry.name.startswith(("signmaml", "__editable__"))
                link = lent / entry.name
                if not own and not link.exists():
                    link.symlink_to(entry)
        self.lend(lent)

    def info(self) -> dict[str, Any]:
        """The report of `python -m signmaml_ext.info` for the package installed here."""
        found: dict[str, Any] = json.loads(run(self.python, "-m", "signmaml_ext.info", "--json").stdout)
        return found


USE = """
import torch
from signmaml_ext import meta_step
from signmaml.models import MLP

torch.manual_seed(0)
model = MLP(inputs=1, outputs=1)
data = [torch.randn(2, 3, 1) for _ in range(4)]
result = meta_step(model, *data, inner_lr=0.01, inner_steps=2, loss="mse")
assert all(bool(p.grad.isfinite().all()) for p in model.parameters())
print("ran on", result.backend)
"""


def use(installed: Environment) -> str:
    """Takes a meta-step with the installed packages, outside any source folder; returns what it printed."""
    return run(installed.python, "-c", USE).stdout


def need_network(folder: Path) -> None:
    """Skips the test, with pip's reason, if build requirements cannot be downloaded."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), "pybind11"]
    done = subprocess.run(command, capture_output=True, text=True, cwd="/", env=environment())
    if done.returncode != 0:
        said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["no reason given"]
        pytest.skip(f"pip cannot fetch build requirements: {said[-1]}")
