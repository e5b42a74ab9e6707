"""All cases of the emulated GPU on the module of one architecture's PTX: cases.py MODULE ARCHITECTURE [products].

`products` leaves out all but the products on tensor cores.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from helpers.cases import emulated_cases
from helpers.cases.emulated_cases import Case
from helpers.devices import emulated


def chosen(only_products: bool) -> Iterator[tuple[str, Case]]:
    """The cases that run, by name. One order of threads is enough here: the emulated GPU looks for races in several."""
    for group in ("products",) if only_products else ("flat", "conv", "second", "steps", "kernels", "products"):
        for name, case in emulated_cases.GROUPS[group].items():
            if not name.endswith(", seed 0"):
                yield f"{group}: {name}", case


if __name__ == "__main__":
    native, architecture = emulated.load(Path(sys.argv[1])), int(sys.argv[2])
    emulated_cases.tensor_core_sums(native, architecture)
    for name, case in chosen("products" in sys.argv[3:]):
        started = time.process_time()
        case(native)
        print(f"{time.process_time() - started:8.2f} s  {name}", flush=True)
