"""The sdist and the wheel of `python -m build`, and the wheel installed."""

from __future__ import annotations

import re
import sys
import sysconfig
import tarfile
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest

import signmaml_ext
from helpers.programs.installs import Environment, has_nvcc, run, use

pytestmark = [pytest.mark.packaging, pytest.mark.slow]


def files_below(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def in_wheel(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def metadata(wheel: Path, name: str) -> Message:
    (member,) = (each for each in in_wheel(wheel) if each.endswith(f".dist-info/{name}"))
    with zipfile.ZipFile(wheel) as archive:
        return Parser().parsestr(archive.read(member).decode())


def test_sdist_carries_the_whole_source_tree(distributions, clone):
    with tarfile.open(distributions.sdist) as archive:
        carried = {member.name.split("/", 1)[1] for member in archive.getmembers() if member.isfile()}
    assert files_below(clone) - carried == set(), "name it in MANIFEST.in"
    added = {name for name in carried - files_below(clone) if ".egg-info/" not in name}
    assert added == {"PKG-INFO", "setup.cfg"}


def test_wheel_carries_both_packages_and_the_native_module(distributions, clone):
    packages = {f"signmaml_ext/{name}" for name in files_below(clone / "signmaml_ext")}
    packages |= {f"signmaml/{name}" for name in files_below(clone / "python" / "signmaml")}
    packages.add(f"signmaml_ext/_C{sysconfig.get_config_var('EXT_SUFFIX')}")
    assert "signmaml/data/splits.json" in packages
    assert {name for name in in_wheel(distributions.wheel) if ".dist-info/" not in name} == packages


def test_wheel_says_what_it_needs_and_offers(distributions):
    found = metadata(distributions.wheel, "METADATA")
    assert found["Version"] == signmaml_ext.__version__
    assert found["License-Expression"] == "MIT"
    needed = {requirement for requirement in found.get_all("Requires-Dist") if "extra ==" not in requirement}
    assert "torch>=2.8" in needed
    tags = metadata(distributions.wheel, "WHEEL")
    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    assert tags["Root-Is-Purelib"] == "false"
    assert re.fullmatch(rf"{python}-{python}-linux_\w+", tags["Tag"])
    offered = {name.rsplit("/", 1)[1] for name in in_wheel(distributions.wheel) if ".dist-info/" in name}
    assert {"entry_points.txt", "LICENSE"} <= offered


def test_wheel_works_from_another_folder(installed):
    assert "ran on" in use(installed)
    assert run(installed.folder / "bin" / "signmaml", "--version").stdout == f"signmaml {signmaml_ext.__version__}\n"
    found = installed.info()
    assert Path(found["package"]) == installed.site_packages / "signmaml_ext"
    assert found["native"]["build_type"] == "Release"


def test_wheel_has_cuda_kernels_where_nvcc_was_found(installed, distributions):
    native = installed.info()["native"]
    assert native["built_with_cuda"] == has_nvcc()
    assert ("building WITHOUT CUDA" in distributions.log) != has_nvcc()
    if not has_nvcc():
        pytest.skip("no nvcc on this machine: there are no CUDA kernels to look at")
    assert native["cuda"].split(".")[0].isdecimal()
    assert native["cuda_architectures"] == ["9.0+PTX"], "what conftest.py asks for, and PTX for newer GPUs"


@pytest.mark.parametrize("command", [["-c", "import signmaml_ext"], ["-m", "signmaml_ext.info"]], ids=" ".join)
def test_source_folder_in_the_way_of_the_installed_package(installed, clone, command):
    said = run(installed.python, *command, cwd=clone, fails=True).stdout
    assert f"ImportError: signmaml_ext was imported from its source folder, {clone / 'signmaml_ext'}." in said
    assert f"found: the package installed in {installed.site_packages / 'signmaml_ext'}" in said
    assert "do:    run from another folder" in said


@pytest.mark.skipif(sys.version_info < (3, 11), reason="python -P came with 3.11")
def test_advice_against_the_source_folder_helps(installed, clone):
    where = "import signmaml_ext; print(signmaml_ext.__file__)"
    said = run(installed.python, "-P", "-c", where, cwd=clone).stdout
    assert Path(said.strip()).parent == installed.site_packages / "signmaml_ext"


def test_console_script_works_in_the_source_folder(installed, clone):
    assert run(installed.folder / "bin" / "signmaml", "--version", cwd=clone).stdout.startswith("signmaml ")


def test_source_folder_that_was_never_built(bare, clone):
    said = run(bare.python, "-c", "import signmaml_ext", cwd=clone, fails=True).stdout
    assert "found: no installed package on sys.path, and no native module in the source folder" in said
    assert f"`pip install {clone}`" in said


def test_torch_is_named_where_it_is_missing(distributions, bare: Environment):
    bare.pip_install("--no-deps", distributions.wheel)
    said = run(bare.python, "-c", "import signmaml_ext", fails=True).stdout
    assert "ImportError: signmaml_ext needs torch 2.8 or later, and torch cannot be imported" in said
