"""The CPU backend and its bindings under sanitizers, and with structs of any content."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.devices import emulated
from reliability import native_cases
from signmaml_ext._loader import C


def test_against_python() -> None:
    """Runs the driver that the sanitizers run, here on the installed module."""
    done = subprocess.run([sys.executable, native_cases.__file__, C.__file__, "4"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    counts = ast.literal_eval(done.stdout)
    assert {"sign_step", "meta_accumulate", "conv_meta_step", "struct refused", "struct served"} <= counts.keys()


@pytest.mark.slow
@settings(max_examples=300, derandomize=True, database=None, deadline=None)
@given(st.data())
def test_structs_of_any_content(data: st.DataObject) -> None:
    """Gives a plan without negative numbers or a refusal, never a crash."""
    native_cases.any_struct(C, lambda choices: data.draw(st.sampled_from(choices)))


# ---------------------------------------------------------------------------------------------------------------------
# Sizes beyond 32 bits

LARGE = 2**31 + 1


def test_plans_count_beyond_31_bits() -> None:
    """Every count derived from a size of 2^31 + 1 is exact, because products are computed in 64 bits."""
    plan = C.plan_sign_step_cpu(3, LARGE, 8)
    assert (plan["chunks_per_row"] - 1) * plan["chunk"] < LARGE <= plan["chunks_per_row"] * plan["chunk"]
    assert plan["items"] == 3 * plan["chunks_per_row"]
    assert C.plan_meta_accumulate(LARGE, 5, 4, 512, 512, 132)["tail"] >= 0
    grid = C.plan_meta_accumulate(2, LARGE, 8, 512, 512, 132)
    assert grid["head"] + grid["bodies"] * grid["vector"] + grid["tail"] == LARGE
    tiles = C.plan_sign_step(3, LARGE, 4, 512, 512, 132)
    tile = tiles["block"] * tiles["unroll"] * tiles["vector"]
    assert (tiles["tiles_per_row"] - 1) * tile < LARGE <= tiles["tiles_per_row"] * tile
    shape = {"blocks": 4, "channels": 3, "filters": 64, "height": 84, "width": 84, "ways": 5, "halving": "max",
             "readout": "flatten", "conv_bias": True, "eps": [1e-5] * 4}  # fmt: skip
    sizes = {"tasks": 10**6, "support": 25, "query": 75}
    small = C.plan_conv_meta_step_cpu(shape, **{**sizes, "tasks": 10**3}, scalar_bytes=4, threads=1)
    large = C.plan_conv_meta_step_cpu(shape, **sizes, scalar_bytes=4, threads=1)
    assert large["parameters"] == small["parameters"] == 121093
    assert large["task_scalars"] == small["task_scalars"] > 0
    huge = C.plan_conv_meta_step_cpu(shape, tasks=2, support=2000, query=2000, scalar_bytes=8, threads=1)
    assert huge["task_scalars"] * 8 > 2**31, "a task of more than 2^31 bytes is counted as such"
    assert huge["workspace_bytes"] >= huge["task_scalars"] * 8


@pytest.mark.parametrize(
    "call",
    [
        lambda: C.plan_sign_step_cpu(2**40, 2**40, 1),
        lambda: C.plan_meta_accumulate_cpu(2**62, 2**62, 1),
        lambda: C.plan_sign_step(2**62, 3, 4, 512, 512, 132),
        lambda: C.sign_step_cpu(0, 0, 0, 0, 0, 0, 2**40, 2**40, 1, 0, 0, False, 1),
        lambda: C.meta_accumulate_cpu(0, 0, 0, 2**40, 2**40, False, True, 1),
        lambda: C.plan_mlp_meta_step([2**20, 2**20, 2**20], 2**30, 1, 1, 4, 1),
        lambda: C.plan_mlp_meta_step([2**10, 2**10, 2**10], 1, 1, 1, 4, 1, 2**40, "maml"),
        lambda: C.plan_mlp_meta_step_cpu([2**10, 2**10, 2**10], 1, 1, 1, 4, 1, 2**40, "maml"),
    ],
)
def test_products_that_64_bits_do_not_hold_are_refused(call) -> None:
    with pytest.raises(ValueError, match="expected a product of at most"):
        call()


def test_memory_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match="params: expected an address, found none"):
        C.sign_step_cpu(0, 0, 0, 0, 0, 0, 2, 3, 1, 0, 0, False, 1)


# ---------------------------------------------------------------------------------------------------------------------
# Sanitizers

OPTIONS = {**emulated.SANITIZER_OPTIONS, "TSAN_OPTIONS": "halt_on_error=1", "PYTHONMALLOC": "malloc"}


def with_thread_sanitizer(folder: Path) -> Path:
    """The CPU-only module in a folder of its own.

    Races depend on the threads, which are the same for every instruction set, so one is enough: the quickest to
    compile.
    """
    import pybind11

    if shutil.which("cmake", path=emulated.tools()["PATH"]) is None:
        pytest.skip("cmake and ninja are needed to build the module")
    command = ["cmake", "-S", str(emulated.ROOT), "-B", str(folder), "-G", "Ninja", "-DCMAKE_BUILD_TYPE=RelWithDebInfo"]
    command += [f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", f"-DPython_EXECUTABLE={sys.executable}"]
    command += ["-DSIGNMAML_CUDA=OFF", "-DSIGNMAML_SANITIZE_CPU=thread", "-DSIGNMAML_ISAS=portable"]
    emulated.run(command)
    emulated.run(["cmake", "--build", str(folder), "--target", "_C"])
    (module,) = folder.glob("_C*.so")
    return module


def drive(module: Path, libraries: list[str], examples: int) -> subprocess.CompletedProcess[str]:
    """Runs the driver without address randomisation, which ThreadSanitizer's shadow memory does not support."""
    command = [sys.executable, native_cases.__file__, str(module), str(examples)]
    if shutil.which("setarch"):
        command = ["setarch", "-R", *command]
    environment = {**os.environ, **OPTIONS, "LD_PRELOAD": ":".join(libraries)}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sanitizers", "libraries"), [("address,undefined", ["libasan", "libstdc++"]), ("thread", ["libtsan"])]
)
def test_the_cpu_backend_under_sanitizers(tmp_path: Path, sanitizers: str, libraries: list[str]) -> None:
    """AddressSanitizer checks the emulated module, which has the same bindings and CPU operators."""
    paths = [emulated.sanitizer_library(name) for name in libraries]
    module = with_thread_sanitizer(tmp_path) if sanitizers == "thread" else emulated.sanitized_once()
    done = drive(module, paths, examples=6)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "runtime error" not in done.stderr and "WARNING: ThreadSanitizer" not in done.stderr, done.stderr[-4000:]
