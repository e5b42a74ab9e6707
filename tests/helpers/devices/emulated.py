"""Builds and loads `_emulated`, the CUDA kernels on the emulated GPU, from the original or modified sources."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from helpers.programs import shared
from signmaml_ext._loader import C

ROOT = Path(__file__).resolve().parents[3]
BUILT_BY_SETUP = ROOT / "build" / "emulated"  # where SIGNMAML_EMULATED=1 leaves the module


def sources() -> list[Path]:
    """All files that the module is built from."""
    return [ROOT / "CMakeLists.txt", *sorted(path for path in (ROOT / "csrc").rglob("*") if path.is_file())]


def copy_sources(target: Path) -> None:
    """Copies the sources, to build or modify them."""
    for path in sources():
        copy = target / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, copy)


def tools() -> dict[str, str]:
    """An environment whose PATH starts with this interpreter's folder, so that its cmake and ninja come first."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, **shared.launcher(), "PATH": path}


def configure(source: Path, build: Path, *variables: str, flags: str = "-O1") -> None:
    """Runs cmake; skips the test if it is not installed.

    Builds one instruction set unless `variables` say otherwise, because the module does not test the CPU's operators.
    """
    if shutil.which("cmake", path=tools()["PATH"]) is None or shutil.which("ninja", path=tools()["PATH"]) is None:
        pytest.skip("cmake and ninja are needed to build the emulated module")
    import pybind11

    command = ["cmake", "-S", str(source), "-B", str(build), "-G", "Ninja", "-DSIGNMAML_EMULATED=ON"]
    command += ["-DSIGNMAML_ISAS=portable"]
    command += [f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", f"-DPython_EXECUTABLE={sys.executable}"]
    run([*command, f"-DSIGNMAML_EMULATED_FLAGS={flags}", *(f"-D{variable}" for variable in variables)])


def compile_module(build: Path, name: str = "_emulated") -> Path:
    """Builds what has changed and returns the path of the module."""
    run(["cmake", "--build", str(build), "--target", name])
    (module,) = build.glob(f"{name}*.so")
    return module


def run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, env=tools())
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"


def load(path: Path) -> ModuleType:
    """Imports a native module from a file."""
    spec = importlib.util.spec_from_file_location(path.name.partition(".")[0], path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def built_by_setup() -> Path | None:
    """The module left by an install with SIGNMAML_EMULATED=1, unless a source is newer."""
    newest = max(path.stat().st_mtime for path in sources())
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    module = BUILT_BY_SETUP / f"_emulated{suffix}"
    return module if module.is_file() and module.stat().st_mtime > newest else None


def build_once() -> Path:
    """The module of the current sources, built once per state of the sources."""
    module = built_by_setup()
    if module is not None:
        return module
    digest = hashlib.sha256(sys.version.encode())
    for path in sources():
        digest.update(path.read_bytes())
    kept = Path(tempfile.gettempdir()) / f"signmaml_emulated-{os.getuid()}-{digest.hexdigest()[:16]}"
    kept.mkdir(exist_ok=True)
    with (kept / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # a second process waits for the first one's module
        modules = list(kept.glob("_emulated*.so"))
        if modules:
            return modules[0]
        with tempfile.TemporaryDirectory() as folder:
            configure(ROOT, Path(folder))
            module = compile_module(Path(folder))
            # Rename, so that an interruption never leaves an incomplete module.
            staged = kept / "staged"
            shutil.copy2(module, staged)
            os.replace(staged, kept / module.name)
    return kept / module.name


def by_seed(native: ModuleType, seed: int) -> None:
    """Runs threads in a random order, for some seeds with several blocks at once."""
    native.configure(seed=seed, blocks_alive=1 + seed % 3, multiprocessors=2)


# For modules with AddressSanitizer and UndefinedBehaviorSanitizer.
SANITIZER_OPTIONS = {
    # Leaks are not checked: Python itself does not free everything on exit.
    "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1",
    "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
}


def sanitized_once() -> Path:
    """The module, including the CPU's operators, built with these sanitizers.

    Out-of-bounds accesses depend on the vector width, so the CPU's operators use wide vectors if this CPU has them.
    """
    wide = "avx2" if "avx2" in C.cpu_isas() else "portable"

    def build(folder: Path) -> None:
        sanitizers = "address,undefined"
        variables = (f"SIGNMAML_SANITIZE={sanitizers}", f"SIGNMAML_SANITIZE_CPU={sanitizers}", f"SIGNMAML_ISAS={wide}")
        configure(ROOT, folder, *variables, "SIGNMAML_EMULATED_COUNTS=OFF", flags="-O1;-g1")
        compile_module(folder)

    (module,) = shared.once("sanitized", build).glob("_emulated*.so")
    return module


def sanitizer_library(name: str) -> str:
    """The run-time library to preload into Python; skips the test if it is not installed."""
    found = subprocess.run(["g++", f"-print-file-name={name}.so"], capture_output=True, text=True, check=True)
    path = found.stdout.strip()
    if not os.path.isabs(path):
        pytest.skip(f"g++ has no {name}")
    return path


def sign_step_(
    native: ModuleType,
    params: Tensor,
    grads: Tensor,
    lr: Tensor,
    *,
    segment_offsets: Tensor | None = None,
    mask: Tensor | None = None,
    nonfinite: Tensor,
) -> None:
    """`signmaml_ext.sign_step_` by the CUDA kernel on the emulated GPU, for tensors on the CPU."""
    offsets, allowed = (torch.empty(0) if tensor is None else tensor for tensor in (segment_offsets, mask))
    native.sign_step_cuda(
        params.data_ptr(),
        grads.data_ptr(),
        lr.data_ptr(),
        offsets.data_ptr(),
        allowed.data_ptr(),
        nonfinite.data_ptr(),
        *params.shape,
        lr.numel(),
        allowed.numel(),
        max(0, offsets.numel() - 1),
        params.dtype == torch.float64,
        0,
        0,
    )


def compact_sign_step_(
    native: ModuleType,
    counts: Tensor,
    params: Tensor,
    theta: Tensor,
    grads: Tensor,
    lr: Tensor,
    *,
    segment_offsets: Tensor | None = None,
    nonfinite: Tensor,
) -> None:
    """`signmaml_ext.compact_sign_step_` likewise."""
    offsets = torch.empty(0) if segment_offsets is None else segment_offsets
    native.compact_sign_step_cuda(
        counts.data_ptr(),
        params.data_ptr(),
        theta.data_ptr(),
        grads.data_ptr(),
        lr.data_ptr(),
        offsets.data_ptr(),
        nonfinite.data_ptr(),
        *params.shape,
        lr.numel(),
        max(0, offsets.numel() - 1),
        params.dtype == torch.float64,
        0,
        0,
    )


def meta_accumulate_(
    native: ModuleType, out: Tensor, grads: Tensor, *, nonfinite: Tensor, skip_nonfinite: bool = False
) -> None:
    """`signmaml_ext.meta_accumulate_` likewise."""
    addresses = (out.data_ptr(), grads.data_ptr(), nonfinite.data_ptr())
    native.meta_accumulate_cuda(*addresses, *grads.shape, skip_nonfinite, grads.dtype == torch.float64, 0, 0)
