"""nvcc's PTX of every kernel, executed: the cases of the emulated GPU on an interpreter of PTX.

The emulated GPU runs the kernels as C++. Here the compiler's own output runs, with the real inline assembly and the
real parameter blocks. It shows nothing of ptxas or of the hardware below the PTX. See helpers/devices/ptx.py.

nvcc writes the same PTX for several architectures, so the same text runs once. What still tells such architectures
apart is how their tensor cores sum, in the kernels that use them.
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

# Architectures whose PTX runs as a whole, and those with the same text.
RUN = (100, 80)
SAME = {90: 80, 120: 100}


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


def run(text_of: int, architecture: int, coverage: Path, *cases: str) -> dict[str, Ran]:
    """Runs the PTX for one architecture on the tensor cores of another; returns what ran."""
    program, module = Path(__file__).with_name("cases.py"), ptx.build_once(text_of)
    done = subprocess.run(
        [sys.executable, str(program), str(module), str(architecture), *cases],
        env=ptx.settings(architecture, coverage), capture_output=True, text=True,
    )  # fmt: skip
    print(done.stdout)
    assert done.returncode == 0, done.stderr[-4000:]
    return read_coverage(coverage)


def test_every_architecture_is_here():
    assert sorted((*RUN, *SAME)) == sorted(resources.ARCHITECTURES) and set(SAME.values()) <= set(RUN)


@pytest.mark.parametrize("architecture", RUN)
def test_every_kernel_runs_from_its_ptx(architecture, tmp_path, record_property):
    ran = run(architecture, architecture, tmp_path / "coverage")
    for name, row in ran.items():
        print(f"{name:60} {row.launches:4} launches {row.blocks:6} blocks, {row.reached:5} of {row.instructions:5}")
    known = json.loads(resources.TABLE.read_text())["kernels"]
    assert known.keys() <= ran.keys(), f"not launched: {sorted(known.keys() - ran.keys())}"
    assert not [name for name in known if ran[name].launches == 0]
    reached, all_of_them = (sum(getattr(ran[name], of) for name in known) for of in ("reached", "instructions"))
    record_property("summary", f"sm_{architecture}: {len(known)} kernels ran, {reached} of {all_of_them} instructions")
    assert reached > 0.7 * all_of_them


@pytest.mark.parametrize("architecture", SAME)
def test_ptx_is_the_text_that_runs(architecture, tmp_path):
    """But for the line that names the architecture. If nvcc comes to tell two of them apart, run both."""
    found, expected = ptx.texts(architecture, tmp_path), ptx.texts_in(ptx.build_once(SAME[architecture]))
    assert len(found) == len(resources.LAUNCHES)
    for launch, text in found.items():
        assert ptx.target(text) == architecture
        assert ptx.plain(text) in expected, f"{launch} differs from that for sm_{SAME[architecture]}"


def test_products_run_on_tensor_cores_that_sum_otherwise(tmp_path):
    """sm_90 has the PTX of sm_80, but keeps more bits of a sum and adds more products at once."""
    ran = run(SAME[90], 90, tmp_path / "coverage", "products")
    known = json.loads(resources.TABLE.read_text())["kernels"]
    products = {name for name in known if name.partition("<")[0] in resources.ON_TENSOR_CORES}
    assert products and not [name for name in products if ran[name].launches == 0]
