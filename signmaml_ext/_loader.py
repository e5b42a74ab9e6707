"""Loads the native module `signmaml_ext._C`; an error says what it was built for, what was found, and what to do.

Holds the version of the package: `pyproject.toml` reads it from here, so that a native module built from another
version is noticed.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import re
import sys
import sysconfig
from pathlib import Path
from types import ModuleType
from urllib.parse import unquote, urlsplit

VERSION = "0.1.0"
OLDEST_TORCH = (2, 8)

PACKAGE = "signmaml_ext"
FOLDER = Path(__file__).resolve().parent


def load() -> ModuleType:
    """Imports and returns `signmaml_ext._C`.

    Raises:
        ImportError: if this is a source folder in the way of the installed package, if the native module is missing,
            was built for another Python, does not load, or is of another version, if torch is missing or older than
            2.8, or if SIGNMAML_CPU_ISA names no usable instruction set. The message says what it was built
            for, what was found, and what to do.
    """
    check_not_shadowing(FOLDER, sys.path)
    check_torch()
    check_native_files(FOLDER)
    try:
        native = importlib.import_module(f"{PACKAGE}._C")
    except ImportError as error:
        raise ImportError(
            f"{PACKAGE}: the native module does not load: {error}\n"
            f"  built for: this Python ({python_tag()}), on perhaps another machine or C++ library\n"
            f"  found:     {', '.join(str(path) for path in native_files(FOLDER))}\n"
            f"  do:        {reinstall()}"
        ) from error
    check_version(native)
    choose_cpu_isa(native)
    return native


def native_files(folder: Path) -> list[Path]:
    """The native modules in a package folder, for any Python."""
    return sorted(path for path in folder.glob("_C.*") if path.suffix in (".so", ".pyd", ".dylib"))


def is_source_folder(folder: Path) -> bool:
    """Whether a package folder is in the source tree."""
    return (folder.parent / "csrc").is_dir() and (folder.parent / "setup.py").is_file()


def installed_elsewhere(folder: Path, search_path: list[str]) -> Path | None:
    """A package folder other than the given one, on the search path or installed from there as editable."""
    for entry in search_path:
        candidate = (Path(entry or ".") / PACKAGE).resolve()
        if candidate != folder and (candidate / "__init__.py").is_file():
            return candidate
    for distribution in importlib.metadata.distributions(name=PACKAGE, path=search_path):
        origin = json.loads(distribution.read_text("direct_url.json") or "{}")
        if origin.get("dir_info", {}).get("editable"):
            candidate = (Path(unquote(urlsplit(origin["url"]).path)) / PACKAGE).resolve()
            elsewhere = candidate != folder and (candidate / "__init__.py").is_file()
            return candidate if elsewhere else None  # the first one is the one that counts
    return None


def check_not_shadowing(folder: Path, search_path: list[str]) -> None:
    """Refuses a source folder that hides the installed package, or that was never built."""
    if not is_source_folder(folder):
        return
    installed = installed_elsewhere(folder, search_path)
    if installed is None and native_files(folder):
        return  # an editable install
    if installed is not None:
        found = f"the package installed in {installed}, which this source folder hides"
        todo = "run from another folder, or with `python -P` (3.11 or later), which leaves the current folder out"
    else:
        found = "no installed package on sys.path, and no native module in the source folder"
        todo = f"`pip install {folder.parent}`, then run from another folder, or `pip install -e {folder.parent}`"
    raise ImportError(f"{PACKAGE} was imported from its source folder, {folder}.\n  found: {found}\n  do:    {todo}")


def check_torch() -> None:
    """Refuses a missing or too old torch, before anything needs it."""
    wanted = ".".join(map(str, OLDEST_TORCH))
    try:
        import torch
    except ImportError as error:
        raise ImportError(
            f"{PACKAGE} needs torch {wanted} or later, and torch cannot be imported: {error}\n"
            f"  do: `pip install 'torch>={wanted}'`"
        ) from error
    number = re.match(r"(\d+)\.(\d+)", torch.__version__)
    if number is not None and (int(number[1]), int(number[2])) < OLDEST_TORCH:
        raise ImportError(
            f"{PACKAGE} needs torch {wanted} or later.\n"
            f"  found: torch {torch.__version__} in {Path(torch.__file__).parent}\n"
            f"  do:    `pip install 'torch>={wanted}'`"
        )


def check_native_files(folder: Path) -> None:
    """Refuses a folder whose native modules are missing or all built for another Python."""
    files = native_files(folder)
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    if any(path.name in (f"_C{suffix}", "_C.abi3.so", "_C.so") for path in files):
        return
    if not files:
        raise ImportError(
            f"{PACKAGE}: the native module is missing.\n"
            f"  expected: {folder / f'_C{suffix}'}\n"
            f"  found:    no native module in that folder\n"
            f"  do:       {reinstall()}"
        )
    raise ImportError(
        f"{PACKAGE}: the native module was built for another Python.\n"
        f"  built for: {', '.join(path.name.split('.')[1] for path in files)} ({', '.join(map(str, files))})\n"
        f"  found:     this Python is {python_tag()} ({sys.executable})\n"
        f"  do:        {reinstall()}"
    )


def check_version(native: ModuleType) -> None:
    """Refuses a native module that was built from another version of the package."""
    if native.version != VERSION:
        raise ImportError(
            f"{PACKAGE}: the native module and the Python files are of different versions.\n"
            f"  built for: version {native.version} ({native.__file__})\n"
            f"  found:     Python files of version {VERSION} ({FOLDER})\n"
            f"  do:        {reinstall()}"
        )


def choose_cpu_isa(native: ModuleType) -> None:
    """Obeys SIGNMAML_CPU_ISA; without it the CPU backend uses the fastest instruction set that the CPU has."""
    wanted = os.environ.get("SIGNMAML_CPU_ISA", "").strip()
    if wanted:
        try:
            native.select_cpu_isa(wanted)
        except ValueError as error:
            raise ImportError(f"SIGNMAML_CPU_ISA: {error}") from None


def python_tag() -> str:
    """The tag of this Python in a native module's name: `cpython-311-x86_64-linux-gnu`."""
    suffix: str = sysconfig.get_config_var("EXT_SUFFIX") or ""
    return suffix.strip(".").split(".")[0]


def reinstall() -> str:
    """The command that rebuilds the native module."""
    if is_source_folder(FOLDER):
        return f"`{sys.executable} -m pip install -e {FOLDER.parent}`"
    return f"`{sys.executable} -m pip install --force-reinstall --no-deps --no-cache-dir {PACKAGE}`"


C = load()
