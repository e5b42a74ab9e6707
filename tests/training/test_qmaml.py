"""examples/qmaml.py: its simulator against dense matrices, its meta-gradient against plain autograd, its training."""

from __future__ import annotations

import functools
import importlib.util
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from signmaml_ext import evaluate, meta_step

FILE = Path(__file__).resolve().parents[2] / "examples" / "qmaml.py"
PAULIS = {
    "1": torch.eye(2, dtype=torch.complex128),
    "X": torch.tensor([[0, 1], [1, 0]], dtype=torch.complex128),
    "Y": torch.tensor([[0, -1j], [1j, 0]], dtype=torch.complex128),
    "Z": torch.tensor([[1, 0], [0, -1]], dtype=torch.complex128),
}
EXACT = {"rtol": 0, "atol": 1e-12}


@functools.cache
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("qmaml_example", FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def product(letters: str) -> Tensor:
    """A product of Pauli matrices, one a qubit, such as "X11X"."""
    return functools.reduce(torch.kron, [PAULIS[letter] for letter in letters])


def generators(qubits: int) -> list[Tensor]:
    """The Pauli products of one layer's gates, in the order of its angles."""
    found = []
    for letter in "XYZ":
        for sites in [(q,) for q in range(qubits)] + [(q, q + 1) for q in range(qubits - 1)]:
            found.append(product("".join(letter if q in sites else "1" for q in range(qubits))))
    return found


def gate(generator: Tensor, angle: Tensor) -> Tensor:
    return torch.matrix_exp(-0.5j * angle * generator)


def hamiltonian(couplings: Tensor, qubits: int) -> Tensor:
    total = torch.zeros(2**qubits, 2**qubits, dtype=torch.complex128)
    for strength, letter in zip(couplings, "XYZ", strict=True):
        for first in range(qubits - 1):
            total += strength * product("1" * first + 2 * letter + "1" * (qubits - 2 - first))
    return total


def random_angles(chain: Any, count: int) -> Tensor:
    return 2 * math.pi * torch.rand(count, chain.angles, dtype=torch.float64)


@pytest.mark.parametrize("qubits", [2, 3, 4])
def test_each_gate_is_a_matrix_exponential(qubits: int) -> None:
    """Every gate of a second layer by itself, on the state that a first layer of random angles makes."""
    chain = example().HeisenbergChain(qubits, 2, torch.float64)
    gates = generators(qubits)
    assert chain.angles == 2 * len(gates)
    alone = random_angles(chain, 1).expand(len(gates), -1).clone()
    angle = alone[:, len(gates) :].diagonal().clone()
    alone[:, len(gates) :] = angle.diag()
    before = alone[:1].clone()
    before[:, len(gates) :] = 0
    state = chain.states(before).flatten()
    found = chain.states(alone).flatten(1)
    for number, generator in enumerate(gates):
        torch.testing.assert_close(found[number], gate(generator, angle[number]) @ state, **EXACT)
    assert ((found - state).abs().amax(1) > 1e-3).all(), "no gate does nothing"


@pytest.mark.parametrize(("qubits", "layers"), [(2, 1), (3, 2), (5, 1)])
def test_a_circuit_is_its_gates_in_order(qubits: int, layers: int) -> None:
    chain = example().HeisenbergChain(qubits, layers, torch.float64)
    angles = random_angles(chain, 2)
    for own, found in zip(angles, chain.states(angles).flatten(1), strict=True):
        state = torch.zeros(2**qubits, dtype=torch.complex128)
        state[0] = 1
        for generator, angle in zip(generators(qubits) * layers, own, strict=True):
            state = gate(generator, angle) @ state
        torch.testing.assert_close(found, state, **EXACT)


def test_energies_are_expectations_and_never_below_the_ground() -> None:
    module, qubits = example(), 4
    chain = module.HeisenbergChain(qubits, 2, torch.float64)
    couplings = module.draw_chains(40, 0, torch.float64)
    assert couplings.abs().max() <= 3 and couplings.min() < -2 and couplings.max() > 2
    angles = random_angles(chain, 40)
    energies, states = chain(couplings[:, 0], angles), chain.states(angles).flatten(1)
    ground = module.ground_energies(couplings, qubits)
    for number, state in enumerate(states):
        dense = hamiltonian(couplings[number, 0], qubits)
        torch.testing.assert_close(energies[number], (state.conj() @ dense @ state).real, rtol=0, atol=1e-12)
        torch.testing.assert_close(ground[number], torch.linalg.eigvalsh(dense)[0], rtol=0, atol=1e-12)
    assert (energies > ground).all()
    single = module.HeisenbergChain(qubits, 2)(couplings[:, 0].float(), angles.float())
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), energies, rtol=0, atol=1e-4)


def test_ground_energies_of_two_qubits() -> None:
    """The eigenstates are the four Bell states."""
    couplings = example().draw_chains(20, 0, torch.float64)
    bell = torch.tensor([[1, -1, 1], [-1, 1, 1], [1, 1, -1], [-1, -1, -1]], dtype=torch.float64)
    torch.testing.assert_close(example().ground_energies(couplings, 2), (couplings[:, 0] @ bell.T).amin(1), **EXACT)


def test_gradients_follow_the_parameter_shift_rule() -> None:
    """d energy / d angle = (energy at + pi / 2 - energy at - pi / 2) / 2, exactly, for gates of Pauli products."""
    chain = example().HeisenbergChain(3, 2, torch.float64)
    angles = random_angles(chain, 1).requires_grad_()
    couplings = example().draw_chains(1, 3, torch.float64)[0]
    (gradient,) = torch.autograd.grad(chain(couplings, angles).sum(), angles)
    shifts = math.pi / 2 * torch.eye(chain.angles, dtype=torch.float64)
    up, down = (chain(couplings.expand(chain.angles, -1), angles.detach() + sign * shifts) for sign in (1, -1))
    torch.testing.assert_close(gradient[0], (up - down) / 2, **EXACT)
    assert gradient.abs().max() > 0.1


def test_sizes_are_checked() -> None:
    for qubits, layers in ((1, 1), (11, 1), (4, 0)):
        with pytest.raises(ValueError, match="expected 2 to 10 qubits and at least one layer"):
            example().HeisenbergChain(qubits, layers)


def test_the_starts_that_know_nothing() -> None:
    chain = example().HeisenbergChain(4, 2)
    found = example().starts(chain, 300, 2, seed=0)
    assert list(found) == ["zero", "uniform", "Gaussian"]
    assert found["zero"].abs().max() == 0
    assert math.pi - 0.01 < found["uniform"].abs().max() <= math.pi
    assert found["Gaussian"].var().item() == pytest.approx(1 / (4 * 2 * 4), rel=0.03)


def test_start_zero_is_stationary() -> None:
    chain = example().HeisenbergChain(4, 2, torch.float64)
    angles = torch.zeros(8, chain.angles, dtype=torch.float64).requires_grad_()
    (gradient,) = torch.autograd.grad(chain(example().draw_chains(8, 0, torch.float64)[:, 0], angles).sum(), angles)
    assert gradient.abs().max() < 1e-13


@pytest.mark.parametrize("batching", ["together", "one-by-one"])
@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_sign_steps_enter_pre_training_exactly(backend: str, batching: str) -> None:
    """The meta-gradient is what autograd finds through all steps, with the sign's derivative, 0, written into them."""
    model = example().QMaml(3, 1, hidden=5, dtype=torch.float64)
    couplings, rates = example().draw_chains(4, 0, torch.float64), torch.tensor([0.1, 0.05, 0.02]).double()
    learned = rates.clone().requires_grad_()
    options = {"inner_steps": 3, "loss": torch.mean, "adapt": ["offset"], "backend": backend, "batching": batching}
    found = meta_step(model, couplings, None, couplings, None, inner_lr=learned, **options)

    leaves = rates.clone().requires_grad_()
    start = angles = model.propose(couplings[:, 0])
    for rate in leaves:
        gradient = torch.autograd.grad(model.chain(couplings[:, 0], angles).sum(), angles, create_graph=True)[0]
        angles = angles - rate * torch.sign(gradient)  # torch differentiates a sign as 0
    energies = model.chain(couplings[:, 0], angles)
    torch.testing.assert_close(found.query_loss, energies.detach(), **EXACT)
    assert (energies < model.chain(couplings[:, 0], start)).all()
    weights = dict(model.network.named_parameters())
    *expected, of_rates = torch.autograd.grad(energies.mean(), [*weights.values(), leaves])
    for parameter, gradient in zip(weights.values(), expected, strict=True):
        assert gradient.abs().max() > 1e-3
        torch.testing.assert_close(parameter.grad, gradient, **EXACT)
    torch.testing.assert_close(learned.grad, of_rates, **EXACT)
    assert model.offset.abs().max() == 0
    # By the chain rule: the network's derivative times the energy's gradient at the adapted angles.
    at_end = torch.autograd.grad(model.chain(couplings[:, 0], end := angles.detach().requires_grad_()).mean(), end)[0]
    by_hand = torch.autograd.grad(model.propose(couplings[:, 0]), list(weights.values()), at_end)
    for gradient, other in zip(expected, by_hand, strict=True):
        torch.testing.assert_close(gradient, other, **EXACT)


@pytest.mark.parametrize("mode", ["gradient descent", "sign steps"])
def test_adaptation_is_the_same_from_any_start(mode: str) -> None:
    """Given as angles, the network's proposal adapts as it does from the network; the curve has a value a step."""
    module = example()
    model, couplings = module.QMaml(3, 1, hidden=5), module.draw_chains(4, 0)
    start = model.propose(couplings).detach()
    energies = module.curve(model, couplings, start, mode, 0.02, 6)
    assert energies.shape == (7, 4) and energies.dtype == torch.float64
    torch.testing.assert_close(energies[0].float(), model(couplings[:, 0]).detach(), rtol=1e-5, atol=1e-5)
    rates = 0.02 * torch.logspace(0, -math.log10(30), 6) if mode == "sign steps" else 0.02
    options = {"inner_lr": rates, "inner_steps": 6, "method": module.METHODS[mode], "adapt": ["offset"]}
    own = evaluate(model, couplings, None, couplings, None, loss=torch.mean, **options)
    torch.testing.assert_close(energies[-1].float(), own.query_loss, rtol=1e-4, atol=1e-4)
    assert (energies[-1] < energies[0]).all()


@pytest.fixture(scope="module")
def trained() -> dict[int, tuple[Any, Tensor]]:
    """Networks after 150 iterations by their number of inner steps, and the learned rates of these."""
    found = {}
    for inner_steps in (0, 3):
        torch.manual_seed(1)
        model = example().QMaml(3, 1, hidden=16)
        found[inner_steps] = model, example().pretrain(model, 150, inner_steps=inner_steps, lr=0.01, seed=1000)
    return found


@pytest.mark.slow
def test_pre_training_beats_starts_that_know_nothing(trained: dict[int, tuple[Any, Tensor]]) -> None:
    module = example()
    couplings = module.draw_chains(100, 10**6)
    ground = module.ground_energies(couplings, 3)
    blind = module.starts(trained[0][0].chain, 100, 1, seed=0)
    for inner_steps, (model, _) in trained.items():
        energies = module.curve(model, couplings, model.propose(couplings).detach(), "gradient descent", 0.02, 10)
        assert (energies > ground - 1e-4).all()
        for name, start in blind.items():
            other = module.curve(model, couplings, start, "gradient descent", 0.02, 10)
            assert energies[-1].mean() < other[-1].mean() - 1, (inner_steps, name)


@pytest.mark.slow
def test_pre_training_through_sign_steps_is_good_after_them(trained: dict[int, tuple[Any, Tensor]]) -> None:
    couplings = example().draw_chains(100, 10**6)
    rates = trained[3][1]
    assert rates.shape == (3,) and (rates > 0.025).all(), "they have learned"
    options = {"inner_lr": rates, "inner_steps": 3, "loss": torch.mean, "adapt": ["offset"]}
    published, through = (
        evaluate(trained[inner_steps][0], couplings, None, couplings, None, **options) for inner_steps in (0, 3)
    )
    assert through.query_loss.mean() < published.query_loss.mean() - 0.1
    for model, _ in trained.values():
        assert model.offset.abs().max() == 0


def test_an_iteration_takes_a_gradient_for_each_step_and_one_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """So the comparison is fair. Energies are computed for all chains of a batch at once, under vmap."""
    module, calls = example(), []

    def counted(self: Any, couplings: Tensor, angles: Tensor) -> Tensor:
        if torch._C._functorch.is_batchedtensor(
            couplings
        ):  # others look at the model: this forward changes, by `calls`
            calls.append(couplings)
        return forward(self, couplings, angles)

    forward = module.HeisenbergChain.forward
    monkeypatch.setattr(module.HeisenbergChain, "forward", counted)
    model = module.QMaml(2, 1, hidden=2)
    for iterations, inner_steps in ((2, 3), (8, 0)):
        calls.clear()
        module.pretrain(model, iterations, inner_steps=inner_steps)
        assert len(calls) == iterations * (inner_steps + 1) == 8
