"""Private copies of a module: a forward pass with other tensors never touches the module that a user holds.

A forward may use its module in any way: read parameters late (activation checkpointing recomputes in the backward
pass), leave tensors behind (`self.features = h`), write buffers, run in several threads at once. So no tensor is ever
put into the user's module, not even for a moment. Each forward pass gets module objects of its own: same class, same
attributes, hooks and submodules, with the given tensors in place of parameters and buffers.
"""

from __future__ import annotations

import functools
import types
import weakref
from collections import deque
from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from .checks import refuse

# BatchNorm of any dimension.
BatchNorm = nn.modules.batchnorm._BatchNorm

# Longer containers are data, such as a vocabulary: shared as they are, neither searched nor copied.
LONGEST = 1024
# How deep plain objects within plain objects are searched for modules and tensors of the tree.
DEEPEST = 3

_PLAIN = frozenset((bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size))
_CONTAINERS = (list, dict, set, deque)
# Attributes of torch.nn.Module itself; every copy gets its own.
_TREE = ("_parameters", "_buffers", "_modules")
_KEPT = frozenset(key for key, value in vars(nn.Module()).items() if isinstance(value, _CONTAINERS)) - set(_TREE)


class Replicas:
    """Makes private copies of one module's tree.

    Tensors that are the same for all tasks (buffers, frozen parameters, tensors in plain attributes) are copied once,
    and again only after a forward has written to the copy, so each forward pass finds the values that the user's module
    holds.

    Args:
        model: The module. Its tree must stay as it is while copies are made.
        batch_norm: "batch": BatchNorm normalises by the set at hand, in training and evaluation; "running": by its
            running statistics; None: as the module's own mode says. No copy writes running statistics.

    Raises:
        ValueError: The tree holds a `torch.compile`d module with hooks of its own, which a copy cannot carry.
    """

    def __init__(self, model: nn.Module, batch_norm: str | None = None) -> None:
        self._model = model
        self._names = {id(t): name for name, t in chain(model.named_parameters(), model.named_buffers())}
        self._held: dict[int, Tensor] = {}  # tensors of the tree by id, as the user's modules hold them
        self._copies: dict[int, tuple[Tensor, int]] = {}  # by the same id: the private copy, and its version
        self._modules: dict[int, nn.Module] = {}  # the tree by id, also modules that are only in attributes
        self._owned: set[int] = set()  # ids of containers in attributes
        self._gather(model)
        self._plans: list[_Plan] = []
        self._compiled: list[tuple[int, int]] = []  # a compiled module, and the module that it wraps
        for module in self._modules.values():
            if _is_compiled(module):
                if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks:
                    refuse("model", "hooks on the module itself", "some on what torch.compile made of it")
                self._compiled.append((id(module), id(module._modules["_orig_mod"])))
            else:
                self._plans.append(self._plan(module, batch_norm))

    def make(self, tensors: Mapping[str, Tensor]) -> nn.Module:
        """A private copy.

        Args:
            tensors: Replacements for parameters and buffers, by their first names. The others are copies of what the
                module holds.
        """
        placed: dict[int, Any] = {}
        for number, held in self._held.items():
            name = self._names.get(number)
            placed[number] = tensors[name] if name is not None and name in tensors else self._constant(number, held)
        copies: list[nn.Module] = []
        for plan in self._plans:
            copy = plan.kind.__new__(plan.kind)
            copies.append(copy)
            placed[plan.number] = copy
        for compiled, wrapped in reversed(self._compiled):
            placed[compiled] = placed[wrapped]
        for plan, copy in zip(self._plans, copies, strict=True):
            attributes = vars(copy)
            attributes.update(plan.shared)
            for key, kind in plan.empty:
                attributes[key] = kind()
            for key, held_here in plan.members:
                attributes[key] = {name: placed.get(id(value), value) for name, value in held_here.items()}
            for key, value in plan.referring:
                attributes[key] = self._mapped(value, placed)
        made: nn.Module = placed[id(self._model)]
        return made

    def own_buffers(self) -> dict[str, Tensor]:
        """The buffers outside BatchNorm, by name. A forward may write to them, so tasks under vmap need their own."""
        norms = [f"{name}." if name else "" for name, m in self._model.named_modules() if isinstance(m, BatchNorm)]
        buffers = self._model.named_buffers()
        return {name: buffer for name, buffer in buffers if not any(map(name.startswith, norms))}

    def _constant(self, number: int, held: Tensor) -> Tensor:
        known = self._copies.get(number)
        if known is None or known[0]._version != known[1]:
            with torch.no_grad(), torch.inference_mode(False):
                copy = held.detach().clone()
            self._copies[number] = known = (copy, copy._version)
        return known[0]

    # -----------------------------------------------------------------------------------------------------------------
    # What a copy of one module is made of

    def _gather(self, value: Any) -> None:
        """Finds the modules and tensors of the tree: registered, or in attributes and containers of attributes."""
        if type(value) in _PLAIN:
            return
        if isinstance(value, Tensor):
            self._held[id(value)] = value
        elif isinstance(value, nn.Module):
            if id(value) not in self._modules:
                self._modules[id(value)] = value
                for attribute in vars(value).values():
                    self._gather(attribute)
        elif isinstance(value, (*_CONTAINERS, tuple)) and len(value) <= LONGEST:
            self._owned.add(id(value))
            for part in _parts_of(value):
                self._gather(part)

    def _plan(self, module: nn.Module, batch_norm: str | None) -> _Plan:
        shared: dict[str, Any] = {}
        empty: list[tuple[str, type]] = []
        members: list[tuple[str, dict[str, Any]]] = []
        referring: list[tuple[str, Any]] = []
        for key, value in vars(module).items():
            kind = type(value)
            if kind in _PLAIN:
                shared[key] = value
            elif key in _TREE:
                members.append((key, value))
            elif key in _KEPT and not value:
                empty.append((key, kind))  # most hook dictionaries; new ones, lest a forward add to the user's
            elif isinstance(value, _CONTAINERS) or id(value) in self._held or self._refers(value, set()):
                referring.append((key, value))
            else:
                shared[key] = value
        # Otherwise the copy of a module compiled in place would call the code compiled for the user's module.
        shared["_compiled_call_impl"] = None
        if batch_norm is not None and isinstance(module, BatchNorm):
            # Without `track_running_stats`, torch's forward neither reads nor writes the running buffers.
            shared["training"] = batch_norm == "batch"
            shared["track_running_stats"] = batch_norm == "running"
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            shared["sparse"] = False  # the same gradient as a dense tensor: the sign of 0 is 0
        return _Plan(type(module), id(module), shared, tuple(empty), tuple(members), tuple(referring))

    def _refers(self, value: Any, seen: set[int], depth: int = 0) -> bool:
        """Whether a value refers to the tree, so that a copy needs its own version."""
        if type(value) in _PLAIN or isinstance(value, (type, types.ModuleType)) or id(value) in seen:
            return False
        if id(value) in self._modules or id(value) in self._names or id(value) in self._owned:
            return True
        seen.add(id(value))
        return any(self._refers(part, seen, depth + 1) for part in _parts_of(value, depth))

    def _mapped(self, value: Any, placed: dict[int, Any]) -> Any:
        """A value with the tree's modules and tensors replaced by their copies.

        Lists, dicts, sets and deques are always copied, so that a forward that appends to one does not change the
        user's.
        """
        kind = type(value)
        if kind in _PLAIN or isinstance(value, (type, types.ModuleType)):
            return value
        if id(value) in placed:
            return placed[id(value)]
        if isinstance(value, _CONTAINERS):
            return self._container(value, placed) if len(value) <= LONGEST else value
        if isinstance(value, (nn.Module, Tensor)):
            return value  # of another tree, behind a function or a plain object
        if isinstance(value, (tuple, frozenset)):
            parts = [self._mapped(part, placed) for part in value]
            if all(map(_same, parts, value)):
                return value
            return kind._make(parts) if hasattr(kind, "_make") else kind(parts)
        if isinstance(value, types.MethodType):
            owner = self._mapped(value.__self__, placed)
            return value if owner is value.__self__ else types.MethodType(value.__func__, owner)
        if isinstance(value, functools.partial):
            arguments = [self._linked(part, placed) for part in value.args]
            keywords = {key: self._linked(part, placed) for key, part in value.keywords.items()}
            return functools.partial(self._mapped(value.func, placed), *arguments, **keywords)
        if isinstance(value, types.FunctionType):
            return self._function(value, placed)
        if isinstance(value, weakref.ref):
            referent = value()
            return weakref.ref(placed[id(referent)]) if id(referent) in placed else value
        return self._object(value, placed)

    def _container(self, value: Any, placed: dict[int, Any]) -> Any:
        copy: Any = value.copy()
        kind: Any = type(value)
        if type(copy) is not kind:  # a subclass, such as a dictionary whose keys are attributes
            plain, copy = copy, kind.__new__(kind)
            (dict.update if isinstance(value, dict) else list.extend)(copy, plain)
            vars(copy).update(vars(value))
        placed[id(value)] = copy
        if isinstance(value, dict):
            for key, part in value.items():
                dict.__setitem__(copy, key, self._mapped(part, placed))
        elif isinstance(value, list):
            copy[:] = [self._mapped(part, placed) for part in value]
        else:
            copy.clear()
            (copy.update if isinstance(value, set) else copy.extend)(self._mapped(part, placed) for part in value)
        return copy

    def _function(self, value: types.FunctionType, placed: dict[int, Any]) -> types.FunctionType:
        """A function whose closure or defaults hold the tree, such as `self.act = lambda x: x * self.scale`."""
        placed[id(value)] = value  # a recursive function holds itself
        cells = [cell.cell_contents for cell in value.__closure__ or () if not _is_empty(cell)]
        inside = [*cells, *(value.__defaults__ or ())]
        mapped = [self._linked(part, placed) for part in inside]
        if all(map(_same, mapped, inside)):
            return value
        found = iter(mapped)
        closure = tuple(cell if _is_empty(cell) else types.CellType(next(found)) for cell in value.__closure__ or ())
        copy = types.FunctionType(value.__code__, value.__globals__, value.__name__, tuple(found) or None, closure)
        copy.__kwdefaults__ = value.__kwdefaults__
        copy.__dict__.update(value.__dict__)
        placed[id(value)] = copy
        return copy

    def _object(self, value: Any, placed: dict[int, Any]) -> Any:
        """A plain object that holds the tree, as a helper of the model's author may."""
        if not _is_searched(value) or not self._refers(value, set()):
            return value
        kind: Any = type(value)
        try:
            copy = kind.__new__(kind)
        except TypeError:
            # It cannot be created without arguments, like the result of functools.lru_cache. If the forward reaches a
            # parameter through it, that is the user's own, and the call is refused.
            return value
        placed[id(value)] = copy
        vars(copy).update({key: self._linked(part, placed) for key, part in vars(value).items()})
        return copy

    def _linked(self, value: Any, placed: dict[int, Any]) -> Any:
        """A part of a function or plain object, unchanged unless it refers to the tree or is an attribute in it.

        A list in which hooks collect values, and which the user holds elsewhere, thus stays the user's own.
        """
        if isinstance(value, _CONTAINERS) and not self._refers(value, set()):
            return value
        return self._mapped(value, placed)


def _is_compiled(module: nn.Module) -> bool:
    """Whether `torch.compile` made it; checked without importing the compiler, which takes a second."""
    kind = type(module)
    return kind.__name__ == "OptimizedModule" and kind.__module__.startswith("torch._dynamo")


class _Plan:
    """How the copies of one module are made."""

    __slots__ = ("empty", "kind", "members", "number", "referring", "shared")

    def __init__(
        self,
        kind: type[nn.Module],
        number: int,
        shared: dict[str, Any],
        empty: tuple[tuple[str, type], ...],
        members: tuple[tuple[str, dict[str, Any]], ...],
        referring: tuple[tuple[str, Any], ...],
    ) -> None:
        self.kind = kind
        self.number = number  # id of the user's module
        self.shared = shared  # attributes shared as they are
        self.empty = empty  # attributes that are empty containers, with their type
        self.members = members  # parameters, buffers, submodules
        self.referring = referring  # attributes that are mapped anew for each copy


def _parts_of(value: Any, depth: int = 0) -> Iterable[Any]:
    """The parts of a value that may be modules or tensors of a tree."""
    if isinstance(value, (*_CONTAINERS, tuple, frozenset)):
        if len(value) > LONGEST:
            return ()
        return value.values() if isinstance(value, dict) else value
    if isinstance(value, types.MethodType):
        return (value.__self__,)
    if isinstance(value, functools.partial):
        return (value.func, *value.args, *value.keywords.values())
    if isinstance(value, types.FunctionType):
        cells = (cell.cell_contents for cell in value.__closure__ or () if not _is_empty(cell))
        return (*cells, *(value.__defaults__ or ()))
    if isinstance(value, weakref.ref):
        return (value(),)
    if depth < DEEPEST and not isinstance(value, nn.Module) and _is_searched(value):
        return vars(value).values()
    return ()


def _is_searched(value: Any) -> bool:
    """Whether a plain object may be copied safely; one that owns a resource (`__del__`) may not."""
    kind = type(value)
    if kind.__module__.partition(".")[0] in ("builtins", "numpy", "threading"):
        return False
    return isinstance(getattr(value, "__dict__", None), dict) and not hasattr(kind, "__del__")


def _is_empty(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return True
    return False


def _same(a: object, b: object) -> bool:
    return a is b
