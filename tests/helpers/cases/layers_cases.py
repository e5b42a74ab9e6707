"""Passes of programs of layers by a native module, against torch in float64: losses, predictions, gradients, and the
products of the Hessian.

Memory starts as NaN, so that nothing unwritten may be read.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from helpers.cases.second_order_cases import Case, alone
from signmaml_ext import layers

TASKS, EXAMPLES, WAYS = 3, 7, 3


class Setting:
    """A network, random parameters of three tasks and their examples, as native calls take them.

    Args:
        native: The module.
        make: Makes the network.
        shape: Of an example.
        squares: Whether the loss is the mean squared error.
        shares: Whether the tasks share every other tensor.
        row: The only row of images that is not 0; None: all.
    """

    def __init__(
        self, native: ModuleType, make: Callable[[], nn.Module], shape: tuple[int, ...], *, squares: bool,
        shares: bool, row: int | None,
    ) -> None:  # fmt: skip
        model = make()
        spec = layers.read(model)
        assert not isinstance(spec, str), spec
        self.spec, self.squares = spec, squares
        self.program = native.LayersProgram([block.entries() for block in spec.blocks], spec.size(shape))
        sizes = {name: parameter.shape for name, parameter in model.named_parameters()}
        self.x = torch.randn(TASKS, EXAMPLES, *shape, dtype=torch.float64)
        if row is not None:
            kept = self.x[..., row, :].clone()
            self.x.zero_()[..., row, :] = kept
        self.labels = torch.randint(WAYS, (TASKS, EXAMPLES))
        self.target = torch.randn(TASKS, EXAMPLES, WAYS, dtype=torch.float64)
        shared = list(spec.names)[::2] if shares else ()
        by_task = [self._noise_of(task) for task in range(TASKS)]
        self.noise = [torch.stack(of_block).contiguous() for of_block in zip(*by_task, strict=True)]
        self.parameters = {
            name: 0.4 * torch.randn(1 if name in shared else TASKS, *sizes[name], dtype=torch.float64)
            .expand(TASKS, *sizes[name]) for name in spec.names
        }  # fmt: skip

    def _noise_of(self, task: int) -> list[Tensor]:
        """What torch's dropouts multiply by, in the order of the blocks."""
        found = []
        with torch.random.fork_rng():
            torch.manual_seed(task)
            for block, (_, _, made) in zip(self.spec.blocks, self.program.sizes, strict=True):
                ones = torch.ones(EXAMPLES, *made, dtype=torch.float64)
                if block.drops == "values":
                    found.append(F.dropout(ones, block.share))
                elif block.drops == "channels":
                    found.append(F.dropout2d(ones, block.share)[:, :, 0, 0])
        return found

    def goal(self) -> tuple[int, int]:
        return (0, self.target.data_ptr()) if self.squares else (self.labels.data_ptr(), 0)

    def places(self, tensors: dict[str, Tensor]) -> list[tuple[int, int]]:
        """Where each parameter's tensor is; nowhere for those that are not given."""
        found = {name: (tensor.data_ptr(), tensor.stride(0)) for name, tensor in tensors.items()}
        return [found.get(name, (0, 0)) for name in self.spec.names]

    def unwritten(self, wanted: Callable[[str], bool]) -> dict[str, Tensor]:
        return {
            name: torch.full(value.shape, torch.nan, dtype=torch.float64)
            for name, value in self.parameters.items() if wanted(name)
        }  # fmt: skip

    def workspace(self, *, hessian: bool = False) -> Tensor:
        size = self.program.plan(TASKS, EXAMPLES, True, 1, hessian)["workspace_bytes"]
        return torch.full((size,), 255, dtype=torch.uint8)

    def expected(self, task: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """A task's loss, predictions, and gradients that can be differentiated."""
        own = {name: value[task].clone().requires_grad_() for name, value in self.parameters.items()}
        with torch.random.fork_rng():
            torch.manual_seed(task)
            out = self.spec.forward(own, self.x[task])
        loss = F.mse_loss(out, self.target[task]) if self.squares else F.cross_entropy(out, self.labels[task])
        self.own = own
        return loss, out, dict(zip(own, torch.autograd.grad(loss, list(own.values()), create_graph=True), strict=True))


def passes(
    native: ModuleType, make: Callable[[], nn.Module], shape: tuple[int, ...], *, squares: bool = False,
    wanted: Callable[[str], bool] = lambda name: True, row: int | None = None,
) -> None:  # fmt: skip
    """One pass of three tasks, whose parameters are random, and one in which they share every other tensor.

    Args:
        native: The module.
        make: Makes the network.
        shape: Of an example.
        squares: Whether the loss is the mean squared error.
        wanted: Which parameters get a gradient.
        row: The only row of images that is not 0; None: all.
    """
    for shares in (False, True):
        at = Setting(native, make, shape, squares=squares, shares=shares, row=row)
        grads = at.unwritten(wanted)
        loss = torch.full((TASKS,), torch.nan, dtype=torch.float64)
        predictions = torch.full((TASKS, EXAMPLES, WAYS), torch.nan, dtype=torch.float64)
        workspace = at.workspace()
        at.program.run(
            at.places(at.parameters), at.places(grads), at.x.data_ptr(), *at.goal(),
            [factors.data_ptr() for factors in at.noise], loss.data_ptr(),
            predictions.data_ptr(), workspace.data_ptr(), TASKS, EXAMPLES, True, 1,
        )  # fmt: skip
        for task in range(TASKS):
            expected, out, gradients = at.expected(task)
            scale = 1e-4 * max(float(gradient.detach().norm()) for gradient in gradients.values())
            _close("loss", loss[task], expected)
            _close("predictions", predictions[task], out)
            for name, found in grads.items():
                if name in at.spec.unmoved:
                    continue
                _close(name, found[task], gradients[name], scale)
                assert bool((found[task][gradients[name] == 0] == 0).all()), f"{name} is not exactly 0"


def hessian(
    native: ModuleType, make: Callable[[], nn.Module], shape: tuple[int, ...], *, squares: bool = False,
    wanted: Callable[[str], bool] = lambda name: True, moves: Callable[[str], bool] = lambda name: True,
    row: int | None = None,
) -> None:  # fmt: skip
    """The product of three tasks' Hessians with random directions; tasks share every other tensor.

    Args:
        native: The module.
        make: Makes the network.
        shape: Of an example.
        squares: Whether the loss is the mean squared error.
        wanted: Of which parameters the gradient's change is computed.
        moves: Which parameters have a direction.
        row: The only row of images that is not 0; None: all.
    """
    at = Setting(native, make, shape, squares=squares, shares=True, row=row)
    products = at.unwritten(wanted)
    directions = {name: torch.randn_like(value) for name, value in at.parameters.items() if moves(name)}
    workspace = at.workspace(hessian=True)
    at.program.hessian(
        at.places(at.parameters), at.places(directions), at.places(products), at.x.data_ptr(), *at.goal(),
        [factors.data_ptr() for factors in at.noise], workspace.data_ptr(), TASKS, EXAMPLES, True, 1,
    )  # fmt: skip
    for task in range(TASKS):
        _, _, gradients = at.expected(task)
        along = sum(
            ((gradients[name] * direction[task]).sum() for name, direction in directions.items()),
            start=0 * sum(gradient.sum() for gradient in gradients.values()),
        )
        changes = torch.autograd.grad(along, list(at.own.values()), allow_unused=True)
        scale = max((float(change.norm()) for change in changes if change is not None), default=0.0)
        for name, change in zip(at.own, changes, strict=True):
            if name in products:
                expected = torch.zeros_like(at.own[name]) if change is None else change
                _close(f"the change of {name}", products[name][task], expected, scale)


def _close(name: str, found: Tensor, expected: Tensor, scale: float = 0.0) -> None:
    """Asserts that the error is small beside the expected values, or beside `scale` if that is larger."""
    error = float((found - expected.detach()).norm() / max(float(expected.detach().norm()), scale, 1e-9))
    assert error <= 1e-9, f"{name} is {error:.1e} away"


def network(*kinds: nn.Module, features: int, bias: bool = True) -> nn.Sequential:
    return nn.Sequential(*kinds, nn.Flatten(), nn.Linear(features, WAYS, bias=bias))


SIZE = (3, 6, 7)
ACTIVATIONS: dict[str, nn.Module] = {
    "ReLU": nn.ReLU(), "LeakyReLU": nn.LeakyReLU(0.2), "ELU": nn.ELU(0.7), "GELU": nn.GELU(),
    "GELU by tanh": nn.GELU("tanh"), "SiLU": nn.SiLU(), "Tanh": nn.Tanh(), "Sigmoid": nn.Sigmoid(),
}  # fmt: skip


def after_zeros() -> nn.Module:
    """The second convolution's taps meet what the first one makes of other than zeros, and nothing else."""
    return network(
        nn.Conv2d(3, 6, 1, bias=False), nn.ReLU(), nn.Conv2d(6, 9, 3, 1, 1), nn.GroupNorm(3, 9), nn.LeakyReLU(0.1),
        features=9 * 42,
    )  # fmt: skip


class Branches(nn.Module):
    """A network with branches: `run` computes it with the parts."""

    def __init__(self, run: Callable[[Any, Tensor], Tensor], **parts: nn.Module) -> None:
        super().__init__()
        self.run = run
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def _shortcut(net: Any, x: Tensor) -> Tensor:
    x = net.first(x)
    return net.head(F.max_pool2d(F.leaky_relu(x + net.inner(x), 0.1), 2).flatten(1))


def shortcut() -> nn.Module:
    """A block whose input is added to its output, as ResNet has it."""
    inner = nn.Sequential(
        nn.Conv2d(6, 10, 3, 1, 1, bias=False), nn.BatchNorm2d(10), nn.ReLU(), nn.Conv2d(10, 6, 3, 1, 1),
        nn.BatchNorm2d(6),
    )  # fmt: skip
    first = nn.Sequential(nn.Conv2d(3, 6, 3, 1, 1), nn.BatchNorm2d(6), nn.ReLU())
    return Branches(_shortcut, first=first, inner=inner, head=nn.Linear(6 * 9, WAYS))


def _projected(net: Any, x: Tensor) -> Tensor:
    x = torch.tanh(net.across(x) + net.inner(x))  # both read the examples
    return net.head(net.last(x).add(net.beside(x)).mean((2, 3)))


def projected() -> nn.Module:
    """Shortcuts with convolutions of their own, the first of which reads the examples."""
    inner = nn.Sequential(nn.Conv2d(3, 5, 3, 2, 1), nn.SiLU(), nn.Conv2d(5, 6, 3, 1, 1), nn.GroupNorm(2, 6))
    return Branches(
        _projected, inner=inner, across=nn.Sequential(nn.Conv2d(3, 6, 1, 2), nn.GroupNorm(3, 6)),
        beside=nn.Conv2d(6, 4, 1, bias=False), last=nn.Conv2d(6, 4, 3, 1, 1), head=nn.Linear(4, WAYS),
    )  # fmt: skip


def _wide(net: Any, x: Tensor) -> Tensor:
    x = net.first(x)
    opened = F.relu(net.norm(x))
    x = net.beside(opened) + net.inner(opened)
    x = torch.add(x, net.again(x))
    return net.head(F.avg_pool2d(F.relu(net.norm_again(x)), 3).flatten(1))


def wide() -> nn.Module:
    """Norm and activation before the convolutions, as wide residual networks have them.

    The last norm takes away what biases of the summands would add.
    """
    inner = nn.Sequential(
        nn.Conv2d(5, 6, 3, 1, 1), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.3), nn.Conv2d(6, 6, 3, 1, 1, bias=False)
    )
    again = nn.Sequential(nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 3, 1, 1, bias=False))
    return Branches(
        _wide, first=nn.Conv2d(3, 5, 3, 1, 1), norm=nn.BatchNorm2d(5), inner=inner, again=again,
        beside=nn.Conv2d(5, 6, 1, bias=False), norm_again=nn.BatchNorm2d(6), head=nn.Linear(6 * 4, WAYS),
    )  # fmt: skip


def _of_features(net: Any, x: Tensor) -> Tensor:
    x = x + net.a(F.gelu(net.b(x)))
    x = x + torch.tanh(net.c(x))
    return net.head(x + x)


def of_features() -> nn.Module:
    """Shortcuts around linear layers, the first of which adds the examples."""
    return Branches(
        _of_features, a=nn.Linear(9, 7), b=nn.Linear(7, 9), c=nn.Linear(7, 7, bias=False), head=nn.Linear(7, WAYS)
    )


def _with_the_examples(net: Any, x: Tensor) -> Tensor:
    y = F.dropout(F.max_pool2d(torch.sigmoid(net.a(x) + x), 3, 1, 1), 0.2)
    return net.head((y + F.dropout2d(net.b(F.elu(y)), 0.3)).flatten(1))


def with_the_examples() -> nn.Module:
    return Branches(
        _with_the_examples, a=nn.Conv2d(3, 3, 3, 1, 1), b=nn.Conv2d(3, 3, (1, 3), 1, (0, 1)), head=nn.Linear(126, WAYS)
    )


def _means(net: Any, x: Tensor) -> Tensor:
    return net.head(F.silu(net.conv(x).mean((2, 3)) + net.flat(x.flatten(1))) + net.again(x).mean((2, 3)))


def means() -> nn.Module:
    """Sums of what a linear layer makes and of the means of images."""
    return Branches(
        _means, conv=nn.Conv2d(3, 7, 3), flat=nn.Linear(126, 7), again=nn.Conv2d(3, 7, 2), head=nn.Linear(7, WAYS)
    )


RESIDUAL: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "a shortcut": (shortcut, SIZE), "shortcuts with convolutions": (projected, SIZE),
    "norm and activation first": (wide, SIZE), "shortcuts of features": (of_features, (7,)),
    "a shortcut from the examples": (with_the_examples, SIZE), "means and features": (means, SIZE),
}  # fmt: skip


def _cases(check: Callable[..., None]) -> dict[str, Case]:
    def case(make: Callable[[], nn.Module], shape: tuple[int, ...] = SIZE, **options: Any) -> Case:
        return alone(lambda native: check(native, make, shape, **options))

    found = {
        "3x3 by tiles": case(
            lambda: network(
                nn.Conv2d(3, 6, 3, 1, 1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 10, 3, 1, 1), nn.BatchNorm2d(10),
                nn.ReLU(), nn.MaxPool2d(2), features=90,
            )
        ),
        "3x3 after zeros below the first row": case(after_zeros, row=0),
        "3x3 after zeros above the last row": case(after_zeros, row=5),
        "a few examples at once": case(
            lambda: network(
                nn.Conv2d(3, 8, 3, 1, 1), nn.GroupNorm(2, 8), nn.AvgPool2d(30), nn.Conv2d(8, 5, 2), features=5
            ),
            (3, 60, 60),
        ),
        "3x3 without a norm": case(
            lambda: network(
                nn.Conv2d(3, 6, 3, 1, 1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 5, 3, 1, 1), nn.ReLU(), features=45
            )
        ),
        "strides": case(
            lambda: network(
                nn.Conv2d(3, 6, (3, 2), (2, 1), (1, 1)), nn.GroupNorm(2, 6), nn.SiLU(), nn.Conv2d(6, 9, 4, 3, 2),
                nn.GroupNorm(9, 9), nn.Tanh(), nn.Conv2d(9, 4, 1, 2), nn.ELU(), features=8,
            )
        ),
        "average": case(
            lambda: network(
                nn.Conv2d(3, 6, 3), nn.AvgPool2d(2, 1, 1), nn.SiLU(), nn.Conv2d(6, 6, 2),
                nn.AvgPool2d(2, 2, 1, count_include_pad=False), nn.AdaptiveAvgPool2d(1), features=6,
            )
        ),
        "overlapping maximum": case(
            lambda: network(nn.Conv2d(3, 6, 3), nn.InstanceNorm2d(6), nn.MaxPool2d(3, 1, 1), features=120)
        ),
        "features": case(
            lambda: nn.Sequential(
                nn.Linear(19, 21), nn.LayerNorm(21), nn.GELU(), nn.Linear(21, 6, bias=False), nn.BatchNorm1d(6),
                nn.ReLU(), nn.Linear(6, WAYS),
            ),
            (19,),
        ),
        "wide features, a few examples at once": case(
            lambda: nn.Sequential(
                nn.Linear(40, 7000), nn.SiLU(), nn.Linear(7000, 9), nn.Tanh(), nn.Linear(9, WAYS)
            ),
            (40,),
        ),
        "dropouts": case(
            lambda: network(
                nn.Dropout2d(0.3), nn.Conv2d(3, 6, 3, 1, 1), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2),
                nn.Dropout(0.4), nn.Conv2d(6, 9, 3, 1, 1), nn.GroupNorm(3, 9), nn.Tanh(), nn.Dropout2d(0.5),
                nn.Flatten(), nn.Linear(81, 12), nn.SiLU(), nn.Dropout(0.2), features=12,
            )
        ),
        "dropouts, a few examples at once": case(
            lambda: network(
                nn.Conv2d(3, 8, 3, 1, 1), nn.SiLU(), nn.Dropout(0.3), nn.AvgPool2d(30), nn.Dropout2d(0.3),
                nn.Conv2d(8, 5, 2), features=5,
            ),
            (3, 60, 60),
        ),
        "squares": case(lambda: nn.Sequential(nn.Linear(5, 9), nn.Tanh(), nn.Linear(9, WAYS)), (5,), squares=True),
        "a norm first": case(
            lambda: network(nn.BatchNorm2d(3), nn.ReLU(), nn.BatchNorm2d(3), nn.Tanh(), features=126)
        ),
        "the head alone": case(
            lambda: network(nn.Conv2d(3, 6, 3), nn.ReLU(), features=120), wanted=lambda name: name.startswith("3.")
        ),
        "scales alone": case(
            lambda: network(nn.Conv2d(3, 6, 3), nn.GroupNorm(2, 6), nn.ReLU(), features=120),
            wanted=lambda name: name.startswith("1."),
        ),
    }  # fmt: skip
    for name, (make, shape) in RESIDUAL.items():
        found[name] = case(make, shape)
    found["a shortcut, the branch alone"] = case(shortcut, wanted=lambda name: name.startswith("inner.3"))
    found["shortcuts with convolutions, one alone"] = case(projected, wanted=lambda name: name.startswith("across"))
    for name, activation in ACTIVATIONS.items():
        found[name] = case(lambda kind=activation: nn.Sequential(nn.Linear(5, 9), kind, nn.Linear(9, WAYS)), (5,))
    return found


def _directions() -> dict[str, Case]:
    """Directions of which some parameters are no part."""

    def make() -> nn.Module:
        return network(
            nn.Conv2d(3, 6, 3, 1, 1), nn.GroupNorm(2, 6), nn.SiLU(), nn.Conv2d(6, 5, 3, 1, 1), nn.BatchNorm2d(5),
            nn.Tanh(), nn.Sigmoid(), features=5 * 42,
        )  # fmt: skip

    def moving(
        *parts: str, wanted: Callable[[str], bool] = lambda name: True, make: Callable[[], nn.Module] = make
    ) -> Case:
        return alone(
            lambda native: hessian(native, make, SIZE, wanted=wanted, moves=lambda name: name.startswith(parts))
        )

    return {
        "the head moves alone": moving("8."),
        "the second convolution moves alone": moving("3."),
        "norms move alone": moving("1.", "4."),
        "a bias moves alone": moving("0.bias"),
        "the first layer moves, the head is wanted": moving("0.", wanted=lambda name: name.startswith("8.")),
        "nothing moves": moving("none"),
        "a branch moves alone": moving("inner.3", make=shortcut),
        "another branch moves alone": moving("across", make=projected),
        "the last shortcut moves alone": moving("beside", make=projected),
    }


# Cases by group and name. Each can run alone.
GROUPS: dict[str, dict[str, Case]] = {
    "layers": _cases(passes), "layers, second order": _cases(hessian) | _directions(),
}  # fmt: skip
