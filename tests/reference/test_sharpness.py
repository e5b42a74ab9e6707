"""Sharpness-aware steps, equal to the published definition in float64: lower, upper and both."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

import signmaml_ext
from helpers.cases import nets
from signmaml_ext import Sharpness, adapt, evaluate, meta_step, perturbed

METHODS = ("sign-maml", "fo-maml", "maml")
KINDS = [Sharpness(0.1, norm, adaptive) for norm in ("l2", "linf") for adaptive in (False, True)]
kinds = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.norm + "-adaptive" * kind.adaptive)
methods = pytest.mark.parametrize("method", METHODS)


def eps_of(kind: Sharpness, values: list[Tensor], gradients: list[Tensor]) -> list[Tensor]:
    """One task's perturbation, from one long vector."""
    w, g = torch.cat([v.flatten() for v in values]), torch.cat([v.flatten() for v in gradients])
    scale = w.abs() if kind.adaptive else torch.ones_like(w)
    eps = kind.rho * scale
    if kind.norm == "linf":
        eps = eps * torch.sign(scale * g)
    else:
        eps = eps * scale * g / (((scale * g) ** 2).sum().sqrt() + 1e-12)
    parts = eps.split([v.numel() for v in values])
    return [part.view(v.shape) for part, v in zip(parts, values, strict=True)]


def plain(
    model: nn.Module,
    data: tuple[Tensor, ...],
    kind: Sharpness | None,
    *,
    method: str,
    inner_lr: float = 0.05,
    steps: int = 3,
    adapted: tuple[str, ...] | None = None,
) -> tuple[dict[str, Tensor], Tensor, dict[str, Tensor]]:
    """Mean meta-gradient, support losses `[K, T]` and adapted parameters, by whole-graph autograd on every task."""
    names = [name for name, _ in model.named_parameters() if adapted is None or name in adapted]
    means: dict[str, Tensor] = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    supports, moved = [], []
    for support_x, support_y, query_x, query_y in zip(*data, strict=True):
        theta = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
        phi, losses = dict(theta), []

        def gradients(at: dict[str, Tensor], x: Tensor, y: Tensor, of: list[str]) -> tuple[Tensor, list[Tensor]]:
            loss = F.cross_entropy(functional_call(model, at, (x,)), y)
            return loss, list(torch.autograd.grad(loss, [at[name] for name in of], create_graph=True))

        for _ in range(steps):
            loss, found = gradients(phi, support_x, support_y, names)
            losses.append(loss.detach())
            if kind is not None:
                eps = eps_of(kind, [phi[name] for name in names], found)
                if method != "maml":
                    eps = [value.detach() for value in eps]
                there = phi | {name: phi[name] + e for name, e in zip(names, eps, strict=True)}
                _, found = gradients(there, support_x, support_y, names)
            direction = [torch.sign(g) for g in found] if method == "sign-maml" else found
            if method == "fo-maml":
                direction = [d.detach() for d in direction]
            phi = phi | {name: phi[name] - inner_lr * d for name, d in zip(names, direction, strict=True)}
        loss = F.cross_entropy(functional_call(model, phi, (query_x,)), query_y)
        for (name, leaf), g in zip(theta.items(), torch.autograd.grad(loss, list(theta.values())), strict=True):
            means[name] = means[name] + g / len(data[0])
            assert leaf.grad is None
        supports.append(torch.stack(losses))
        moved.append({name: phi[name].detach() for name in names})
    return means, torch.stack(supports, 1), {name: torch.stack([m[name] for m in moved]) for name in names}


def grads(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def smooth() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return nets.mlp(activation=nn.Tanh).double(), nets.vector_tasks()


@methods
@kinds
@pytest.mark.parametrize("batching", ["together", "one-by-one"])
def test_lower_steps_are_those_of_the_definition(kind: Sharpness, method: str, batching: str) -> None:
    model, data = smooth()
    expected, support, _ = plain(model, data, kind, method=method)
    result = meta_step(
        model, *data, inner_lr=0.05, inner_steps=3, method=method, sharpness=kind, batching=batching, backend="torch"
    )
    torch.testing.assert_close(grads(model), expected, rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(result.support_loss, support, rtol=1e-12, atol=1e-13)
    without, _, _ = plain(model, data, None, method=method)
    assert any((without[name] - expected[name]).abs().max() > 1e-6 for name in expected)


@pytest.mark.parametrize("method", ["sign-maml", "fo-maml"])
@kinds
def test_every_backend_takes_the_same_steps(backend: str, kind: Sharpness, method: str) -> None:
    """Of a module that no whole-meta-step kernel serves."""
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Softplus(), nn.Linear(8, 3)).double()
    data = nets.vector_tasks()
    expected, _, moved = plain(model, data, kind, method=method)
    options: dict[str, Any] = {
        "inner_lr": 0.05, "inner_steps": 3, "method": method, "sharpness": kind, "backend": backend,
    }  # fmt: skip
    assert meta_step(model, *data, **options).backend == backend
    torch.testing.assert_close(grads(model), expected, rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(dict(adapt(model, *data[:2], **options)), moved, rtol=1e-11, atol=1e-13)


@methods
@kinds
def test_the_norm_is_over_what_adapts(kind: Sharpness, method: str) -> None:
    model, data = smooth()
    adapted = ("2.weight", "4.weight", "4.bias")
    expected, _, moved = plain(model, data, kind, method=method, adapted=adapted)
    options: dict[str, Any] = {
        "inner_lr": 0.05, "inner_steps": 3, "method": method, "sharpness": kind, "adapt": adapted,
    }  # fmt: skip
    meta_step(model, *data, **options)
    torch.testing.assert_close(grads(model), expected, rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(dict(adapt(model, *data[:2], **options)), moved, rtol=1e-11, atol=1e-13)


@kinds
def test_the_norm_is_each_tasks_own(backend: str, kind: Sharpness) -> None:
    model, data = smooth()
    together = adapt(model, *data[:2], inner_lr=0.05, inner_steps=2, sharpness=kind, backend=backend)
    for task in range(3):
        alone = adapt(
            model, *(d[task : task + 1] for d in data[:2]), inner_lr=0.05, inner_steps=2, sharpness=kind,
            backend=backend,
        )  # fmt: skip
        for name, value in alone.items():
            torch.testing.assert_close(together[name][task], value[0], rtol=1e-12, atol=1e-13)


@methods
def test_the_gradient_of_a_rate_is_a_difference_quotient(method: str) -> None:
    model, data = smooth()
    rate = torch.tensor([0.03, 0.05], dtype=torch.float64, requires_grad=True)
    options: dict[str, Any] = {"inner_steps": 2, "method": method, "sharpness": 0.1}
    meta_step(model, *data, inner_lr=rate, **options)

    def loss(step: int, shift: float) -> Tensor:
        shifted = rate.detach().clone()
        shifted[step] += shift
        return evaluate(model, *data, inner_lr=shifted, **options).query_loss.mean()

    # The last step's rate alone: first-order methods take the directions of other steps for constants.
    expected = (loss(1, 1e-6) - loss(1, -1e-6)) / 2e-6
    torch.testing.assert_close(rate.grad[1], expected, rtol=1e-6, atol=1e-9)


def test_maml_differentiates_through_the_perturbation() -> None:
    """Central differences of the whole meta-loss along a random direction."""
    model, data = smooth()
    options: dict[str, Any] = {"inner_lr": 0.1, "inner_steps": 2, "method": "maml", "sharpness": 0.2}
    meta_step(model, *data, **options)
    along = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    found = sum((p.grad * along[name]).sum() for name, p in model.named_parameters())

    def loss(shift: float) -> Tensor:
        moved = copy.deepcopy(model)
        with torch.no_grad():
            for name, p in moved.named_parameters():
                p += shift * along[name]
        return evaluate(moved, *data, **options).query_loss.mean()

    torch.testing.assert_close(found, (loss(1e-5) - loss(-1e-5)) / 2e-5, rtol=1e-6, atol=1e-9)


def test_int8_task_state_counts_the_signs_of_the_perturbed_gradient(backend: str) -> None:
    model, data = smooth()
    options: dict[str, Any] = {"inner_lr": 0.05, "inner_steps": 4, "sharpness": 0.3, "backend": backend}
    full = adapt(model, *data[:2], **options)
    counted = adapt(model, *data[:2], **options, task_state="int8")
    for name, value in full.items():
        torch.testing.assert_close(counted[name], value, rtol=1e-11, atol=1e-12)


@methods
def test_a_radius_of_zero_is_no_perturbation(method: str) -> None:
    model, data = smooth()
    meta_step(model, *data, inner_lr=0.05, inner_steps=2, method=method)
    expected = {name: g.clone() for name, g in grads(model).items()}
    for none in (0, 0.0, Sharpness(0.0, "linf")):
        model.zero_grad()
        meta_step(model, *data, inner_lr=0.05, inner_steps=2, method=method, sharpness=none)
        assert all(torch.equal(g, expected[name]) for name, g in grads(model).items())


@methods
@kinds
def test_a_gradient_of_zero_moves_nothing(kind: Sharpness, method: str) -> None:
    """An l2 norm of 0 would divide 0 by 0."""
    model = nn.Linear(4, 3).double()
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    x, y = torch.zeros(2, 3, 4, dtype=torch.float64), torch.arange(3).expand(2, -1)
    result = meta_step(model, x, y, x, y, inner_lr=0.1, inner_steps=2, method=method, sharpness=kind)
    assert not result.nonfinite.any()
    torch.testing.assert_close(result.query_loss, torch.full((2,), math.log(3.0), dtype=torch.float64))
    assert all(g.isfinite().all() for g in grads(model).values())


@kinds
def test_a_non_finite_first_gradient_flags_its_task(backend: str, kind: Sharpness) -> None:
    """The sign of an infinite gradient is finite, so nothing later would show it."""

    class Root(nn.Module):
        """At 0 its gradient is infinite, and with signs the perturbed place has a finite one again."""

        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.zeros(1, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.w.sqrt()

    x = torch.ones(2, 1, 1, dtype=torch.float64)
    options: dict[str, Any] = {"inner_lr": 0.0, "inner_steps": 1, "loss": "mse", "backend": backend}
    assert evaluate(Root(), x, -x, x, -x, sharpness=kind, **options).nonfinite.tolist() == [True, True]


def test_both_passes_of_a_step_drop_the_same_units() -> None:
    """The gradient at the perturbed place is that of the same function."""
    model = nn.Sequential(nn.Linear(4, 3, bias=False), nn.Dropout(0.5)).double()
    seen: list[Tensor] = []
    model[1].register_forward_hook(lambda module, args, out: seen.append((out == 0).detach()))
    data = nets.vector_tasks(tasks=2)
    adapt(model, *data[:2], inner_lr=0.1, inner_steps=2, sharpness=0.1, seed=3)
    seen = seen[-8:]  # 2 tasks, 2 steps, 2 passes; a first try found out that the model draws
    for first, second in zip(seen[::2], seen[1::2], strict=True):
        assert torch.equal(first, second)
    assert not torch.equal(seen[0], seen[2])


# ---- the upper step


@methods
@kinds
@pytest.mark.parametrize("lower", [None, Sharpness(0.05)], ids=["up", "both"])
def test_the_upper_step_is_that_of_the_definition(kind: Sharpness, method: str, lower: Sharpness | None) -> None:
    model, data = smooth()
    options: dict[str, Any] = {"inner_lr": 0.05, "inner_steps": 2, "method": method, "sharpness": lower}
    before = copy.deepcopy(model.state_dict())
    meta_step(model, *data, **options)
    with perturbed(model.parameters(), kind):
        meta_step(model, *data, **options)

    reference = copy.deepcopy(model)
    first, _, _ = plain(reference, data, lower, method=method, steps=2)
    with torch.no_grad():
        parameters = dict(reference.named_parameters())
        eps = eps_of(kind, list(parameters.values()), [first[name] for name in parameters])
        for p, e in zip(parameters.values(), eps, strict=True):
            p += e
    expected, _, _ = plain(reference, data, lower, method=method, steps=2)
    torch.testing.assert_close(grads(model), expected, rtol=1e-10, atol=1e-13)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_an_error_inside_leaves_everything_as_before() -> None:
    model, data = smooth()
    meta_step(model, *data, inner_lr=0.05, inner_steps=1)
    before = {name: (p.detach().clone(), p.grad) for name, p in model.named_parameters()}
    with pytest.raises(KeyError), perturbed(model.parameters(), 0.1):
        raise KeyError
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name][0]) and p.grad is before[name][1]


def test_parameters_without_a_gradient_stay_and_tied_ones_move_once() -> None:
    one, other = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))
    one.grad = torch.tensor([3.0, 4.0])
    with perturbed([one, one, other], 1.0):
        torch.testing.assert_close(one.detach(), torch.tensor([1.6, 1.8]))
        assert torch.equal(other, torch.ones(3)) and one.grad is None
    assert torch.equal(one, torch.ones(2))


# ---- refusals


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (-0.1, ValueError, r"sharpness: expected a finite radius >= 0, a Sharpness or None, found -0\.1"),
        (math.nan, ValueError, r"sharpness: expected a finite radius >= 0, a Sharpness or None, found nan"),
        ("l2", TypeError, r"sharpness: expected a radius >= 0, a Sharpness or None, found str 'l2'"),
        (True, TypeError, r"sharpness: expected a radius >= 0, a Sharpness or None, found bool True"),
    ],
)
def test_what_is_no_radius_is_refused(given: Any, error: type[Exception], message: str) -> None:
    model, data = smooth()
    with pytest.raises(error, match=message):
        meta_step(model, *data, inner_lr=0.1, inner_steps=1, sharpness=given)
    assert not grads(model)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"rho": -1.0}, ValueError, "rho: expected a finite number >= 0, found -1.0"),
        ({"rho": math.inf}, ValueError, "rho: expected a finite number >= 0, found inf"),
        ({"rho": "0.1"}, TypeError, "rho: expected a number >= 0, found str '0.1'"),
        ({"rho": 0.1, "norm": "l1"}, ValueError, "norm: expected one of 'l2', 'linf', found 'l1'"),
        ({"rho": 0.1, "adaptive": 1}, TypeError, "adaptive: expected True or False, found int 1"),
    ],
)
def test_what_is_no_sharpness_is_refused(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Sharpness(**arguments)


def test_the_upper_step_refuses_what_are_no_parameters() -> None:
    wrong: Any = [nn.Linear(2, 2)]
    with pytest.raises(TypeError, match="parameters: expected tensors, found Linear"), perturbed(wrong, 0.1):
        pass
    parameters = nn.Linear(2, 2).parameters()
    with pytest.raises(ValueError, match="rho: expected a finite number >= 0, found -1"), perturbed(parameters, -1):
        pass


def test_explain_says_who_serves_it() -> None:
    model = nets.mlp()
    assert signmaml_ext.explain(model, sharpness=0.1).family == "mlp"
    assert signmaml_ext.explain(model, method="maml", sharpness=0.1).family == "layers"
    found = signmaml_ext.explain(nets.Tied(), method="maml", sharpness=0.1)
    assert found.backend == "torch" and "differentiates through them" in found.families["cpu"]["flat"]
