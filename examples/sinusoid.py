"""Regression of sine waves (Finn et al. 2017): sign steps against gradient steps, both first order, tuned alike.

python examples/sinusoid.py [--iterations 2000] [--shots 5 10] [--rates parameter constant] [--out FOLDER]

Amplitude in [0.1, 5], phase in [0, pi], x in [-5, 5], network 1-40-40-1, 5 inner steps. Sign-MAML and FO-MAML start
from the same weights and see the same tasks equally often. For each, validation error chooses the inner rates among the
same candidates: constant, or learned by the outer loop, one for each tensor or parameter and step, from several starts.
The test uses separate tasks. FOLDER gets result.json, with every candidate, and plots of fits; results of earlier calls
with other --shots or --rates are kept and compared too.
"""

import argparse
import json
import math
from pathlib import Path

import torch

from signmaml import MLP, SinusoidSampler
from signmaml.plots import draw_fits
from signmaml.stats import mean_and_ci95
from signmaml_ext import evaluate, meta_step

INNER_STEPS = 5
# A sign step moves every parameter by the rate, a gradient step by the rate times the gradient. Their best rates are
# unrelated, so the grid is wide enough for both.
GRID = {"parameter": (0.003, 0.008), "tensor": (0.003, 0.008), "constant": (0.003, 0.006, 0.01, 0.02)}


def errors(model, rates, method, shots, *, tasks, seed):
    """The mean squared error after adaptation, for each of `tasks` tasks."""
    waves = SinusoidSampler(shots=shots, queries=10, tasks=tasks, seed=seed).draw(0)
    options = {"inner_lr": rates, "inner_steps": INNER_STEPS, "method": method, "loss": "mse"}
    return evaluate(model, *waves, **options).query_loss


def train(method, shots, rates, start, iterations):
    """The meta-trained model and its inner rates."""
    torch.manual_seed(0)
    model = MLP(1, 1)
    shapes = {name: p.shape if rates == "parameter" else [1] * p.ndim for name, p in model.named_parameters()}
    logs = {name: torch.full((INNER_STEPS, *shape), math.log(start)) for name, shape in shapes.items()}
    groups = [{"params": model.parameters(), "lr": 1e-3}]
    if rates != "constant":
        groups.append({"params": [log.requires_grad_() for log in logs.values()], "lr": 1e-2})
    optimizer = torch.optim.Adam(groups)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)

    def inner_lr():
        return start if rates == "constant" else {name: log.exp() for name, log in logs.items()}

    waves = SinusoidSampler(shots=shots, queries=10, tasks=25, seed=0)
    options = {"inner_steps": INNER_STEPS, "method": method, "loss": "mse", "nonfinite": "skip"}
    for iteration in range(iterations):
        optimizer.zero_grad()
        meta_step(model, *waves.draw(iteration), inner_lr=inner_lr(), **options)
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        return model, inner_lr()


def best_of_grid(method, shots, rates, iterations):
    """The model and rates with the lowest validation error, and a record of all candidates."""
    found = {}
    for start in GRID[rates]:
        model, inner_lr = train(method, shots, rates, start, iterations)
        error = errors(model, inner_lr, method, shots, tasks=1000, seed=1).mean().item()
        found[start] = (error if math.isfinite(error) else math.inf, model, inner_lr)
        print(f"{shots}-shot, {rates} rates, {method}, rate {start}: validation {error:.3f}", flush=True)
    start = min(found, key=lambda candidate: found[candidate][0])
    _, model, inner_lr = found[start]
    test = errors(model, inner_lr, method, shots, tasks=4000, seed=2)
    mean, ci95 = mean_and_ci95(test.double().numpy())
    print(f"{shots}-shot, {rates} rates, {method}: test {mean:.3f} +- {ci95:.3f}\n", flush=True)
    validation = {str(candidate): round(error, 4) for candidate, (error, *_) in found.items()}
    record = {"start": start, "validation_mse": validation, "test_mse": round(mean, 4), "test_ci95": round(ci95, 4)}
    return model, inner_lr, record | {"test_tasks": len(test)}


def draw(model, inner_lr, shots, title, file):
    """Draws fits of four tasks that no run has seen, before and after adaptation."""
    waves = SinusoidSampler(shots=shots, queries=10, tasks=4, seed=3).draw(0)
    draw_fits(model, waves, file, title=title, inner_lr=inner_lr, inner_steps=INNER_STEPS, loss="mse")


def best_of_all(results, shots):
    """Each method's choice among all kinds of rates, by validation error."""
    chosen = {}
    for method in ("sign-maml", "fo-maml"):
        candidates = {kind: of_kind[method] for kind, of_kind in results[f"{shots}-shot"].items() if kind != "best"}
        kind = min(candidates, key=lambda kind: min(candidates[kind]["validation_mse"].values()))
        chosen[method] = {"rates": kind, **candidates[kind]}
        print(f"{shots}-shot, {method}: {kind} rates, test {candidates[kind]['test_mse']:.3f}", flush=True)
    return chosen


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=2000)
    parser.add_argument("--shots", type=int, nargs="+", default=[5, 10])
    parser.add_argument("--rates", nargs="+", choices=GRID, default=["parameter", "constant"])
    parser.add_argument("--out", type=Path, default=Path("runs/sinusoid"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # tensors are so small that more threads only add overhead

    arguments.out.mkdir(parents=True, exist_ok=True)
    file = arguments.out / "result.json"
    result = json.loads(file.read_text()) if file.exists() else {"results": {}}
    result |= {"benchmark": "sinusoid", "command": "python examples/sinusoid.py", "torch": torch.__version__}
    result |= {"iterations": arguments.iterations, "inner_steps": INNER_STEPS, "tasks": 25}
    for shots in arguments.shots:
        of_shots = result["results"].setdefault(f"{shots}-shot", {})
        for rates in arguments.rates:
            records = {}
            for method in ("sign-maml", "fo-maml"):
                model, inner_lr, records[method] = best_of_grid(method, shots, rates, arguments.iterations)
                title = f"{method}, {shots}-shot, {rates} inner rates, tasks never seen"
                draw(model, inner_lr, shots, title, arguments.out / f"fits-{shots}-{rates}-{method}.png")
            of_shots[rates] = records
            of_shots["best"] = best_of_all(result["results"], shots)
            file.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
