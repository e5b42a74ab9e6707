"""All cases of the emulated GPU on the module of one architecture's PTX: cases.py MODULE ARCHITECTURE."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from helpers.cases import emulated_cases
from helpers.devices import emulated

if __name__ == "__main__":
    native = emulated.load(Path(sys.argv[1]))
    emulated_cases.tensor_core_sums(native, int(sys.argv[2]))
    for group in ("flat", "conv", "second", "steps", "kernels"):
        emulated_cases.GROUPS[group](native)
