"""Q-MAML (Lee, Cho, Kim 2025, arXiv 2501.05906): a network proposes where the angles of a quantum circuit start.

python examples/qmaml.py [--qubits 6] [--layers 3] [--steps 50] [--seed 0] [--out FOLDER]

A task is a Heisenberg XYZ chain, H = sum over neighbours of Jx X X + Jy Y Y + Jz Z Z with open ends and J in [-3, 3]^3;
its loss is the energy <psi(angles)| H |psi(angles)> of the state that a circuit makes of |0...0>. The network maps J to
the first angles, and adaptation then tunes the angles alone. The network is pre-trained in two ways:

- as published: it minimises the energy at the angles it proposes;
- through K sign steps, with `signmaml_ext.meta_step`: it minimises the energy after them. Angles after K steps are
  network(J) - sum of rate * sign(gradient), and the derivative of the sign is 0, so d angles_K / d angles_0 = I: the
  network gets the energy's gradient at angles_K, exactly, without any derivative of a step. The steps' rates learn too.

A sign step takes one gradient of the energy, like an iteration of the published form, so that one iteration through K
steps costs K + 1 of the published ones. The published form is run twice: with as many gradients, and with as many
iterations, which see as many chains.

These starts are compared with angles of 0, uniform ones in [-pi, pi], and Gaussian ones of variance 1 / (4 S (L + 2)),
S = 2 (Zhang et al. 2022), on chains that no run has seen, by the same adaptation: gradient descent at one rate, or sign
steps whose rate falls to 1/30. Other chains choose that rate for each start, from the same candidates, by the mean
energy over all steps. 0 is a stationary point of every such chain, so that only rounding errors lead away from it.

FOLDER gets result.json and energies.png. It takes about a minute and a half on one core.
"""

import argparse
import itertools
import json
import math
import time
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import nn

from signmaml.sheets import save_figure
from signmaml.stats import mean_and_ci95
from signmaml_ext import evaluate, meta_step

BATCH = 32
SHOWN = (0, 1, 5, 10, 20, 50, 100, 200)
METHODS = {"gradient descent": "fo-maml", "sign steps": "sign-maml"}
# A gradient step moves an angle by the rate times the gradient, a sign step by the rate: the grid is for both.
GRID = (0.01, 0.02, 0.05, 0.1, 0.2)
COLORS = ("0.6", "#b279a2", "#f58518", "#4c78a8", "#72b7b2", "#e45756")


class HeisenbergChain(nn.Module):
    """A state-vector simulator: energies of the states that a circuit makes of |0...0>, for many chains at once.

    A layer is IsingXX on all neighbours and RX on all qubits, then the same with YY and RY, then with ZZ and RZ. The
    gates of such a block commute: in the basis of its Pauli matrix, all of them together are one phase for each basis
    state. So a block is a change of basis and a product. A change of basis is the same 2 x 2 matrix on every qubit;
    half of the qubits are the rows of a matrix and the others its columns, so it is two small matrix products.

    Qubit 0 is the leading bit. Gates are as in PennyLane: IsingXX(a) = exp(-i a XX / 2), RX(a) = exp(-i a X / 2).

    Args:
        qubits: n, 2 to 10.
        layers: L.
        dtype: torch.float32 or torch.float64; states have the complex type of the same precision.
    """

    def __init__(self, qubits, layers, dtype=torch.float32):
        super().__init__()
        if not 2 <= qubits <= 10 or layers < 1:
            raise ValueError(f"expected 2 to 10 qubits and at least one layer, found {qubits} and {layers}")
        self.qubits, self.layers = qubits, layers
        bits = torch.arange(2**qubits)[:, None] >> torch.arange(qubits - 1, -1, -1)
        singles = 1 - 2 * (bits & 1)
        bonds = singles[:, 1:] * singles[:, :-1]
        # [2^n, 2 n - 1]: the eigenvalue in each basis state of each qubit's Pauli matrix, then of each bond's product.
        self.register_buffer("eigenvalues", torch.cat([singles, bonds], 1).to(dtype))
        self.register_buffer("bonds", bonds.sum(1).to(dtype))
        hadamard = torch.tensor([[1, 1], [1, -1]], dtype=torch.complex128) / math.sqrt(2)
        to_y = torch.tensor([1, 1j]).to(torch.complex128).diag() @ hadamard  # Y = to_y Z to_y^*, and X = H Z H
        turns = (hadamard, to_y.mH @ hadamard, to_y)  # from the basis of Z to that of X, X to Y, Y to Z
        kind = torch.complex64 if dtype == torch.float32 else torch.complex128
        self.register_buffer("rows", torch.stack([_on_each(turn, qubits // 2) for turn in turns]).to(kind))
        columns = [_on_each(turn, qubits - qubits // 2).T for turn in turns]
        self.register_buffer("columns", torch.stack(columns).to(kind))

    @property
    def angles(self):
        """How many angles there are: L * 3 * (2 n - 1), by layer, Pauli matrix X, Y, Z, then qubits and bonds."""
        return self.layers * 3 * self.eigenvalues.shape[1]

    def states(self, angles):
        """The states of circuits: `[S, angles]` -> complex `[S, 2^(n // 2), 2^(n - n // 2)]`, in the basis of Z."""
        turned = -0.5 * angles.unflatten(1, (self.layers, 3, -1)) @ self.eigenvalues.T
        phases = torch.complex(turned.cos(), turned.sin()).unflatten(-1, (self.rows.shape[1], -1))
        # The first row of the change of basis is |0...0> in the basis of X.
        state = (self.rows[0, :, :1] @ self.columns[0, :1]) * phases[:, 0, 0]
        for block in range(1, 3 * self.layers):
            state = self._turned(state, block % 3) * phases[:, block // 3, block % 3]
        return state

    def forward(self, couplings, angles):
        """The energies `[S]` of chains with `couplings` `[S, 3]` (Jx, Jy, Jz) at `angles` `[S, angles]`."""
        in_z = self.states(angles)
        in_x = self._turned(in_z, 0)
        in_y = self._turned(in_x, 1)
        chances = [torch.view_as_real(state).square().sum(-1).flatten(1) for state in (in_x, in_y, in_z)]
        return (torch.stack(chances, 1) @ self.bonds * couplings).sum(1)

    def _turned(self, state, which):
        return self.rows[which] @ state @ self.columns[which]


def _on_each(turn, qubits):
    """The Kronecker power of a 2 x 2 matrix."""
    power = turn
    for _ in range(qubits - 1):
        power = torch.kron(power, turn)
    return power


def terms(qubits):
    """The sums over neighbours of X X, Y Y and Z Z as matrices: float64 `[3, 2^n, 2^n]` (Y Y is real too)."""
    x, y, z = ([[0, 1], [1, 0]], [[0, -1j], [1j, 0]], [[1, 0], [0, -1]])
    sums = []
    for pauli in (torch.tensor(matrix, dtype=torch.complex128) for matrix in (x, y, z)):
        pair = torch.kron(pauli, pauli).real
        before_and_after = (
            (torch.eye(2**first).double(), torch.eye(2 ** (qubits - 2 - first)).double()) for first in range(qubits - 1)
        )
        sums.append(sum(torch.kron(torch.kron(before, pair), after) for before, after in before_and_after))
    return torch.stack(sums)


def ground_energies(couplings, qubits):
    """The lowest eigenvalue of each chain, float64 `[T]`, for `couplings` `[T, 1, 3]`."""
    parts, of_terms = couplings[:, 0].double().split(16), terms(qubits)
    return torch.cat([torch.linalg.eigvalsh(torch.einsum("ta,aij->tij", part, of_terms))[:, 0] for part in parts])


class QMaml(nn.Module):
    """A chain's energy at the angles that a network proposes, moved by an offset that only adaptation changes.

    With ``adapt=["offset"]`` each task has its own offset, 0 at first, so that its steps are steps of its angles. All
    other parameters, the network's, do not move in the inner loop and get their meta-gradient at the adapted angles.
    """

    def __init__(self, qubits, layers, hidden=64, dtype=torch.float32):
        super().__init__()
        self.chain = HeisenbergChain(qubits, layers, dtype)
        sizes = (3, hidden, hidden, self.chain.angles)
        linears = [nn.Linear(*pair, dtype=dtype) for pair in itertools.pairwise(sizes)]
        self.network = nn.Sequential(linears[0], nn.Tanh(), linears[1], nn.Tanh(), linears[2])
        self.offset = nn.Parameter(torch.zeros(self.chain.angles, dtype=dtype))

    def propose(self, couplings):
        """The angles to start at, `[..., angles]`."""
        return self.network(couplings / 3)

    def forward(self, couplings, start=None):
        """Energies `[S]`; from the angles `start` `[S, angles]` instead of the network's, if given."""
        return self.chain(couplings, (self.propose(couplings) if start is None else start) + self.offset)


def draw_chains(tasks, seed, dtype=torch.float32):
    """Couplings of random chains, `[T, 1, 3]`: what describes a task is its only example."""
    return 6 * torch.rand(tasks, 1, 3, generator=torch.Generator().manual_seed(seed)).to(dtype) - 3


def starts(circuit, tasks, layers, seed):
    """The starts that know nothing of the chain, by name: `[T, 1, angles]`."""
    generator = torch.Generator().manual_seed(seed)
    shape = (tasks, 1, circuit.angles)
    return {
        "zero": torch.zeros(shape),
        "uniform": math.pi * (2 * torch.rand(shape, generator=generator) - 1),
        "Gaussian": torch.randn(shape, generator=generator) / math.sqrt(4 * 2 * (layers + 2)),
    }


def pretrain(model, iterations, *, inner_steps=0, rate=0.02, lr=3e-3, seed=0):
    """Trains the network of a `QMaml` in place; each iteration takes `inner_steps` + 1 gradients of a batch's energies.

    Returns the rates of the K = `inner_steps` sign steps, `[K]`. They start at `rate`, and the outer loop learns their
    logarithms. The outer optimizer is Adam, its rate falls from `lr` (0.02 for the logarithms) to 0 along a cosine.
    """
    logs = torch.full((inner_steps,), math.log(rate), dtype=model.offset.dtype).requires_grad_()
    # Without the offset: it stays 0, so that angles start where the network says. A shift of all is in its last bias.
    groups = [{"params": model.network.parameters(), "lr": lr}, {"params": [logs], "lr": 2e-2}]
    optimizer = torch.optim.Adam(groups)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
    for iteration in range(iterations):
        couplings = draw_chains(BATCH, seed + iteration, model.offset.dtype)
        model.zero_grad()  # also of the offset, whose gradient no optimizer uses
        logs.grad = None
        # The energies are what the model returns, so there are no targets; support and query are the same chain.
        steps = {"inner_lr": logs.exp(), "inner_steps": inner_steps}
        meta_step(model, couplings, None, couplings, None, **steps, loss=torch.mean, adapt=["offset"])
        optimizer.step()
        schedule.step()
    return logs.exp().detach()


def curve(model, couplings, start, mode, rate, steps):
    """The energies of chains at `start` and after each of `steps` steps, float64 `[steps + 1, T]`."""
    rates = rate * torch.logspace(0, -math.log10(30), steps) if mode == "sign steps" else rate
    options = {"inner_lr": rates, "inner_steps": steps, "method": METHODS[mode], "adapt": ["offset"]}
    found = evaluate(model, (couplings, start), None, (couplings, start), None, loss=torch.mean, **options)
    return torch.cat([found.support_loss, found.query_loss[None]]).double()


def compare(model, candidates, tuning, test, steps):
    """The excess energies of all starts by mode and name: rate and float64 `[steps + 1, T]`, in % of the ground's.

    Args:
        model: Any `QMaml`; its chain is used.
        candidates: By name, a function from couplings to starts.
        tuning: Couplings of the chains that choose the rates.
        test: Couplings and ground energies of the chains that are compared.
        steps: Adaptation steps.
    """
    couplings, ground = test
    found = {}
    for mode in METHODS:
        found[mode] = {}
        for name, start in candidates.items():
            means = {rate: curve(model, tuning, start(tuning), mode, rate, steps).mean().item() for rate in GRID}
            rate = min(means, key=means.get)
            energies = curve(model, couplings, start(couplings), mode, rate, steps)
            found[mode][name] = (rate, 100 * (energies - ground) / ground.abs())
    return found


def table(of_mode, steps):
    """Lines of means with 95% intervals, one for each start, and the same as a record."""
    shown = [step for step in SHOWN if step < steps] + [steps]
    lines = [f"{'start':<20}{'rate':>6}" + "".join(f"{step:>17}" for step in shown)]
    record = {}
    for name, (rate, excess) in of_mode.items():
        pairs = {step: mean_and_ci95(excess[step].numpy()) for step in shown}
        lines.append(f"{name:<20}{rate:>6}" + "".join(f"{mean:>9.2f} +- {half:<4.2f}" for mean, half in pairs.values()))
        by_step = {str(step): [round(mean, 4), round(half, 4)] for step, (mean, half) in pairs.items()}
        record[name] = {"rate": rate, "mean_and_ci95_percent": by_step}
    return lines, record


def draw(found, file, title):
    """Excess energy over adaptation steps, one panel for each mode, with 95% intervals."""
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    panels = figure.subplots(1, len(found), sharey=True)
    for panel, (mode, of_mode) in zip(panels, found.items(), strict=True):
        for color, (name, (_, excess)) in zip(COLORS, of_mode.items(), strict=True):
            means, halves = zip(*(mean_and_ci95(of_step.numpy()) for of_step in excess), strict=True)
            panel.plot(means, color=color, label=name)
            bounds = [[mean + sign * half for mean, half in zip(means, halves, strict=True)] for sign in (-1, 1)]
            panel.fill_between(range(len(means)), *bounds, color=color, alpha=0.2, linewidth=0)
        panel.set(title=mode, xlabel="adaptation steps", yscale="log")
        panel.grid(alpha=0.25)
    panels[0].set_ylabel("energy above the ground state (% of it)")
    figure.legend(*panels[0].get_legend_handles_labels(), frameon=False, loc="outside lower center", ncols=len(COLORS))
    figure.suptitle(title, fontsize=11)
    save_figure(figure, file)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--qubits", type=int, choices=range(2, 11), default=6)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--steps", type=int, default=50, help="adaptation steps on chains never seen")
    parser.add_argument("--inner-steps", type=int, default=5, help="K, the sign steps of pre-training")
    parser.add_argument("--gradients", type=int, default=2400, help="gradients of a batch that pre-training takes")
    parser.add_argument("--tasks", type=int, default=256, help="chains of the test")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/qmaml"))
    arguments = parser.parse_args()
    if min(arguments.layers, arguments.steps, arguments.inner_steps, arguments.tasks - 1) < 1:
        parser.error("expected at least one layer, one step of each kind and two tasks")
    if arguments.gradients <= arguments.inner_steps:
        parser.error("--gradients: expected more than --inner-steps, which are one iteration with the query gradient")
    torch.set_num_threads(1)  # tensors are so small that more threads only add overhead

    qubits, layers, steps, seed = arguments.qubits, arguments.layers, arguments.steps, arguments.seed
    # Pre-training draws its chains with the seeds from `seed` on, one for each iteration.
    tuning, couplings = draw_chains(64, 10**6 + seed), draw_chains(arguments.tasks, 2 * 10**6 + seed)
    ground = ground_energies(couplings, qubits)
    most, inner_steps = arguments.gradients, arguments.inner_steps
    fewer = most // (inner_steps + 1)
    forms = {f"published, {most}": (most, 0), f"published, {fewer}": (fewer, 0)}
    forms[f"{inner_steps} sign steps, {fewer}"] = (fewer, inner_steps)
    proposals, records = {}, {}
    for name, (iterations, inside) in forms.items():
        torch.manual_seed(seed)
        model, began = QMaml(qubits, layers), time.perf_counter()
        rates = pretrain(model, iterations, inner_steps=inside, seed=seed).tolist()
        records[name] = {"seconds": round(time.perf_counter() - began, 1), "inner_rates": rates}
        proposals[name] = torch.no_grad()(model.propose)
        learned = "; learned rates " + " ".join(f"{rate:.4f}" for rate in rates) if rates else ""
        cost = f"{iterations * (inside + 1)} gradients, {records[name]['seconds']} s"
        print(f"{name} iterations: {cost}{learned}", flush=True)

    def blind(name):
        return lambda chains: starts(model.chain, len(chains), layers, seed)[name]

    candidates = {name: blind(name) for name in ("zero", "uniform", "Gaussian")} | proposals
    found = compare(model, candidates, tuning, (couplings, ground), steps)
    print(f"\n{qubits} qubits, {layers} layers, {model.chain.angles} angles; energy above the ground state in % of it,")
    print(f"mean over {len(couplings)} chains never seen with its 95% interval, by adaptation steps")
    results = {}
    for mode, of_mode in found.items():
        lines, results[mode] = table(of_mode, steps)
        print("\n".join(["", mode, *lines, ""]))
        *published, through = forms
        for other in published:
            print(verdict(through, other, *(of_mode[name][1][-1] for name in (through, other))))
    arguments.out.mkdir(parents=True, exist_ok=True)
    result = {"benchmark": "qmaml", "command": "python examples/qmaml.py", "torch": torch.__version__}
    result |= {name: value for name, value in vars(arguments).items() if name != "out"}
    result |= {"angles": model.chain.angles, "pre-training": records, "results": results}
    (arguments.out / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    draw(found, arguments.out / "energies.png", f"Heisenberg chains of {qubits} qubits never seen, {layers} layers")


def verdict(name, other, excess, of_other):
    """One line: which of two starts is better after the last step, by the paired differences of the chains."""
    mean, half = mean_and_ci95((excess - of_other).numpy())
    word = "no different from" if abs(mean) <= half else "worse than" if mean > 0 else "better than"
    return f"'{name}' is {word} '{other}' after the last step: {mean:+.2f} +- {half:.2f} points"


if __name__ == "__main__":
    main()
