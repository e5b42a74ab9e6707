"""The emulated kernels, the emulator and the bindings under AddressSanitizer and UndefinedBehaviorSanitizer."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from helpers import emulated, emulated_cases


def sanitizer_library(name: str) -> str:
    """The run-time library that must be loaded before Python starts."""
    path = subprocess.run(
        ["g++", f"-print-file-name={name}.so"], capture_output=True, text=True, check=True
    ).stdout.strip()
    if not os.path.isabs(path):
        pytest.skip(f"g++ has no {name}")
    return path


@pytest.mark.slow
def test_all_cases_under_sanitizers(tmp_path):
    emulated.configure(emulated.ROOT, tmp_path, sanitize="address,undefined")
    module = emulated.compile_module(tmp_path)
    environment = {
        **os.environ,
        # libstdc++ too: without it the interceptor of exceptions finds nothing to call.
        "LD_PRELOAD": f"{sanitizer_library('libasan')}:{sanitizer_library('libstdc++')}",
        # Python itself does not free everything at its end.
        "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1",
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
    }
    command = [sys.executable, emulated_cases.__file__, str(module)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=500)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "runtime error" not in done.stderr, done.stderr[-4000:]
