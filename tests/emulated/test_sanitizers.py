"""The emulated kernels, the emulator and the bindings under AddressSanitizer and UndefinedBehaviorSanitizer."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from helpers.cases import emulated_cases
from helpers.devices import emulated


@pytest.mark.slow
def test_all_cases_under_sanitizers():
    # Preload libstdc++ too: without it the sanitizer's exception interceptor finds nothing to call.
    libraries = [emulated.sanitizer_library(name) for name in ("libasan", "libstdc++")]
    environment = {**os.environ, **emulated.SANITIZER_OPTIONS, "LD_PRELOAD": ":".join(libraries)}
    command = [sys.executable, emulated_cases.__file__, str(emulated.sanitized_once()), "flat", "conv", "sums"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "runtime error" not in done.stderr, done.stderr[-4000:]
