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

ROOT = Path(__file__).resolve().parents[2]
TABLE = ROOT / "tests" / "compile" / "resources.json"
ARCHITECTURES = (80, 90, 100, 120)
LAUNCHES = ("meta_accumulate", "mlp_meta_step", "sign_step")

# Threads of a block, as the plans choose them (kSignStepBlock, kMetaAccumulateBlock; kMlpBlock or one warp).
BLOCKS = {
    "sign_step_kernel": 256,
    "flag_nonfinite_kernel": 256,
    "meta_accumulate_kernel": 128,
    "mlp_meta_step_kernel": 256,
}
# Of one multiprocessor: 32-bit registers and resident warps.
REGISTERS = 65536
WARPS = {80: 64, 90: 64, 100: 64, 120: 48}

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


def warps_resident(registers: int, block: int, architecture: int) -> int:
    """Warps of a multiprocessor that registers allow at a block size; they are given out in eights a thread."""
    of_block = -(-registers // 8) * 8 * block
    blocks = min(REGISTERS // of_block, WARPS[architecture] * 32 // block)
    return blocks * block // 32


def block_of(kernel: str) -> int:
    """Threads of a block of a kernel, by its name with template arguments."""
    name, arguments = kernel.split("<")
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
        values["warps_resident"] = warps_resident(values["registers"], block_of(name), architecture)
        found[name] = values
    return found


def demangled(symbol: str) -> str:
    """A kernel's name as one writes it, without its namespace and parameters."""
    text = subprocess.run(["c++filt", symbol], capture_output=True, text=True, check=True).stdout.strip()
    text = re.sub(r"\(int\)|\(bool\)|signmaml::|^void ", "", text)
    return text[: text.index(">") + 1] if "<" in text else text.split("(")[0]


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
