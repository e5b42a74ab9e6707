"""Everything that a module's forward may depend on besides its numbers, cheap to compare from call to call.

It has two parts:

- the structure, for every module: the tree, the types, the settings of torch's own layers, hooks, which tensors there
  are;
- the reads: which attributes of the user's modules a forward read while it was traced, each with its value, or, for
  what it called, its code and the globals that the code names.

An attribute that no forward reads (a counter, what a trainer keeps on its model) is in neither, so it may change from
call to call at no cost. What a forward reads through an object that is not a module is followed a few levels deep:
numbers, strings, containers and plain objects of them, such as a configuration.
"""

from __future__ import annotations

import functools
import numbers
import types
from collections.abc import Hashable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

Reads = frozenset[tuple[str, str]]  # path of a module, name of an attribute

# Plain objects and functions are compared by content down to this many levels, and by identity below.
DEEPEST = 3
# Larger containers and objects are compared by identity and length.
LARGEST = 256

_PLAIN = frozenset((bool, int, float, complex, str, bytes, type(None)))
_HOOKS = (
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs",
)  # fmt: skip
# Attributes of every module; `training` counts as a setting.
_KEPT = frozenset(vars(nn.Module())) - {"training"}

# Attributes that Python keeps on a class and no forward reads.
_UNREAD = frozenset(vars(type("_", (), {}))) | {"__annotations__", "__firstlineno__", "__static_attributes__"}


def is_layer(module: nn.Module) -> bool:
    """Whether a module is one of torch's own layers, which computes with its settings and tensors alone."""
    return type(module).__module__.startswith("torch.nn") and not isinstance(module, nn.Sequential)


def of_module(model: nn.Module) -> Hashable:
    """The structure, as one flat tuple for speed: most of a call's host time is spent here."""
    found: list[Any] = []
    for name, module in model.named_modules():
        attributes = vars(module)
        kind = type(module)
        found.append(name)
        found.append(kind)
        for key in _HOOKS:
            if attributes[key]:
                found.extend((key, *attributes[key], *map(id, attributes[key].values())))
        for tensors in (attributes["_parameters"], attributes["_buffers"]):
            for key, tensor in tensors.items():
                found.extend((key, None) if tensor is None else (key, id(tensor), tensor.shape))
        if is_layer(module):
            found.append(kind.forward)
            for key, value in attributes.items():
                if key not in _KEPT:
                    found.append(key)
                    found.append(value if type(value) in _PLAIN else of_value(value))
        else:
            found.append(of_value(attributes.get("forward")))
    return tuple(found)


def of_reads(model: nn.Module, reads: Reads) -> Hashable:
    """The values of attributes of the user's modules."""
    if not reads:
        return ()
    modules = dict(model.named_modules())
    return tuple(of_value(_attribute(modules.get(path), name)) for path, name in sorted(reads))


def of_attributes(model: nn.Module) -> Hashable:
    """Everything that the user's modules and their classes hold, whether a forward reads it or not."""
    found: list[Hashable] = []
    for module in model.modules():
        if not is_layer(module):
            own = {name: value for name, value in vars(module).items() if name not in _KEPT}
            classes = [vars(kind) for kind in type(module).__mro__ if kind not in nn.Module.__mro__]
            for held in (own, *classes):
                found.append(tuple((name, of_value(value)) for name, value in held.items() if name not in _UNREAD))
    return tuple(found)


def _attribute(module: nn.Module | None, name: str) -> Any:
    """An attribute's value. A property's code is not run, because what it reads is among the reads itself."""
    if module is None:
        return None
    for held in (vars(module), module._parameters, module._buffers, module._modules):
        if name in held:
            return held[name]
    return next((vars(kind)[name] for kind in type(module).__mro__ if name in vars(kind)), None)


def of_value(value: Any, depth: int = 0) -> Hashable:
    """A comparable form of a value: if equal, the values have the same effect on a forward that reads them."""
    kind = type(value)
    if kind in _PLAIN or isinstance(value, numbers.Number):  # such as NumPy's
        return kind, value
    if isinstance(value, nn.Parameter):
        return id(value), value.shape
    if isinstance(value, Tensor):
        # A forward may read a buffer's numbers: the version changes when they are written.
        return id(value), value.shape, 0 if value.is_inference() else value._version
    if isinstance(value, (nn.Module, type, types.ModuleType, types.BuiltinFunctionType)):
        return id(value)
    if isinstance(value, types.FunctionType):
        return _function(value, depth)
    if isinstance(value, types.MethodType):
        return id(value.__self__), of_value(value.__func__, depth)
    if isinstance(value, (staticmethod, classmethod)):
        return of_value(value.__func__, depth)
    if isinstance(value, property):
        return id(value) if value.fget is None else of_value(value.fget, depth)
    if isinstance(value, functools.partial):
        return tuple(of_value(part, depth) for part in (value.func, value.args, value.keywords))
    if isinstance(value, Mapping) and len(value) <= LARGEST and depth <= DEEPEST:
        keys = tuple(key if type(key) in _PLAIN else id(key) for key in value)
        return kind, keys, tuple(of_value(part, depth + 1) for part in value.values())
    if isinstance(value, (list, tuple)) and len(value) <= LARGEST and depth <= DEEPEST:
        return kind, tuple(of_value(part, depth + 1) for part in value)
    if isinstance(value, (set, frozenset)) and len(value) <= LARGEST:
        return kind, frozenset(part if type(part) in _PLAIN else id(part) for part in value)
    held = getattr(value, "__dict__", None)
    if isinstance(held, dict) and len(held) <= LARGEST and depth <= DEEPEST:
        return kind, id(value), tuple(held), tuple(of_value(part, depth + 1) for part in held.values())
    return kind, id(value), len(value) if hasattr(kind, "__len__") else 0


def _function(value: types.FunctionType, depth: int) -> Hashable:
    """Code, defaults, what the closure holds, and the globals that the code names."""
    if depth > DEEPEST:
        return id(value)
    cells = tuple(of_value(part, depth + 1) for part in _closure(value))
    named = value.__globals__
    globals_read = tuple(of_value(named[name], depth + 1) for name in _names(value.__code__) if name in named)
    return value.__code__, of_value(value.__defaults__, depth + 1), cells, globals_read


def _closure(value: types.FunctionType) -> Iterator[Any]:
    for cell in value.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # not filled yet
            yield None


@functools.lru_cache(maxsize=4096)
def _names(code: types.CodeType) -> tuple[str, ...]:
    """The names that a code object looks up, including those of nested code."""
    inside = (name for const in code.co_consts if isinstance(const, types.CodeType) for name in _names(const))
    return tuple(dict.fromkeys((*code.co_names, *inside)))


class Watched:
    """Notes which attributes the forward of a private copy of a module reads; torch's own layers are not watched.

    Args:
        copy: The copy, see `replica`; its modules become instances of watched classes.
    """

    def __init__(self, copy: nn.Module) -> None:
        self._found: set[tuple[str, str]] = set()
        for path, module in list(copy.named_modules()):
            if not is_layer(module):
                module.__class__ = _watched_class(type(module), path, self._found)

    def found(self) -> Reads:
        """What was read so far."""
        return frozenset(self._found)


def _watched_class(kind: type[nn.Module], path: str, found: set[tuple[str, str]]) -> type[nn.Module]:
    def read(self: nn.Module, name: str) -> Any:
        if name not in _KEPT and (not _is_torchs(kind, name) or name in object.__getattribute__(self, "__dict__")):
            found.add((path, name))
        return kind.__getattribute__(self, name)

    return type(kind.__name__, (kind,), {"__getattribute__": read, "__module__": kind.__module__})


def _is_torchs(kind: type[nn.Module], name: str) -> bool:
    """Whether an attribute of a class is nn.Module's own machinery, or Python's."""
    for base in kind.__mro__:
        if name in vars(base):
            return base in (nn.Module, object)
    return False
