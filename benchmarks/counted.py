"""Traffic and work of every kernel of a meta-step, counted without a GPU: python -m benchmarks.counted --workload A

The kernels run on the emulated GPU at the workload's sizes (launches.py). Requests to memory are counted warp by warp:
sectors of global memory and cycles of shared memory against the least that the same bytes could take. With nvcc and
nvdisasm at hand, the machine code is weighted with those counts (machine_code.py), and a model says how long a launch
would take on a card and why (time_model.py). Modelled times are no measurements.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # the other scripts, when run as a module

import launches
import machine_code
import report
import time_model
import torch
import workloads
from launches import Launch

MOST = 1.1  # times the least sectors or wavefronts that a kernel may take without a reason
# Why a kernel takes more, by its name and what it takes. A test holds that nothing else does.
REASONS: dict[tuple[str, str], str] = {
    ("patch_moments_kernel", "sectors"): "a tile's rows of pixels begin and end anywhere in a sector; once a meta-step",
    ("conv_pack_kernel", "sectors"): "reads theta in torch's order and writes it by filters; once a meta-step",
    ("conv_first_kernel", "sectors"): "a tile's rows of pixels begin anywhere, and the winners are single bytes, of "
    "which a store has 16 in a row",
    ("conv_first_kernel", "wavefronts"): "windows are two pixels apart, so those of two rows may share a bank",
    ("conv_first_grad_kernel", "sectors"): "a tile's rows of pixels begin and end anywhere in a sector",
    ("conv_forward_kernel", "sectors"): "in bf16 a lane's two neighbouring filters are 4 bytes, half of what fills a "
    "sector together with its neighbours'",
    ("conv_forward_kernel", "wavefronts"): "with stride 2 positions are two inputs apart, two to a bank",
    ("conv_head_kernel", "sectors"): "the query pass writes the classifier's gradient in torch's order",
    ("conv_data_grad_kernel", "sectors"): "reads z at every window's winner, which may be any of four, and the winners "
    "themselves as two bytes a lane",
    ("conv_weight_grad_kernel", "wavefronts"): "in bf16 pairs of floats are read one by one, two of them to a bank",
    ("conv_meta_accumulate_kernel", "sectors"): "writes the gradient in torch's order; once a meta-step",
    ("mlp_meta_step_kernel", "sectors"): "a task's examples and parameters begin anywhere in a sector",
    ("mlp_meta_step_kernel", "wavefronts"): "a row of 40 weights is ten vectors: lanes beyond the tenth begin it "
    "again, in the banks of others",
}


def excesses(found: Iterable[Launch]) -> dict[tuple[str, str], float]:
    """How many times the least a kernel takes, over all its launches, where that is more than MOST."""
    taken: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0, 0.0])
    for launch in found:
        for what in ("sectors", "wavefronts"):
            total, least = getattr(launch, what)
            taken[launch.kernel, what][0] += total
            taken[launch.kernel, what][1] += least
    return {key: total / least for key, (total, least) in taken.items() if least and total / least > MOST}


def grouped(found: Sequence[Launch]) -> dict[str, list[int]]:
    """Indices of the launches of every kernel and block of the network, by its label, in the order of the first."""
    groups: dict[str, list[int]] = defaultdict(list)
    for index, launch in enumerate(found):
        label = launch.kernel.removesuffix("_kernel") + (f", block {launch.block}" if launch.block else "")
        groups[label].append(index)
    return groups


def ratio(pair: tuple[float, float]) -> str:
    """Taken over least."""
    return f"{pair[0] / pair[1]:.2f}" if pair[1] else "-"


def traffic(found: Sequence[Launch]) -> str:
    """One row for each kernel and block of the network, over all its launches."""
    rows = []
    for label, indices in grouped(found).items():
        ours = [found[index] for index in indices]
        sectors = launches.sum_of_pairs(one.sectors for one in ours)
        wavefronts = launches.sum_of_pairs(one.wavefronts for one in ours)
        rows.append(
            (
                label,
                str(len(ours)),
                f"{ours[0].blocks:.0f}",
                f"{sum(one.passed_bytes for one in ours) / 1e6:.1f}",
                ratio(sectors),
                f"{wavefronts[0] / 1e6:.2f}",
                ratio(wavefronts),
                f"{ours[0].executions('barrier') / ours[0].warps:.0f}",
                f"{sum(one.executions('mma') for one in ours) / 1e6:.2f}",
            )
        )
    header = ("kernel", "launches", "blocks", "MB passed", "sectors / least", "10^6 wavefronts", "/ least", "barriers",
              "10^6 mma")  # fmt: skip
    return report.table(header, rows)


def times(modelled: Sequence[time_model.Modelled]) -> str:
    """Modelled microseconds of every kernel and block of the network, and what they are spent on."""
    rows = []
    for label, indices in grouped([one.launch for one in modelled]).items():
        ours = [modelled[index] for index in indices]
        parts = {name: sum(one.times[name] for one in ours) for name in ours[0].times if name != "gap"}
        rows.append(
            (
                label,
                str(len(ours)),
                f"{ours[0].resident}",
                f"{sum(one.instructions for one in ours) / 1e6:.2f}",
                f"{sum(one.memory_bytes for one in ours) / 1e6:.1f}",
                f"{sum(one.microseconds for one in ours):.1f}",
                ours[0].bound,
                ", ".join(
                    f"{name} {value:.1f}" for name, value in sorted(parts.items(), key=lambda each: -each[1])[1:4]
                ),
            )
        )
    header = ("kernel", "launches", "blocks resident", "10^6 instructions", "MB of memory", "us, with gaps", "bound by",
              "next, us")  # fmt: skip
    return report.table(header, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", choices=sorted(report.WORKLOADS), required=True)
    parser.add_argument("--precision", choices=("fp32", "tf32", "bf16"), default="fp32")
    parser.add_argument("--blocks", type=int, default=8, help="blocks of a launch to count (default 8)")
    parser.add_argument("--card", choices=sorted(time_model.CARDS), nargs="*", default=list(time_model.CARDS),
                        help="cards to model (default: all)")  # fmt: skip
    arguments = parser.parse_args()
    torch.manual_seed(0)
    found = launches.of_workload(arguments.workload, arguments.precision, blocks=arguments.blocks)
    tasks = workloads.WORKLOADS[arguments.workload].tasks
    print(f"{report.WORKLOADS[arguments.workload]}; {arguments.precision}, T = {tasks}, K = 5. Counted:\n")
    print(traffic(found))
    for (kernel, what), times_least in excesses(found).items():
        print(
            f"\n{kernel}: {times_least:.2f} times the least {what}: {REASONS.get((kernel, what), 'no reason known')}."
        )
    missing = machine_code.missing()
    if missing:
        print(f"\nNo times are modelled: {missing}.")
        return
    for name in arguments.card:
        modelled = time_model.of_launches(found, time_model.CARDS[name], arguments.precision)
        total = sum(one.microseconds for one in modelled)
        gaps = sum(one.times["gap"] for one in modelled)
        print(f"\n{name}, modelled, not measured: {total / 1e3:.3f} ms, {gaps / 1e3:.3f} of it gaps between launches\n")
        print(times(modelled))


if __name__ == "__main__":
    main()
