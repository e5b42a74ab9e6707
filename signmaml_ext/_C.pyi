"""The native module: addresses, sizes and a stream in. `ops.py` is its only caller besides tests and `info.py`."""

from collections.abc import Sequence
from typing import Any

version: str
build_type: str
compiler: str
built_with_cuda: bool
cuda_version: str | None
cuda_architectures: tuple[str, ...]

def cpu_isas() -> list[str]: ...
def cpu_isa() -> str: ...
def select_cpu_isa(name: str, /) -> None: ...
def sign_step_cpu(
    params: int,
    grads: int,
    lr: int,
    segment_offsets: int,
    mask: int,
    nonfinite: int,
    tasks: int,
    parameters: int,
    lr_entries: int,
    mask_entries: int,
    segments: int,
    is_double: bool,
    threads: int,
    /,
) -> None: ...
def compact_sign_step_cpu(
    counts: int,
    params: int,
    theta: int,
    grads: int,
    lr: int,
    segment_offsets: int,
    nonfinite: int,
    tasks: int,
    parameters: int,
    lr_entries: int,
    segments: int,
    is_double: bool,
    threads: int,
    /,
) -> None: ...
def meta_accumulate_cpu(
    out: int,
    grads: int,
    nonfinite: int,
    tasks: int,
    parameters: int,
    skip_nonfinite: bool,
    is_double: bool,
    threads: int,
    /,
) -> None: ...

# The next four, conv_meta_step_cuda, mlp_meta_step_cuda and multiprocessors are there only where built_with_cuda.
def cuda_driver_version() -> int: ...
def sign_step_cuda(
    params: int,
    grads: int,
    lr: int,
    segment_offsets: int,
    mask: int,
    nonfinite: int,
    tasks: int,
    parameters: int,
    lr_entries: int,
    mask_entries: int,
    segments: int,
    is_double: bool,
    device: int,
    stream: int,
    /,
) -> None: ...
def compact_sign_step_cuda(
    counts: int,
    params: int,
    theta: int,
    grads: int,
    lr: int,
    segment_offsets: int,
    nonfinite: int,
    tasks: int,
    parameters: int,
    lr_entries: int,
    segments: int,
    is_double: bool,
    device: int,
    stream: int,
    /,
) -> None: ...
def meta_accumulate_cuda(
    out: int,
    grads: int,
    nonfinite: int,
    tasks: int,
    parameters: int,
    skip_nonfinite: bool,
    is_double: bool,
    device: int,
    stream: int,
    /,
) -> None: ...

class LayersProgram:
    """A network as a list of blocks, see signmaml_ext/layers/spec.py, for examples of one size `(C, H, W)`."""

    def __init__(self, blocks: Sequence[dict[str, Any]], size: tuple[int, int, int]) -> None: ...
    tensors: int
    outputs: int
    couples_examples: bool
    dropouts: int
    sizes: list[tuple[tuple[int, int, int], tuple[int, int, int], tuple[int, int, int]]]
    def plan(self, tasks: int, count: int, is_double: bool, threads: int, hessian: bool = False) -> dict[str, int]: ...
    def hessian(
        self,
        parameters: Sequence[tuple[int, int]],
        directions: Sequence[tuple[int, int]],
        products: Sequence[tuple[int, int]],
        x: int,
        labels: int,
        target: int,
        noise: Sequence[int],
        workspace: int,
        tasks: int,
        count: int,
        is_double: bool,
        threads: int,
    ) -> None: ...
    def run(
        self,
        parameters: Sequence[tuple[int, int]],
        gradients: Sequence[tuple[int, int]],
        x: int,
        labels: int,
        target: int,
        noise: Sequence[int],
        loss: int,
        predictions: int,
        workspace: int,
        tasks: int,
        count: int,
        is_double: bool,
        threads: int,
    ) -> None: ...

def plan_sign_step_cpu(tasks: int, parameters: int, threads: int, /) -> dict[str, int]: ...
def plan_meta_accumulate_cpu(tasks: int, parameters: int, threads: int, /) -> dict[str, int]: ...
def plan_sign_step(
    tasks: int, parameters: int, scalar_bytes: int, params: int, grads: int, multiprocessors: int, /
) -> dict[str, int]: ...
def plan_compact_sign_step(
    tasks: int, parameters: int, scalar_bytes: int, params: int, grads: int, counts: int, multiprocessors: int, /
) -> dict[str, int]: ...
def plan_meta_accumulate(
    tasks: int, parameters: int, scalar_bytes: int, out: int, grads: int, multiprocessors: int, /
) -> dict[str, int]: ...
def plan_conv_meta_step_cpu(
    shape: dict[str, Any],
    tasks: int,
    support: int,
    query: int,
    scalar_bytes: int,
    threads: int,
    steps: int = 0,
    method: str = "sign-maml",
    rates_by_element: bool = False,
    rates_by_step: bool = True,
    learns_rates: bool = False,
    sharpness_rho: float = 0.0,
    counts_steps: bool = False,
    with_blocks: bool = False,
) -> dict[str, Any]: ...
def plan_conv_meta_step(
    shape: dict[str, Any],
    tasks: int,
    support: int,
    query: int,
    steps: int,
    precision: str,
    multiprocessors: int,
    wants_grads: bool = True,
    wants_adapted: bool = False,
    by_covariance: bool = True,
    workspace_limit: int = 0,
    method: str = "sign-maml",
    rates_by_element: bool = False,
    learns_rates: bool = False,
    sharpness_rho: float = 0.0,
    sharpness_norm: str = "l2",
    sharpness_adaptive: bool = False,
    counts_steps: bool = False,
) -> dict[str, Any]: ...
def conv_meta_step_cuda(
    addresses: dict[str, int],
    shape: dict[str, Any],
    *,
    tasks: int,
    support: int,
    query: int,
    steps: int,
    method: str,
    precision: str,
    device: int,
    stream: int,
    by_covariance: bool = True,
    workspace_limit: int = 0,
    rates_by_element: bool = False,
    learns_rates: bool = False,
    sharpness_rho: float = 0.0,
    sharpness_norm: str = "l2",
    sharpness_adaptive: bool = False,
    counts_steps: bool = False,
) -> None: ...
def conv_meta_step_cpu(
    addresses: dict[str, int],
    shape: dict[str, Any],
    *,
    tasks: int,
    support: int,
    query: int,
    steps: int,
    method: str,
    is_double: bool,
    threads: int,
    skip_nonfinite: bool = False,
    rates_by_element: bool = False,
    rates_by_step: bool = True,
    learns_rates: bool = False,
    sharpness_rho: float = 0.0,
    sharpness_norm: str = "l2",
    sharpness_adaptive: bool = False,
    counts_steps: bool = False,
) -> None: ...
def plan_mlp_meta_step_cpu(
    widths: Sequence[int],
    tasks: int,
    support: int,
    query: int,
    scalar_bytes: int,
    threads: int,
    steps: int = 0,
    method: str = "sign-maml",
    rates_by_element: bool = False,
    rates_by_step: bool = True,
    learns_rates: bool = False,
    sharpness_rho: float = 0.0,
    counts_steps: bool = False,
) -> dict[str, int]: ...
def mlp_meta_step_cpu(
    addresses: dict[str, int],
    widths: Sequence[int],
    activation: str,
    loss: str,
    tasks: int,
    support: int,
    query: int,
    steps: int,
    method: str,
    is_double: bool,
    threads: int,
    skip_nonfinite: bool = False,
    rates_by_element: bool = False,
    rates_by_step: bool = True,
    learns_rates: bool = False,
    sharpness_rho: float = 0.0,
    sharpness_norm: str = "l2",
    sharpness_adaptive: bool = False,
    counts_steps: bool = False,
) -> None: ...

class ConvStageRunner:
    """The stages of the CPU's convolutional family one by one, on the memory of one task; for tests and benchmarks.

    Memory is 0 at first. A stage finds what the stages before it, or the caller, left in the arrays. It stays with the
    instruction set that was selected when it was made.
    """

    def __init__(self, shape: dict[str, Any], examples: int, is_double: bool = False) -> None: ...
    def run(self, stage: str, block: int, times: int = 1) -> None: ...
    def array(self, name: str, block: int = 0) -> memoryview: ...
    def plan(self, block: int) -> dict[str, Any]: ...
    def dot(self, a: int, b: int, n: int) -> float: ...
    def add_scaled(self, y: int, factor: float, x: int, n: int) -> None: ...
    def gradient_step(self, params: int, grads: int, lr: float, n: int) -> bool: ...
