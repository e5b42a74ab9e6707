"""What every kernel takes of a GPU, as nvcc's own tools report it.

`python tests/helpers/resources.py` renews the table.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

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
    "sign_step",
)

# Threads of a block, as the plans choose them (kSignStepBlock, kMetaAccumulateBlock; kMlpBlock or one warp;
# kConvThreads, kConvHeadThreads, kConvUpdateThreads).
BLOCKS = {
    "compact_sign_step_kernel": 256,
    "conv_data_gradient_kernel": 128,
    "conv_first_gradient_kernel": 128,
    "conv_first_kernel": 128,
    "conv_forward_kernel": 128,
    "conv_head_kernel": 256,
    "conv_meta_accumulate_kernel": 256,
    "conv_pack_kernel": 256,
    "conv_raw_gradient_kernel": 128,
    "conv_sign_update_kernel": 256,
    "conv_unpack_kernel": 256,
    "conv_weight_gradient_kernel": 128,
    "patch_moments_kernel": 128,
    "sign_step_kernel": 256,
    "flag_nonfinite_kernel": 256,
    "meta_accumulate_kernel": 128,
    "mlp_meta_step_kernel": 256,
}
# Kernels that sum the covariance of patches in double, once a meta-step or for block 1's few weights only.
IN_DOUBLE = {"conv_meta_accumulate_kernel", "conv_pack_kernel", "conv_sign_update_kernel", "patch_moments_kernel"}
# Kernels whose operands wait in shared memory and registers; two blocks of four warps keep the tensor cores busy.
ON_TENSOR_CORES = {"conv_data_gradient_kernel", "conv_forward_kernel", "conv_weight_gradient_kernel"}
# Of one multiprocessor: 32-bit registers, resident warps and blocks, shared memory in KiB, of which each block's share
# is a KiB more than it asks for.
REGISTERS = 65536
WARPS = {80: 64, 90: 64, 100: 64, 120: 48}
MOST_BLOCKS = {80: 32, 90: 32, 100: 32, 120: 24}
SHARED_KIB = {80: 164, 90: 228, 100: 228, 120: 100}
# The launch that a warp a task is looked at for: the sinusoid workload of the budgets (widths, tasks, support, query).
SINUSOID = ((1, 40, 40, 1), 1000, 10, 10)

# An instruction of PTX on doubles; a kernel on float32 has no business with it.
FP64 = re.compile(r"^\s+(?:@\S+\s+)?[a-z]\S*\.f64\b", re.MULTILINE)


def nvcc() -> str | None:
    """The compiler, if there is one."""
    return shutil.which("nvcc")


def release() -> str:
    """Its release, such as 13.0: another one may give other registers."""
    text = subprocess.run([nvcc() or "nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    match = re.search(r"release (\S+),", text)
    assert match is not None, text
    return match[1]


def warps_resident(registers: int, block: int, shared_bytes: int, architecture: int) -> int:
    """Warps of a multiprocessor at a launch: what registers (given out in eights a thread), blocks and shared memory
    allow."""
    of_block = -(-registers // 8) * 8 * block
    blocks = min(
        REGISTERS // of_block,
        WARPS[architecture] * 32 // block,
        MOST_BLOCKS[architecture],
        SHARED_KIB[architecture] * 1024 // (shared_bytes + 1024),
    )
    return blocks * block // 32


def dynamic_shared_bytes(kernel: str) -> int:
    """Dynamic shared memory of a block at the launch that occupancy is given for."""
    name, _, arguments = kernel.partition("<")
    if name in ON_TENSOR_CORES or name.startswith(("conv_", "patch_")):
        return conv_shared_bytes(name, arguments.rstrip(">").split(", "))
    if name != "mlp_meta_step_kernel":
        return 0
    scalar, warp, in_shared = arguments.rstrip(">").split(", ")
    scalar_bytes = 4 if scalar == "float" else 8
    if in_shared == "false":
        return 8 * scalar_bytes  # kMlpScratch
    if warp == "false":
        return 48 * 1024  # kMlpSharedBytes: whatever fits is taken
    return int(C.plan_mlp_meta_step(*SINUSOID, scalar_bytes, 132)["shared_bytes"])


def conv_shared_bytes(name: str, arguments: list[str]) -> int:
    """The most that a Conv4 of the budgets asks for: 64 filters at 28 x 28, else 32 (or 8) at 84 x 84."""
    filters = {"1": 8, "8": 64}.get(arguments[1], 32) if name in ON_TENSOR_CORES else 32
    side = 28 if filters == 64 else 84
    shape = {
        "blocks": 4, "channels": 3, "filters": filters, "height": side, "width": side, "ways": 5, "halving": "max",
        "readout": "flatten", "conv_bias": True, "eps": [1e-5] * 4,
    }  # fmt: skip
    precision = arguments[0] if name in ON_TENSOR_CORES else "fp32"
    plan = C.plan_conv_meta_step(shape, 8, 5, 5, 1, precision, 132, True, True, name != "conv_raw_gradient_kernel")
    return max(int(one["shared_bytes"]) for one in plan["launches"] if f"{one['kernel']}_kernel" == name)


def block_of(kernel: str) -> int:
    """Threads of a block of a kernel, by its name with template arguments."""
    name, _, arguments = kernel.partition("<")
    if name == "mlp_meta_step_kernel" and arguments.split(", ")[1] == "true":
        return 32
    return BLOCKS[name]


def measure(launch: str, architecture: int, folder: Path) -> dict[str, dict[str, int]]:
    """Compiles one file of launch/ and reads off what its kernels take."""
    target = folder / f"{launch}.{architecture}.cubin"
    command = [nvcc() or "nvcc", "-std=c++17", "-O3", "-DNDEBUG", "-Xptxas", "-v", f"-I{ROOT / 'csrc'}", "-cubin"]
    kept = folder / f"{launch}.{architecture}"
    kept.mkdir()
    command += [
        "--keep",
        "--keep-dir",
        str(kept),
        f"-arch=sm_{architecture}",
        str(ROOT / "csrc" / "launch" / f"{launch}.cu"),
        "-o",
        str(target),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (ptx,) = kept.glob("*.ptx")
    code_of = {part.split("(", 1)[0].strip(): part for part in ptx.read_text().split(".entry")[1:]}
    found = {}
    for part in done.stderr.split("Compiling entry function '")[1:]:
        symbol = part.split("'", 1)[0]
        numbers = {
            "registers": r"Used (\d+) registers",
            "shared_bytes": r"(\d+) bytes smem",
            "stack_bytes": r"(\d+) bytes stack frame",
            "spill_bytes": r"(\d+) bytes spill stores",
        }
        values = {key: int(match[1]) if (match := re.search(p, part)) else 0 for key, p in numbers.items()}
        name = demangled(symbol)
        values["fp64_instructions"] = len(FP64.findall(code_of[symbol]))
        values["dynamic_shared_bytes"] = dynamic_shared_bytes(name)
        shared = values["shared_bytes"] + values["dynamic_shared_bytes"]
        values["warps_resident"] = warps_resident(values["registers"], block_of(name), shared, architecture)
        found[name] = values
    return found


def demangled(symbol: str) -> str:
    """A kernel's name as one writes it, without its namespace and parameters."""
    text = subprocess.run(["c++filt", symbol], capture_output=True, text=True, check=True).stdout.strip()
    text = re.sub(r"\(int\)|\(bool\)|signmaml::|^void ", "", text)
    for number, precision in enumerate(("fp32", "tf32", "bf16")):
        text = text.replace(f"(ConvPrecision){number}", precision)
    name = text.split("(")[0]
    return name[: name.index(">") + 1] if "<" in name else name


def table() -> dict[str, Any]:
    """All kernels on all architectures."""
    jobs = [(launch, architecture) for launch in LAUNCHES for architecture in ARCHITECTURES]
    kernels: dict[str, dict[str, dict[str, int]]] = {}
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        results = pool.map(lambda job: (job[1], measure(*job, Path(folder))), jobs)
        for architecture, found in results:
            for name, values in found.items():
                kernels.setdefault(name, {})[f"sm_{architecture}"] = values
    return {"nvcc": release(), "kernels": dict(sorted(kernels.items()))}


if __name__ == "__main__":
    lines = json.dumps(table(), indent=1)
    # One line a kernel and architecture, so that a change is a short diff.
    lines = re.sub(r'("sm_\d+": )\{([^}]*)\}', lambda m: m[1] + "{" + " ".join(m[2].split()) + "}", lines)
    TABLE.write_text(lines + "\n")
    print(f"wrote {TABLE}")
