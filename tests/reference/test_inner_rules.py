"""Inner rules: momentum, Lion, Adam and weight decay, equal to their published definitions in float64."""

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
from helpers.cases import nets, rules
from signmaml_ext import (
    Adam,
    InnerRule,
    Lion,
    Momentum,
    Plain,
    Sharpness,
    Signum,
    adapt,
    evaluate,
    meta_step,
)
from signmaml_ext import (
    batching as batching_rules,
)

SIGN, FIRST, EXACT = "sign-maml", "fo-maml", "maml"
# Every rule with every method that it serves, the vector that it steps along, and both with and without decay.
VECTORS: dict[InnerRule, rules.Vector] = {
    Plain(0.7): rules.plain(),
    Signum(0.8): rules.signum(0.8),
    Signum(0.6, weight_decay=0.7): rules.signum(0.6),
    Lion(0.8, 0.6): rules.lion(0.8, 0.6),
    Lion(0.5, 0.9, weight_decay=0.7): rules.lion(0.5, 0.9),
    Momentum(0.8): rules.momentum(0.8),
    Momentum(0.7, nesterov=True): rules.momentum(0.7, nesterov=True),
    Momentum(0.7, nesterov=True, weight_decay=0.7): rules.momentum(0.7, nesterov=True),
    Adam(0.8, 0.9, 1e-4): rules.adam(0.8, 0.9, 1e-4),
    Adam(0.6, 0.7, 1e-3, weight_decay=0.7): rules.adam(0.6, 0.7, 1e-3),
}
CASES = [(method, rule) for rule in VECTORS for method in (SIGN, FIRST, EXACT) if method in rule.methods]
cases = pytest.mark.parametrize(("method", "rule"), CASES, ids=lambda value: str(value))
SOME = [(SIGN, Signum(0.6, weight_decay=0.7)), (FIRST, Momentum(0.8)), (EXACT, Adam(0.6, 0.7, 1e-3, weight_decay=0.7))]
some = pytest.mark.parametrize(("method", "rule"), SOME, ids=lambda value: str(value))
LR, STEPS = 0.05, 3


def expected_of(
    model: nn.Module,
    data: tuple[Tensor, ...],
    rule: InnerRule,
    method: str,
    *,
    rates: Any = LR,
    steps: int = STEPS,
    adapted: tuple[str, ...] | None = None,
    sharpness: float = 0.0,
) -> tuple[dict[str, Tensor], Any, dict[str, Tensor]]:
    """Mean meta-gradient, the same of the rates, and adapted parameters: the definition, one task after another.

    One autograd graph for all steps. `rates` is a number, a tensor `[K]`, or a dict of tensors `[K, ...]`.
    """
    vector, names = VECTORS[rule], [name for name, _ in model.named_parameters() if adapted is None or name in adapted]
    learnable = list(rates.values()) if isinstance(rates, dict) else [rates] if isinstance(rates, Tensor) else []
    means = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    of_rates, moved = [torch.zeros_like(rate) for rate in learnable], []
    for support_x, support_y, query_x, query_y in zip(*data, strict=True):
        theta = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
        phi, seen = dict(theta), {name: [] for name in names}

        def gradients(at: dict[str, Tensor], x: Tensor, y: Tensor) -> dict[str, Tensor]:
            loss = F.cross_entropy(functional_call(model, at, (x,)), y)
            return dict(zip(names, torch.autograd.grad(loss, [at[n] for n in names], create_graph=True), strict=True))

        for step in range(steps):
            found = gradients(phi, support_x, support_y)
            if sharpness:
                norm = torch.cat([g.flatten() for g in found.values()]).norm() + 1e-12
                eps = {name: sharpness * g / norm for name, g in found.items()}
                eps = eps if method == EXACT else {name: e.detach() for name, e in eps.items()}
                found = gradients(phi | {name: phi[name] + eps[name] for name in names}, support_x, support_y)
            for name, gradient in found.items():
                seen[name].append(gradient if method == EXACT else gradient.detach())
                step_along = vector(seen[name])
                if method == SIGN:
                    step_along = step_along.sign()
                rate = rates[name][step] if isinstance(rates, dict) else rates
                rate = rate[step] if isinstance(rates, Tensor) else rate
                phi[name] = (1 - rate * rule.weight_decay) * phi[name] - rate * step_along
        loss = F.cross_entropy(functional_call(model, phi, (query_x,)), query_y)
        leaves = [*theta.values(), *learnable]
        found_all = torch.autograd.grad(loss / len(data[0]), leaves, materialize_grads=True)
        for total, gradient in zip([*means.values(), *of_rates], found_all, strict=True):
            total += gradient
        moved.append({name: phi[name].detach() for name in names})
    of_names = dict(zip(rates, of_rates, strict=True)) if isinstance(rates, dict) else (of_rates or [None])[0]
    return means, of_names, {name: torch.stack([one[name] for one in moved]) for name in names}


def smooth(tasks: int = 3) -> tuple[nn.Module, tuple[Tensor, ...]]:
    return nets.mlp(activation=nn.Tanh).double(), nets.vector_tasks(tasks)


def close(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


# ---- the definition


@cases
@pytest.mark.parametrize(("backend", "batching"), [("torch", "together"), ("torch", "one-by-one"), ("cpu", "auto")])
def test_steps_are_those_of_the_definition(method: str, rule: InnerRule, backend: str, batching: str) -> None:
    model, data = smooth()
    for steps in (0, 1, STEPS):
        expected, _, moved = expected_of(model, data, rule, method, steps=steps)
        options: dict[str, Any] = {"inner_lr": LR, "inner_steps": steps, "method": method, "inner_rule": rule}
        options |= {"backend": backend, "batching": batching}
        assert meta_step(model, *data, **options).backend == backend
        close(nets.grads(model), expected)
        close(dict(adapt(model, *data[:2], **options)), moved)


@cases
def test_some_parameters_adapt(method: str, rule: InnerRule) -> None:
    model, data = smooth()
    adapted = ("2.weight", "4.bias")
    expected, _, moved = expected_of(model, data, rule, method, adapted=adapted)
    options: dict[str, Any] = {"inner_lr": LR, "inner_steps": STEPS, "method": method, "inner_rule": rule}
    meta_step(model, *data, **options, adapt=adapted)
    close(nets.grads(model), expected)
    close(dict(adapt(model, *data[:2], **options, adapt=adapted)), moved)


@cases
def test_the_rule_gets_the_gradient_at_the_sharpest_place(method: str, rule: InnerRule) -> None:
    model, data = smooth()
    expected, _, moved = expected_of(model, data, rule, method, sharpness=0.1)
    options: dict[str, Any] = {"inner_lr": LR, "inner_steps": STEPS, "method": method, "inner_rule": rule}
    meta_step(model, *data, **options, sharpness=Sharpness(0.1))
    close(nets.grads(model), expected)
    close(dict(adapt(model, *data[:2], **options, sharpness=0.1)), moved)


RATE_SHAPES = {
    "step": lambda shape: (),
    "tensor and step": lambda shape: [1] * len(shape),
    "element and step": lambda shape: shape,
}


@cases
@pytest.mark.parametrize("kind", RATE_SHAPES)
def test_gradients_of_rates(method: str, rule: InnerRule, kind: str) -> None:
    """The rate scales the step and the decay, and both count."""
    model, data = smooth()
    if kind == "step":
        rates: Any = torch.tensor([0.03, 0.06, 0.05], dtype=torch.float64, requires_grad=True)
    else:
        named = dict(model.named_parameters())
        shapes = {name: (STEPS, *RATE_SHAPES[kind](p.shape)) for name, p in named.items()}
        rates = {n: (0.03 + 0.03 * torch.rand(s, dtype=torch.float64)).requires_grad_() for n, s in shapes.items()}
    expected, of_rates, _ = expected_of(model, data, rule, method, rates=rates)
    meta_step(model, *data, inner_lr=rates, inner_steps=STEPS, method=method, inner_rule=rule)
    close(nets.grads(model), expected)
    close({n: r.grad for n, r in rates.items()} if isinstance(rates, dict) else rates.grad, of_rates)


@some
@pytest.mark.parametrize("batching", ["together", "one-by-one"])
def test_rates_without_an_axis_of_steps(method: str, rule: InnerRule, batching: str) -> None:
    model, data = smooth()
    once = {n: (0.03 + 0.03 * torch.rand_like(p)).detach() for n, p in model.named_parameters()}
    each = {name: rate.expand(STEPS, *rate.shape).clone().requires_grad_() for name, rate in once.items()}
    expected, of_rates, moved = expected_of(model, data, rule, method, rates=each)
    learnable = {name: rate.requires_grad_() for name, rate in once.items()}
    options: dict[str, Any] = {"inner_lr": learnable, "inner_steps": STEPS, "method": method, "inner_rule": rule}
    meta_step(model, *data, **options, batching=batching)
    close(nets.grads(model), expected)
    close({name: rate.grad for name, rate in learnable.items()}, {name: g.sum(0) for name, g in of_rates.items()})
    close(dict(adapt(model, *data[:2], **options, batching=batching)), moved)


# ---- exact meta-gradients


@pytest.mark.parametrize(("method", "rule"), [case for case in CASES if case[0] != FIRST], ids=lambda value: str(value))
def test_the_meta_gradient_is_a_difference_quotient(method: str, rule: InnerRule) -> None:
    """Of theta and of the rates at once, along a random direction; no gradient here is close to a change of sign."""
    model, data = smooth()
    rate = torch.tensor([0.03, 0.05, 0.04], dtype=torch.float64, requires_grad=True)
    options: dict[str, Any] = {"inner_steps": 3, "method": method, "inner_rule": rule}
    meta_step(model, *data, inner_lr=rate, **options)
    along = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    along_rate = torch.randn_like(rate)
    found = sum((p.grad * along[name]).sum() for name, p in model.named_parameters()) + (rate.grad * along_rate).sum()

    def loss(shift: float) -> Tensor:
        moved = copy.deepcopy(model)
        with torch.no_grad():
            for name, p in moved.named_parameters():
                p += shift * along[name]
        return evaluate(moved, *data, inner_lr=rate.detach() + shift * along_rate, **options).query_loss.mean()

    torch.testing.assert_close(found, (loss(1e-6) - loss(-1e-6)) / 2e-6, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("rule", [Plain(0.7), Signum(weight_decay=0.7), Lion(weight_decay=0.7)], ids=str)
def test_sign_steps_scale_the_query_gradient_by_the_decay(rule: InnerRule) -> None:
    """d phi_K / d theta = prod_k (1 - alpha_k lambda) for what adapts, and 1 for what does not."""
    model, data = smooth(tasks=1)
    rates = torch.tensor([0.03, 0.05, 0.04], dtype=torch.float64)
    options: dict[str, Any] = {"inner_lr": rates, "inner_steps": 3, "adapt": ["2.*", "4.*"], "inner_rule": rule}
    meta_step(model, *data, **options)
    found = nets.grads(model)
    adapted = adapt(model, *data[:2], **options)
    at = {n: adapted[n][0].requires_grad_() if n in adapted else p for n, p in model.named_parameters()}
    loss = F.cross_entropy(functional_call(model, at, (data[2][0],)), data[3][0])
    of_query = dict(zip(at, torch.autograd.grad(loss, list(at.values())), strict=True))
    factor = float((1 - 0.7 * rates).prod())
    close(found, {name: g * factor if name in adapted else g for name, g in of_query.items()})


# ---- torch.optim


OPTIMIZERS = {
    "SGD": (Momentum(0.9), lambda p: torch.optim.SGD(p, LR, momentum=0.9)),
    "SGD, nesterov": (Momentum(0.6, nesterov=True), lambda p: torch.optim.SGD(p, LR, momentum=0.6, nesterov=True)),
    "Adam": (Adam(), lambda p: torch.optim.Adam(p, LR)),
    "AdamW": (
        Adam(0.8, 0.95, 1e-6, weight_decay=0.3),
        lambda p: torch.optim.AdamW(p, LR, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.3),
    ),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("method", [FIRST, EXACT])
def test_steps_are_those_of_torchs_optimizer(name: str, method: str) -> None:
    rule, make = OPTIMIZERS[name]
    model, (x, y, *_) = nets.mlp().double(), nets.vector_tasks()
    for steps in (1, 2, 5):
        adapted = adapt(model, x, y, inner_lr=LR, inner_steps=steps, method=method, inner_rule=rule)
        for task in range(3):
            learner = copy.deepcopy(model)
            optimizer = make(learner.parameters())
            for _ in range(steps):
                optimizer.zero_grad()
                F.cross_entropy(learner(x[task]), y[task]).backward()
                optimizer.step()
            close({n: value[task] for n, value in adapted.items()}, {n: p.data for n, p in learner.named_parameters()})


# ---- gradients of 0, and none


@pytest.mark.parametrize("batching", ["together", "one-by-one"])
@cases
def test_units_that_never_fire(method: str, rule: InnerRule, batching: str) -> None:
    """Their gradient is exactly 0: no step but the decay, and no NaN out of Adam's root."""
    model, data = nets.mlp().double(), nets.vector_tasks()
    with torch.no_grad():
        model[0].bias[:4] = -100.0
    options: dict[str, Any] = {
        "inner_lr": LR, "inner_steps": STEPS, "method": method, "inner_rule": rule, "batching": batching,
    }  # fmt: skip
    result = meta_step(model, *data, **options)
    assert not result.nonfinite.any()
    grads = nets.grads(model)
    assert all(g.isfinite().all() for g in grads.values())
    assert not grads["0.weight"][:4].any() and grads["0.weight"][4:].any()
    kept = (1 - LR * rule.weight_decay) ** STEPS
    close(adapt(model, *data[:2], **options)["0.weight"][1, :4], model[0].weight.detach()[:4] * kept)


@pytest.mark.parametrize("batching", ["together", "one-by-one"])
@some
def test_what_the_loss_does_not_reach_stays(method: str, rule: InnerRule, batching: str) -> None:
    """Without a gradient there is neither a step nor a decay, as in torch.optim."""
    model, data = nets.WithUnused().double(), nets.vector_tasks()
    options: dict[str, Any] = {
        "inner_lr": LR, "inner_steps": STEPS, "method": method, "inner_rule": rule, "batching": batching,
    }  # fmt: skip
    meta_step(model, *data, **options)
    assert model.unused.weight.grad is None
    moved = adapt(model, *data[:2], **options)
    assert torch.equal(moved["unused.weight"], model.unused.weight.detach().expand(3, -1, -1))
    assert not torch.equal(moved["used.weight"], model.used.weight.detach().expand(3, -1, -1))


@some
@pytest.mark.parametrize("batching", ["together", "one-by-one"])
def test_a_bias_before_batch_norm_decays(method: str, rule: InnerRule, batching: str) -> None:
    """Its gradient is exactly 0, not missing."""
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)).double()
    data = nets.vector_tasks()
    options: dict[str, Any] = {
        "inner_lr": LR, "inner_steps": STEPS, "method": method, "inner_rule": rule, "batching": batching,
    }  # fmt: skip
    meta_step(model, *data, **options)
    assert not model[0].bias.grad.any() and model[0].weight.grad.isfinite().all()
    kept = (1 - LR * rule.weight_decay) ** STEPS
    close(adapt(model, *data[:2], **options)["0.bias"], kept * model[0].bias.detach().expand(3, -1))


def test_adams_derivative_at_gradients_of_zero() -> None:
    """There a small gradient moves the step by itself / eps, so the derivative exists.

    The support loss is s * w, whose gradient s is 0 at theta, and the query loss is 2 w (1 + s).
    """

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.tensor([0.3], dtype=torch.float64))
            self.s = nn.Parameter(torch.zeros(1, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.w * (1 + self.s) if x.sum() > 1 else x * self.s * self.w

    model, one = Scaled(), torch.ones(1, 1, 1, dtype=torch.float64)
    eps, alpha = 0.1, 0.5
    options: dict[str, Any] = {
        "inner_lr": alpha, "inner_steps": 2, "method": EXACT, "inner_rule": Adam(0.9, 0.99, eps), "adapt": ["w"],
        "loss": lambda prediction: prediction.sum(), "batching": "one-by-one",
    }  # fmt: skip
    result = meta_step(model, one, None, 2 * one, None, **options)
    assert not result.nonfinite.any()
    # phi = w - 2 alpha * s / eps to first order in s.
    close(model.w.grad, torch.tensor([2.0], dtype=torch.float64))
    close(model.s.grad, torch.tensor([2 * (0.3 - 2 * alpha / eps)], dtype=torch.float64))


def test_adams_root_has_no_slope_where_squares_underflow() -> None:
    """The gradient is 1e-30, whose square is 0 in float32."""
    model, x = nn.Linear(1, 1, bias=False), torch.full((1, 1, 1), 1e-30)
    options: dict[str, Any] = {"inner_lr": 0.1, "inner_steps": 2, "method": EXACT, "inner_rule": Adam()}
    meta_step(model, x, None, torch.ones(1, 1, 1), None, loss=lambda prediction: prediction.sum(), **options)
    torch.testing.assert_close(model.weight.grad, torch.ones(1, 1))


@some
def test_a_nan_stays_in_its_task(method: str, rule: InnerRule) -> None:
    model, data = smooth()
    options: dict[str, Any] = {"inner_lr": LR, "inner_steps": STEPS, "method": method, "inner_rule": rule}
    meta_step(model, *(value[[0, 2]] for value in data), **options)
    expected = nets.grads(model)
    data[0][1, 0, 0] = torch.nan
    result = meta_step(model, *data, **options, nonfinite="skip")
    assert result.nonfinite.tolist() == [False, True, False]
    close(nets.grads(model), expected)
    assert adapt(model, *data[:2], **options)["0.weight"][1].isnan().all()


# ---- int8


@pytest.mark.parametrize("rule", [Signum(0.8), Lion(0.8, 0.6)], ids=str)
@pytest.mark.parametrize("batching", ["together", "one-by-one"])
@pytest.mark.parametrize("sharpness", [None, 0.1])
def test_int8_task_state_counts_the_steps(rule: InnerRule, batching: str, sharpness: float | None) -> None:
    model, data = smooth()
    rate = torch.tensor(LR, dtype=torch.float64, requires_grad=True)
    options: dict[str, Any] = {
        "inner_lr": rate, "inner_steps": 4, "inner_rule": rule, "batching": batching, "sharpness": sharpness,
    }  # fmt: skip
    meta_step(model, *data, **options)
    expected, rate.grad = {**nets.grads(model), "rate": rate.grad}, None
    meta_step(model, *data, **options, task_state="int8")
    close({**nets.grads(model), "rate": rate.grad}, expected)
    close(dict(adapt(model, *data[:2], **options, task_state="int8")), dict(adapt(model, *data[:2], **options)))


# ---- what stays as it was


@pytest.mark.parametrize("method", [SIGN, FIRST, EXACT])
@pytest.mark.parametrize("make", [nets.mlp, nets.Tied])
def test_a_rule_that_changes_nothing_is_no_rule(method: str, make: Any, backend: str) -> None:
    """`Plain()` leaves the kernels in place, bit for bit."""
    if method == EXACT and backend != "torch" and make is nets.Tied:
        pytest.skip("no kernel serves it")
    model, data = make().double(), nets.vector_tasks()
    options: dict[str, Any] = {"inner_lr": LR, "inner_steps": STEPS, "method": method, "backend": backend}
    meta_step(model, *data, **options)
    expected = nets.grads(model)
    assert meta_step(model, *data, **options, inner_rule=Plain()).backend == backend
    assert all(torch.equal(g, expected[name]) for name, g in nets.grads(model).items())


@some
def test_calls_are_repeatable_and_start_from_an_empty_memory(method: str, rule: InnerRule) -> None:
    model, data = smooth()
    options: dict[str, Any] = {"inner_lr": LR, "inner_steps": STEPS, "method": method, "inner_rule": rule}
    before = copy.deepcopy(model.state_dict())
    first, second = (adapt(model, *data[:2], **options) for _ in range(2))
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_tasks_on_threads_keep_to_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = nets.mlp().double(), nets.vector_tasks(tasks=5)
    options: dict[str, Any] = {
        "inner_lr": LR, "inner_steps": STEPS, "inner_rule": Signum(weight_decay=0.1), "batching": "one-by-one",
    }  # fmt: skip
    meta_step(model, *data, **options)
    expected = nets.grads(model)
    monkeypatch.setattr(batching_rules, "LONG", 0.0)
    torch.set_num_threads(2)
    try:
        meta_step(model, *data, **options)
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(g, expected[name]) for name, g in nets.grads(model).items())


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("method", [SIGN, FIRST])
def test_what_one_task_writes_does_not_decay_in_another(method: str) -> None:
    """A forward with max_norm shortens the rows that its task uses, and only those."""
    model = nn.Sequential(nn.Embedding(6, 4, max_norm=0.5), nn.Flatten(), nn.Linear(8, 3)).double()
    tokens, labels = torch.arange(6).reshape(3, 1, 2), torch.zeros(3, 1, dtype=torch.int64)
    options: dict[str, Any] = {"inner_lr": LR, "inner_steps": 1, "method": method, "inner_rule": Plain(0.7)}
    together, one_by_one = (
        adapt(model, tokens, labels, **options, batching=batching) for batching in ("together", "one-by-one")
    )
    close(dict(together), dict(one_by_one))
    unused = model[0].weight.detach()[2:]
    close(together["0.weight"][0, 2:], (1 - 0.7 * LR) * unused)


# ---- refusals, explain


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"inner_rule": "signum"}, TypeError, r"inner_rule: expected None or a rule .*, found str 'signum'"),
        ({"inner_rule": Signum}, TypeError, r"inner_rule: expected None or a rule .*, found the class Signum itself"),
        ({"inner_rule": torch.optim.Adam}, TypeError, r"inner_rule: expected .*, found the class Adam itself"),
        (
            {"inner_rule": Signum(), "method": "maml"},
            ValueError,
            r"inner_rule: expected one of Plain, Momentum, Adam for method 'maml', found Signum\(momentum=0.9",
        ),
        (
            {"inner_rule": Lion(), "method": "fo-maml"},
            ValueError,
            r"inner_rule: expected one of Plain, Momentum, Adam for method 'fo-maml', found Lion\(",
        ),
        (
            {"inner_rule": Adam()},
            ValueError,
            r"inner_rule: expected one of Plain, Signum, Lion for method 'sign-maml', found Adam\(",
        ),
        (
            {"inner_rule": Signum(weight_decay=0.1), "task_state": "int8"},
            ValueError,
            r"task_state: expected 'full' with Signum\(.*counts hold no weight decay.*found 'int8'",
        ),
        (
            {"inner_rule": Signum(), "task_state": "int8", "inner_lr": torch.tensor([0.1, 0.2])},
            ValueError,
            r"inner_lr: expected one rate for all steps with task_state 'int8'",
        ),
        ({"inner_rule": Signum(), "compile": True}, ValueError, r"compile: expected False with Signum\("),
        (
            {"inner_rule": Signum(), "backend": "cpu", "model": nn.Sequential(nn.Linear(4, 3), nn.Softplus())},
            ValueError,
            r"backend: expected one that serves this call, found 'cpu': .*flat: its steps are plain, and inner_rule is",
        ),
        (
            {"inner_rule": Adam(eps=1e-40), "method": "maml", "model": nets.mlp()},
            ValueError,
            r"inner_rule: expected eps within the range of torch.float32, like the parameters, found Adam\(",
        ),
    ],
)
def test_what_does_not_fit_is_refused_before_any_work(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    seen: list[int] = []
    options = dict(options)
    model = options.pop("model", nets.mlp().double())
    data = nets.vector_tasks(dtype=model[0].weight.dtype)
    model[0].register_forward_hook(lambda *_: seen.append(1))
    options = {"inner_lr": 0.1, "inner_steps": 2, **options}
    for call, tensors in ((meta_step, data), (evaluate, data), (adapt, data[:2]), (signmaml_ext.explain, data)):
        with pytest.raises(error, match=message):
            call(model, *tensors, **options)
    assert model[0].weight.grad is None and not seen


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Plain(-1.0), ValueError, "weight_decay: expected a finite number >= 0, found -1.0"),
        (lambda: Plain(math.inf), ValueError, "weight_decay: expected a finite number >= 0, found inf"),
        (lambda: Plain("0.1"), TypeError, "weight_decay: expected a finite number >= 0, found str '0.1'"),
        (lambda: Signum(1.0), ValueError, r"momentum: expected a number in \[0, 1\), found 1.0"),
        (lambda: Signum(True), TypeError, r"momentum: expected a number in \[0, 1\), found bool True"),
        (lambda: Lion(beta1=-0.1), ValueError, r"beta1: expected a number in \[0, 1\), found -0.1"),
        (lambda: Lion(beta2=math.nan), ValueError, r"beta2: expected a number in \[0, 1\), found nan"),
        (lambda: Momentum(1.5), ValueError, r"momentum: expected a number in \[0, 1\), found 1.5"),
        (lambda: Momentum(nesterov=1), TypeError, "nesterov: expected True or False, found int 1"),
        (lambda: Adam(beta2=1), ValueError, r"beta2: expected a number in \[0, 1\), found 1"),
        (lambda: Adam(eps=0.0), ValueError, "eps: expected a finite number > 0, found 0.0"),
        (lambda: Adam(eps=-1e-8), ValueError, "eps: expected a finite number > 0, found -1e-08"),
    ],
)
def test_what_is_no_rule_is_refused(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("model", "family", "instead"),
    [
        (nets.mlp, "mlp", ("cpu", "layers")), (lambda: nets.conv4(filters=8), "conv", ("cpu", "layers")),
        (nets.Tied, "flat", ("torch", "reference")),
    ],
)  # fmt: skip
def test_explain_says_why_no_kernel_takes_its_steps(model: Any, family: str, instead: tuple[str, str]) -> None:
    found = signmaml_ext.explain(model(), inner_rule=Signum())
    assert (found.backend, found.family) == instead
    assert found.families["cpu"][family] == f"its steps are plain, and inner_rule is {Signum()}"
    assert signmaml_ext.explain(model()).family == family
