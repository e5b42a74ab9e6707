"""nvcc's PTX of every kernel, executed: the cases of the emulated GPU on an interpreter of PTX.

The emulated GPU runs the kernels as C++. Here the compiler's own output runs, with the real inline assembly and the
real parameter blocks. It shows nothing of ptxas or of the hardware below the PTX. See helpers/devices/ptx.py.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from compile import resources
from helpers.devices import ptx

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(ptx.missing() is not None, reason=str(ptx.missing())),
]


class Ran(NamedTuple):
    """What ran of a kernel."""

    launches: int
    blocks: int
    reached: int  # instructions
    instructions: int


def read_coverage(file: Path) -> dict[str, Ran]:
    """By the kernel's name as in the source."""
    rows = [line.split("\t") for line in file.read_text().splitlines() if line.startswith("kernel\t")]
    names = resources.output("c++filt", text="\n".join(row[1] for row in rows)).splitlines()
    return {resources.plain(name): Ran(*map(int, row[2:])) for name, row in zip(names, rows, strict=True)}


@pytest.mark.parametrize("architecture", resources.ARCHITECTURES)
def test_every_kernel_runs_from_its_ptx(architecture, tmp_path, record_property):
    module, coverage = ptx.build_once(architecture), tmp_path / "coverage"
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("cases.py")), str(module), str(architecture)],
        env=ptx.settings(architecture, coverage), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    ran = read_coverage(coverage)
    for name, row in ran.items():
        print(f"{name:60} {row.launches:4} launches {row.blocks:6} blocks, {row.reached:5} of {row.instructions:5}")
    known = json.loads(resources.TABLE.read_text())["kernels"]
    assert known.keys() <= ran.keys(), f"not launched: {sorted(known.keys() - ran.keys())}"
    assert not [name for name in known if ran[name].launches == 0]
    reached, all_of_them = (sum(getattr(ran[name], of) for name in known) for of in ("reached", "instructions"))
    record_property("summary", f"sm_{architecture}: {len(known)} kernels ran, {reached} of {all_of_them} instructions")
    assert reached > 0.7 * all_of_them
