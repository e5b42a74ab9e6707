"""Broken installations say what was built, what was found, and what to do."""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from signmaml_ext import _loader

SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """The package folder of a source tree without a native module."""
    root = tmp_path / "checkout"
    (root / "csrc").mkdir(parents=True)
    (root / "setup.py").touch()
    return package(root)


def package(root: Path) -> Path:
    folder = root / "signmaml_ext"
    folder.mkdir(parents=True)
    (folder / "__init__.py").touch()
    return folder


def test_source_folder_without_an_installed_package(source):
    with pytest.raises(ImportError) as caught:
        _loader.check_not_shadowing(source, [str(source.parent)])
    message = str(caught.value)
    assert f"imported from its source folder, {source}" in message
    assert "no installed package" in message
    assert f"pip install -e {source.parent}" in message


@pytest.mark.parametrize("built", [False, True])
def test_source_folder_that_hides_the_installed_package(source, tmp_path, built):
    installed = package(tmp_path / "site-packages")
    if built:
        (source / f"_C{SUFFIX}").touch()
    with pytest.raises(ImportError) as caught:
        _loader.check_not_shadowing(source, [str(source.parent), str(installed.parent)])
    message = str(caught.value)
    assert str(source) in message
    assert str(installed) in message
    assert "run from another folder" in message


def test_source_folder_that_hides_an_editable_install_of_another(source, tmp_path):
    other, site = package(tmp_path / "other"), tmp_path / "site-packages"
    record = site / "signmaml_ext-0.1.0.dist-info"
    record.mkdir(parents=True)
    (record / "METADATA").write_text("Metadata-Version: 2.1\nName: signmaml_ext\nVersion: 0.1.0\n")
    origin = {"url": other.parent.as_uri(), "dir_info": {"editable": True}}
    (record / "direct_url.json").write_text(json.dumps(origin))
    with pytest.raises(ImportError, match=str(other)):
        _loader.check_not_shadowing(source, [str(source.parent), str(site)])


def test_editable_install_is_no_source_folder_in_the_way(source, tmp_path):
    (source / f"_C{SUFFIX}").touch()
    _loader.check_not_shadowing(source, [str(source.parent), str(tmp_path)])


def test_installed_package_is_not_taken_for_a_source_folder(tmp_path):
    _loader.check_not_shadowing(package(tmp_path / "site-packages"), [str(tmp_path / "site-packages")])


def test_import_from_a_source_folder_is_loud(source):
    """End to end, in a Python process that starts in the source tree."""
    for path in _loader.FOLDER.glob("*.py"):
        (source / path.name).write_bytes(path.read_bytes())
    command = [sys.executable, "-c", "import signmaml_ext"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=source.parent)
    assert done.returncode != 0
    assert f"ImportError: signmaml_ext was imported from its source folder, {source}" in done.stderr
    assert str(_loader.FOLDER) in done.stderr, "it has to say where the installed package is"


def test_native_module_is_missing(source):
    with pytest.raises(ImportError, match=r"native module is missing.*\n.*expected: .*\n.*found: .*\n.*do: "):
        _loader.check_native_files(source)


def test_native_module_of_another_python(source):
    (source / "_C.cpython-27-x86_64-linux-gnu.so").touch()
    with pytest.raises(ImportError) as caught:
        _loader.check_native_files(source)
    message = str(caught.value)
    assert "built for: cpython-27-x86_64-linux-gnu" in message
    assert f"this Python is {SUFFIX.split('.')[1]}" in message
    assert "pip install" in message


def test_native_module_of_this_python_among_others(source):
    (source / "_C.cpython-27-x86_64-linux-gnu.so").touch()
    (source / f"_C{SUFFIX}").touch()
    _loader.check_native_files(source)


def test_native_module_of_another_version():
    native = SimpleNamespace(version="0.0.9", __file__="/somewhere/_C.so")
    with pytest.raises(ImportError, match=r"built for: version 0\.0\.9(.|\n)*found: .*version 0\.1\.0"):
        _loader.check_version(native)  # type: ignore[arg-type]


@pytest.mark.parametrize("version", ["2.7.1", "1.13.1+cu117", "2.0.0a0+git123"])
def test_old_torch_is_refused(monkeypatch, version):
    monkeypatch.setattr(torch, "__version__", version)
    with pytest.raises(ImportError, match=r"needs torch 2\.8 or later(.|\n)*found: torch"):
        _loader.check_torch()


@pytest.mark.parametrize("version", ["2.8.0", "2.10.0+cpu", "3.0.0", "2.9.0a0+git123"])
def test_new_torch_is_accepted(monkeypatch, version):
    monkeypatch.setattr(torch, "__version__", version)
    _loader.check_torch()


def test_missing_torch_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ImportError, match=r"needs torch 2\.8 or later, and torch cannot be imported"):
        _loader.check_torch()


@pytest.mark.slow
def test_pytest_as_a_module_finds_the_installed_package():
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "tests/training/test_stats_and_schedule.py"]
    done = subprocess.run(command, cwd=Path(__file__).resolve().parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
