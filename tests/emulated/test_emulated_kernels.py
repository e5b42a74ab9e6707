"""The .cuh files that nvcc compiles, run on the emulated GPU."""

from __future__ import annotations

import math
import random
from fractions import Fraction
from types import ModuleType

import pytest
import torch

from helpers.cases import emulated_cases
from helpers.devices import emulated


@pytest.fixture(scope="module")
def native() -> ModuleType:
    return emulated.load(emulated.build_once())


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("form", ["all", "masked", "element", "segments", "segments masked"])
def test_sign_step_kernel(native, form, dtype, seed):
    torch.manual_seed(seed)
    native.configure(seed=seed, blocks_alive=1 + seed, multiprocessors=1 + seed)
    for tasks, parameters, shift in (
        (1, 1, 0),
        (2, 3, 1),
        (7, 15, 2),
        (3, 16, 3),
        (2, 17, 0),
        (3, 1023, 0),
        (2, 1025, 1),
    ):
        emulated_cases.sign_step(native, tasks, parameters, dtype, form, shift % (16 // dtype.itemsize))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("form", ["all", "element", "segments"])
def test_compact_sign_step_kernel(native, form, dtype, seed):
    torch.manual_seed(seed)
    native.configure(seed=seed, blocks_alive=1 + seed, multiprocessors=1 + seed)
    for tasks, parameters, shift in ((1, 1, 0), (2, 3, 1), (7, 15, 2), (3, 16, 3), (2, 17, 0), (3, 1023, 0)):
        emulated_cases.compact_sign_step(native, tasks, parameters, dtype, form, shift % (16 // dtype.itemsize))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("skip", [False, True])
def test_meta_accumulate_kernel(native, skip, dtype, seed):
    torch.manual_seed(seed)
    native.configure(seed=seed, blocks_alive=1 + seed, multiprocessors=1)
    for tasks, parameters, shift in (
        (1, 1, 0),
        (1, 5, 1),
        (3, 16, 0),
        (8, 17, 0),
        (9, 33, 1),
        (17, 1027, 0),
        (2, 2052, 2),
    ):
        emulated_cases.meta_accumulate(native, tasks, parameters, dtype, skip, shift % (16 // dtype.itemsize))


@pytest.mark.parametrize("seed", range(3))
def test_platform_functions(native, seed):
    torch.manual_seed(seed)
    native.configure(seed=seed, blocks_alive=1 + seed)
    for rows, columns, block in ((1, 1, 32), (3, 1027, 128), (2, 100, 256)):
        emulated_cases.block_sum(native, rows, columns, block)
    for m, n, k in ((16, 16, 8), (48, 32, 24)):
        emulated_cases.matmul_tf32(native, m, n, k)
    for m, n, k in ((16, 8, 16), (32, 24, 64)):
        emulated_cases.matmul_bf16(native, m, n, k)


FAULTS = [
    None,
    r"(race|uninitialised): block 1, thread \d+ (reads|writes) element \d+ of 'shared memory', .*",
    r"out of bounds: an address that belongs to no argument, touched by block 1, thread 37",
    r"out of bounds: element 64 of a shared array of 64, touched by block 1, thread 37",
    r"race: block 1, thread \d+ writes element 64 of 'out', written by block 1, thread \d+ with no barrier in between",
    r"race: block \d, thread \d+ writes element \d+ of 'out', written by block \d, thread \d+ with no barrier .*",
    r"divergence: block 1, thread \d+ waits at (shuffle_xor|a block barrier), but block 1, thread \d+ waits at .*",
    r"divergence: block 1, thread \d+ waits at a block barrier, but block 1, thread 37 has ended",
    r"uninitialised: block 1, thread 37 reads element \d+ of 'shared memory', which nobody wrote",
    r"read only: block 1, thread 37 writes to 'in'",
    r"misaligned access of 16 bytes by block 1, thread 37",
    r"uninitialised: block 1, thread 37 reads element 101 of 'out', which nobody wrote",
]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("blocks_alive", [1, 2])
@pytest.mark.parametrize("kind", range(len(FAULTS)))
def test_every_fault_is_reported_with_block_and_thread(native, kind, blocks_alive, seed):
    """The only fault of an otherwise correct kernel is found in every order of its threads."""
    native.configure(seed=seed, blocks_alive=blocks_alive)
    # Apart, because what lies beyond the end of one must not be the other.
    memory = torch.zeros(1024)
    values, out = memory[:128].normal_(), memory[512:640]
    if FAULTS[kind] is None:
        native.selftest_fault(kind, values.data_ptr(), out.data_ptr())
        assert torch.equal(out, values)
        return
    with pytest.raises(RuntimeError, match=rf"^faulty_kernel: {FAULTS[kind]}$"):
        native.selftest_fault(kind, values.data_ptr(), out.data_ptr())
    if "'out', which nobody wrote" in FAULTS[kind]:
        assert out[101].isnan(), "outputs are poisoned until they are written"


def test_tf32_rounds_as_documented(native):
    """1 + 2^-11 is half way between two TF32 numbers and rounds away from zero; 1 + 2^-12 rounds to 1."""
    native.configure()
    a, b = torch.zeros(16, 8), torch.zeros(8, 16)
    a[0, 0], a[1, 0], a[2, 0], b[0, 0] = 1 + 2**-11, 1 + 2**-12, -(1 + 2**-11), 1
    c = emulated_cases.poisoned(16, 16)
    native.selftest_matmul_tf32(a.data_ptr(), b.data_ptr(), c.data_ptr(), 16, 16, 8)
    assert c[:3, 0].tolist() == [1 + 2**-10, 1.0, -(1 + 2**-10)]


def test_tensor_cores_cut_sums_off_as_the_published_models_say(native):
    for case in emulated_cases.GROUPS["sums"].values():
        case(native)


def aligned(value: Fraction, exponent: int, extra_bits: int) -> Fraction:
    """Cut off towards zero below float32's last bit of that exponent and the extra bits."""
    unit = Fraction(2) ** (exponent - 23 - extra_bits)
    return int(value / unit) * unit


def exponent_of(value: float) -> int:
    return max(math.frexp(value)[1] - 1, -126)


def modelled_sum(start: float, factors: list[tuple[float, float]], at_once: int, extra_bits: int) -> float:
    """The published models in exact fractions."""
    total = start
    for first in range(0, len(factors), at_once):
        group = factors[first : first + at_once]
        terms = [(Fraction(x) * Fraction(y), exponent_of(x) + exponent_of(y)) for x, y in group if x * y != 0]
        if total != 0:
            terms.append((Fraction(total), exponent_of(total)))
        if not terms:
            continue
        largest = max(exponent for _, exponent in terms)
        exact = sum((aligned(value, largest, extra_bits) for value, _ in terms), Fraction(0))
        total = float(aligned(exact, exponent_of(float(exact)), 0)) if exact else 0.0
    return total


@pytest.mark.parametrize(("architecture", "at_once", "extra_bits"), [(80, 4, 1), (89, 4, 1), (90, 8, 2), (120, 8, 2)])
def test_tensor_cores_on_random_numbers_of_many_sizes(native, architecture, at_once, extra_bits):
    draw = random.Random(architecture)
    native.configure(architecture=architecture)

    def number(bits: int, spread: int) -> float:
        return draw.choice((-1, 1)) * draw.randrange(2 ** (bits - 1), 2**bits) * 2.0 ** draw.randint(-spread, spread)

    rounded_differently = 0
    for _ in range(200):
        start, factors = number(8, 20), [(number(8, 9), number(8, 9)) for _ in range(8)]
        at_tf32 = emulated_cases.tensor_core_sum(native, "tf32", start, factors)
        assert at_tf32 == modelled_sum(start, factors, at_once, extra_bits)
        at_bf16 = emulated_cases.tensor_core_sum(native, "bf16", start, [*factors, *factors])
        assert at_bf16 == modelled_sum(start, [*factors, *factors], 2 * at_once, extra_bits)
        nearest = torch.tensor(float(start + sum(Fraction(x) * Fraction(y) for x, y in factors))).item()
        rounded_differently += at_tf32 != nearest
    assert rounded_differently > 50, "the model rounds like a single addition"


def test_architectures_without_a_model_are_refused(native):
    with pytest.raises(ValueError, match=r"architecture: expected a number from 80 to 120, .*, found 75"):
        native.configure(architecture=75)
    with pytest.raises(ValueError, match="found 130"):
        native.configure(architecture=130)


def test_block_sum_is_bitwise_the_same_in_every_order(native):
    values, results = torch.randn(1, 1027), []
    for seed in range(4):
        native.configure(seed=seed)
        out = emulated_cases.poisoned(1)
        native.selftest_block_sum(values.data_ptr(), out.data_ptr(), 1, 1027, 128)
        results.append(out.item())
    assert len(set(results)) == 1


def test_memory_outside_the_arguments_is_refused(native):
    """The emulated GPU also catches wrong sizes from the caller."""
    values, out = torch.randn(2, 8), emulated_cases.poisoned(2)
    native.configure()
    with pytest.raises(ValueError, match=r"out: expected memory of its own, found that it overlaps grads"):
        emulated.meta_accumulate_(native, values[0], values, nonfinite=torch.zeros(2, dtype=torch.bool))
    with pytest.raises(RuntimeError, match="launch of block_sum_kernel: a grid of 2 blocks of 2048 threads"):
        native.selftest_block_sum(values.data_ptr(), out.data_ptr(), 2, 8, 2048)


def test_quotients_are_exact(native):
    """By multiplication up to where it is exact, by division beyond."""
    numbers = random.Random(0)
    for value in (1, 2, 3, 7, 42, 64, 127, 441, 1024, 8191, 8192, 65535):
        exact = (2**31 - 1) // value  # the largest n whose product with value is below 2^31
        for n in {0, 1, value - 1, value, exact, exact - 1, exact // value * value - 1} | {
            numbers.randrange(exact + 1) for _ in range(50)
        }:
            if 0 <= n <= exact:
                assert native.selftest_quotient(n, value, exact) == n // value, (n, value)
        for n in (exact, 2**31 - 1, 2**31 - 2):
            assert native.selftest_quotient(n, value, 2**31 - 1) == n // value, (n, value)
