"""Properties of every public entry point: any input gives a correct result or a clear error, and nothing else.

Each property takes one drawn input and returns the outcome, "served" or "refused". Anything else raises an
AssertionError or the exception that should not have occurred. The tests and the report run the same properties.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import re
import tempfile
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import signmaml_ext
from signmaml import checkpoint, commands
from signmaml import config as configs
from signmaml.cli import main
from signmaml.config import TrainConfig
from signmaml.data import ImageSet, folder
from signmaml.episodes import EpisodeSampler, SinusoidSampler

CLEAR = (ValueError, TypeError)
HUGE = 2**40

# ---------------------------------------------------------------------------------------------------------------------
# Tensors of any shape, type, device, strides and values

DTYPES = (
    torch.float32,
    torch.float64,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.bool,
    torch.uint8,
    torch.complex64,
    torch.int32,
)
VALUES = ("small", "zero", "huge", "subnormal", "nan", "inf", "mixed")


@st.composite
def tensors(draw: st.DrawFn, usual: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor, mostly of the usual shape and type."""
    if draw(st.integers(0, 9)) == 0:
        usual = tuple(draw(st.lists(st.integers(0, 4), max_size=5)))
    if draw(st.integers(0, 9)) == 0:
        dtype = draw(st.sampled_from(DTYPES))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    if dtype.is_floating_point or dtype.is_complex:
        value = torch.randn(usual, generator=generator)
        kind = draw(st.sampled_from(VALUES)) if draw(st.booleans()) else "small"
        if kind == "mixed":
            odd = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0, 1e38, 1e-45])
            chosen = torch.randint(len(odd), usual, generator=generator)
            value = torch.where(torch.rand(usual, generator=generator) < 0.2, odd[chosen], value)
        elif kind != "small":
            value = value * {"zero": 0.0, "huge": 1e37, "subnormal": 1e-42, "nan": math.nan, "inf": math.inf}[kind]
        value = value.to(dtype)
    else:
        value = torch.randint(0, draw(st.sampled_from((1, 2, 3))), usual, generator=generator).to(dtype)
        if draw(st.integers(0, 19)) == 0 and value.numel() and dtype == torch.int64:
            value.view(-1)[0] = draw(st.sampled_from((-1, 3, 2**62, -(2**63))))
    return _strided(draw, value)


def _strided(draw: st.DrawFn, value: Tensor) -> Tensor:
    layout = draw(
        st.sampled_from(("plain",) * 6 + ("transposed", "every second", "expanded", "offset", "meta", "grad"))
    )
    if layout == "transposed" and value.ndim >= 2:
        return value.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "every second" and value.ndim:
        return torch.stack((value, value), -1)[..., 0]
    if layout == "expanded" and value.ndim and value.shape[0]:
        return value[:1].expand_as(value)
    if layout == "offset":
        return torch.cat((value.flatten()[:1], value.flatten()))[1:].view(value.shape) if value.numel() else value
    if layout == "meta":
        return value.to("meta")
    if layout == "grad" and value.is_floating_point():
        return value.requires_grad_()
    return value


class Convolutional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.classifier = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.relu(self.norm(self.conv(x))).mean((2, 3)))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(4, 3), (4,)),
    "mlp": (lambda: nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)), (4,)),
    "mlp of three": (
        lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 3)),
        (4,),
    ),
    "norm": (lambda: nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3)), (4,)),
    "dropout": (lambda: nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.5), nn.Linear(5, 3)), (4,)),
    "convolutional": (Convolutional, (1, 6, 6)),
}

numbers: st.SearchStrategy[Any] = st.one_of(
    st.sampled_from(
        (0, 1, 2, -1, HUGE, -HUGE, 2**63, 10**400, 1.5, math.nan, math.inf, -math.inf, True, None, "3", "")
    ),
    st.integers(),
    st.floats(),
)
anything: st.SearchStrategy[Any] = st.one_of(
    numbers, st.text(max_size=8), st.lists(numbers, max_size=3), st.binary(max_size=4)
)


@st.composite
def calls(draw: st.DrawFn) -> tuple[str, nn.Module, dict[str, Any]]:
    """A call of meta_step, adapt or evaluate in which some arguments may be anything."""
    name = draw(st.sampled_from(("meta_step", "evaluate", "adapt")))
    make, shape = MODELS[draw(st.sampled_from(sorted(MODELS)))]
    torch.manual_seed(0)
    model = make()
    if draw(st.integers(0, 5)) == 0:
        model.double()
    model.train(draw(st.booleans()))
    dtype = next(model.parameters()).dtype
    tasks, support, query = draw(st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4)))
    loss = draw(st.sampled_from(("cross_entropy", "cross_entropy", "mse")))
    target, kind = ((), torch.int64) if loss == "cross_entropy" else ((3,), dtype)
    arguments: dict[str, Any] = {
        "support_x": draw(tensors((tasks, support, *shape), dtype)),
        "support_y": draw(tensors((tasks, support, *target), kind)),
        "query_x": draw(tensors((tasks, query, *shape), dtype)),
        "query_y": draw(tensors((tasks, query, *target), kind)),
        "inner_lr": draw(st.sampled_from((0.01, 0.5, 0.0, 1e30))),
        "inner_steps": draw(st.integers(0, 3)),
        "method": draw(st.sampled_from(("sign-maml", "sign-maml", "fo-maml", "maml"))),
        "loss": loss,
        "backend": draw(st.sampled_from(("auto", "auto", "torch", "cpu", "cuda"))),
        "nonfinite": draw(st.sampled_from(("propagate", "skip", "raise"))),
        "batch_norm": draw(st.sampled_from(("batch", "batch", "running"))),
        "seed": draw(st.sampled_from((None, 0, 2**70))),
    }
    if draw(st.integers(0, 3)) == 0:
        rate = tensors(draw(st.sampled_from(((), (1,), (arguments["inner_steps"],), (2, 2)))), dtype)
        arguments["inner_lr"] = draw(
            st.one_of(rate, anything, st.dictionaries(st.text(max_size=3), numbers, max_size=2))
        )
    if draw(st.integers(0, 3)) == 0:
        extra = (
            "method",
            "loss",
            "backend",
            "precision",
            "nonfinite",
            "batch_norm",
            "adapt",
            "seed",
            "zero_dead_bias",
            "inner_steps",
            "support_x",
            "query_y",
        )
        chosen = draw(st.sampled_from(extra))
        # A huge number of steps is a valid call that would take forever.
        arguments[chosen] = (
            draw(anything.filter(lambda v: not isinstance(v, int) or v < 9))
            if chosen == "inner_steps"
            else draw(anything)
        )
    if name == "adapt":
        del arguments["query_x"], arguments["query_y"]
    if draw(st.integers(0, 5)) == 0:
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
    return name, model, arguments


def _bits(tensor: Tensor | None) -> bytes | None:
    return None if tensor is None else tensor.detach().contiguous().numpy().tobytes()


def snapshot(model: nn.Module) -> list[Any]:
    """Every bit of a model: parameters, buffers, gradients, modes, requires_grad."""
    return [
        [(n, _bits(p), _bits(p.grad), p.requires_grad) for n, p in model.named_parameters()],
        [(n, _bits(b)) for n, b in model.named_buffers()],
        [module.training for module in model.modules()],
    ]


def any_call(call: tuple[str, nn.Module, dict[str, Any]]) -> str:
    """meta_step, evaluate and adapt."""
    name, model, arguments = call
    before, random_state = snapshot(model), torch.get_rng_state()
    try:
        result = getattr(signmaml_ext, name)(model, **arguments)
    except (*CLEAR, FloatingPointError) as error:
        assert str(error), "an error without a message"
        assert isinstance(error, CLEAR) or arguments["nonfinite"] == "raise"
        assert snapshot(model) == before, f"a refused call changed the model ({error})"
        assert torch.equal(torch.get_rng_state(), random_state), "a refused call advanced the generator"
        return "refused"
    after = snapshot(model)
    assert after[1:] == before[1:], "buffers or modes changed"
    kept = [(n, p, r) for n, p, _, r in after[0]] == [(n, p, r) for n, p, _, r in before[0]]
    assert kept, "parameters changed"
    if name != "meta_step":
        assert after == before, "gradients changed"
    # Strides and memory layouts change nothing: the same call on plain copies gives the same bits.
    torch.set_rng_state(random_state)
    plain = {
        k: v.detach().clone(memory_format=torch.contiguous_format) if isinstance(v, Tensor) else v
        for k, v in arguments.items()
    }
    _restore_gradients(model, before)
    again = getattr(signmaml_ext, name)(model, **plain)
    if name == "adapt":
        assert all(_bits(result[key]) == _bits(again[key]) for key in again)
    else:
        assert _bits(result.query_loss) == _bits(again.query_loss)
        assert _bits(result.nonfinite) == _bits(again.nonfinite)
        assert result.query_loss.shape == arguments["support_x"].shape[:1]
    assert snapshot(model) == after, "plain copies of the arguments give another result"
    return "served"


def _restore_gradients(model: nn.Module, before: list[Any]) -> None:
    for parameter, (_, _, gradient, _) in zip(model.parameters(), before[0], strict=True):
        parameter.grad = None
        if gradient is not None:
            kind = torch.frombuffer(bytearray(gradient), dtype=parameter.dtype)
            parameter.grad = kind.view(parameter.shape)


# ---------------------------------------------------------------------------------------------------------------------
# Image sets and samplers


def mostly(usual: st.SearchStrategy[Any], other: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.integers(0, 7).flatmap(lambda number: other if number == 0 else usual)


small = st.one_of(st.integers(-1, 6), numbers)


def any_image_set(given_values: tuple[Any, Any, Any]) -> str:
    """ImageSet of any tensors and names."""
    images, names, sizes = given_values
    try:
        made = ImageSet("x", "train", images, names, sizes)
    except CLEAR as error:
        assert str(error)
        return "refused"
    assert int(made.class_sizes.sum()) == len(made.images) and made.classes == len(made.class_names)
    return "served"


image_sets = st.tuples(
    mostly(tensors((6, 1, 2, 2), torch.uint8), anything),
    mostly(st.just(("a", "b", "c")), st.one_of(st.lists(st.text(max_size=2), max_size=4).map(tuple), anything)),
    mostly(
        st.just(torch.tensor([2, 2, 2])),
        st.one_of(st.lists(st.integers(-2, 5), max_size=4).map(torch.tensor), anything),
    ),
)


def any_sampler(given_values: tuple[dict[str, Any], Any, Any]) -> str:
    """EpisodeSampler and SinusoidSampler with any arguments, and draws of any number."""
    arguments, first, count = given_values
    try:
        if "images" in arguments:
            sampler: Any = EpisodeSampler(**arguments)
        else:
            sampler = SinusoidSampler(
                **{k: v for k, v in arguments.items() if k not in ("ways", "normalize", "rotations")}
            )
        with mock.patch.object(sampler, "tasks", min(sampler.tasks, 4)):
            whole = sampler.draw(first)
        part = sampler.draw_tasks(first, count)
    except CLEAR as error:
        assert str(error)
        return "refused"
    assert len(part[0]) == count and all(torch.isfinite(x).all() for x in (*whole, *part) if x.is_floating_point())
    return "served"


TOY = ImageSet(
    "toy", "train", torch.arange(48, dtype=torch.uint8).view(12, 1, 2, 2), ("a", "b", "c"), torch.tensor([4, 4, 4])
)
# Numbers between 64 and HUGE are valid, but drawing that much would fill the memory.
bounded = small.filter(lambda value: not isinstance(value, int) or value <= 64 or value >= HUGE)
few = mostly(st.integers(1, 2), bounded)
samplers = st.tuples(
    st.one_of(
        st.fixed_dictionaries(
            {"images": mostly(st.just(TOY), anything), "ways": mostly(st.integers(2, 3), small)}
            | dict.fromkeys(("shots", "queries", "tasks"), few),
            optional={
                "seed": mostly(st.integers(0, 9), small),
                "normalize": mostly(
                    st.sampled_from(("raw", "signed")), st.one_of(anything, st.tuples(numbers, numbers))
                ),
                "rotations": mostly(st.booleans(), anything),
                "device": mostly(st.just("cpu"), st.sampled_from(("cup", None, 3.5))),
            },
        ),
        st.fixed_dictionaries(
            dict.fromkeys(("shots", "queries", "tasks"), few),
            optional={
                "seed": mostly(st.integers(0, 9), small),
                "amplitude": mostly(st.just((0.5, 1.0)), st.tuples(numbers, numbers)),
                "phase": mostly(st.just((0.0, 1.0)), anything),
                "x_range": st.tuples(st.floats(-9, 9), st.floats(-9, 9)),
            },
        ),
    ),
    mostly(st.integers(0, 9), bounded),
    mostly(st.integers(1, 8), st.one_of(st.integers(-1, 8), st.sampled_from((1.5, None, "2", True, 2**63)))),
)

# ---------------------------------------------------------------------------------------------------------------------
# Configurations and the command line

fields = st.sampled_from([*configs.kinds(), "wasy", "", "inner-lr"])
plain_values = st.recursive(
    st.one_of(numbers, st.text(max_size=6), st.sampled_from(("sign-maml", "cpu", "sinusoid", "mlp", "skip", "none"))),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=2), inner, max_size=2)),
    max_leaves=4,
)


def any_configuration(values: dict[str, Any]) -> str:
    """TrainConfig from any plain values; a good one survives YAML."""
    import yaml

    try:
        config = TrainConfig.from_dict(values)
    except ValueError as error:
        assert str(error) and len(str(error)) < 2000
        return "refused"
    assert TrainConfig.from_dict(yaml.safe_load(config.to_yaml())) == config
    return "served"


yaml_words = st.sampled_from(
    (
        "ways",
        "5",
        ":",
        " ",
        "\n",
        "- ",
        "[",
        "]",
        "{",
        "}",
        "&a",
        "*a",
        "<<",
        "!!python/object/apply:os.system",
        "['touch x']",
        "!!python/name:os.system",
        "|",
        ">",
        "'",
        '"',
        "#",
        "%",
        "\t",
        "1e999",
        "0x10",
        "2001-01-01",
        "!!binary",
        "= ",
        "null",
        ",",
    )
)
file_texts = st.one_of(
    st.binary(max_size=60),
    st.lists(yaml_words, max_size=25).map(lambda words: "".join(words).encode()),
    st.text(max_size=40).map(str.encode),
)


def any_configuration_file(given_values: tuple[bytes, str]) -> str:
    """read_file of any bytes under any suffix."""
    content, suffix = given_values
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / f"c{suffix}"
        path.write_bytes(content)
        here = os.getcwd()
        os.chdir(place)
        try:
            values = configs.read_file(path)
            TrainConfig.from_dict(values)
            outcome = "served"
        except ValueError as error:
            assert str(error) and len(str(error)) < 5000
            outcome = "refused"
        finally:
            os.chdir(here)
        assert os.listdir(place) == [path.name], "reading wrote something"
    return outcome


words = st.one_of(
    st.sampled_from([f"--{name.replace('_', '-')}" for name in configs.kinds()]),
    st.sampled_from(
        (
            "train",
            "evaluate",
            "plot",
            "data",
            "list",
            "verify",
            "show",
            "info",
            "--resume",
            "--preset",
            "sinusoid",
            "--config",
            "x.yaml",
            "--processes",
            "2",
            "--max-restarts",
            "--timeout",
            "--quiet",
            "--debug",
            "--json",
            "-1",
            "nan",
            "1e400",
            "none",
            "",
            "--",
            "-",
            "=",
            "--ways=3",
            "--data=glyphs",
            "--help",
        )
    ),
    st.text(max_size=6),
)


def any_command(given_words: list[str]) -> str:
    """The command line with any words; a stand-in replaces the trainer, so nothing is trained."""
    trainer = mock.MagicMock()
    said = io.StringIO()
    with (
        tempfile.TemporaryDirectory() as place,
        mock.patch.object(commands, "MetaTrainer", trainer),
        mock.patch.object(commands, "summary", lambda *_: "done"),
        mock.patch.object(commands, "data_fetch", lambda *_: 0),
        mock.patch.object(commands, "data_list", lambda *_: 0),
        mock.patch.object(commands, "settle_threads", lambda *_: None),
        mock.patch.dict(os.environ, {"SIGNMAML_CACHE": place, "XDG_CACHE_HOME": place}),
        contextlib.redirect_stderr(said),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        here = os.getcwd()
        os.chdir(place)
        try:
            code = main(["train", *given_words] if len(given_words) % 2 else given_words)
        except SystemExit as leaving:
            code = int(leaving.code or 0)
        finally:
            os.chdir(here)
    assert code in (0, 2), said.getvalue()
    assert code == 0 or said.getvalue().strip(), "refused without a word"
    assert "Traceback" not in said.getvalue() or "--debug" in given_words
    return "served" if code == 0 else "refused"


# ---------------------------------------------------------------------------------------------------------------------
# Files that are damaged or hostile


@st.composite
def damaged(draw: st.DrawFn, whole: bytes) -> bytes:
    """A file with bytes changed, cut out, repeated, or cut off."""
    content = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        if not content:
            break
        place = draw(st.integers(0, len(content) - 1))
        if draw(st.booleans()):
            place = min(place, draw(st.integers(0, 80)), len(content) - 1)  # damage headers more often
        how = draw(st.sampled_from(("flip", "set", "cut", "truncate", "repeat", "insert")))
        length = draw(st.integers(1, 16))
        if how == "flip":
            content[place] ^= 1 << draw(st.integers(0, 7))
        elif how == "set":
            content[place] = draw(st.sampled_from((0, 255, 127, 128, 10)))
        elif how == "cut":
            del content[place : place + length]
        elif how == "truncate":
            del content[place:]
        elif how == "repeat":
            content[place:place] = content[place : place + length]
        else:
            content[place:place] = draw(st.binary(max_size=8))
    return bytes(content)


def _checkpoint() -> bytes:
    with tempfile.TemporaryDirectory() as place:
        torch.manual_seed(0)
        checkpoint.save_weights(nn.Linear(3, 2), f"{place}/w", {"note": 1})
        return Path(f"{place}/w").read_bytes()


def any_checkpoint(content: bytes) -> str:
    """load_weights of a damaged file."""
    torch.manual_seed(1)
    model = nn.Linear(3, 2)
    before = snapshot(model)
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "w.safetensors"
        path.write_bytes(content)
        try:
            checkpoint.load_weights(model, path)
        except ValueError as error:
            assert re.match("checkpoint: expected", str(error)), error
            assert snapshot(model) == before
            return "refused"
        assert os.listdir(place) == ["w.safetensors"]
    return "served"


def _picture(kind: str) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.frombytes("L", (8, 8), bytes(range(64))).save(buffer, kind)
    return buffer.getvalue()


PICTURES = {".png": _picture("PNG"), ".jpg": _picture("JPEG"), ".gif": _picture("GIF"), ".bmp": _picture("BMP")}


def _archive() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in "abc":
            archive.writestr(f"{name}/1.png", PICTURES[".png"])
    return buffer.getvalue()


def _load_folder(root: Path) -> str:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            images = folder(root, "train", image_size=8, progress=False)
        except ValueError as error:
            assert str(root) in str(error) or "image_size" in str(error), error
            return "refused"
    assert images.images.dtype == torch.uint8
    return "served"


def any_picture(given_values: tuple[str, bytes]) -> str:
    """A folder of images, one of them damaged."""
    suffix, content = given_values
    with tempfile.TemporaryDirectory() as place, mock.patch.dict(os.environ, {"SIGNMAML_CACHE": f"{place}/cache"}):
        for name in "abc":
            (Path(place) / "set" / name).mkdir(parents=True)
            (Path(place) / "set" / name / f"1{suffix}").write_bytes(content)
        return _load_folder(Path(place) / "set")


def any_archive(content: bytes) -> str:
    """A zip of images, damaged."""
    with tempfile.TemporaryDirectory() as place, mock.patch.dict(os.environ, {"SIGNMAML_CACHE": f"{place}/cache"}):
        (Path(place) / "set.zip").write_bytes(content)
        outcome = _load_folder(Path(place) / "set.zip")
        assert set(os.listdir(place)) <= {"set.zip", "cache"}, "reading wrote something"
    return outcome


PROPERTIES: dict[str, tuple[st.SearchStrategy[Any], Callable[[Any], str]]] = {
    "meta_step, evaluate, adapt": (calls(), any_call),
    "image sets": (image_sets, any_image_set),
    "samplers": (samplers, any_sampler),
    "configurations": (st.dictionaries(fields, plain_values, max_size=4), any_configuration),
    "configuration files": (
        st.tuples(file_texts, st.sampled_from((".yaml", ".toml", ".yml", ".json"))),
        any_configuration_file,
    ),
    "command lines": (st.lists(words, max_size=7), any_command),
    "checkpoints": (damaged(_checkpoint()), any_checkpoint),
    "pictures": (
        st.sampled_from(sorted(PICTURES)).flatmap(lambda s: st.tuples(st.just(s), damaged(PICTURES[s]))),
        any_picture,
    ),
    "archives": (damaged(_archive()), any_archive),
}


def run(name: str, examples: int, *, repeatable: bool = True) -> Counter[str]:
    """Tries a property on `examples` inputs; returns how many were served and how many refused."""
    strategy, body = PROPERTIES[name]
    outcomes: Counter[str] = Counter()

    def one(drawn: Any) -> None:
        outcomes[body(drawn)] += 1

    checked = given(drawn=strategy)(one)
    settings(
        max_examples=examples,
        derandomize=repeatable,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )(checked)()
    return outcomes
