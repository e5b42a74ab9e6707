"""Both learning rates of a training, changed online by their hypergradients: Alpha MAML.

A *hypergradient* is the derivative of a loss with respect to a rate. With alpha the inner and beta the outer rate, G_t
the mean meta-gradient of iteration t at theta_t, l_Qi the query loss of task i after its inner steps, and u_t the
direction of the outer step (for SGD G_t, for Adam m_hat / (sqrt(v_hat) + eps)):

    h_alpha = mean_i d l_Qi / d alpha                   `meta_step` leaves it in the `.grad` of an `inner_lr` tensor
    h_beta  = -s_{t-1} <G_t, u_{t-1}>                   d l / d beta of the step that led to theta_t; 0 at first
    alpha  <- alpha - a0 h_alpha
    beta   <- beta - b0 h_beta
    theta  <- theta - s_t beta u_t                      with the beta just found, and the next iteration's alpha

s_t is the factor of a schedule, 1 without one. Sources: Behl, Baydin, Torr, "Alpha MAML: Adaptive Model-Agnostic
Meta-Learning" (2019); Baydin et al., "Online Learning Rate Adaptation with Hypergradient Descent" (ICLR 2018), whose
order this is: rates first, then the step. The rate's gradient is exact for sign-maml and maml, whatever the number of
inner steps; with fo-maml it takes the steps as constants, as all of fo-maml does.

Nothing in the definition keeps a rate positive. Hence, in both rules, one iteration changes a rate by a factor in
[1/2, 2] and never lowers it below a millionth of where it started. While no limit is met, "alpha-maml" is exactly the
above. "multiplicative" descends on log(rate) instead, so that hyper-rates have no unit and suit rates of any size:

    rate   <- rate exp(-k rate h)
"""

from __future__ import annotations

import torch
from torch import Tensor

# Hyper-rates that are not given, k of the multiplicative rule. The other rule takes k rate_0^2, which begins alike.
INNER_K, OUTER_K = 0.1, 0.3
LARGEST_FACTOR, LEAST_SHARE = 2.0, 1e-6


class OnlineRates:
    """Changes the outer rate of an optimizer, and an inner rate, by their hypergradients; see the module.

    Call `update` between the meta-step and the optimizer's step. It neither waits for a device nor asks anything of
    the host, so a CUDA graph can hold it if the optimizer keeps its rate in a tensor there.

    Args:
        optimizer: `torch.optim.Adam` or `torch.optim.SGD` in its plain form: one group, no momentum with SGD, no weight
            decay. Its rate is where beta starts.
        inner: The tensor `[]` that `meta_step` gets as `inner_lr`, a leaf that requires grad, > 0. None: the inner
            rate is not this object's business.
        rule: "alpha-maml" or "multiplicative".
        inner_hyper_lr: a0 (rate^2 a unit of the loss), or k (1 a unit of the loss) of the multiplicative rule; >= 0.
            None: k = 0.1, and a0 = 0.1 alpha^2 with the alpha at the start.
        outer_hyper_lr: b0, or k, likewise; None: k = 0.3, and b0 = 0.3 beta^2. 0 leaves the optimizer's rate constant.

    Attributes:
        outer_lr: beta, float64 `[]` on the parameters' device.
        factor: The schedule's factor in the last step, likewise; 0 before the first.

    Raises:
        ValueError: The optimizer is of another form, the inner rate is not such a tensor, or there is no such rule.

    With Adam nothing is stored but two numbers, because Adam's moments give its last direction; with SGD a copy of the
    last gradient is. A parameter without a gradient has no part in the outer hypergradient.

    Example:
        >>> import signmaml, signmaml_ext
        >>> model, waves = signmaml.MLP(1, 1), signmaml.SinusoidSampler(shots=10, queries=10, tasks=25)
        >>> optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        >>> inner = torch.tensor(0.01, device="cpu", requires_grad=True)
        >>> rates, start = OnlineRates(optimizer, inner), inner.item()
        >>> for iteration in range(3):
        ...     optimizer.zero_grad()
        ...     batch = waves.draw(iteration)
        ...     result = signmaml_ext.meta_step(model, *batch, inner_lr=inner, inner_steps=2, loss="mse")
        ...     rates.update()
        ...     optimizer.step()
        >>> inner.item() == start, rates.outer_lr.item() == 1e-3
        (False, False)
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        inner: Tensor | None = None,
        *,
        rule: str = "alpha-maml",
        inner_hyper_lr: float | None = None,
        outer_hyper_lr: float | None = None,
    ) -> None:
        if rule not in ("alpha-maml", "multiplicative"):
            raise ValueError(f"rule: expected 'alpha-maml' or 'multiplicative', found {rule!r}")
        _check_plain(optimizer)
        if inner is not None and not (inner.ndim == 0 and inner.is_leaf and inner.requires_grad):
            found = f"shape {[*inner.shape]}, leaf: {inner.is_leaf}, requires_grad: {inner.requires_grad}"
            raise ValueError(f"inner: expected a leaf tensor [] that requires grad, found {found}")
        self._group = optimizer.param_groups[0]
        self._optimizer, self._rule, self.inner = optimizer, rule, inner
        parameters: list[Tensor] = self._group["params"]
        device = parameters[0].device
        start = float(self._group["lr"])
        self.outer_lr = torch.tensor(start, dtype=torch.float64, device=device)
        self.factor = torch.zeros((), dtype=torch.float64, device=device)
        self._outer_hyper_lr = self._hyper_lr("outer", outer_hyper_lr, OUTER_K, start)
        self._outer_least = LEAST_SHARE * start
        inner_start = 0.0 if inner is None else float(inner.detach())
        self._inner_hyper_lr = self._hyper_lr("inner", inner_hyper_lr, INNER_K, inner_start)
        self._inner_least = LEAST_SHARE * inner_start
        keeps = isinstance(optimizer, torch.optim.SGD) and self._outer_hyper_lr > 0
        self._last_gradients = [torch.zeros_like(p, requires_grad=False) for p in parameters] if keeps else []

    def _hyper_lr(self, which: str, given: float | None, k: float, start: float) -> float:
        if given is None:
            return k if self._rule == "multiplicative" else k * start**2
        if not 0 <= given < float("inf"):
            raise ValueError(f"{which}_hyper_lr: expected a number >= 0, found {given}")
        return given

    @torch.no_grad()
    def update(self, factor: float | Tensor = 1.0) -> None:
        """Changes both rates by the gradients of this iteration and sets the optimizer's rate to s_t beta.

        Uses up the inner rate's `.grad` and sets it to None; `optimizer.zero_grad()` would not reach it.

        Args:
            factor: s_t, a number or a tensor `[]` on the parameters' device.
        """
        if self._outer_hyper_lr > 0:
            moved = self._moved(self.outer_lr, self.outer_hypergradient(), self._outer_hyper_lr)
            self.outer_lr.copy_(moved.clamp(min=self._outer_least))
            for last, parameter in zip(self._last_gradients, self._group["params"], strict=False):
                last.zero_() if parameter.grad is None else last.copy_(parameter.grad)
        if self.inner is not None and self.inner.grad is not None:
            moved = self._moved(self.inner, self.inner.grad, self._inner_hyper_lr)
            self.inner.copy_(moved.clamp(min=self._inner_least))
            self.inner.grad = None
        if isinstance(factor, Tensor):
            self.factor.copy_(factor)
        else:
            self.factor.fill_(factor)
        lr = self._group["lr"]
        if isinstance(lr, Tensor):
            lr.copy_(self.outer_lr * self.factor)
        else:
            self._group["lr"] = float(self.outer_lr * self.factor)

    @torch.no_grad()
    def outer_hypergradient(self) -> Tensor:
        """h_beta, float64 `[]`, from the `.grad` of this iteration and the step before it."""
        total = torch.zeros_like(self.outer_lr)
        for index, parameter in enumerate(self._group["params"]):
            direction = self._last_direction(index, parameter)
            if parameter.grad is not None and direction is not None:
                total += (parameter.grad * direction).sum(dtype=torch.float64)
        return -self.factor * total

    def tensors(self) -> dict[str, Tensor]:
        """All that the next `update` depends on besides optimizer and inner rate, by name; for checkpoints."""
        last = {f"last_gradient.{index}": value for index, value in enumerate(self._last_gradients)}
        return {"outer_lr": self.outer_lr, "factor": self.factor, **last}

    def _last_direction(self, index: int, parameter: Tensor) -> Tensor | None:
        if self._last_gradients:
            return self._last_gradients[index]
        state = self._optimizer.state.get(parameter)
        if not state:
            return None
        step, eps = state["step"].double(), self._group["eps"]
        # Before the first step both moments and `step` may be 0: the limits turn 0/0 into 0, and change nothing else.
        first, second = ((1 - beta**step).clamp(min=(1 - beta) / 2) for beta in self._group["betas"])
        direction: Tensor = (state["exp_avg"] / first) / ((state["exp_avg_sq"] / second).sqrt() + eps)
        return direction

    def _moved(self, rate: Tensor, hypergradient: Tensor, hyper_lr: float) -> Tensor:
        if self._rule == "multiplicative":
            moved = rate * (-hyper_lr * rate * hypergradient).exp()
        else:
            moved = rate - hyper_lr * hypergradient
        return moved.clamp(rate / LARGEST_FACTOR, rate * LARGEST_FACTOR)  # a NaN stays one


def _check_plain(optimizer: torch.optim.Optimizer) -> None:
    """Raises ValueError unless the direction of a step is known: plain Adam or SGD with one group."""
    found = type(optimizer).__name__
    if type(optimizer) not in (torch.optim.Adam, torch.optim.SGD):
        raise ValueError(f"optimizer: expected torch.optim.Adam or torch.optim.SGD, found {found}")
    if len(optimizer.param_groups) != 1:
        raise ValueError(f"optimizer: expected one group of parameters, found {len(optimizer.param_groups)}")
    group = optimizer.param_groups[0]
    others = [name for name in ("momentum", "weight_decay", "amsgrad", "maximize") if group.get(name)]
    if others:
        raise ValueError(f"optimizer: expected {found} without {others[0]}, found {group[others[0]]!r}")
