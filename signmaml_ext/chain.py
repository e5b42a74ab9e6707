"""Reads a module's forward as layers, with torch.fx: a chain, or with sums of branches. The computation counts, not the
class.

What is known about a module is cached until the module changes; structure.py defines what a change is.
"""

from __future__ import annotations

import functools
import operator
import weakref
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeVar, cast

import torch
import torch.fx
from torch import Tensor, nn
from torch.nn import functional as F

from . import modes, structure
from .replica import Replicas
from .structure import Reads

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Layer:
    """One layer.

    Attributes:
        kind: "conv" and "norm" (of images), "conv1d", "norm1d" (of features or series), "group_norm", "instance_norm",
            "layer_norm", "linear"; an activation, see `ACTIVATIONS`; "pool" (2x2 maximum), "max_pool" and
            "average_pool" (any others), "mean" (over all positions; of series "mean1d"); "dropout" (of values),
            "dropout1d" and "dropout2d" (of channels of series and of images); "flatten", or "images" (a view as images,
            regardless of the shape before); "sum" (of two layers' outputs).
        name: In messages: the module's path, or the node of the graph.
        module: The module of a layer with parameters or of a normalisation; its path is `name`.
        size: The sizes that a "flatten" or "images" view spells out, if it does: `[features]`, `[C, H, W]`.
        slope: Of "leaky_relu" and "elu": what they multiply by below 0.
        window: Of "max_pool" and "average_pool": kernel, stride and padding, each `(height, width)`.
        counts_padding: Whether an "average_pool" divides by positions over the border too.
        share: Of a dropout: what share becomes 0, between 0 and 1.
        reads: How many layers back those are whose outputs it reads: two for a "sum", one for others. The examples come
            before the first layer.
    """

    kind: str
    name: str
    module: nn.Module | None = None
    size: tuple[int, ...] = ()
    slope: float = 0.0
    window: tuple[tuple[int, int], ...] = ()
    counts_padding: bool = True
    share: float = 0.0
    reads: tuple[int, ...] = (1,)


@dataclass
class Known:
    """What is known about a module, valid until it changes.

    Attributes:
        structure: The module's structure, see `structure.of_module`.
        answers: By question, see `remembered`.
        computed: The specs and example shapes that it was verified for, see `recognition.verified`.
        reads: The attributes that its forward read while it was traced.
        values: Their values, see `structure.of_reads`.
    """

    structure: Hashable
    answers: dict[Hashable, Any] = field(default_factory=dict)
    computed: set[Hashable] = field(default_factory=set)
    reads: Reads = frozenset()
    values: Hashable = None


_known: weakref.WeakKeyDictionary[nn.Module, Known] = weakref.WeakKeyDictionary()


class _Look(dict[nn.Module, Known]):
    """The modules already compared within `one_look`."""

    __slots__ = ("__weakref__",)


# The present `one_look`; None outside. It is not kept alive here: an interrupt may prevent that this is put back, and
# later calls would then trust a look that is over.
_look: ContextVar[weakref.ref[_Look] | None] = ContextVar("_look", default=None)


def present_look() -> _Look | None:
    """The modules already compared, within `one_look`."""
    look = _look.get()
    return None if look is None else look()


@contextmanager
def one_look() -> Iterator[None]:
    """Compares a module's structure only once within the context. A call changes no structure, so once suffices."""
    look, before = _Look(), _look.get()
    try:
        _look.set(weakref.ref(look))
        yield
    finally:
        _look.set(before)


def of_module(model: nn.Module) -> Known:
    """What is known about a module with its present structure."""
    seen = present_look()
    if seen is None:
        return _of_module(model)
    if model not in seen:
        seen[model] = _of_module(model)
    return seen[model]


def _of_module(model: nn.Module) -> Known:
    present = structure.of_module(model)
    known = _known.get(model)
    if known is None or known.structure != present or structure.of_reads(model, known.reads) != known.values:
        known = Known(present)
        known.values = structure.of_reads(model, known.reads)
        _known[model] = known
    return known


def remembered(model: nn.Module, question: str, find: Callable[[nn.Module], Answer]) -> Answer:
    """The result of `find` for a module, cached until the module changes."""
    answers = of_module(model).answers
    if question not in answers:
        answers[question] = find(model)
    answer: Answer = answers[question]
    return answer


def network_of(model: nn.Module) -> tuple[Layer, ...] | str:
    """A module's forward as layers, of which the last one gives its prediction; or why it is not that."""
    return remembered(model, "layers", lambda model: _why_untraceable(model) or _traced(model))


def layers_of(model: nn.Module) -> tuple[Layer, ...] | str:
    """A module's forward as a chain of layers, each of which reads the one before; or why it is not one."""
    found = network_of(model)
    if isinstance(found, str):
        return found
    odd = next((layer for layer in found if layer.reads != (1,)), None)
    return found if odd is None else f"its layers are no plain chain (at {odd.name!r})"


_HOOKS = {
    "_forward_hooks": "forward hooks",
    "_forward_pre_hooks": "forward hooks",
    "_backward_hooks": "backward hooks",
    "_backward_pre_hooks": "backward hooks",
}


def _why_untraceable(model: nn.Module) -> str | None:
    """A feature of the module that torch.fx would silently leave out; None if there is none."""
    if structure.is_layer(model):
        return "it is a single layer"  # its `Layer` would keep the model alive in `_known`
    for dictionary, kind in _HOOKS.items():
        if getattr(nn.modules.module, f"_global{dictionary}"):
            return f"global {kind} are registered"
    for name, module in model.named_modules():
        where = f"module {name!r}" if name else "it"
        for dictionary, kind in _HOOKS.items():
            if getattr(module, dictionary):
                return f"{where} has {kind}"
        if "forward" in vars(module) or type(module).__call__ is not nn.Module.__call__:
            return f"the forward of {type(module).__name__} was replaced"
        if hasattr(module, "parametrizations"):
            return f"{where} is parametrised"
    return None


# ---------------------------------------------------------------------------------------------------------------------
# From the graph to the layers


class _Refused(Exception):
    """The module does not consist of known layers; the message says why."""


def _traced(model: nn.Module) -> tuple[Layer, ...] | str:
    known = of_module(model)
    answer, reads = _trace(model)
    known.reads, known.values = reads, structure.of_reads(model, reads)
    return answer


def _trace(model: nn.Module) -> tuple[tuple[Layer, ...] | str, Reads]:
    """The layers, or why there are none, and the attributes that the forward read.

    torch.fx's own `symbolic_trace` replaces `nn.Module.__call__` for the whole process while it runs. Here a private
    copy of the module runs instead, whose layers record their calls.
    """
    graph = torch.fx.Graph()
    tracer = torch.fx.proxy.GraphAppendingTracer(graph)
    copy = Replicas(model, "batch").make({})
    reads = structure.Watched(copy)
    owners: dict[int, _Owner] = {}
    for path, module in list(copy.named_modules()):
        if structure.is_layer(module):
            vars(module)["forward"] = _recording(tracer, path)
            continue
        for name, parameter in module._parameters.items():
            if parameter is not None:
                owners[id(parameter)] = _Owner(path, name)
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            # It only raises, and asks the input for its number of axes, which a proxy does not have.
            vars(module)["_check_input_dim"] = lambda x: None
    try:
        with torch.no_grad():
            output = copy(tracer.create_proxy("placeholder", "x", (), {}))
        graph.output(tracer.create_arg(output))
    except Exception as error:  # the caller's forward runs on proxies: anything may go wrong
        reason = f"torch.fx cannot trace it: {(str(error).strip() or type(error).__name__).splitlines()[0]}"
        return reason, reads.found()
    try:
        return _Reader(dict(model.named_modules()), owners).read(graph), reads.found()
    except _Refused as refusal:
        return str(refusal), reads.found()


def _recording(tracer: torch.fx.proxy.TracerBase, path: str) -> Callable[..., Any]:
    return lambda *args, **kwargs: tracer.create_proxy("call_module", path, args, kwargs)


class _Owner(NamedTuple):
    """Where a parameter lies: the path of its module, and its name there."""

    path: str
    name: str


class _Reader:
    def __init__(self, modules: Mapping[str, nn.Module], owners: Mapping[int, _Owner]) -> None:
        self.modules = modules
        self.owners = owners
        self.sizes: set[torch.fx.Node] = set()  # nodes that are a shape
        self.counts: set[torch.fx.Node] = set()  # nodes that are the number of examples
        self.given: dict[torch.fx.Node, int] = {}  # node -> the number of the layer that gives it; 0: the examples
        self.layers: list[Layer] = []

    def read(self, graph: torch.fx.Graph) -> tuple[Layer, ...]:
        for node in graph.nodes:
            if node.op == "placeholder":
                if self.given:
                    raise _Refused("its forward takes several arguments")
                self.given[node] = 0
            elif node.op == "output":
                if self.given.get(node.args[0], -1) != len(self.layers):
                    raise _Refused("it returns something else than its last layer's output")
                break
            elif not self._is_about_the_shape(node):
                self.given[node] = self._given(node)
        read = {number - back for number, layer in enumerate(self.layers, 1) for back in layer.reads}
        for number, layer in enumerate(self.layers[:-1], 1):
            if number not in read:
                raise _Refused(f"nothing reads what {layer.name!r} gives")
        return tuple(self.layers)

    def _given(self, node: torch.fx.Node) -> int:
        """The number of the layer that gives a node's output."""
        if self._adds_two(node):
            sources = [self.given[cast(torch.fx.Node, argument)] for argument in node.args]
            layer: Layer | None = Layer("sum", node.name)
        else:
            data = [argument for argument in node.all_input_nodes if argument not in self.counts]
            if len(data) != 1 or data[0] not in self.given or not node.args or node.args[0] is not data[0]:
                used = getattr(node.target, "__name__", node.target)
                raise _Refused(f"it uses {used} in a way that is no layer and no sum (at {node.name!r})")
            sources, layer = [self.given[data[0]]], self._layer(node)
        if layer is None:
            return sources[0]
        number = len(self.layers) + 1
        self.layers.append(replace(layer, reads=tuple(number - source for source in sources)))
        return number

    def _adds_two(self, node: torch.fx.Node) -> bool:
        if node.op == "call_module" or node.target not in _SUMS:
            return False
        are_data = [isinstance(argument, torch.fx.Node) and argument in self.given for argument in node.args]
        return are_data == [True, True] and dict(node.kwargs) in ({}, {"alpha": 1})

    def _is_about_the_shape(self, node: torch.fx.Node) -> bool:
        """`x.size(0)`, `x.size()[0]`, `x.shape[0]`: the number of examples, the same for all layers."""
        source, *rest = node.args or (None,)
        if not isinstance(source, torch.fx.Node):
            return False
        if source in self.sizes:
            if node.target is operator.getitem and rest == [0]:
                self.counts.add(node)
                return True
        elif source in self.given:
            if node.target == "size" and node.op == "call_method" and rest == [0]:
                self.counts.add(node)
                return True
            if (node.target == "size" and not rest) or (node.target is getattr and rest == ["shape"]):
                self.sizes.add(node)
                return True
        return False

    def _layer(self, node: torch.fx.Node) -> Layer | None:
        """The layer of a node; None if it passes its input through."""
        if node.op == "call_module":
            name = str(node.target)
            return self._module(name, self.modules[name])
        for function, kind, settings in _FUNCTIONAL:
            if node.target is function:
                return self._functional(node, kind, settings)
        if node.op == "call_method":
            read = _METHODS.get(str(node.target))
        else:
            read = next((reader for function, reader in _FUNCTIONS if function is node.target), None)
        if read is None:
            raise _Refused(f"it uses {getattr(node.target, '__name__', node.target)}")
        given = node.args[1:]
        if read is _view and len(given) == 1 and isinstance(given[0], (tuple, list)):
            given = tuple(given[0])  # the sizes of a view may be given as one argument
        is_count = tuple(isinstance(a, torch.fx.Node) and a in self.counts for a in given)
        arguments = tuple(-1 if counts else a for a, counts in zip(given, is_count, strict=True))
        return read(node.name, arguments, dict(node.kwargs), is_count)

    def _functional(self, node: torch.fx.Node, kind: str, defaults: Mapping[str, Any]) -> Layer:
        """A functional call with the parameters of one module, which is a subclass of torch's own such layer."""
        function = getattr(node.target, "__name__", str(node.target))
        given: dict[str, Any] = {**defaults, **dict(zip(defaults, node.args[1:], strict=False)), **node.kwargs}
        owner = self.owners.get(id(given["weight"]))
        if owner is None:
            raise _Refused(f"it uses {function} with a weight that is no parameter of a module (at {node.name!r})")
        module = self.modules[owner.path]
        bias = given["bias"]
        own = owner.name == "weight" and isinstance(module, _REPEATED[kind][0])
        if own and bias is not None:
            own = self.owners.get(id(bias)) == _Owner(owner.path, "bias")
        if not own or (bias is None) != (module.bias is None):
            raise _Refused(
                f"it uses {function} with parameters that are not weight and bias of one {_REPEATED[kind][0].__name__} "
                f"(at {node.name!r})"
            )
        for setting in _REPEATED[kind][1]:
            if _pair(getattr(module, setting)) != _pair(given[setting]):
                raise _Refused(f"it uses {function} with a {setting} other than its module's (at {node.name!r})")
        if kind == "norm" and not given["training"]:
            raise _Refused(f"it uses {function} with statistics that are not the batch's (at {node.name!r})")
        return Layer(self._norm_kind(node) if kind == "norm" else kind, owner.path, module)

    def _norm_kind(self, node: torch.fx.Node) -> str:
        """F.batch_norm is the same for images and features: what came before tells."""
        number = self.given[cast(torch.fx.Node, node.args[0])]
        while number > 0:
            layer = self.layers[number - 1]
            if layer.kind in ("conv", "images"):
                return "norm"
            if layer.kind in ("conv1d", "linear", "flatten", "mean", "mean1d"):
                return "norm1d"
            number -= layer.reads[0]
        raise _Refused(f"it uses batch_norm before a layer that tells its number of axes (at {node.name!r})")

    def _module(self, name: str, module: nn.Module) -> Layer | None:
        kind = type(module)
        if kind is nn.Identity:
            return None
        if isinstance(module, nn.modules.dropout._DropoutNd):
            if _passes(module.p, module.training):
                return None
            if kind not in _DROPOUTS:
                raise _Refused(f"it uses {kind.__name__} in training mode")
            return _dropped(_DROPOUTS[kind], name, module.p)
        if kind in _COMPUTING:
            return Layer(_COMPUTING[kind], name, module)
        if kind in _ACTIVATIONS:
            return Layer(_ACTIVATIONS[kind], name)
        if kind in _SETTINGS:
            read, settings = _SETTINGS[kind]
            return read(name, (), {key: getattr(module, key) for key in settings}, ())
        if kind in (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d):
            read = _ADAPTIVE_2D if kind is nn.AdaptiveAvgPool2d else _ADAPTIVE_1D
            return read(name, (module.output_size,), {}, ())
        if kind is nn.Flatten:
            return _flatten(name, (module.start_dim, module.end_dim), {}, ())
        raise _Refused(f"it uses {kind.__name__}")


# Functions that compute with parameters -> the kind of layer, and their arguments after the input with defaults.
_CONV_DEFAULTS: dict[str, Any] = {"weight": None, "bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1}
_NORM_DEFAULTS: dict[str, Any] = {
    "running_mean": None, "running_var": None, "weight": None, "bias": None, "training": False, "momentum": 0.1,
    "eps": 1e-5,
}  # fmt: skip
_FUNCTIONAL: list[tuple[Any, str, dict[str, Any]]] = [
    (F.conv2d, "conv", _CONV_DEFAULTS),
    (F.conv1d, "conv1d", _CONV_DEFAULTS),
    (F.batch_norm, "norm", _NORM_DEFAULTS),
    (F.linear, "linear", {"weight": None, "bias": None}),
]
# Kind of layer -> the class whose subclasses may compute so, and the settings that the call must repeat.
_REPEATED: dict[str, tuple[type[nn.Module], tuple[str, ...]]] = {
    "conv": (nn.Conv2d, ("stride", "padding", "dilation", "groups")),
    "conv1d": (nn.Conv1d, ("stride", "padding", "dilation", "groups")),
    "norm": (nn.modules.batchnorm._BatchNorm, ("eps",)),
    "linear": (nn.Linear, ()),
}

_COMPUTING: dict[type[nn.Module], str] = {
    nn.Conv2d: "conv", nn.Conv1d: "conv1d", nn.BatchNorm2d: "norm", nn.BatchNorm1d: "norm1d", nn.Linear: "linear",
    nn.GroupNorm: "group_norm", nn.InstanceNorm1d: "instance_norm", nn.InstanceNorm2d: "instance_norm",
    nn.LayerNorm: "layer_norm",
}  # fmt: skip
_ACTIVATIONS: dict[type[nn.Module], str] = {
    nn.ReLU: "relu", nn.Tanh: "tanh", nn.SiLU: "silu", nn.Sigmoid: "sigmoid",
}  # fmt: skip
ACTIVATIONS = ("relu", "leaky_relu", "elu", "gelu", "gelu_tanh", "silu", "tanh", "sigmoid")


_DROPOUTS: dict[type[nn.Module], str] = {
    nn.Dropout: "dropout", nn.Dropout1d: "dropout1d", nn.Dropout2d: "dropout2d",
}  # fmt: skip


def _passes(share: Any, training: Any) -> bool:
    """Whether a dropout leaves everything as it is."""
    return bool(share == 0 or not training)


def _dropped(kind: str, name: str, share: Any) -> Layer:
    if not isinstance(share, float):
        raise _Refused(f"its dropout's share is of type {type(share).__name__} (at {name!r})")
    if not 0 < share < 1:
        raise _Refused(f"its dropout's share is {share:g} (at {name!r})")
    return Layer(kind, name, share=float(share))


# Each reads one call: its name in the graph, its arguments after the data (-1 in place of a count of examples), its
# keyword arguments, and which arguments are such a count. None: it passes its input through.
_Arguments = tuple[Any, ...]
_Read = Callable[[str, _Arguments, dict[str, Any], tuple[bool, ...]], Layer | None]


def _activation(kind: str) -> _Read:
    def read(name: str, arguments: _Arguments, keywords: dict[str, Any], is_count: tuple[bool, ...]) -> Layer:
        # In-place ones are the same here. Where a forward reads what such a one has overwritten, `computes` sees it.
        return Layer(kind, name)

    return read


def _sloped(kind: str, keyword: str, default: float) -> _Read:
    def read(name: str, arguments: _Arguments, keywords: dict[str, Any], is_count: tuple[bool, ...]) -> Layer:
        settings = {keyword: default} | dict(zip((keyword,), arguments, strict=False)) | keywords
        if not isinstance(settings[keyword], (int, float)):
            raise _Refused(f"its slope is no number (at {name!r})")
        return Layer(kind, name, slope=float(settings[keyword]))

    return read


def _dropout(kind: str) -> _Read:
    def read(name: str, arguments: _Arguments, keywords: dict[str, Any], is_count: tuple[bool, ...]) -> Layer | None:
        settings = {"p": 0.5, "training": True} | dict(zip(("p", "training"), arguments, strict=False)) | keywords
        if _passes(settings["p"], settings["training"]):
            return None
        return _dropped(kind, name, settings["p"])

    return read


def _gelu(name: str, arguments: _Arguments, keywords: dict[str, Any], is_count: tuple[bool, ...]) -> Layer:
    how = keywords.get("approximate", "none")
    if arguments or how not in ("none", "tanh"):
        raise _Refused(f"its GELU is approximated in an unknown way (at {name!r})")
    return Layer("gelu" if how == "none" else "gelu_tanh", name)


_POOL_DEFAULTS: dict[str, Any] = {
    "kernel_size": None, "stride": None, "padding": 0, "dilation": 1, "ceil_mode": False, "return_indices": False,
}  # fmt: skip
_AVERAGE_DEFAULTS: dict[str, Any] = {
    "kernel_size": None, "stride": None, "padding": 0, "ceil_mode": False, "count_include_pad": True,
    "divisor_override": None,
}  # fmt: skip


def _pool_of(kind: str, defaults: Mapping[str, Any], axes: int) -> _Read:
    """Reads a pooling over one axis (of series, which are images of height 1) or two."""

    def pair(value: Any) -> tuple[Any, Any]:
        return _pair(value) if axes == 2 else (None, *_pair(value)[:1])

    def read(name: str, arguments: _Arguments, keywords: dict[str, Any], is_count: tuple[bool, ...]) -> Layer:
        settings = {**defaults, **dict(zip(defaults, arguments, strict=False)), **keywords}
        kernel, padding = pair(settings["kernel_size"]), pair(settings["padding"])
        stride = kernel if settings["stride"] in (None, [], ()) else pair(settings["stride"])
        if _pair(settings.get("dilation", 1)) != (1, 1) and pair(settings.get("dilation", 1))[1:] != (1,):
            raise _Refused(f"its pooling has dilation (at {name!r})")
        if settings["ceil_mode"] or settings.get("return_indices") or settings.get("divisor_override") is not None:
            raise _Refused(f"its pooling has ceil_mode, returns indices or has a divisor of its own (at {name!r})")
        window = (
            (kernel[0] or 1, kernel[1]), (stride[0] or 1, stride[1]), (padding[0] or 0, padding[1]),
        )  # fmt: skip
        if not all(isinstance(number, int) for two in window for number in two):
            raise _Refused(f"its pooling has sizes that are no numbers (at {name!r})")
        if (kind, window) == ("max_pool", ((2, 2), (2, 2), (0, 0))):
            return Layer("pool", name)
        return Layer(kind, name, window=window, counts_padding=bool(settings.get("count_include_pad", True)))

    return read


_MAX_1D, _MAX_2D = (_pool_of("max_pool", _POOL_DEFAULTS, axes) for axes in (1, 2))
_AVERAGE_1D, _AVERAGE_2D = (_pool_of("average_pool", _AVERAGE_DEFAULTS, axes) for axes in (1, 2))


def _pair(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value, value)


def _adaptive_of(kind: str, what: str) -> _Read:
    """Reads an average pooling to one position."""

    def read(name: str, arguments: _Arguments, keywords: dict[str, Any], is_count: tuple[bool, ...]) -> Layer:
        sizes = [*arguments, *keywords.values()]
        if len(sizes) != 1 or set(_pair(sizes[0])) != {1}:
            raise _Refused(f"its average pooling is not over the whole {what} (at {name!r})")
        return Layer(kind, name)

    return read


_ADAPTIVE_1D, _ADAPTIVE_2D = _adaptive_of("mean1d", "series"), _adaptive_of("mean", "image")


def _mean(name: str, arguments: _Arguments, keywords: dict[str, Any], is_count: tuple[bool, ...]) -> Layer:
    keep = keywords.pop("keepdim", False)
    axes = [*arguments, *keywords.values()]
    if not keep and axes in ([2], [-1], [(2,)], [(-1,)], [[2]], [[-1]]):
        return Layer("mean1d", name)
    if keep or len(axes) != 1 or sorted(a % 4 if isinstance(a, int) else -1 for a in _pair(axes[0])) != [2, 3]:
        raise _Refused(f"its mean is not over height and width (at {name!r})")
    return Layer("mean", name)


def _flatten(name: str, arguments: _Arguments, keywords: dict[str, Any], is_count: tuple[bool, ...]) -> Layer:
    settings = {"start_dim": 0, "end_dim": -1} | dict(zip(("start_dim", "end_dim"), arguments, strict=False)) | keywords
    if settings != {"start_dim": 1, "end_dim": -1}:
        raise _Refused(f"it flattens other axes than all but the first (at {name!r})")
    return Layer("flatten", name)


def _view(name: str, arguments: _Arguments, keywords: dict[str, Any], is_count: tuple[bool, ...]) -> Layer:
    """`x.view(-1, n)`, `x.view(x.size(0), -1)`, `x.view(-1, C, H, W)`: the first axis still counts examples."""
    sizes = arguments[1:]
    written_out = all(isinstance(size, int) and size > 0 for size in sizes) and not any(is_count[1:])
    if arguments[:1] == (-1,) and not keywords:
        if sizes == (-1,) and is_count == (True, False):
            return Layer("flatten", name)
        if len(sizes) == 1 and written_out:
            return Layer("flatten", name, size=sizes)
        if len(sizes) == 3 and written_out:
            return Layer("images", name, size=sizes)
    raise _Refused(f"its view is not one of examples by features (at {name!r})")


# `a + b`, `a += b` and their kin.
_SUMS: tuple[Any, ...] = (operator.add, operator.iadd, torch.add, "add", "add_")
_AVERAGE_1D_SETTINGS = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad")
# How layers with settings are read, and the attributes that hold these.
_SETTINGS: dict[type[nn.Module], tuple[_Read, tuple[str, ...]]] = {
    nn.MaxPool2d: (_MAX_2D, tuple(_POOL_DEFAULTS)),
    nn.MaxPool1d: (_MAX_1D, tuple(_POOL_DEFAULTS)),
    nn.AvgPool2d: (_AVERAGE_2D, tuple(_AVERAGE_DEFAULTS)),
    nn.AvgPool1d: (_AVERAGE_1D, _AVERAGE_1D_SETTINGS),
    nn.LeakyReLU: (_sloped("leaky_relu", "negative_slope", 0.01), ("negative_slope",)),
    nn.ELU: (_sloped("elu", "alpha", 1.0), ("alpha",)),
    nn.GELU: (_gelu, ("approximate",)),
}


def _flag_free(read: _Read) -> _Read:
    """Reads a function without its flag `inplace`, see `_activation`."""
    return lambda name, arguments, keywords, is_count: read(
        name, arguments[:1], {key: value for key, value in keywords.items() if key != "inplace"}, is_count
    )


_METHODS: dict[str, _Read] = {
    "relu": _activation("relu"),
    "relu_": _activation("relu"),
    "tanh": _activation("tanh"),
    "sigmoid": _activation("sigmoid"),
    "mean": _mean,
    "flatten": _flatten,
    "view": _view,
    "reshape": _view,
}
_FUNCTIONS: list[tuple[Any, _Read]] = [
    (torch.relu, _activation("relu")),
    (torch.relu_, _activation("relu")),
    (F.relu, _activation("relu")),
    (F.relu_, _activation("relu")),
    (torch.tanh, _activation("tanh")),
    (F.tanh, _activation("tanh")),
    (torch.sigmoid, _activation("sigmoid")),
    (F.sigmoid, _activation("sigmoid")),
    (F.leaky_relu, _flag_free(_sloped("leaky_relu", "negative_slope", 0.01))),
    (F.elu, _flag_free(_sloped("elu", "alpha", 1.0))),
    (F.gelu, _gelu),
    (F.silu, _activation("silu")),
    (F.max_pool2d, _MAX_2D),
    (torch.max_pool2d, _MAX_2D),
    (F.max_pool1d, _MAX_1D),
    (F.avg_pool2d, _AVERAGE_2D),
    (F.avg_pool1d, _AVERAGE_1D),
    (F.adaptive_avg_pool2d, _ADAPTIVE_2D),
    (F.adaptive_avg_pool1d, _ADAPTIVE_1D),
    (torch.adaptive_avg_pool1d, _ADAPTIVE_1D),
    (F.dropout, _dropout("dropout")),
    (F.dropout1d, _dropout("dropout1d")),
    (F.dropout2d, _dropout("dropout2d")),
    (torch.mean, _mean),
    (torch.flatten, _flatten),
]


# ---------------------------------------------------------------------------------------------------------------------
# Numbers


def computes(
    model: nn.Module,
    names: tuple[str, ...],
    forward: Callable[[Mapping[str, Tensor], Tensor], Tensor],
    x: Tensor,
    draws: bool = False,
) -> bool:
    """Whether a module computes what `forward` does with its parameters `names`: values and gradients.

    A structure can be misread: a forward may drop the gradient, switch to another precision, or rely on a wrapped
    function. The float64 run tells a factor of 1 + 1e-8 from 1; the float32 run detects rounding that affects only
    float32. The examples are random, with the shape of those of `x` `[S, ...]`, and BatchNorm normalises by the batch:
    real examples may be constant or not finite. The check makes the host wait for the device.

    Args:
        model: The module.
        names: Its parameters that `forward` uses.
        forward: Predictions from parameters and examples.
        x: Examples `[S, ...]`.
        draws: Whether both draw random numbers, which must then be the same ones.
    """
    if draws:
        return modes.without_drawing(x.device, lambda: _computes(model, names, forward, x, draws=True))
    return _computes(model, names, forward, x, draws=False)


def _computes(
    model: nn.Module,
    names: tuple[str, ...],
    forward: Callable[[Mapping[str, Tensor], Tensor], Tensor],
    x: Tensor,
    draws: bool,
) -> bool:
    if modes.is_capturing(x.device):
        raise RuntimeError(
            "signmaml_ext: expected a call of this model before the CUDA graph is captured (the first call verifies "
            "what it found out about the model, which a graph cannot hold), found the first one inside the capture"
        )
    generator = torch.Generator().manual_seed(0)
    examples = torch.randn(3, *x.shape[1:], generator=generator, device="cpu")
    copies = Replicas(model, "batch")
    with torch.inference_mode(False), torch.enable_grad():
        for dtype, tolerance, seeds in ((torch.float64, 1e-8, _SEEDS[::2]), (torch.float32, 1e-4, _SEEDS[1::2])):
            parameters = {
                name: parameter.detach().to(dtype, copy=True).requires_grad_(name in names)
                for name, parameter in model.named_parameters()
            }
            # A forward may hand its running statistics to F.batch_norm, which wants them in the type of the input.
            buffers = {
                name: buffer.detach().to(dtype, copy=True)
                for name, buffer in model.named_buffers()
                if buffer.is_floating_point()
            }
            inputs = examples.to(x.device, dtype)
            expected = functools.partial(forward, parameters, inputs)
            models = functools.partial(_run_copy, copies, buffers | parameters, inputs)
            used = [parameters[name] for name in names]
            try:
                for seed in seeds if draws else (None,):
                    agrees, sees_all = _agree(expected, models, used, generator, tolerance, seed)
                    if not agrees:
                        return False
                    if sees_all:
                        break
                else:
                    return False
            except Exception:  # such as examples that do not fit: the reference will raise it again
                return False
    return True


def _run_copy(copies: Replicas, values: dict[str, Tensor], x: Tensor) -> Any:
    return copies.make(values)(x)


# Some for each dtype, so that a forward which sets the generator itself cannot always set the same.
_SEEDS = tuple(range(16))


def _agree(
    own: Callable[[], Tensor],
    models: Callable[[], Any],
    parameters: list[Tensor],
    generator: torch.Generator,
    tolerance: float,
    seed: int | None,
) -> tuple[bool, bool]:
    """Whether two results and their gradients agree, by the norm of the difference.

    Args:
        own: The expected result.
        models: The result in question.
        parameters: What the gradients are of.
        generator: For the weights of the results in the gradients.
        tolerance: Of the difference, relative to the expected norm.
        seed: Sets torch's generator before each; both must leave it alike. None: they draw no numbers.

    Returns:
        Whether they agree, and, with a seed, whether all weights had a gradient other than 0: a dropout may have
        hidden some.
    """

    def result(forward: Callable[[], Any]) -> tuple[Any, bytes]:
        if seed is not None:
            torch.default_generator.manual_seed(seed)
        value = forward()
        return value, b"" if seed is None else modes.state_of(torch.default_generator)

    (expected, expected_state), (found, state) = result(own), result(models)
    if not isinstance(found, Tensor) or found.dtype != expected.dtype or found.shape != expected.shape:
        return False, True
    if not found.requires_grad or state != expected_state:
        return False, True
    weights = torch.randn(expected.shape, generator=generator, device="cpu").to(expected)

    def gradients(value: Tensor) -> list[Tensor | None]:
        return list(torch.autograd.grad((value * weights).sum(), parameters, allow_unused=True))

    def close(a: Tensor | None, b: Tensor | None) -> bool:
        return a is not None and b is not None and bool((a - b).norm() <= tolerance * (1 + b.norm()))

    exact = gradients(expected)
    agrees = close(found, expected) and all(map(close, gradients(found), exact))
    sees_all = seed is None or all(grad is None or grad.ndim < 2 or bool(grad.any()) for grad in exact)
    return agrees, sees_all
