"""The native operations as torch operators: `sign_step_`, `compact_sign_step_`, `meta_accumulate_` on flat buffers.

`torch.ops.signmaml_ext.*` have implementations for CPU, CUDA and fake tensors. They are registered with
`Library.define` and `impl`: the `custom_op` decorator costs ten times as much per call. The functions of this module
are the same operators with keyword arguments.

Shapes are those of `T` tasks with `P` parameters each; `G` is a number of segments.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._loader import C
from .nvtx import Range

LIBRARY = torch.library.Library("signmaml_ext", "DEF")
SCALARS = (torch.float32, torch.float64)


def sign_step_(
    params: Tensor,
    grads: Tensor,
    lr: Tensor,
    *,
    segment_offsets: Tensor | None = None,
    mask: Tensor | None = None,
    nonfinite: Tensor,
) -> None:
    """One signSGD step of all tensors of all tasks, in place: `params -= lr * sign(grads)`.

    The sign is three-valued: 0 for zeros of either sign, NaN for NaN, so that a broken gradient breaks the parameter.
    Subnormal gradients have a sign, regardless of `torch.set_flush_denormal`.

    Args:
        params: `[T, P]` float32 or float64, contiguous; updated in place.
        grads: `[T, P]`, dtype and device of `params`, contiguous. May not share memory with `params`.
        lr: learning rates, dtype and device of `params`: `[1]` for all parameters, `[P]` one per parameter, or,
            with `segment_offsets`, `[G]` one per segment.
        segment_offsets: `[G + 1]` int64 on the device of `params`, 0 first, P last, non-decreasing: segment `g` is
            columns `offsets[g]` to `offsets[g + 1] - 1`. The values are checked on the CPU. On CUDA a check would have
            to wait for the device, so wrong values choose wrong segments there. Default: no segments.
        mask: `[P]` bool or, with `segment_offsets`, `[G]` bool, on the device of `params`. Where it is False the
            parameter is not touched and its gradient is ignored. Default: all parameters are stepped.
        nonfinite: `[T]` bool on the device of `params`; set where a task's gradients, except ignored ones, hold a NaN
            or an infinity, otherwise left as it is.

    Raises:
        TypeError: for an argument that is not a tensor or has another dtype than above.
        ValueError: for another shape, device or layout than above, for tensors that overlap, and on the CPU for bad
            values of `segment_offsets`. Nothing is changed then.
        RuntimeError: where gradients would be recorded (grad mode is on and an argument requires grad), and for CUDA
            tensors where the package was built without CUDA.

    Deterministic: bitwise the same for any number of threads, on every instruction set and on CUDA, and whatever other
    tasks are in the batch. Allocates nothing; on CUDA it is one kernel launch on the current stream, without
    synchronisation, and may be captured in a graph.

    Example:
        >>> params, grads = torch.zeros(1, 3), torch.tensor([[2.0, -0.5, 0.0]])
        >>> nonfinite = torch.zeros(1, dtype=torch.bool)
        >>> sign_step_(params, grads, torch.tensor([0.25]), nonfinite=nonfinite)
        >>> params
        tensor([[-0.2500,  0.2500,  0.0000]])
    """
    check_tensors(params=params, grads=grads, lr=lr, nonfinite=nonfinite)
    torch.ops.signmaml_ext.sign_step_(params, grads, lr, segment_offsets, mask, nonfinite)


def compact_sign_step_(
    counts: Tensor,
    params: Tensor,
    theta: Tensor,
    grads: Tensor,
    lr: Tensor,
    *,
    segment_offsets: Tensor | None = None,
    nonfinite: Tensor,
) -> None:
    """One signSGD step of tasks whose state is int8: `counts += sign(grads)`, then `params = theta - lr * counts`.

    With a learning rate that is the same in every step, K steps from `theta` end at `theta - lr * n` with whole
    numbers |n| <= K: one byte per parameter holds what `sign_step_` keeps in four. `params` is written for the next
    forward pass and need not be kept longer. It is rounded twice (the product, the difference) for any K, where
    `sign_step_` rounds once per step. A gradient that is NaN makes its count -128 for good, which stands for NaN in
    `params`; so does the step that would leave -127..127.

    Args:
        counts: `[T, P]` int8, contiguous, zeros at `theta`; updated in place.
        params: `[T, P]` float32 or float64, contiguous; overwritten.
        theta: `[P]`, dtype and device of `params`: where the tasks started.
        grads: `[T, P]`, dtype and device of `params`, contiguous.
        lr: As for `sign_step_`; the same in every call on these counts.
        segment_offsets: As for `sign_step_`.
        nonfinite: `[T]` bool; set where a task's gradients hold a NaN or an infinity, or a count is NaN.

    Raises:
        TypeError, ValueError, RuntimeError: as `sign_step_` does.

    Deterministic as `sign_step_` is, and one launch on CUDA.

    Example:
        >>> counts, theta = torch.zeros(1, 3, dtype=torch.int8), torch.tensor([1.0, 2.0, 3.0])
        >>> params, nonfinite = torch.empty(1, 3), torch.zeros(1, dtype=torch.bool)
        >>> for grads in ([[2.0, -0.5, 0.0]], [[1.0, 0.5, -7.0]]):
        ...     grads, lr = torch.tensor(grads), torch.tensor([0.25])
        ...     compact_sign_step_(counts, params, theta, grads, lr, nonfinite=nonfinite)
        >>> counts, params
        (tensor([[ 2,  0, -1]], dtype=torch.int8), tensor([[0.5000, 2.0000, 3.2500]]))
    """
    check_tensors(counts=counts, params=params, theta=theta, grads=grads, lr=lr, nonfinite=nonfinite)
    torch.ops.signmaml_ext.compact_sign_step_(counts, params, theta, grads, lr, segment_offsets, nonfinite)


def meta_accumulate_(out: Tensor, grads: Tensor, *, nonfinite: Tensor, skip_nonfinite: bool = False) -> None:
    """Adds the mean of the tasks' meta-gradients, in place: `out += sum over live t of grads[t] / live tasks`.

    A column's sum runs over tasks 0, 1, ..., T - 1 in that order.

    Args:
        out: `[P]` float32 or float64, contiguous; added to in place.
        grads: `[T, P]`, dtype and device of `out`, contiguous. May not share memory with `out`.
        nonfinite: `[T]` bool on the device of `out`; set where `grads` of a task hold a NaN or an infinity, otherwise
            left as it is.
        skip_nonfinite: False (default): all T tasks count, and a NaN ends up in `out`. True: tasks whose flag is set,
            by this call or before it, are left out of the sum and of the count; if none is left, `out` stays as it is.

    Raises:
        TypeError, ValueError, RuntimeError: as `sign_step_` does.

    Deterministic as `sign_step_` is. On CUDA one launch, or two with `skip_nonfinite`.

    Example:
        >>> out, grads = torch.zeros(2), torch.tensor([[1.0, 2.0], [3.0, float("nan")]])
        >>> nonfinite = torch.zeros(2, dtype=torch.bool)
        >>> meta_accumulate_(out, grads, nonfinite=nonfinite, skip_nonfinite=True)
        >>> out, nonfinite
        (tensor([1., 2.]), tensor([False,  True]))
    """
    check_tensors(out=out, grads=grads, nonfinite=nonfinite)
    torch.ops.signmaml_ext.meta_accumulate_(out, grads, nonfinite, skip_nonfinite)


# ---- checks -------------------------------------------------------------------------------------------------------


def check_tensors(**arguments: object) -> None:
    for name, argument in arguments.items():
        if not isinstance(argument, Tensor):
            raise TypeError(f"{name}: expected a tensor, found {type(argument).__name__}")


def check_no_autograd(op: str, **tensors: Tensor | None) -> None:
    """The operators record nothing for autograd, so they refuse where something would be lost."""
    if torch.is_grad_enabled():
        for name, tensor in tensors.items():
            if tensor is not None and tensor.requires_grad:
                raise RuntimeError(
                    f"{op}: expected arguments that do not require grad, or torch.no_grad(); found that {name} "
                    "requires grad. The operator works in place and records no gradient"
                )


def check_tensor(name: str, tensor: Tensor, shape: str, dtype: torch.dtype, like: Tensor) -> None:
    """Checks dtype, device and layout; `check_shape` and `check_table` check the rest."""
    if tensor.dtype != dtype:
        raise TypeError(f"{name}: expected {shape} {dtype}, found {tensor.dtype}")
    if tensor.device != like.device:
        raise ValueError(f"{name}: expected device {like.device}, that of the first tensor, found {tensor.device}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name}: expected a contiguous tensor, found strides {tuple(tensor.stride())}")


def check_matrix(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in SCALARS:
        raise TypeError(f"{name}: expected float32 or float64, found {tensor.dtype}")
    if tensor.dim() != 2:
        raise ValueError(f"{name}: expected [T, P], found shape {list(tensor.shape)}")


def check_shape(name: str, tensor: Tensor, expected: str, allowed: bool) -> None:
    if not allowed:
        raise ValueError(f"{name}: expected {expected}, found shape {list(tensor.shape)}")


def check_table(name: str, tensor: Tensor, lengths: dict[str, int]) -> None:
    """Checks for one dimension of one of the lengths."""
    if tensor.dim() != 1 or tensor.shape[0] not in lengths.values():
        described = " or ".join(f"{letter} = [{length}]" for letter, length in lengths.items())
        raise ValueError(f"{name}: expected {described}, found shape {list(tensor.shape)}")


def check_step_buffers(
    params: Tensor, grads: Tensor, lr: Tensor, segment_offsets: Tensor | None, nonfinite: Tensor
) -> dict[str, int]:
    """Checks what both sign steps take; returns the lengths that a table over the columns may have."""
    check_matrix("params", params)
    tasks, parameters = params.shape
    dtype = params.dtype
    check_tensor("params", params, "[T, P]", dtype, params)
    check_tensor("grads", grads, "[T, P]", dtype, params)
    check_tensor("lr", lr, "[1], [P] or [G]", dtype, params)
    check_tensor("nonfinite", nonfinite, "[T]", torch.bool, params)
    check_shape("grads", grads, f"[T, P] = {[tasks, parameters]}, as params", grads.shape == params.shape)
    check_shape("nonfinite", nonfinite, f"[T] = [{tasks}]", nonfinite.dim() == 1 and nonfinite.shape[0] == tasks)
    lengths = {"[P]": parameters}
    if segment_offsets is not None:
        check_tensor("segment_offsets", segment_offsets, "[G + 1]", torch.int64, params)
        one_or_more = segment_offsets.dim() == 1 and segment_offsets.shape[0] >= 2
        check_shape("segment_offsets", segment_offsets, "[G + 1] with G of at least 1", one_or_more)
        lengths["[G]"] = segment_offsets.shape[0] - 1
    return lengths


# ---- the operators --------------------------------------------------------------------------------------------------


class SignStep(NamedTuple):
    """The arguments of `sign_step_`, in the operator's order."""

    params: Tensor
    grads: Tensor
    lr: Tensor
    segment_offsets: Tensor | None
    mask: Tensor | None
    nonfinite: Tensor

    def check(self) -> None:
        """Raises for arguments that the operator does not take; see `sign_step_`."""
        check_no_autograd("sign_step_", params=self.params, grads=self.grads, lr=self.lr)
        lengths = check_step_buffers(self.params, self.grads, self.lr, self.segment_offsets, self.nonfinite)
        if self.mask is not None:
            check_tensor("mask", self.mask, "[P] or [G]", torch.bool, self.params)
            check_table("mask", self.mask, lengths)
        check_table("lr", self.lr, {"[1]": 1, **lengths})

    def buffer(self) -> Tensor:
        """`[T, P]`; if it is empty, there is nothing to do."""
        return self.params

    def written(self) -> tuple[Tensor, ...]:
        """The tensors that are changed in place."""
        return self.params, self.nonfinite

    def native(self) -> tuple[int | bool, ...]:
        """The leading arguments of both native implementations."""
        tasks, parameters = self.params.shape
        return (
            self.params.data_ptr(),
            self.grads.data_ptr(),
            self.lr.data_ptr(),
            address(self.segment_offsets),
            address(self.mask),
            self.nonfinite.data_ptr(),
            tasks,
            parameters,
            self.lr.shape[0],
            0 if self.mask is None else self.mask.shape[0],
            segments(self.segment_offsets),
            self.params.dtype == torch.float64,
        )


class CompactSignStep(NamedTuple):
    """The arguments of `compact_sign_step_`, in the operator's order; methods as those of `SignStep`."""

    counts: Tensor
    params: Tensor
    theta: Tensor
    grads: Tensor
    lr: Tensor
    segment_offsets: Tensor | None
    nonfinite: Tensor

    def check(self) -> None:
        check_no_autograd("compact_sign_step_", params=self.params, theta=self.theta, grads=self.grads, lr=self.lr)
        lengths = check_step_buffers(self.params, self.grads, self.lr, self.segment_offsets, self.nonfinite)
        tasks, parameters = self.params.shape
        counts, theta = self.counts, self.theta
        check_tensor("counts", counts, "[T, P]", torch.int8, self.params)
        check_shape("counts", counts, f"[T, P] = {[tasks, parameters]}, as params", counts.shape == self.params.shape)
        check_tensor("theta", theta, "[P]", self.params.dtype, self.params)
        check_shape("theta", theta, f"[P] = [{parameters}]", theta.dim() == 1 and theta.shape[0] == parameters)
        check_table("lr", self.lr, {"[1]": 1, **lengths})

    def buffer(self) -> Tensor:
        return self.params

    def written(self) -> tuple[Tensor, ...]:
        return self.counts, self.params, self.nonfinite

    def native(self) -> tuple[int | bool, ...]:
        tasks, parameters = self.params.shape
        return (
            self.counts.data_ptr(),
            self.params.data_ptr(),
            self.theta.data_ptr(),
            self.grads.data_ptr(),
            self.lr.data_ptr(),
            address(self.segment_offsets),
            self.nonfinite.data_ptr(),
            tasks,
            parameters,
            self.lr.shape[0],
            segments(self.segment_offsets),
            self.params.dtype == torch.float64,
        )


class MetaAccumulate(NamedTuple):
    """The arguments of `meta_accumulate_`, in the operator's order; methods as those of `SignStep`."""

    out: Tensor
    grads: Tensor
    nonfinite: Tensor
    skip_nonfinite: bool

    def check(self) -> None:
        out, grads, nonfinite = self.out, self.grads, self.nonfinite
        check_no_autograd("meta_accumulate_", out=out, grads=grads)
        check_matrix("grads", grads)
        tasks, parameters = grads.shape
        check_tensor("out", out, "[P]", grads.dtype, out)
        check_tensor("grads", grads, "[T, P]", grads.dtype, out)
        check_tensor("nonfinite", nonfinite, "[T]", torch.bool, out)
        check_shape("out", out, f"[P] = [{parameters}]", out.dim() == 1 and out.shape[0] == parameters)
        check_shape("nonfinite", nonfinite, f"[T] = [{tasks}]", nonfinite.dim() == 1 and nonfinite.shape[0] == tasks)

    def buffer(self) -> Tensor:
        return self.grads

    def written(self) -> tuple[Tensor, ...]:
        return self.out, self.nonfinite

    def native(self) -> tuple[int | bool, ...]:
        tasks, parameters = self.grads.shape
        return (
            self.out.data_ptr(),
            self.grads.data_ptr(),
            self.nonfinite.data_ptr(),
            tasks,
            parameters,
            self.skip_nonfinite,
            self.grads.dtype == torch.float64,
        )


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def segments(offsets: Tensor | None) -> int:
    return 0 if offsets is None else offsets.shape[0] - 1


def check_built_with_cuda(op: str) -> None:
    if not C.built_with_cuda:
        raise RuntimeError(
            f"{op}: expected CPU tensors, found CUDA tensors, and this signmaml_ext was built without CUDA. "
            "Reinstall it where nvcc is found; FORCE_CUDA=1 makes a missing nvcc an error"
        )


def register(stem: str, call: type[SignStep] | type[CompactSignStep] | type[MetaAccumulate], schema: str) -> None:
    """Defines `<stem>_` with its implementations; torch allows it once per process, and the module is imported once.

    Args:
        stem: Stem of the name of the operator and of the native functions `<stem>_cpu` and `<stem>_cuda`.
        call: Type of its arguments.
        schema: Schema of the arguments.
    """
    name = f"{stem}_"

    def cpu(*arguments: Any) -> None:
        found = call(*arguments)
        found.check()
        if found.buffer().numel():
            getattr(C, f"{stem}_cpu")(*found.native(), torch.get_num_threads())
            torch.autograd.graph.increment_version(found.written())

    def cuda(*arguments: Any) -> None:
        found = call(*arguments)
        found.check()
        check_built_with_cuda(name)
        device = found.buffer().device
        if found.buffer().numel():
            # The native side makes the device current.
            with Range(stem, device):
                getattr(C, f"{stem}_cuda")(*found.native(), device.index, torch.cuda.current_stream(device).cuda_stream)
            torch.autograd.graph.increment_version(found.written())

    def fake(*arguments: Any) -> None:
        call(*arguments).check()

    LIBRARY.define(f"{name}({schema}) -> ()", tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, cpu, "CPU")
    LIBRARY.impl(name, cuda, "CUDA")
    torch.library.register_fake(f"signmaml_ext::{name}", fake, lib=LIBRARY)


register(
    "sign_step",
    SignStep,
    "Tensor(a!) params, Tensor grads, Tensor lr, Tensor? segment_offsets, Tensor? mask, Tensor(b!) nonfinite",
)
register(
    "compact_sign_step",
    CompactSignStep,
    "Tensor(a!) counts, Tensor(b!) params, Tensor theta, Tensor grads, Tensor lr, Tensor? segment_offsets, "
    "Tensor(c!) nonfinite",
)
register("meta_accumulate", MetaAccumulate, "Tensor(a!) out, Tensor grads, Tensor(b!) nonfinite, bool skip_nonfinite")
