"""Which GPUs this build can serve, by their compute capability and their driver."""

from __future__ import annotations

import re
from functools import lru_cache

import torch

from ._loader import C


def coverage(capability: tuple[int, int], architectures: tuple[str, ...]) -> str | None:
    """Which entry of an architecture list a GPU of this compute capability runs, None if it can run none.

    Machine code (SASS) runs on GPUs of the same generation that are not older; that of an `a` variant only on its own
    capability, that of an `f` variant like plain code. PTX is compiled at the first launch, for any GPU not older.

    Example:
        >>> coverage((8, 6), ("8.0", "9.0+PTX")), coverage((12, 0), ("8.0", "9.0+PTX")), coverage((7, 5), ("8.0",))
        ('SASS 8.0', 'PTX 9.0', None)
    """
    sass, ptx = [], []
    for entry in architectures:
        match = re.fullmatch(r"(\d+)\.(\d+)([af]?)(\+PTX)?", entry)
        if match is None:
            continue
        built = (int(match[1]), int(match[2]))
        exact_only = match[3] == "a"
        name = f"{built[0]}.{built[1]}{match[3]}"
        if built == capability or (built[0] == capability[0] and built <= capability and not exact_only):
            sass.append((built, f"SASS {name}"))
        if match[4] and built <= capability and not match[3]:
            ptx.append((built, f"PTX {name}"))
    best = max(sass, default=None) or max(ptx, default=None)
    return best[1] if best else None


def why_not(capability: tuple[int, int], driver: int, architectures: tuple[str, ...], release: str) -> str | None:
    """Why kernels cannot run on a GPU of this capability; None if they can.

    Args:
        capability: The GPU's compute capability.
        driver: The newest CUDA version that the driver serves, such as 13000 for 13.0; 0 if it is unknown.
        architectures: What the kernels are compiled for.
        release: The CUDA release that compiled them, such as ``13.0.88``.

    Machine code needs a driver of the same major CUDA version or a later one; PTX, which the driver compiles, one that
    is not older than the compiler.

    Example:
        >>> why_not((9, 0), 12080, ("8.0", "9.0"), "13.0.88")
        'the driver serves CUDA 12.8, and the kernels were compiled by CUDA 13.0: install a newer driver'
        >>> why_not((9, 0), 13000, ("8.0", "9.0"), "13.0.88")
    """
    covered = coverage(capability, architectures)
    if covered is None:
        name = f"{capability[0]}.{capability[1]}"
        return (
            f"this build has kernels for {', '.join(architectures)}, and the GPU has compute capability {name}: "
            f"reinstall with TORCH_CUDA_ARCH_LIST={name}"
        )
    major, minor = (int(part) for part in release.split(".")[:2])
    needed = major * 1000 + (minor * 10 if covered.startswith("PTX") else 0)
    if driver and driver < needed:
        return (
            f"the driver serves CUDA {version_text(driver)}, and the kernels were compiled by CUDA {major}.{minor}: "
            "install a newer driver"
        )
    return None


def version_text(number: int) -> str:
    """CUDA's version number as people write it: 13000 is 13.0."""
    return f"{number // 1000}.{number % 1000 // 10}"


@lru_cache(maxsize=64)
def why_not_served(index: int) -> str | None:
    """Why this build's kernels cannot run on the GPU with this index; None if they can. Needs a build with CUDA."""
    capability = torch.cuda.get_device_capability(index)
    return why_not(capability, C.cuda_driver_version(), tuple(C.cuda_architectures), C.cuda_version)
