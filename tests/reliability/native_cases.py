"""The native module driven by addresses alone, without torch and NumPy: python native_cases.py MODULE [EXAMPLES].

Every buffer is a malloc of its own, of exactly the size needed, so that AddressSanitizer sees any access out of bounds.
Nothing else in the process has threads, so that ThreadSanitizer reports on this code only.
"""

from __future__ import annotations

import array
import ctypes
import importlib.util
import itertools
import math
import os
import random
import sys
import threading
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

LIBC = ctypes.CDLL(None)
LIBC.malloc.restype = ctypes.c_void_p
LIBC.malloc.argtypes = (ctypes.c_size_t,)
LIBC.free.argtypes = (ctypes.c_void_p,)

REAL, WHOLE, BYTE = ("f", "d"), "q", "B"
METHODS = ("sign-maml", "fo-maml", "maml")


class Buffer:
    """Numbers of one type code of `array`, in a malloc of their own."""

    def __init__(self, kind: str, values: Sequence[float]) -> None:
        self.kind, self.count = kind, len(values)
        data = array.array(kind, values)
        self.bytes = data.itemsize * len(data)
        self.address: int = LIBC.malloc(self.bytes) or 0
        ctypes.memmove(self.address, data.tobytes(), self.bytes)

    def __del__(self) -> None:
        LIBC.free(self.address)

    def values(self) -> list[float]:
        return list(array.array(self.kind, self.content()))

    def content(self) -> bytes:
        return ctypes.string_at(self.address, self.bytes)


def load(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(os.path.basename(path).partition(".")[0], path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def sign(x: float) -> float:
    return math.nan if math.isnan(x) else float((x > 0) - (x < 0))


def numbers(generator: random.Random, count: int) -> list[float]:
    odd = (0.0, -0.0, math.inf, -math.inf, math.nan, 1e-42, 1.0)
    return [generator.choice(odd) if generator.random() < 0.1 else generator.uniform(-2, 2) for _ in range(count)]


def exact(kind: str, value: float) -> float:
    return array.array(kind, [value])[0]


# ---------------------------------------------------------------------------------------------------------------------
# Operators on flat buffers, against Python


def sign_step(native: ModuleType, generator: random.Random) -> None:
    """One call with random sizes, rates, segments and mask."""
    kind = generator.choice(REAL)
    tasks, segments = generator.choice((1, 2, 5)), generator.choice((0, 0, 1, 3))
    parameters = generator.choice((1, 3, 16, 63, 65, 1025))
    lengths = sorted(generator.randint(0, parameters) for _ in range(max(0, segments - 1)))
    offsets = [0, *lengths, parameters] if segments else []
    rates = generator.choice((1, parameters, segments or 1))
    masks = generator.choice((0, parameters, segments))
    params, grads = (numbers(generator, tasks * parameters) for _ in range(2))
    lr = [exact(kind, generator.uniform(0, 1)) for _ in range(rates)]
    mask = [generator.randint(0, 1) for _ in range(masks)]
    held = [Buffer(kind, params), Buffer(kind, grads), Buffer(kind, lr), Buffer(WHOLE, offsets), Buffer(BYTE, mask)]
    flags = Buffer(BYTE, [0] * tasks)
    addresses = [b.address if b.count else 0 for b in held]
    native.sign_step_cpu(
        *addresses, flags.address, tasks, parameters, rates, masks, segments, kind == "d", generator.choice((1, 2, 4))
    )
    found, start, gradient = held[0].values(), array.array(kind, params), array.array(kind, grads)
    for i, value in enumerate(found):
        column = i % parameters
        segment = next((s for s in range(segments) if offsets[s] <= column < offsets[s + 1]), 0)
        allowed = masks == 0 or mask[segment if masks == segments else column]
        rate = lr[segment if rates == segments else column if rates == parameters else 0]
        expected = exact(kind, start[i] - exact(kind, rate * sign(gradient[i]))) if allowed else start[i]
        assert value == expected or (math.isnan(value) and math.isnan(expected)), (i, value, expected)


def meta_accumulate(native: ModuleType, generator: random.Random) -> None:
    """One call, compared with sums in task order."""
    kind, skip = generator.choice(REAL), generator.random() < 0.5
    tasks, parameters = generator.choice((1, 2, 5, 9)), generator.choice((1, 3, 16, 63, 65, 1025))
    grads = [exact(kind, generator.uniform(-1, 1)) for _ in range(tasks * parameters)]
    bad = generator.randrange(tasks) if generator.random() < 0.3 else None
    if bad is not None:
        grads[bad * parameters + generator.randrange(parameters)] = math.nan
    out, data, flags = Buffer(kind, [1.0] * parameters), Buffer(kind, grads), Buffer(BYTE, [0] * tasks)
    threads = generator.choice((1, 2, 4))
    native.meta_accumulate_cpu(out.address, data.address, flags.address, tasks, parameters, skip, kind == "d", threads)
    assert flags.values() == [int(task == bad) for task in range(tasks)]
    live = [task for task in range(tasks) if not (skip and task == bad)]
    for column, value in enumerate(out.values()):
        total = 0.0
        for task in live:
            total = exact(kind, total + grads[task * parameters + column])
        expected = exact(kind, 1.0 + exact(kind, total / max(1, len(live))))
        assert value == expected or (math.isnan(value) and math.isnan(expected)), (column, value, expected)


# ---------------------------------------------------------------------------------------------------------------------
# Whole meta-steps: the same bits for any number of threads, nothing left unwritten


def poisoned(kind: str, count: int) -> Buffer:
    return Buffer(kind, [math.nan] * count)


def kind_of_steps(generator: random.Random, method: str) -> dict[str, Any]:
    """Further arguments of a native call: often none, and none for steps that are differentiated."""
    counted = {"counts_steps": True} if method == "sign-maml" and generator.random() < 0.3 else {}
    if method == "maml" or generator.random() < 0.5:
        return counted
    norm, adaptive = generator.choice(("l2", "linf")), generator.random() < 0.5
    return counted | {"sharpness_rho": 0.1, "sharpness_norm": norm, "sharpness_adaptive": adaptive}


def conv_meta_step(native: ModuleType, generator: random.Random) -> None:
    """A convolutional network of random shape, with 1 and with 3 threads."""
    kind = generator.choice(REAL)
    blocks, halving = generator.randint(1, 3), generator.choice(("max", "stride"))
    height, width = (generator.randint(2**blocks, 2**blocks + 9) for _ in range(2))
    shape = {
        "blocks": blocks,
        "channels": generator.randint(1, 3),
        "filters": generator.choice((8, 16, 24)),
        "height": height,
        "width": width,
        "ways": generator.randint(2, 5),
        "halving": halving,
        "readout": generator.choice(("flatten", "mean")),
        "conv_bias": generator.random() < 0.5,
        "eps": [1e-5] * blocks,
    }
    tasks, support, query = generator.randint(1, 3), generator.randint(1, 7), generator.randint(0, 5)
    steps = generator.randint(0, 2)
    whole = {"tasks": tasks, "support": support, "query": query}
    size = 8 if kind == "d" else 4
    plan = native.plan_conv_meta_step_cpu(shape, **whole, scalar_bytes=size, threads=1)
    parameters, tensors = plan["parameters"], blocks * (4 if shape["conv_bias"] else 3) + 2
    image = shape["channels"] * height * width

    def reals(count: int) -> Buffer:
        return Buffer(kind, [generator.uniform(-1, 1) for _ in range(count)])

    def labels(count: int) -> Buffer:
        beyond = generator.random() < 0.1  # must make the loss NaN, and not be used as an index
        return Buffer(WHOLE, [2**40 if beyond else generator.randrange(shape["ways"]) for _ in range(count)])

    given = {
        "theta": reals(parameters),
        "support_x": reals(tasks * support * image),
        "support_labels": labels(tasks * support),
        "query_x": reals(tasks * query * image),
        "query_labels": labels(tasks * query),
        "lr": Buffer(kind, [0.01] * (steps * tensors)),
        "adapt": Buffer(BYTE, [generator.randint(0, 1) for _ in range(tensors)]),
    }
    method, bits = generator.choice(METHODS), []
    further = kind_of_steps(generator, method)
    of_plan = {name: value for name, value in further.items() if name in ("sharpness_rho", "counts_steps")}
    for threads in (1, 3):
        wanted = {
            "support_loss": steps * tasks,
            "query_loss": tasks,
            "query_accuracy": tasks,
            "logits": tasks * query * shape["ways"],
            "adapted": tasks * parameters,
            "grads": tasks * parameters,
        }
        if query == 0:
            wanted = {name: wanted[name] for name in ("support_loss", "adapted")}
        results = {name: poisoned(kind, count) for name, count in wanted.items()}
        results["nonfinite"] = Buffer(BYTE, [0] * tasks)
        if "counts_steps" in further:
            results["counts"] = Buffer(BYTE, [99] * (tasks * parameters))
        room = native.plan_conv_meta_step_cpu(
            shape, **whole, scalar_bytes=size, threads=threads, steps=steps, method=method, **of_plan
        )["workspace_bytes"]
        workspace = Buffer(BYTE, [255] * room)
        used = {
            name: buffer.address
            for name, buffer in (given | results | {"workspace": workspace}).items()
            if buffer.count
        }
        native.conv_meta_step_cpu(
            used, shape, **whole, steps=steps, method=method, is_double=kind == "d", threads=threads, **further
        )
        if "adapted" in results and not any(results["nonfinite"].values()):
            for name, buffer in results.items():
                assert not any(math.isnan(v) for v in buffer.values()), f"{name} was left unwritten"
        bits.append({name: buffer.content() for name, buffer in results.items()})
    assert bits[0] == bits[1], "another number of threads gives other bits"


def mlp_meta_step(native: ModuleType, generator: random.Random) -> None:
    """A multilayer perceptron of random widths, with 1 and with 3 threads."""
    kind = generator.choice(REAL)
    loss = generator.choice(("mse", "cross_entropy"))
    widths = [generator.randint(1, 9) for _ in range(generator.randint(3, 5))]
    tasks, support, query = generator.randint(1, 5), generator.randint(1, 7), generator.randint(1, 5)
    steps, out = generator.randint(0, 2), widths[-1]
    parameters = sum((a + 1) * b for a, b in itertools.pairwise(widths))

    def reals(count: int) -> Buffer:
        return Buffer(kind, [generator.uniform(-1, 1) for _ in range(count)])

    given = {
        "theta": reals(parameters),
        "lr": Buffer(kind, [0.01] * (steps * 2 * (len(widths) - 1))),
        "adapt": Buffer(BYTE, [generator.random() < 0.7 for _ in range(2 * (len(widths) - 1))]),
    }
    for name, count in (("support", support), ("query", query)):
        given[f"{name}_x"] = reals(tasks * count * widths[0])
        if loss == "mse":
            given[f"{name}_target"] = reals(tasks * count * out)
        else:
            given[f"{name}_labels"] = Buffer(WHOLE, [generator.randrange(out) for _ in range(tasks * count)])
    bits, method, activation = [], generator.choice(METHODS), generator.choice(("relu", "tanh"))
    further = kind_of_steps(generator, method)
    of_plan = {name: value for name, value in further.items() if name in ("sharpness_rho", "counts_steps")}
    for threads in (1, 3):
        results = {
            name: poisoned(kind, count)
            for name, count in {
                "support_loss": steps * tasks,
                "query_loss": tasks,
                "query_accuracy": tasks,
                "predictions": tasks * query * out,
                "adapted": tasks * parameters,
                "grads": tasks * parameters,
            }.items()
        } | {"nonfinite": Buffer(BYTE, [0] * tasks)}
        if "counts_steps" in further:
            results["counts"] = Buffer(BYTE, [99] * (tasks * parameters))
        sizes = (tasks, support, query, 8 if kind == "d" else 4, threads, steps, method)
        room = native.plan_mlp_meta_step_cpu(widths, *sizes, **of_plan)["workspace_scalars"]
        workspace = poisoned(kind, room)
        used = {n: b.address for n, b in (given | results | {"workspace": workspace}).items() if b.count}
        native.mlp_meta_step_cpu(
            used,
            widths=widths,
            activation=activation,
            loss=loss,
            tasks=tasks,
            support=support,
            query=query,
            steps=steps,
            method=method,
            is_double=kind == "d",
            threads=threads,
            **further,
        )
        bits.append({name: buffer.content() for name, buffer in results.items() if name != "query_accuracy"})
    assert bits[0] == bits[1], "another number of threads gives other bits"


# ---------------------------------------------------------------------------------------------------------------------
# Structs with any content

INTEGERS = (
    0,
    1,
    2,
    3,
    5,
    8,
    127,
    128,
    -1,
    -8,
    2**14,
    2**15,
    2**20,
    2**31 - 1,
    2**31,
    -(2**31),
    2**40,
    2**62,
    2**63 - 1,
)
WORDS = (
    "max", "stride", "flatten", "mean", "", "relu", "tanh", "mse", "cross_entropy", "fp32", "tf32", "bf16", "maml", "\0"
)  # fmt: skip


def block_at_random(generator: random.Random) -> dict[str, Any]:
    """A block of a program of layers that may not fit the images."""

    def pair(least: int, most: int) -> tuple[int, int]:
        return generator.randint(least, most), generator.randint(least, most)

    kernel = (3, 3) if generator.random() < 0.5 else pair(1, 4)
    found: dict[str, Any] = {"product": generator.choice(("conv", "conv", "conv", "none")), "kernel": kernel}
    found |= {"channels": generator.choice((1, 6, 8, 20)), "bias": generator.random() < 0.5}
    found |= {"stride": generator.choice(((1, 1), (1, 1), (2, 2), (1, 3)))}
    found |= {"padding": tuple(generator.randint(0, size - 1) for size in kernel)}
    found |= {"norm": generator.choice(("none", "batch", "group")), "groups": generator.choice((1, 2)), "eps": 1e-5}
    found |= {"affine": generator.random() < 0.5, "slope": 0.3}
    activations = "none", "relu", "leaky_relu", "elu", "gelu", "gelu_tanh", "silu", "tanh", "sigmoid"
    found |= {"activation": generator.choice(activations), "pool": generator.choice(("none", "max", "average"))}
    found |= {"pool_kernel": pair(1, 3), "pool_stride": pair(1, 3), "counts_padding": generator.random() < 0.5}
    found |= {"drops": generator.choice(("none", "none", "values", "channels"))}
    return found | {"pool_padding": tuple(generator.randint(0, size // 2) for size in found["pool_kernel"])}


def with_a_shortcut(blocks: list[dict[str, Any]], generator: random.Random) -> list[dict[str, Any]]:
    """The blocks, with one somewhere between them whose input is added to its output."""
    at = generator.randint(0, len(blocks))
    branch: dict[str, Any] = {"product": "none", "norm": generator.choice(("none", "batch")), "eps": 1e-5}
    branch |= {"affine": True, "activation": generator.choice(("tanh", "relu")), "drops": "none"}
    if at > 0 and blocks[at - 1]["product"] == "conv" and generator.random() < 0.7:
        branch |= {"product": "conv", "channels": blocks[at - 1]["channels"], "bias": generator.random() < 0.5}
        branch |= generator.choice(({"kernel": (3, 3), "padding": (1, 1)}, {"kernel": (1, 1)}))
    added = {"product": "sum", "reads": 2, "adds": 1, "activation": generator.choice(("none", "silu"))}
    return [*blocks[:at], branch, added, *blocks[at:]]


def layers_program(native: ModuleType, generator: random.Random) -> None:
    """A program of random blocks, with 1 and with 3 threads; its tensors have memory of their own."""
    kind = generator.choice(REAL)
    size = (generator.randint(1, 9), generator.randint(1, 12), generator.randint(1, 12))
    head = {"product": "linear", "channels": generator.randint(2, 5), "bias": generator.random() < 0.5}
    blocks = [block_at_random(generator) for _ in range(generator.randint(0, 3))]
    for _ in range(generator.randint(0, 2)):
        blocks = with_a_shortcut(blocks, generator)
    try:
        program = native.LayersProgram([*blocks, head], size)
    except ValueError:
        return layers_program(native, generator)
    counts, noises = [], []
    for block, (read, made, given) in zip([*blocks, head], program.sizes, strict=True):
        if block["product"] in ("conv", "linear"):
            window = math.prod(block["kernel"]) if block["product"] == "conv" else read[1] * read[2]
            counts += [made[0] * read[0] * window, *([made[0]] if block["bias"] else [])]
        if block.get("norm", "none") != "none" and block["affine"]:
            counts += [made[0]] * 2
        if block.get("drops", "none") != "none":
            noises.append(given[0] if block["drops"] == "channels" else math.prod(given))
    assert program.dropouts == len(noises)
    assert len(counts) == program.tensors
    tasks, count, is_double = generator.randint(1, 3), generator.randint(1, 6), kind == "d"

    def reals(number: int) -> Buffer:
        return Buffer(kind, [generator.uniform(-1, 1) for _ in range(number)])

    tensors, x = [reals(tasks * number) for number in counts], reals(tasks * count * math.prod(size))
    outputs, beyond = head["channels"], generator.random() < 0.1
    labels = Buffer(WHOLE, [2**40 if beyond else generator.randrange(outputs) for _ in range(tasks * count)])
    target, noise = reals(tasks * count * outputs), [reals(tasks * count * each) for each in noises]
    squares, wanted, bits = generator.random() < 0.5, [generator.random() < 0.8 for _ in counts], []
    for threads in (1, 3):
        grads = [poisoned(kind, tasks * number) for number in counts]
        loss, predictions = poisoned(kind, tasks), poisoned(kind, tasks * count * outputs)
        workspace = Buffer(BYTE, [255] * program.plan(tasks, count, is_double, threads)["workspace_bytes"])
        program.run(
            [(tensor.address, number) for tensor, number in zip(tensors, counts, strict=True)],
            [(g.address if want else 0, number) for g, want, number in zip(grads, wanted, counts, strict=True)],
            x.address, 0 if squares else labels.address, target.address if squares else 0,
            [factors.address for factors in noise], loss.address, predictions.address, workspace.address, tasks, count,
            is_double, threads,
        )  # fmt: skip
        results = [loss, predictions, *(grad for grad, want in zip(grads, wanted, strict=True) if want)]
        if squares or not beyond:
            assert not any(math.isnan(v) for result in results for v in result.values()), "something was left unwritten"
        bits.append([result.content() for result in (loss, predictions, *grads)])
    assert bits[0] == bits[1], "another number of threads gives other bits"
    return None


def any_entry(choose: Callable[[Sequence[Any]], Any]) -> Any:
    return choose((choose(INTEGERS), choose(INTEGERS), choose(WORDS), None, 0.5, True, [], [1e-5], [math.nan] * 4, {}))


def any_struct(native: ModuleType, choose: Callable[[Sequence[Any]], Any]) -> str:
    """One call of a plan, or of an operator without addresses, with arbitrary sizes and words.

    Returns:
        "served" or "refused"; a refusal is a ValueError, TypeError, MemoryError or OverflowError with a message.
    """
    good = {
        "blocks": 4,
        "channels": 1,
        "filters": 32,
        "height": 28,
        "width": 28,
        "ways": 5,
        "halving": "max",
        "readout": "flatten",
        "conv_bias": True,
        "eps": [1e-5] * 4,
    }
    shape = dict(good)
    for _ in range(choose((0, 1, 2))):
        name = choose(sorted(good))
        shape[name] = any_entry(choose)
        if choose((False, False, False, True)):
            del shape[name]
    widths = [choose(INTEGERS) for _ in range(choose((0, 1, 2, 3, 4, 12)))]
    size, bytes_ = (lambda: choose(INTEGERS)), choose((4, 8, 0, -4, 3))
    nothing: dict[str, int] = {}

    def step_options() -> dict[str, Any]:
        return {
            "rates_by_element": choose((False, True)),
            "learns_rates": choose((False, True)),
            "sharpness_rho": choose((0.0, 0.0, 0.1, -1.0, float("nan"), float("inf"))),
            "sharpness_norm": choose(("l2", "linf", "", "l2\0")),
            "sharpness_adaptive": choose((False, True)),
            "counts_steps": choose((False, True)),
        }

    calls: dict[str, Callable[[], Any]] = {
        "plan_sign_step_cpu": lambda: native.plan_sign_step_cpu(size(), size(), size()),
        "plan_meta_accumulate_cpu": lambda: native.plan_meta_accumulate_cpu(size(), size(), size()),
        "plan_sign_step": lambda: native.plan_sign_step(size(), size(), bytes_, abs(size()), abs(size()), size()),
        "plan_meta_accumulate": lambda: native.plan_meta_accumulate(
            size(), size(), bytes_, abs(size()), abs(size()), size()
        ),
        "plan_mlp_meta_step_cpu": lambda: native.plan_mlp_meta_step_cpu(
            widths, size(), size(), size(), bytes_, size(), size(), choose(WORDS)
        ),
        "plan_mlp_meta_step": lambda: native.plan_mlp_meta_step(
            widths, size(), size(), size(), bytes_, size(), size(), choose(WORDS), **step_options()
        ),
        "plan_conv_meta_step_cpu": lambda: native.plan_conv_meta_step_cpu(
            shape, size(), size(), size(), bytes_, size()
        ),
        "plan_conv_meta_step": lambda: native.plan_conv_meta_step(
            shape,
            size(),
            size(),
            size(),
            choose((0, 1, 3, -1, 50)),
            choose(WORDS),
            size(),
            workspace_limit=size(),
            method=choose(("sign-maml", "maml")),
            **step_options(),
        ),
        "layers_program": lambda: native.LayersProgram(
            [
                {
                    "product": choose(("conv", "linear", "none", "sum")),
                    "reads": choose((1, 1, size())),
                    "adds": size(),
                    "channels": size(),
                    "kernel": (choose((1, 3, 16)), size()),
                },
                {"pool": choose(("mean", "max")), "norm": choose(WORDS), "eps": choose((1e-5, float("nan")))},
            ],
            (size(), size(), size()),
        ).plan(size(), size(), bytes_ == 8, size()),
        "conv_meta_step_cpu": lambda: native.conv_meta_step_cpu(
            nothing,
            shape,
            tasks=size(),
            support=size(),
            query=size(),
            steps=size(),
            method="sign-maml",
            is_double=False,
            threads=size(),
        ),
        # Without tasks or parameters no memory may be touched, so addresses of 0 are valid. Other sizes have no memory.
        "sign_step_cpu": lambda: native.sign_step_cpu(
            0, 0, 0, 0, 0, 0, choose((0, -1, 2**62)), size(), 1, 0, 0, False, size()
        ),
        "meta_accumulate_cpu": lambda: native.meta_accumulate_cpu(
            0, 0, 0, choose((0, -1, 2**62)), size(), True, True, size()
        ),
    }
    name = choose(sorted(calls))
    try:
        plan = calls[name]()
    except (ValueError, TypeError, MemoryError, OverflowError) as error:
        assert str(error), name
        return "refused"
    for key, value in (plan or {}).items():
        assert not isinstance(value, int) or value >= 0, f"{name}: {key} is {value}: an overflow"
    return "served"


# ---------------------------------------------------------------------------------------------------------------------


def cases(native: ModuleType) -> list[Callable[[ModuleType, random.Random], None]]:
    """The cases whose operators the module has."""
    known = [sign_step, meta_accumulate, conv_meta_step, mlp_meta_step]
    found = [case for case in known if hasattr(native, f"{case.__name__}_cpu")]
    return [*found, layers_program] if hasattr(native, "LayersProgram") else found


def several_callers(native: ModuleType) -> None:
    """Calls from several Python threads at once: one of them gets the pool, the others compute without it."""
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            generator = random.Random(seed)
            for _ in range(10):
                for case in cases(native):
                    case(native, generator)
        except BaseException as error:
            failures.append(error)

    callers = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    if failures:
        raise failures[0]


def forked(native: ModuleType) -> None:
    """Computes in the forked child of a process whose pool has threads."""
    child = os.fork()
    if child == 0:
        try:
            sign_step(native, random.Random(1))
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def main(path: str, examples: int) -> None:
    native = load(path)
    generator = random.Random(0)
    counts: dict[str, int] = {}
    for isa in native.cpu_isas():
        native.select_cpu_isa(isa)
        for case in cases(native):
            for _ in range(examples):
                case(native, generator)
            counts[case.__name__] = counts.get(case.__name__, 0) + examples
    several_callers(native)
    if "--no-fork" not in sys.argv:
        forked(native)
    for _ in range(20 * examples):
        outcome = any_struct(native, generator.choice)
        counts[f"struct {outcome}"] = counts.get(f"struct {outcome}", 0) + 1
    print(counts)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
