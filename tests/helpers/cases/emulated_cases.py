"""Cases that every kernel must pass on the emulated GPU; each raises if a kernel is wrong or unsound.

Also run as a program, `emulated_cases.py MODULE [GROUP ...]`, so that a broken kernel cannot take the test process with
it.
"""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from helpers.cases import conv_cases, nets, perceptrons
from signmaml_ext import Sharpness, conv, mlp, reference


def poisoned(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """An output that has not been written yet, filled with NaN."""
    return torch.full(shape, torch.nan, dtype=dtype)


@contextmanager
def unwritten_is_nan() -> Iterator[None]:
    """Fills memory that torch allocates, a workspace too, with NaN (bytes of 255), so that no kernel may rely on it."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def misaligned(value: Tensor, elements: int) -> Tensor:
    """A contiguous copy that starts `elements` elements after a 16-byte boundary."""
    memory = value.new_empty(value.numel() + elements + 16)
    start = (-memory.data_ptr() % 16) // value.element_size() + elements
    copy = memory[start : start + value.numel()].view(value.shape)
    copy.copy_(value)
    return copy


def block_sum(native: ModuleType, rows: int, columns: int, block: int) -> None:
    values, out = torch.randn(rows, columns), poisoned(rows)
    native.selftest_block_sum(values.data_ptr(), out.data_ptr(), rows, columns, block)
    torch.testing.assert_close(out, values.double().sum(1).float(), rtol=1e-5, atol=1e-5)


def matmul_tf32(native: ModuleType, m: int, n: int, k: int) -> None:
    # Small integers are exact in TF32 and in every order of summation.
    a, b = (torch.randint(-8, 9, shape).float() for shape in ((m, k), (k, n)))
    c = poisoned(m, n)
    native.selftest_matmul_tf32(a.data_ptr(), b.data_ptr(), c.data_ptr(), m, n, k)
    torch.testing.assert_close(c, a @ b, rtol=0, atol=0)


def matmul_bf16(native: ModuleType, m: int, n: int, k: int) -> None:
    a, b = (torch.randint(-8, 9, shape).to(torch.bfloat16) for shape in ((m, k), (n, k)))
    c = poisoned(m, n)
    native.selftest_matmul_bf16(a.data_ptr(), b.data_ptr(), c.data_ptr(), m, n, k)
    torch.testing.assert_close(c, a.float() @ b.float().T, rtol=0, atol=0)


def tensor_core_sum(native: ModuleType, precision: str, start: float, factors: list[tuple[float, float]]) -> float:
    """`start` plus the products of at most 8 (tf32) or 16 (bf16) pairs, as one mma makes it; `start` is a tf32 or bf16
    number."""
    depth = {"tf32": 8, "bf16": 16}[precision]
    a, b, c = torch.zeros(16, 2 * depth), torch.zeros(2 * depth, 16), poisoned(16, 16)
    a[0, 0], b[0, 0] = start, 1.0  # the first mma makes the start
    for k, (x, y) in enumerate(factors):
        a[0, depth + k], b[depth + k, 0] = x, y
    if precision == "tf32":
        native.selftest_matmul_tf32(a.data_ptr(), b.data_ptr(), c.data_ptr(), 16, 16, 2 * depth)
    else:
        rows, columns = a.to(torch.bfloat16), b.T.contiguous().to(torch.bfloat16)
        assert torch.equal(rows.float(), a) and torch.equal(columns.float(), b.T)
        native.selftest_matmul_bf16(rows.data_ptr(), columns.data_ptr(), c.data_ptr(), 16, 16, 2 * depth)
    return float(c[0, 0])


_ZERO, _QUARTER = (0.0, 0.0), (0.5, 0.5)
_LARGE, _MINUS_LARGE = (2.0**12, 2.0**12), (-(2.0**12), 2.0**12)
_SQUARE, _MINUS_SQUARE = (1.5, 1.5), (-1.5, 1.5)  # 2.25: its exponent is counted as 0, the sum of 1.5's
# A start, factors, and their sums on sm_80 and on sm_90, worked out by hand from the published models.
TENSOR_CORE_SUMS: dict[str, tuple[str, float, list[tuple[float, float]], float, float]] = {
    "the last bit that both keep": ("tf32", 1.0, [(2.0**-12, 2.0**-12)] * 8, 1 + 2.0**-21, 1 + 2.0**-21),
    "one bit lower": ("tf32", 1.0, [(2.0**-12, 2.0**-13)] * 8, 1.0, 1 + 2.0**-22),
    "two bits lower": ("tf32", 1.0, [(2.0**-13, 2.0**-13)] * 8, 1.0, 1.0),
    "sums are cut off": ("tf32", 1.0, [(1.5 * 2.0**-12, 2.0**-12)], 1.0, 1.0),
    "towards zero": ("tf32", -1.0, [(-1.5 * 2.0**-12, 2.0**-12)], -1.0, -1.0),
    "terms are cut off": ("tf32", 1.0, [(-(2.0**-12), 2.0**-13)], 1.0, 1 - 2.0**-24),
    "four at once, or eight": ("tf32", 0.0, [_LARGE, _MINUS_LARGE, _ZERO, _ZERO, _QUARTER], 0.25, 0.0),
    "the first four": ("tf32", 0.0, [_LARGE, _MINUS_LARGE, _ZERO, _QUARTER], 0.0, 0.0),
    "exponents of products": ("tf32", 0.0, [_SQUARE, _MINUS_SQUARE, (2.0**-12, 2.0**-12)], 2.0**-24, 2.0**-24),
    "beyond them": ("tf32", 0.0, [_SQUARE, _MINUS_SQUARE, (2.0**-13, 2.0**-13)], 0.0, 0.0),
    "a subnormal sum": ("tf32", 0.0, [(2.0**-75, 2.0**-74)], 2.0**-149, 2.0**-149),
    "too small a sum": ("tf32", 0.0, [(2.0**-75, 2.0**-75)], 0.0, 0.0),
    "too large a sum": ("tf32", 0.0, [(-(2.0**64), 2.0**64)], -torch.inf, -torch.inf),
    "eight at once, or sixteen": ("bf16", 0.0, [_LARGE, _MINUS_LARGE, *[_ZERO] * 6, _QUARTER], 0.25, 0.0),
    "the first eight": ("bf16", 0.0, [_LARGE, _MINUS_LARGE, *[_ZERO] * 5, _QUARTER], 0.0, 0.0),
    "bf16, one bit lower": ("bf16", 1.0, [(2.0**-12, 2.0**-13)] * 16, 1.0, 1 + 2.0**-21),
}


def tensor_core_sums(native: ModuleType, architecture: int) -> None:
    """Sums by the tensor cores of an architecture, which the caller has chosen."""
    for name, (precision, start, factors, *expected) in TENSOR_CORE_SUMS.items():
        found = tensor_core_sum(native, precision, start, factors)
        assert found == expected[architecture >= 90], (name, architecture, found, expected)


def gradients(tasks: int, parameters: int, dtype: torch.dtype) -> Tensor:
    """Numbers of every kind except NaN and Inf."""
    grads = torch.randn(tasks, parameters, dtype=dtype)
    flat = grads.view(-1)
    special = torch.tensor([0.0, -0.0, 1e-45 if dtype == torch.float32 else 5e-324], dtype=dtype)
    chosen = torch.randperm(flat.numel())[: 3 * (flat.numel() // 6)]
    flat[chosen] = special.repeat(len(chosen) // 3)
    return grads


def sign_step(
    native: ModuleType, tasks: int, parameters: int, dtype: torch.dtype, form: str, shift: int = 0, apart: int = 0
) -> None:
    """Addresses start `shift` elements after a boundary; those of gradients `apart` more."""
    from helpers.devices import emulated

    grads = gradients(tasks, parameters, dtype)
    offsets = mask = None
    segments = min(3, parameters)
    if form.startswith("segment"):
        inner = torch.randint(0, parameters + 1, (segments - 1,)).sort().values
        offsets = torch.cat([torch.tensor([0]), inner, torch.tensor([parameters])])
    entries = {"all": 1, "masked": 1, "element": parameters, "segments": segments, "segments masked": segments}[form]
    lr = torch.rand(entries, dtype=dtype) + 0.5
    if form.endswith("masked"):
        mask = torch.rand(segments if offsets is not None else parameters) < 0.5
    bad = torch.zeros(tasks, dtype=torch.bool)
    if tasks > 1:
        column = parameters - 1
        grads[1, column] = torch.nan if parameters % 2 else torch.inf
        bad[1] = True
    rates, looked_at = lr.expand(parameters) if entries == 1 else lr, torch.ones(parameters, dtype=torch.bool)
    if offsets is not None:
        rates = lr.repeat_interleave(offsets.diff())
    if mask is not None:
        looked_at = mask if offsets is None else mask.repeat_interleave(offsets.diff())
        bad &= looked_at[-1]
    params = torch.randn(tasks, parameters, dtype=dtype)
    direction = torch.where(grads.isnan(), grads, grads.sign())
    expected = torch.where(looked_at, params - rates * direction, params)
    params, grads = misaligned(params, shift), misaligned(grads, shift + apart)
    flags = torch.zeros(tasks, dtype=torch.bool)
    emulated.sign_step_(native, params, grads, lr, segment_offsets=offsets, mask=mask, nonfinite=flags)
    torch.testing.assert_close(params, expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(flags, bad), (flags, bad)


def compact_sign_step(
    native: ModuleType, tasks: int, parameters: int, dtype: torch.dtype, form: str, shift: int = 0, apart: int = 0
) -> None:
    """Addresses start `shift` elements after a boundary; those of gradients `apart` more."""
    from helpers.devices import emulated

    theta, segments = torch.randn(parameters, dtype=dtype), min(3, parameters)
    inner = torch.randint(0, parameters + 1, (segments - 1,)).sort().values
    offsets = torch.cat([torch.tensor([0]), inner, torch.tensor([parameters])]) if form == "segments" else None
    lr = torch.rand({"all": 1, "element": parameters, "segments": segments}[form], dtype=dtype) + 0.5
    rates = lr.expand(parameters) if form == "all" else lr
    rates = rates if offsets is None else lr.repeat_interleave(offsets.diff())
    before = torch.randint(-127, 128, (tasks, parameters))
    before.view(-1)[torch.randperm(before.numel())[: before.numel() // 8]] = -128
    before.view(-1)[-1] = 127  # one step further in one direction is NaN
    grads = gradients(tasks, parameters, dtype)
    grads[-1, -1] = 1.0
    if tasks > 1:
        grads[1, parameters // 2] = torch.nan
        grads[0, 0] = torch.inf
    after = before + grads.sign().nan_to_num().long()
    after[(before == -128) | grads.isnan() | (after.abs() > 127)] = -128
    bad = ((after == -128) | ~grads.isfinite()).any(1)
    number = torch.where(after == -128, torch.nan, after.to(dtype))
    counts = misaligned(before.to(torch.int8), shift)  # in step with the scalars
    params, grads = misaligned(poisoned(tasks, parameters, dtype=dtype), shift), misaligned(grads, shift + apart)
    flags = torch.zeros(tasks, dtype=torch.bool)
    emulated.compact_sign_step_(native, counts, params, theta, grads, lr, segment_offsets=offsets, nonfinite=flags)
    assert torch.equal(counts.long(), after)
    torch.testing.assert_close(params, theta - rates * number, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(flags, bad), (flags, bad)


def meta_accumulate(
    native: ModuleType, tasks: int, parameters: int, dtype: torch.dtype, skip: bool, shift: int
) -> None:
    from helpers.devices import emulated

    grads, out = gradients(tasks, parameters, dtype), torch.randn(parameters, dtype=dtype)
    bad = torch.zeros(tasks, dtype=torch.bool)
    for task, column in ((0, parameters - 1), (2, 0)):
        if task < tasks:
            grads[task, column] = torch.inf
            bad[task] = True
    live = [task for task in range(tasks) if not (skip and bad[task])]
    total = torch.zeros(parameters, dtype=dtype)
    for task in live:
        total += grads[task]
    expected = out + total / len(live) if live else out.clone()
    out, grads = misaligned(out, shift), misaligned(grads, shift)
    flags = torch.zeros(tasks, dtype=torch.bool)
    emulated.meta_accumulate_(native, out, grads, nonfinite=flags, skip_nonfinite=skip)
    torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(flags, bad), (flags, bad)


def mlp_meta_step(
    native: ModuleType,
    widths: tuple[int, ...],
    tasks: int,
    support: int,
    query: int,
    loss: str,
    dtype: torch.dtype = torch.float64,
    activation: type[nn.Module] = nn.ReLU,
) -> None:
    """Against the definition in plain PyTorch in float64: plain steps and, in float64, sign steps.

    In float32 a sign can differ where a gradient is near 0.
    """
    from helpers.cases import definition, perceptrons
    from signmaml_ext import mlp

    model = perceptrons.network(widths, activation).double()
    data = []
    for count in (support, query):
        data.append(torch.randn(tasks, count, widths[0], dtype=torch.float64))
        targets = torch.randn(tasks, count, widths[-1], dtype=torch.float64)
        data.append(targets if loss == "mse" else targets.argmax(-1))
    tested = copy.deepcopy(model).to(dtype)
    inputs = tuple(value.to(dtype) if value.is_floating_point() else value for value in data)
    near = {"rtol": 1e-10, "atol": 1e-10} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-5}
    for method in ("sign-maml", "fo-maml") if dtype == torch.float64 else ("fo-maml",):
        options = {"inner_lr": 0.05, "inner_steps": 2, "method": method, "loss": loss}
        problem = perceptrons.problem_of(tested, inputs, **options, nonfinite="skip")
        found = mlp.meta_gradients(problem, native)
        expected, query_loss, support_loss = definition.meta_gradient(model, data, **options)
        for name, gradient in expected.items():
            torch.testing.assert_close(found.params[name].double(), gradient, **near)
        torch.testing.assert_close(found.query_loss.double(), query_loss, **near)
        torch.testing.assert_close(found.support_loss.double(), support_loss, **near)
        adapted = mlp.adapt(problem, native)
        torch.testing.assert_close(adapted.query_loss.double(), query_loss, **near)
        if loss == "cross_entropy":
            right = (adapted.logits.argmax(-1) == data[3]).float().mean(1)
            assert torch.equal(found.query_accuracy, right)


def _in_double_and(
    dtype: torch.dtype, widths: tuple[int, ...], tasks: int, support: int, query: int, loss: str,
    activation: type[nn.Module],
) -> tuple[nn.Module, tuple[Tensor, ...], nn.Module, tuple[Tensor, ...]]:  # fmt: skip
    """A perceptron and its tasks in float64, and copies of both in another dtype."""
    model = perceptrons.network(widths, activation).double()
    data = perceptrons.tasks_for(widths, loss, tasks, support, query, torch.float64)
    inputs = tuple(value.to(dtype) if value.is_floating_point() else value for value in data)
    return model, data, copy.deepcopy(model).to(dtype), inputs


def mlp_second_order(
    native: ModuleType,
    widths: tuple[int, ...],
    tasks: int,
    support: int,
    query: int,
    loss: str,
    dtype: torch.dtype = torch.float64,
    activation: type[nn.Module] = nn.Tanh,
) -> None:
    """maml with a rate for every tensor and step, against torch's double backward in float64."""
    model, data, tested, inputs = _in_double_and(dtype, widths, tasks, support, query, loss, activation)
    rates = {name: 0.1 + 0.2 * torch.rand(2, *[1] * value.ndim) for name, value in model.named_parameters()}
    near = {"rtol": 1e-10, "atol": 1e-10} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-5}
    for adapt in (None, ["3.*"]):
        used = rates if adapt is None else {name: rate for name, rate in rates.items() if name.startswith("3.")}
        options = {"inner_lr": used, "inner_steps": 2, "method": "maml", "loss": loss, "adapt": adapt}
        found = mlp.meta_gradients(perceptrons.problem_of(tested, inputs, **options), native)
        expected = reference.meta_gradients(perceptrons.problem_of(model, data, **options))
        for name, gradient in expected.params.items():
            torch.testing.assert_close(found.params[name].double(), gradient, **near)
        torch.testing.assert_close(found.query_loss.double(), expected.query_loss, **near)
        torch.testing.assert_close(found.support_loss.double(), expected.support_loss, **near)


def mlp_sharp(
    native: ModuleType, widths: tuple[int, ...], tasks: int, support: int, query: int, loss: str, dtype: torch.dtype,
    activation: type[nn.Module] = nn.Tanh,
) -> None:  # fmt: skip
    """Sharpness-aware steps in one dtype, against the reference in float64; no sign is taken, which might flip."""
    model, data, tested, inputs = _in_double_and(dtype, widths, tasks, support, query, loss, activation)
    options = {"inner_lr": 0.1, "inner_steps": 2, "method": "fo-maml", "loss": loss, "sharpness": Sharpness(0.05)}
    found = mlp.meta_gradients(perceptrons.problem_of(tested, inputs, **options), native)
    expected = reference.meta_gradients(perceptrons.problem_of(model, data, **options))
    near = {"rtol": 1e-9, "atol": 1e-10} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-5}
    for name, gradient in expected.params.items():
        torch.testing.assert_close(found.params[name].double(), gradient, **near)


def mlp_rates(
    native: ModuleType, widths: tuple[int, ...], sizes: tuple[int, int, int], kind: str, method: str, *,
    loss: str = "mse", activation: type[nn.Module] = nn.Tanh, learnable: bool = True, adapt: list[str] | None = None,
    steps: int = 2, **others: Any,
) -> None:  # fmt: skip
    """Rates that learn or vary within a tensor, and other options of the steps, against the reference in float64."""
    model = perceptrons.network(widths, activation).double()
    data = perceptrons.tasks_for(widths, loss, *sizes, torch.float64)
    rates = rates_of(model, kind, steps, learnable=learnable)
    if adapt is not None and isinstance(rates, dict):
        rates = {name: rate for name, rate in rates.items() if name in adapt}
    options = {"inner_lr": rates, "inner_steps": steps, "method": method, "loss": loss, "adapt": adapt, **others}
    problem = perceptrons.problem_of(model, data, **options)
    assert mlp.why_not(problem, on_cuda=True) is None
    found, expected = mlp.meta_gradients(problem, native), reference.meta_gradients(problem)
    for own, theirs in ((found.params, expected.params), (found.rates, expected.rates)):
        assert own.keys() == theirs.keys()
        for name, value in theirs.items():
            assert (own[name] is None) == (value is None), name
            if value is not None:
                torch.testing.assert_close(own[name], value, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(found.support_loss, expected.support_loss, rtol=1e-10, atol=1e-11)
    adapted, truth = mlp.adapt(problem, native), reference.adapt(problem)
    assert adapted.params.keys() == truth.params.keys()
    for name, value in truth.params.items():
        torch.testing.assert_close(adapted.params[name], value, rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(adapted.query_loss, truth.query_loss, rtol=1e-10, atol=1e-11)


def mlp_second_order_faults(native: ModuleType) -> None:
    """A task that is not finite leaves nothing to the next one of its team; one whose product with the Hessian
    overflows is flagged."""
    from helpers.cases import perceptrons
    from signmaml_ext import mlp, reference

    widths, options = (3, 5, 2), {"inner_steps": 2, "inner_lr": 0.1, "method": "maml", "nonfinite": "skip"}
    for dtype in (torch.float32, torch.float64):
        model = perceptrons.network(widths, nn.Tanh).to(dtype)
        data = perceptrons.tasks_for(widths, "mse", 35, 2, 2, dtype)
        data[0][1] = torch.nan
        problem = perceptrons.problem_of(model, data, **options)
        found, expected = mlp.meta_gradients(problem, native), reference.meta_gradients(problem)
        assert found.nonfinite.tolist() == [task == 1 for task in range(35)], found.nonfinite
        for name, gradient in expected.params.items():
            torch.testing.assert_close(found.params[name], gradient, rtol=1e-4, atol=1e-6)
    for tensor in ("1.weight", "1.bias"):
        model, data, options = perceptrons.overflowing(tensor)
        _, flags = perceptrons.rows(perceptrons.problem_of(model, data, **options, method="maml"), native)
        assert flags.tolist() == [False, True], tensor


def conv_meta_step(native: ModuleType, net: conv_cases.Net, *, by_covariance: bool = True, **options: Any) -> None:
    """A meta-step with plain gradient steps, which hide no error, against float64."""
    data = conv_cases.draw(net)
    found = conv_cases.run(native, net, data, method="fo-maml", by_covariance=by_covariance, **options)
    exact = conv_cases.definition(net, data, method="fo-maml", **options)
    for name in ("grads", "adapted"):
        errors = conv_cases.errors(net, getattr(found, name), getattr(exact, name))
        assert max(errors) < 5e-6, (name, errors)
    for name in ("query_loss", "support_loss", "logits"):
        torch.testing.assert_close(getattr(found, name).double(), getattr(exact, name), rtol=1e-5, atol=1e-5)
    assert torch.equal(found.query_accuracy, exact.query_accuracy)
    assert found.nonfinite.tolist() == exact.nonfinite.tolist()


def conv_ties(native: ModuleType) -> None:
    """Of equal values in a pooling window, the first one gets the gradient."""
    net = conv_cases.Net(tasks=1, height=8, width=9, support=2, query=2)
    data = conv_cases.with_ties(conv_cases.draw(net))
    exact = conv_cases.definition(net, data, steps=0)
    for by_covariance in (True, False):
        found = conv_cases.run(native, net, data, steps=0, by_covariance=by_covariance)
        assert max(conv_cases.errors(net, found.grads, exact.grads)) < 5e-6


def conv_sums(native: ModuleType) -> None:
    """Sums over a long depth are about as exact as PyTorch's; left to tensor cores, they would not be."""
    net = conv_cases.Net(filters=32, height=6, width=6, tasks=1, support=2, query=12)
    apart = conv_cases.errors_of_tasks(native, net, [conv_cases.draw(net)])
    ratio = conv_cases.ratio_to_torch(net, apart)
    assert ratio < 1.4, ratio


def conv_precision(native: ModuleType, net: conv_cases.Net, precision: str, by_covariance: bool) -> None:
    """Gradients are about as exact as PyTorch's in the same precision."""
    draws = conv_cases.draw_tasks(net)
    apart = conv_cases.errors_of_tasks(native, net, draws, precision, by_covariance=by_covariance)
    ratio = conv_cases.ratio_to_torch(net, apart)
    assert ratio < 2, (precision, by_covariance, ratio)


def conv_step_is_exact(native: ModuleType, method: str) -> None:
    """With the same data as query set of no step and as support set of one, the step uses exactly that gradient."""
    net = conv_cases.Net(channels=2, support=3, query=3)
    data = conv_cases.draw(net)
    lr = torch.rand(1, len(net.tensors)) * 0.1
    data.query_x, data.query_y = data.support_x, data.support_y
    gradient = conv_cases.run(native, net, data, steps=0).grads
    stepped = conv_cases.run(native, net, data, steps=1, lr=lr, method=method)
    rates = torch.cat([rate.expand(torch.Size(shape).numel()) for rate, shape in zip(lr[0], net.tensors, strict=True)])
    theta = torch.cat([p.reshape(-1) for p in data.params])
    assert gradient is not None
    direction = gradient.sign() if method == "sign-maml" else gradient
    assert torch.equal(stepped.adapted, theta - rates * direction)
    for tensor, before, dead in zip(conv_cases.split(net, stepped.adapted), data.params, net.dead, strict=True):
        assert not dead or torch.equal(tensor, before.expand_as(tensor)), "a convolution's bias never moves"


# A quiet NaN as most operations give it, the one with all bits set that NVIDIA's give, and both with a sign.
NAN_BITS = (0x7FC00000, 0x7FFFFFFF, 0xFFC00000, 0xFFFFFFFF)


def conv_nan_of_any_bits(native: ModuleType) -> None:
    """A weight of the second block that is NaN, whatever its bits, makes the loss and the gradient NaN."""
    net = conv_cases.Net(tasks=1, support=2, query=2)
    second = 4 if net.conv_bias else 3  # its weight, after the first block's tensors
    for bits in NAN_BITS:
        data = conv_cases.draw(net)
        data.params[second].view(-1)[5:6].view(torch.int32).fill_(bits - (bits >> 31 << 32))
        found = conv_cases.run(native, net, data, steps=0)
        assert found.nonfinite.all() and found.query_loss.isnan().all(), hex(bits)
        gradients = conv_cases.split(net, found.grads)
        assert gradients[second].isnan().any() and gradients[-1].isnan().all(), hex(bits)


def conv_branches(native: ModuleType, net: conv_cases.Net, *, by_covariance: bool = True) -> None:
    """Without gradients, without a query set and in chunks of tasks, the results that remain have the same bits."""
    data = conv_cases.draw(net)
    whole = conv_cases.run(native, net, data, steps=2, by_covariance=by_covariance)
    of_query = {"query_loss", "query_accuracy", "logits", "grads"}
    for options, absent in (
        ({"wants_grads": False}, {"grads"}),
        ({"with_query": False}, of_query),
        ({"workspace_limit": 1}, set()),
    ):
        part = conv_cases.run(native, net, data, steps=2, by_covariance=by_covariance, **options)
        for name in ("support_loss", "adapted", *sorted(of_query)):
            found = getattr(part, name)
            assert found is None if name in absent else torch.equal(found, getattr(whole, name)), (options, name)


def conv_faults(native: ModuleType, device: str = "cpu") -> None:
    """Only a non-finite task is flagged; its neighbours' results keep every bit."""
    net = conv_cases.Net(tasks=3, height=5, width=6, support=2, query=2)
    data = conv_cases.draw(net).to(device)
    healthy = conv_cases.run(native, net, data)
    data.support_y[0, 1] = net.ways
    data.query_x[2, 0, 0, 1, 1] = torch.nan
    found = conv_cases.run(native, net, data)
    assert found.nonfinite.tolist() == [True, False, True], found.nonfinite
    assert torch.equal(found.grads[1], healthy.grads[1]) and torch.equal(found.adapted[1:], healthy.adapted[1:])
    assert found.grads[2].isnan().any() and found.support_loss[0].isnan().tolist() == [True, False, False]


def conv_second_order(native: ModuleType, net: conv_cases.Net, *, by_covariance: bool = True, **options: Any) -> None:
    """maml with a rate for every tensor and step, of which some do not adapt, against torch's double backward."""
    data, count = conv_cases.draw(net), len(net.tensors)
    rates = 0.02 + 0.05 * torch.rand(2, count, generator=torch.Generator().manual_seed(1))
    options = {"steps": 2, "lr": rates, "method": "maml", **options}
    found = conv_cases.run(native, net, data, by_covariance=by_covariance, **options)
    exact = conv_cases.definition(net, data, **options)
    for name in ("grads", "adapted"):
        errors = conv_cases.errors(net, getattr(found, name), getattr(exact, name))
        assert max(errors) < 1e-5, (name, errors)
    torch.testing.assert_close(found.support_loss.double(), exact.support_loss, rtol=1e-5, atol=1e-5)
    assert found.nonfinite.tolist() == exact.nonfinite.tolist()


# Perceptrons (widths, then tasks, support, query) for teams of a warp and of a block, in shared memory and in the
# workspace; one of everything.
TEAMS = [((3, 7, 5, 2), (18, 4, 3)), ((2, 33, 3, 2), (2, 66, 7)), ((5, 256, 3), (2, 3, 11)), ((1, 1, 1), (1, 1, 1))]


def rates_of(model: nn.Module, kind: str, steps: int, *, learnable: bool = True) -> Tensor | dict[str, Tensor]:
    """Rates of one kind, of the model's dtype."""
    dtype = next(model.parameters()).dtype
    shapes: dict[str, Callable[[Tensor], tuple[int, ...]]] = {
        "tensor": lambda p: (),
        "tensor and step": lambda p: (steps, *[1] * p.ndim),
        "filter": lambda p: (p.shape[0], *[1] * (p.ndim - 1)),
        "element": lambda p: tuple(p.shape),
        "element and step": lambda p: (steps, *p.shape),
    }

    def rate(*shape: int) -> Tensor:
        return (0.02 + 0.1 * torch.rand(shape, dtype=dtype)).requires_grad_(learnable)

    if kind in shapes:
        return {name: rate(*shapes[kind](p)) for name, p in model.named_parameters()}
    return rate(steps) if kind == "step" else rate()


def conv_rates(
    native: ModuleType, kind: str, method: str, *, learnable: bool = True, adapt: list[str] | None = None,
    steps: int = 2, others: Mapping[str, Any] = MappingProxyType({}), **sizes: Any,
) -> None:  # fmt: skip
    """Rates that learn or vary within a tensor, and other options of the steps, against the float64 reference, where no
    sign is in doubt."""
    sizes = {"ways": 3, "channels": 2, "filters": 8, "size": 9, "layers": 2, **sizes}
    for _ in range(20 if method == "sign-maml" else 3):  # without signs, only ReLU and pooling can be in doubt
        model = nets.conv4(**sizes)
        data = nets.image_tasks(2, 3, sizes["channels"], 2, 2, sizes["size"], dtype=torch.float32)
        rates = rates_of(model, kind, steps, learnable=learnable)
        if adapt is not None and isinstance(rates, dict):
            rates = {name: rate for name, rate in rates.items() if name in adapt}
        options = {"inner_steps": steps, "method": method, "loss": "cross_entropy", "adapt": adapt, **others}
        problem = perceptrons.problem_of(model, data, inner_lr=rates, **options)
        wide = tuple(value.double() if value.is_floating_point() else value for value in data)
        double = {k: r.detach().double().requires_grad_(learnable) for k, r in problem.rates.values.items()}
        exact = perceptrons.problem_of(copy.deepcopy(model).double(), wide, inner_lr=double.get("", double), **options)
        assert conv.why_not(problem, on_cuda=True) is None
        with unwritten_is_nan():
            adapted = conv.adapt(problem, native)
        expected = reference.adapt(exact)
        if all((adapted.params[name] - value).abs().max() < 1e-4 for name, value in expected.params.items()):
            break
    else:
        raise AssertionError("no draw without a sign in doubt")
    with unwritten_is_nan():
        found = conv.meta_gradients(problem, native)
    truth = reference.meta_gradients(exact)
    assert found.nonfinite.tolist() == truth.nonfinite.tolist()
    torch.testing.assert_close(found.support_loss.double(), truth.support_loss, rtol=1e-4, atol=1e-5)
    for own, theirs in ((found.params, truth.params), (found.rates, truth.rates)):
        assert own.keys() == theirs.keys()
        # The products whose sum is a rate's gradient may cancel.
        largest = max((value.norm() for value in theirs.values() if value is not None), default=0.0)
        for name, value in theirs.items():
            assert (own[name] is None) == (value is None), name
            if value is not None:
                bound = 2e-5 * (value.norm() + 1e-3 * largest) + 1e-9
                assert (own[name].double() - value).norm() <= bound, (name, own[name], value)


def conv_second_order_bits(native: ModuleType, net: conv_cases.Net, precision: str) -> None:
    """maml in any precision, in both forms of block 1, is as near to float64 as that precision's operands allow."""
    data = conv_cases.draw(net)
    options = {"steps": 1, "lr": 0.02, "method": "maml"}
    exact = conv_cases.definition(net, data, **options)
    for by_covariance in (True, False):
        found = conv_cases.run(native, net, data, precision=precision, by_covariance=by_covariance, **options)
        errors = torch.tensor(conv_cases.errors(net, found.grads, exact.grads))
        assert errors.median() < {"fp32": 1e-5, "tf32": 0.02, "bf16": 0.2}[precision], (
            precision,
            by_covariance,
            errors,
        )


def conv_second_order_faults(native: ModuleType, device: str = "cpu") -> None:
    """Tasks that are not finite are flagged, also where only the second order overflows; a neighbour keeps its bits."""
    net = conv_cases.Net(tasks=3, height=5, width=6, support=2, query=2, conv_bias=False)
    data, options = conv_cases.draw(net).to(device), {"steps": 2, "lr": 0.05, "method": "maml"}
    healthy = conv_cases.run(native, net, data, **options)
    for break_, flags in (
        (lambda broken: broken.support_y[0].fill_(net.ways), [True, False, False]),
        (lambda broken: broken.query_x[2, 0, 0].fill_(torch.nan), [False, False, True]),
    ):
        broken = copy.deepcopy(data)
        break_(broken)
        found = conv_cases.run(native, net, broken, **options)
        assert found.nonfinite.tolist() == flags, found.nonfinite
        for task, flag in enumerate(flags):
            assert flag == bool(found.grads[task].isnan().any())
            assert flag or torch.equal(found.grads[task], healthy.grads[task])
    for part in ("classifier", "blocks"):
        net, data, options = conv_overflowing(part)
        found = conv_cases.run(native, net, data.to(device), **options)
        assert found.adapted.isfinite().all() and found.query_loss.isfinite().all(), part
        assert found.nonfinite.tolist() == [True], part


def conv_overflowing(part: str) -> tuple[conv_cases.Net, conv_cases.Data, dict[str, Any]]:
    """A task that is finite but for the second order, which overflows in the gradient of the classifier's weight, or of
    the blocks alone.

    Of one image with both labels and equal logits, the classifier's bias has the gradient 0. So it does not move,
    whatever its rate; but the query gradient times a huge rate is a huge direction.
    """
    net = conv_cases.Net(tasks=1, ways=2, height=5, width=6, support=2, query=2, readout="mean", conv_bias=False)
    data = conv_cases.draw(net)
    data.support_x[:, 1] = data.support_x[:, 0]
    data.support_y[:], data.query_y[:] = torch.tensor([0, 1]), 0
    weight, gamma = data.params[-2], data.params[-4]
    weight.zero_()
    data.params[-1].zero_()
    if part == "classifier":
        gamma *= 100  # the features
    else:
        for tensor in data.params[-5:-2]:  # filters 0 and 1 have the same features
            tensor[1] = tensor[0]
        data.params[-3][:2] += 1  # and some that ReLU passes
        weight[0, 0] = weight[1, 1] = 100.0
    rates = torch.zeros(1, len(net.tensors))
    rates[0, -1] = 3.4e38
    adapt = [False] * (len(net.tensors) - 1) + [True]
    return net, data, {"steps": 1, "lr": rates, "adapt": adapt, "method": "maml"}


Case = Callable[[ModuleType], None]


def seeded(case: Case, seed: int, blocks_alive: int) -> Case:
    """The case with its own random numbers and order of threads, whatever has run before it."""

    def run(native: ModuleType) -> None:
        torch.manual_seed(seed)
        native.configure(seed=seed, blocks_alive=blocks_alive, multiprocessors=1)
        case(native)

    return run


def in_orders(cases: Mapping[str, Case], *orders: tuple[int, int]) -> dict[str, Case]:
    """The cases in several random orders of threads: `(seed, blocks_alive)`."""
    return {
        f"{name}, seed {seed}" if len(orders) > 1 else name: seeded(case, seed, alive)
        for seed, alive in orders
        for name, case in cases.items()
    }


def all_of(function: Callable[..., None], *arguments: Sequence[Any]) -> Case:
    """A case that calls the function with each of these tuples of arguments."""

    def run(native: ModuleType) -> None:
        for each in arguments:
            function(native, *each)

    return run


def of_conv() -> dict[str, Case]:
    """The cases of the convolution kernels; the quick ones come first, because they find most errors."""
    Net = conv_cases.Net
    rates = torch.rand(2, 10, generator=torch.Generator().manual_seed(1)) * 0.1
    adapt = [i % 4 != 2 for i in range(10)]
    # More tiles than slices: a thread block processes several tiles in turn.
    many = Net(halving="stride", height=20, width=22, readout="mean", tasks=1, support=2, query=66)
    return {
        "no step": partial(conv_meta_step, net=Net(channels=2, tasks=1), steps=0),
        "ties": conv_ties,
        "stride": partial(
            conv_meta_step, net=Net(channels=3, halving="stride", readout="mean", conv_bias=False), steps=1
        ),
        "rates": partial(conv_meta_step, net=Net(channels=2, height=9, width=11), steps=2, lr=rates, adapt=adapt),
        "faults": conv_faults,
        "NaN of any bits": conv_nan_of_any_bits,
        "three blocks": partial(
            conv_meta_step, net=Net(blocks=3, height=11, width=9, halving="stride"), steps=1, by_covariance=False
        ),
        # Several chunks of channels, and of columns of the weight gradient.
        "many filters": partial(
            conv_meta_step, net=Net(filters=40, height=4, width=5, tasks=1, support=2, query=2), steps=0
        ),
        "sums": conv_sums,
        # Two numbers share a word of an operand.
        "bf16": partial(
            conv_precision, net=Net(halving="stride", height=7, width=9), precision="bf16", by_covariance=True
        ),
        "one block": partial(
            conv_meta_step, net=Net(blocks=1, channels=3, height=5, width=37, conv_bias=False), by_covariance=False
        ),
        "many tiles": partial(conv_meta_step, net=many, steps=0),
        "many tiles of one block": partial(conv_meta_step, net=replace(many, blocks=1), steps=0, by_covariance=False),
    }


def of_second() -> dict[str, Case]:
    """The cases of convolutional networks whose steps are differentiated; the quick ones come first."""
    Net = conv_cases.Net
    adapt = [i % 4 != 2 for i in range(11)]
    odd = Net(blocks=3, channels=3, height=9, width=11, halving="stride", readout="mean", tasks=1, conv_bias=False)
    many = Net(1, halving="stride", height=20, width=22, readout="mean", tasks=1, support=66, query=2)
    return {
        "one block": partial(conv_second_order, net=Net(blocks=1, tasks=1, height=5, width=8, conv_bias=False)),
        "three blocks": partial(conv_second_order, net=odd, by_covariance=False, adapt=adapt),
        # A thread block that processes several tiles in turn.
        "many tiles": partial(conv_second_order, net=many, steps=1, lr=0.05),
        "two blocks": partial(conv_second_order, net=Net(channels=2, height=9, width=11, tasks=2, support=2, query=2)),
        "faults": conv_second_order_faults,
        # Several chunks of channels and slices of tiles.
        "many filters": partial(conv_second_order, net=Net(filters=40, height=6, width=7, tasks=1, support=9, query=2)),
    }


def of_flat() -> dict[str, Case]:
    """The cases of the emulator itself, the flat-buffer kernels and the MLP. The quick ones come first."""
    cases: dict[str, Case] = {
        "block sum": all_of(block_sum, (3, 1027, 128), (1, 5, 32), (2, 64, 64)),
        "matmul of tf32": all_of(matmul_tf32, (16, 16, 8), (32, 16, 40)),
        "matmul of bf16": all_of(matmul_bf16, (16, 8, 16), (32, 16, 48)),
    }
    sizes = ((3, 1027), (2, 5), (1, 1))
    shifts = (0, 1, 0)
    for dtype, named in ((torch.float32, "float"), (torch.float64, "double")):
        for form in ("all", "masked", "element", "segments", "segments masked"):
            calls = [(*size, dtype, form, shift) for size, shift in zip(sizes, shifts, strict=True)]
            cases[f"sign step, {named}, {form}"] = all_of(sign_step, *calls)
            if not form.endswith("masked"):
                cases[f"counts, {named}, {form}"] = all_of(compact_sign_step, *calls)
        # Several tiles of a row; several tasks per block.
        rest = (2, 4200, dtype, "all", 1), (35, 3, dtype, "all", 0)
        cases[f"sign step, {named}, tiles and tasks"] = all_of(sign_step, *rest)
        cases[f"counts, {named}, tiles and tasks"] = all_of(compact_sign_step, *rest)
        for skip in (False, True):
            rows = [(*row, dtype, skip, shift) for *row, shift in ((1, 1027, 0), (3, 5, 1), (11, 33, 0), (9, 2048, 0))]
            cases[f"mean, {named}, {'skip' if skip else 'keep'}"] = all_of(meta_accumulate, *rows)
    for loss in ("mse", "cross_entropy"):
        # A warp in shared memory, a block in the workspace.
        cases[f"perceptron of a warp, {loss}"] = partial(
            mlp_meta_step, widths=(3, 6, 5, 2), tasks=3, support=4, query=3, loss=loss
        )
        cases[f"perceptron of a block, {loss}"] = partial(
            mlp_meta_step, widths=(2, 33, 3, 2), tasks=2, support=66, query=7, loss=loss
        )
        cases[f"second order of a warp, {loss}"] = partial(
            mlp_second_order, widths=(3, 6, 5, 2), tasks=3, support=5, query=3, loss=loss
        )
        cases[f"second order of a block, {loss}"] = partial(
            mlp_second_order, widths=(2, 33, 3, 2), tasks=2, support=66, query=7, loss=loss
        )
    several: dict[str, Any] = {"widths": (2, 3, 1), "tasks": 35, "support": 2, "query": 2, "loss": "mse"}
    cases["several tasks of a team"] = partial(mlp_meta_step, **several)
    # Large tiles, some of them cut at the edge.
    large: dict[str, Any] = {"widths": (3, 40, 33, 2), "tasks": 12, "support": 5, "query": 5, "loss": "mse"}
    cases["large tiles"] = partial(mlp_meta_step, **large)
    for dtype, named in ((torch.float32, "float"), (torch.float64, "double")):
        cases[f"second order, large tiles, {named}"] = partial(mlp_second_order, **large, dtype=dtype)
    cases["second order, faults"] = mlp_second_order_faults
    return cases


def several_tiles_of_a_block(native: ModuleType) -> None:
    sign_step(native, 1, 33 * 4096 + 3, torch.float32, "all")
    compact_sign_step(native, 1, 33 * 4096 + 3, torch.float32, "all")


def of_mlp_steps() -> dict[str, Case]:
    """The cases of perceptrons whose rates learn or vary within a tensor, of their sharpness-aware steps and of steps
    that are counted: of a warp in shared memory and of a block in the workspace."""
    warp: dict[str, Any] = {"widths": (3, 7, 5, 2), "sizes": (18, 4, 3)}
    block: dict[str, Any] = {"widths": (2, 33, 3, 2), "sizes": (2, 66, 7)}
    counted: dict[str, Any] = {"task_state": "int8", "adapt": ["1.bias", "5.weight"], "steps": 3}
    adaptive = Sharpness(0.05, "l2", adaptive=True)
    return {
        name: partial(mlp_rates, **options)
        for name, options in {
            "rates of tensors, fo-maml": {
                "widths": (3, 7, 5, 2), "sizes": (5, 4, 3), "kind": "tensor", "method": "fo-maml",
                "adapt": ["1.bias", "5.weight"],
            },
            "rates of tensors and steps, maml": {**warp, "kind": "tensor and step", "method": "maml"},
            "rates of elements and steps, maml": {
                **warp, "kind": "element and step", "method": "maml", "adapt": ["3.weight", "5.bias"]
            },
            "rates of elements, sign-maml": {**block, "kind": "element", "method": "sign-maml"},
            "rates of steps, sign-maml": {**block, "kind": "step", "method": "sign-maml"},
            "adaptive sharpness": {**warp, "kind": "tensor and step", "method": "sign-maml", "sharpness": adaptive},
            "sharpness": {**block, "kind": "element", "method": "fo-maml", "sharpness": Sharpness(0.05)},
            "sharp counted steps": {
                **warp, "kind": "filter", "method": "sign-maml", "sharpness": Sharpness(0.01, "linf"), **counted
            },
            "counted steps": {
                **block, "kind": "scalar", "method": "sign-maml", "learnable": False, "task_state": "int8"
            },
        }.items()
    }  # fmt: skip


def of_conv_steps() -> dict[str, Case]:
    """The same of convolutional networks."""
    body = [name for name, _ in nets.conv4(layers=2).named_parameters()][:-2]
    adaptive, linf = Sharpness(0.05, "l2", adaptive=True), Sharpness(0.01, "linf")
    return {
        f"conv, {name}": partial(conv_rates, **options)
        for name, options in {
            "rates of steps, sign-maml": {"kind": "step", "method": "sign-maml"},
            "rates of tensors and steps, maml": {"kind": "tensor and step", "method": "maml"},
            "rates of elements, fo-maml": {"kind": "element", "method": "fo-maml"},
            "rates of elements and steps, maml": {"kind": "element and step", "method": "maml"},
            "adaptive sharpness": {"kind": "tensor", "method": "sign-maml", "others": {"sharpness": adaptive}},
            "sharpness, rates of elements": {
                "kind": "element and step", "method": "fo-maml", "others": {"sharpness": Sharpness(0.05)}
            },
            "sharpness of the body": {
                "kind": "tensor", "method": "fo-maml", "adapt": body, "others": {"sharpness": Sharpness(0.05)}
            },
            "sharp counted steps": {
                "kind": "filter", "method": "sign-maml", "others": {"sharpness": linf, "task_state": "int8"}
            },
            "counted steps": {
                "kind": "scalar", "method": "sign-maml", "learnable": False, "others": {"task_state": "int8"},
                "steps": 3,
            },
        }.items()
    }  # fmt: skip


# Networks of 8, 32 and 64 columns of products, of every number of channels and both halvings.
OF_EVERY_KIND = (
    conv_cases.Net(blocks=3, height=11, width=13),
    conv_cases.Net(filters=32, channels=2, halving="stride", height=9, width=8, tasks=1, query=9),
    conv_cases.Net(filters=64, channels=3, height=6, width=7, tasks=1, query=6, readout="mean", conv_bias=False),
    conv_cases.Net(halving="stride", height=7, width=9),
    conv_cases.Net(filters=32, height=6, width=5, tasks=1, query=9),
    conv_cases.Net(filters=64, halving="stride", height=7, width=6, tasks=1, query=6),
)


def of_products() -> dict[str, Case]:
    """The products on tensor cores, in every precision."""
    cases: dict[str, Case] = {}
    for precision in ("fp32", "tf32", "bf16"):
        for number, net in enumerate(OF_EVERY_KIND):
            for form, by_covariance in (("by covariance", True), ("by patches", False)):
                cases[f"conv, {precision}, network {number}, {form}"] = partial(
                    conv_precision, net=net, precision=precision, by_covariance=by_covariance
                )
            cases[f"conv, second order, {precision}, network {number}"] = partial(
                conv_second_order_bits, net=net, precision=precision
            )
        # Block 1 of every number of channels, by the covariance of its patches.
        for channels in (1, 2, 3):
            net = conv_cases.Net(1, channels=channels, query=9)
            cases[f"conv, {precision}, {channels} channels"] = partial(
                conv_precision, net=net, precision=precision, by_covariance=True
            )
    return cases


def of_kernels() -> dict[str, Case]:
    """Every kernel that the other groups leave out: each type and kind of address, every size of tile."""
    cases: dict[str, Case] = {}
    for dtype, named in ((torch.float32, "float"), (torch.float64, "double")):
        for apart, how in ((0, "vectors"), (1, "elements")):  # in vectors, or one element at a time
            for form in ("all", "masked", "element", "segments", "segments masked"):
                call = partial(sign_step, tasks=2, parameters=9001, dtype=dtype, form=form, apart=apart)
                cases[f"sign step, {named}, {form}, {how}"] = call
                if not form.endswith("masked"):
                    call = partial(compact_sign_step, tasks=2, parameters=9001, dtype=dtype, form=form, apart=apart)
                    cases[f"counts, {named}, {form}, {how}"] = call
        calls = [(tasks, 1029, dtype, skip, shift) for skip in (False, True) for tasks, shift in ((17, 0), (9, 1))]
        cases[f"mean, {named}"] = all_of(meta_accumulate, *calls)
        perceptron = {"mean": mlp_meta_step, "second order": mlp_second_order, "sharp": mlp_sharp}
        for what, function in perceptron.items():
            for loss, activation in (("mse", nn.Tanh), ("cross_entropy", nn.ReLU)):
                for sizes in (
                    ((3, 6, 5, 2), 3, 4, 3),  # a warp in shared memory
                    ((800, 16, 2), 1, 2, 2),  # a warp in the workspace
                    ((3, 33, 5), 2, 70, 66),  # a block, in float in shared memory
                    ((3, 40, 40, 5), 3, 5, 9),  # a block in shared memory
                    # A block in the workspace, with large tiles and with small ones.
                    ((9, 120, 120, 3), 2, *((60, 65) if loss == "mse" else (20, 21))),
                ):
                    name = f"perceptron, {what}, {named}, {sizes}, {loss}"
                    cases[name] = all_of(function, (*sizes, loss, dtype, activation))
            # Large tiles, some of them cut at the edge; small, medium and large ones, of a warp and of a block.
            for sizes in (
                ((3, 40, 33, 2), 12, 5, 5),
                ((3, 160, 2), 12, 3, 3),
                ((3, 160, 2), 1, 3, 3),
                ((3, 160, 2), 1, 20, 5),
                ((3, 64, 64, 2), 1, 12, 12),
                ((3, 60, 60, 2), 12, 10, 10),
            ):
                cases[f"perceptron, {what}, {named}, {sizes}"] = all_of(function, (*sizes, "mse", dtype))
    sharp = {"sharpness": Sharpness(0.01, "linf", adaptive=True), "task_state": "int8"}
    adaptive = {"sharpness": Sharpness(0.05, "l2", adaptive=True)}
    for widths, numbers in (((3, 40, 33, 2), (12, 5, 5)), ((9, 120, 120, 3), (2, 20, 21))):  # shared memory, workspace
        call = partial(mlp_rates, widths=widths, sizes=numbers)
        cases |= {
            f"rates, maml, {widths}": partial(call, kind="element and step", method="maml"),
            f"rates, fo-maml, {widths}": partial(
                call, kind="tensor", method="fo-maml", loss="cross_entropy", activation=nn.ReLU
            ),
            f"rates, counted, {widths}": partial(call, kind="element", method="sign-maml", **sharp),
            f"rates, sharp, {widths}": partial(call, kind="tensor", method="sign-maml", **adaptive),
        }
    for method in ("sign-maml", "fo-maml"):
        cases[f"conv, exact step, {method}"] = partial(conv_step_is_exact, method=method)
    for form, by_covariance in (("by covariance", True), ("by patches", False)):
        small = conv_cases.Net(height=6, width=7, support=2, query=2)
        cases[f"conv, branches, {form}"] = partial(conv_branches, net=small, by_covariance=by_covariance)
    return cases


def of_sums() -> dict[str, Case]:
    """How the emulated tensor cores sum."""

    def sums(architecture: int) -> Case:
        def run(native: ModuleType) -> None:
            native.configure(architecture=architecture)
            tensor_core_sums(native, architecture)

        return run

    return {f"sm_{architecture}": sums(architecture) for architecture in (80, 90)}


# Cases by group and name. Each has its own random numbers and order of threads, so it can run alone.
GROUPS: dict[str, dict[str, Case]] = {
    "flat": in_orders(of_flat(), (0, 1), (1, 3)) | {"several tiles of a block": seeded(several_tiles_of_a_block, 1, 1)},
    "conv": in_orders(of_conv(), (0, 2)),
    "second": in_orders(of_second(), (0, 2)),
    "steps": in_orders(of_mlp_steps(), (0, 1), (1, 3)) | in_orders(of_conv_steps(), (1, 3)),
    "sums": of_sums(),
    "kernels": in_orders(of_kernels(), (1, 1)),
    "products": in_orders(of_products(), (1, 1)),
}


if __name__ == "__main__":
    from helpers.devices.emulated import load

    native = load(Path(sys.argv[1]))
    for group in sys.argv[2:] or GROUPS:
        for name, case in GROUPS[group].items():
            started = time.process_time()
            case(native)
            print(f"{time.process_time() - started:8.2f} s  {group}: {name}", flush=True)
