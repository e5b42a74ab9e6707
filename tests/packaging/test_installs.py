"""Installing from the source tree: pip, uv, editable; with and without CUDA. No build has torch available."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from helpers.programs.installs import run, use, without_nvcc

pytestmark = [pytest.mark.packaging, pytest.mark.slow]


def check_without_cuda(installed, package: Path, build_type: str) -> None:
    """The package is found where it should be, works on the CPU, and says why there is no CUDA."""
    installed.lend_torch()
    assert "ran on" in use(installed)
    found = installed.info()
    assert Path(found["package"]) == package
    assert found["native"]["build_type"] == build_type
    assert found["native"]["built_with_cuda"] is False
    assert found["native"]["cuda"] is None
    assert found["native"]["cuda_architectures"] == []
    assert "built without CUDA" in found["backends"]["cuda"]
    assert found["backends"]["cpu"] is None


def test_pip_install_where_nvcc_is_hidden(source, bare):
    """The emulated module is built too, but stays in the source tree."""
    said = bare.pip_install("--verbose", "--no-deps", source, SIGNMAML_EMULATED="1", **without_nvcc())
    assert len(list((source / "build" / "emulated").glob("_emulated*.so"))) == 1
    assert list(bare.site_packages.rglob("*emulated*")) == []
    assert "**  signmaml_ext: building WITHOUT CUDA" in said
    assert "**  CUDA_HOME is /no/cuda, and there is no bin/nvcc in it." in said
    check_without_cuda(bare, bare.site_packages / "signmaml_ext", "Release")


def test_editable_install(source, bare):
    """It works from its own folder as well, and edits take effect."""
    said = bare.pip_install("--verbose", "--no-deps", "--editable", source, SIGNMAML_NO_CUDA="1")
    assert "**  SIGNMAML_NO_CUDA is set." in said
    check_without_cuda(bare, source / "signmaml_ext", "Release")
    with (source / "signmaml_ext" / "__init__.py").open("a") as file:
        file.write("\nEDITED = True\n")
    for folder in ("/", source):
        assert run(bare.python, "-c", "import signmaml_ext; print(signmaml_ext.EDITED)", cwd=folder).stdout == "True\n"


def test_uv_install_of_a_debug_build(source, bare):
    uv = shutil.which("uv", path=str(Path(sys.executable).parent)) or shutil.which("uv")
    if uv is None:
        pytest.skip("uv is not installed")
    switches = {"SIGNMAML_NO_CUDA": "1", "SIGNMAML_DEBUG": "1"}
    run(uv, "pip", "install", "--python", bare.python, "--no-deps", source, **switches)
    check_without_cuda(bare, bare.site_packages / "signmaml_ext", "Debug")
