"""The GPU resources of every kernel, as CUDA's own tools report them for the machine code in the installed module.

`python tests/compile/resources.py` regenerates the table.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from helpers.programs.tools import tool
from signmaml_ext._loader import C

ROOT = Path(__file__).resolve().parents[2]
TABLE = ROOT / "tests" / "compile" / "resources.json"
ARCHITECTURES = (80, 90, 100, 120)
LAUNCHES = (
    "compact_sign_step",
    "conv_meta_step",
    "conv_products_bf16",
    "conv_products_fp32",
    "conv_products_tf32",
    "meta_accumulate",
    "mlp_meta_step_double",
    "mlp_meta_step_float",
    "mlp_second_order_double",
    "mlp_second_order_float",
    "sign_step",
)

# Threads per block, as the plans choose them (kSignStepBlock, kMetaAccumulateBlock; kMlpBlock or one warp;
# kConvThreads, kConvHeadThreads, kConvUpdateThreads, kMomentThreads).
BLOCKS = {
    "compact_sign_step_kernel": 256,
    "conv_climb_kernel": 256,
    "conv_climb_squares_kernel": 256,
    "conv_data_grad_kernel": 256,
    "conv_direction_kernel": 256,
    "conv_first_grad_kernel": 128,
    "conv_first_kernel": 128,
    "conv_first_tangent_kernel": 128,
    "conv_forward_kernel": 256,
    "conv_head_kernel": 1024,
    "conv_meta_accumulate_kernel": 256,
    "conv_pack_kernel": 256,
    "conv_rate_grads_kernel": 256,
    "conv_raw_grad_kernel": 128,
    "conv_remember_kernel": 256,
    "conv_sign_update_kernel": 256,
    "conv_subtract_kernel": 256,
    "conv_tangent_activate_kernel": 128,
    "conv_tangent_grad_sums_kernel": 128,
    "conv_tangent_head_kernel": 1024,
    "conv_tangent_raw_grad_kernel": 128,
    "conv_tangent_sums_kernel": 128,
    "conv_unpack_kernel": 256,
    "conv_weight_grad_kernel": 256,
    "patch_moments_kernel": 256,
    "sign_step_kernel": 256,
    "flag_nonfinite_kernel": 256,
    "meta_accumulate_kernel": 128,
    "mlp_meta_step_kernel": 256,
    "mlp_second_order_kernel": 256,
}
MLP = {"mlp_meta_step_kernel", "mlp_second_order_kernel"}
# Kernels that sum the covariance of patches in double, once per meta-step or only for block 1's few weights; or the
# squares of a gradient.
IN_DOUBLE = {
    "conv_climb_kernel",
    "conv_climb_squares_kernel",
    "conv_direction_kernel",
    "conv_meta_accumulate_kernel",
    "conv_pack_kernel",
    "conv_sign_update_kernel",
    "conv_subtract_kernel",
    "patch_moments_kernel",
}
# Kernels with operands in shared memory and registers: blocks of eight warps keep the tensor cores busy.
ON_TENSOR_CORES = {"conv_data_grad_kernel", "conv_forward_kernel", "conv_weight_grad_kernel"}
# Limits of one multiprocessor: 32-bit registers, resident warps and blocks, shared memory in KiB. Each block takes
# 1 KiB of shared memory more than it requests.
REGISTERS = 65536
WARPS = {80: 64, 89: 48, 90: 64, 100: 64, 120: 48}
MOST_BLOCKS = {80: 32, 89: 24, 90: 32, 100: 32, 120: 24}
SHARED_KIB = {80: 164, 89: 100, 90: 228, 100: 228, 120: 100}
# The launch used for kernels with one warp per task: the budgets' sinusoid workload (widths, tasks, support, query).
SINUSOID = ((1, 40, 40, 1), 1000, 10, 10)

# A machine instruction on doubles; float32 kernels must not contain any.
FP64 = re.compile(
    r"^\s+/\*\w+\*/\s+(?:@\S+\s+)?(?:D(?:ADD|FMA|MUL|SETP|MNMX|MMA)\b|\S*\.F64\b|MUFU\.\w+64H)", re.MULTILINE
)

# A product and a sum with one rounding. Kernels whose bits are the CPU's must not contain any.
FUSED = re.compile(r"^\s+/\*\w+\*/\s+(?:@\S+\s+)?[FD]FMA2?\b", re.MULTILINE)
ROUNDED_LIKE_THE_CPU = {"compact_sign_step_kernel", "sign_step_kernel"}


def missing() -> str | None:
    """A missing program that the measurement needs, or None."""
    needed = ["cuobjdump", "c++filt"] if in_installed_module() else ["nvcc", "cuobjdump", "c++filt"]
    return next((name for name in needed if tool(name) is None), None)


def in_installed_module() -> bool:
    """Whether the installed module has code for all architectures; otherwise the code is compiled here."""
    return {str(architecture) for architecture in ARCHITECTURES} <= {
        entry.split("+")[0].replace(".", "") for entry in C.cuda_architectures
    }


def release() -> str:
    """CUDA's release, such as 13.0: register counts may differ between releases."""
    if in_installed_module():
        return ".".join(C.cuda_version.split(".")[:2])
    match = re.search(r"release (\S+),", output("nvcc", "--version"))
    assert match is not None
    return match[1]


def output(name: str, *arguments: str, text: str | None = None) -> str:
    """Runs a program of the toolchain and returns what it prints."""
    done = subprocess.run([tool(name) or name, *arguments], input=text, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def warps_resident(registers: int, block: int, shared_bytes: int, architecture: int) -> int:
    """Resident warps per multiprocessor, limited by registers (allocated in multiples of 8 per thread), warps, blocks
    and shared memory."""
    of_block = -(-registers // 8) * 8 * block
    blocks = min(
        REGISTERS // of_block,
        WARPS[architecture] * 32 // block,
        MOST_BLOCKS[architecture],
        SHARED_KIB[architecture] * 1024 // (shared_bytes + 1024),
    )
    return blocks * block // 32


def dynamic_shared_bytes(kernel: str) -> int:
    """Dynamic shared memory per block at the launch for which occupancy is reported."""
    name, _, arguments = kernel.partition("<")
    if name in ON_TENSOR_CORES or name.startswith(("conv_", "patch_")):
        return conv_shared_bytes(name, arguments.rstrip(">").split(", "))
    if name not in MLP:
        return 0
    scalar, *switches = arguments.rstrip(">").split(", ")
    scalar_bytes = 4 if scalar == "float" else 8
    if switches[1 if name == "mlp_meta_step_kernel" else 0] == "false":  # not in shared memory
        return 0
    if name != "mlp_meta_step_kernel" or switches[0] != "true":
        return 48 * 1024  # kMlpSharedBytes, the most that a launch takes
    return int(C.plan_mlp_meta_step(*SINUSOID, scalar_bytes, 132)["shared_bytes"])


def conv_shared_bytes(name: str, arguments: list[str]) -> int:
    """The most that a Conv4 of the budgets requests: 64 filters at 28 x 28, else 32 (or 8) at 84 x 84."""
    filters = {"1": 8, "8": 64}.get(arguments[1], 32) if name in ON_TENSOR_CORES else 32
    side = 28 if filters == 64 else 84
    halving = "stride" if name == "conv_data_grad_kernel" and arguments[2] == "2" else "max"
    shape = {
        "blocks": 4, "channels": 3, "filters": filters, "height": side, "width": side, "ways": 5, "halving": halving,
        "readout": "flatten", "conv_bias": True, "eps": [1e-5] * 4,
    }  # fmt: skip
    precision = arguments[0] if name in ON_TENSOR_CORES else "fp32"
    by_covariance = name != "conv_raw_grad_kernel"
    launches = [
        one
        for options in ({"method": "maml", "learns_rates": True}, {"sharpness_rho": 0.1})
        for one in C.plan_conv_meta_step(shape, 8, 5, 5, 1, precision, 132, True, True, by_covariance, **options)[
            "launches"
        ]
    ]
    return max(int(one["shared_bytes"]) for one in launches if f"{one['kernel']}_kernel" == name)


def block_of(kernel: str) -> int:
    """Threads per block of a kernel, given its name with template arguments."""
    name, _, arguments = kernel.partition("<")
    if name == "mlp_meta_step_kernel" and arguments.split(", ")[1] == "true":
        return 32
    return BLOCKS[name]


def compiled(folder: Path) -> list[Path]:
    """Compiles every file of launch/ for every architecture, with the options of CMakeLists.txt."""

    jobs = [(folder, launch, architecture) for launch in LAUNCHES for architecture in ARCHITECTURES]
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda job: cubin(*job), jobs))


def usual_options() -> list[str]:
    """The options of CMakeLists.txt."""
    return ["-std=c++17", "-O3", "-DNDEBUG", f"-I{ROOT / 'csrc'}"]


def cubin(folder: Path, launch: str, architecture: int, *options: str) -> Path:
    """Compiles a file of launch/ for an architecture, with the options of CMakeLists.txt and these."""
    target = folder / f"{launch}.{architecture}.cubin"
    source = ROOT / "csrc" / "launch" / f"{launch}.cu"
    output("nvcc", *usual_options(), f"-arch=sm_{architecture}", *options, "-cubin", str(source), "-o", str(target))
    return target


def by_function(file: Path, option: str, mark: str) -> dict[tuple[str, str], str]:
    """cuobjdump's output for a file, split by architecture and by the function's symbol."""
    listing = output("cuobjdump", option, str(file))
    if file.suffix == ".cubin":  # for one architecture, which only the file's name gives
        listing = f"arch = sm_{file.suffixes[-2].removeprefix('.')}\n{listing}"
    parts = {}
    for of_code in re.split(r"^arch = ", listing, flags=re.MULTILINE)[1:]:
        for part in of_code.split(mark)[1:]:
            parts[of_code.split()[0], re.split(r"[\s:]", part, maxsplit=1)[0]] = part
    return parts


def measure(files: Sequence[Path]) -> dict[str, dict[str, dict[str, int]]]:
    """Resources of the kernels in these files, by name and architecture."""
    usage: dict[tuple[str, str], str] = {}
    code: dict[tuple[str, str], str] = {}
    for file in files:
        usage |= by_function(file, "-res-usage", " Function ")
        code |= by_function(file, "-sass", "Function : ")
    symbols = sorted({symbol for _, symbol in usage})
    names = dict(zip(symbols, map(plain, output("c++filt", text="\n".join(symbols)).splitlines()), strict=True))
    found: dict[str, dict[str, dict[str, int]]] = {}
    for (architecture, symbol), part in sorted(usage.items(), key=lambda item: int(item[0][0].removeprefix("sm_"))):
        name, number = names[symbol], int(architecture.removeprefix("sm_"))
        numbers = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|SHARED):(\d+)", part)}
        values = {
            "registers": numbers["REG"],
            # From 9.0 on, a kernel with shared memory is also charged the 1 KiB that the system reserves.
            "shared_bytes": max(0, numbers["SHARED"] - (1024 if number >= 90 else 0)),
            "stack_bytes": numbers["STACK"],  # spilled registers are stored there
            "fp64_instructions": len(FP64.findall(code[architecture, symbol])),
            "fused_multiply_adds": len(FUSED.findall(code[architecture, symbol])),
            "dynamic_shared_bytes": dynamic_shared_bytes(name),
        }
        shared = values["shared_bytes"] + values["dynamic_shared_bytes"]
        values["warps_resident"] = warps_resident(values["registers"], block_of(name), shared, number)
        found.setdefault(name, {})[architecture] = values
    return dict(sorted(found.items()))


def plain(demangled: str) -> str:
    """A kernel's name as in the source, without its namespace and parameters."""
    text = re.sub(r"\(int\)|\(bool\)|signmaml::|^void ", "", demangled)
    for number, precision in enumerate(("fp32", "tf32", "bf16")):
        text = text.replace(f"(ConvPrecision){number}", precision)
    name = text.split("(")[0]
    return name[: name.index(">") + 1] if "<" in name else name


def table() -> dict[str, Any]:
    """All kernels on all architectures."""
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(C.__file__)] if in_installed_module() else compiled(Path(folder))
        return {"nvcc": release(), "kernels": measure(files)}


def stale() -> str | None:
    """A source newer than the installed module, or None: the plans of such a module are not those of the sources."""
    built = Path(C.__file__).stat().st_mtime
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.suffix in {".cpp", ".cu", ".cuh", ".h"}]
    return next((str(path.relative_to(ROOT)) for path in sources if path.stat().st_mtime > built), None)


if __name__ == "__main__":
    if newer := stale():
        sys.exit(f"{newer} is newer than the installed module, whose plans the table takes: install it again")
    lines = json.dumps(table(), indent=1)
    # One line per kernel and architecture keeps diffs short.
    lines = re.sub(r'("sm_\d+": )\{([^}]*)\}', lambda m: m[1] + "{" + " ".join(m[2].split()) + "}", lines)
    TABLE.write_text(lines + "\n")
    print(f"wrote {TABLE}")
