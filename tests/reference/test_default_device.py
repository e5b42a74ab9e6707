"""A caller's default device, as torch.set_default_device sets it, changes nothing: tensors say where they are."""

from __future__ import annotations

import ast
import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn

import signmaml_ext
from helpers.cases import nets
from helpers.programs import toy_run
from signmaml_ext import Adam

ROOT = Path(__file__).resolve().parents[2]
# Functions that create on the default device.
FACTORIES = {
    "arange", "as_tensor", "asarray", "empty", "eye", "full", "linspace", "logspace", "normal", "ones", "rand",
    "randint", "randn", "randperm", "scalar_tensor", "tensor", "tril_indices", "triu_indices", "zeros",
}  # fmt: skip


def factories(path: Path) -> Iterator[ast.Call]:
    """Calls of torch's factories in a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        match node:
            case ast.Call(func=ast.Attribute(value=ast.Name(id="torch"), attr=name)) if name in FACTORIES:
                yield node


@pytest.mark.parametrize("package", ["signmaml_ext", "python/signmaml"])
def test_every_tensor_is_made_on_a_named_device(package):
    found = [(path, call) for path in sorted((ROOT / package).rglob("*.py")) for call in factories(path)]
    assert len(found) > 10
    for path, call in found:
        assert "device" in {keyword.arg for keyword in call.keywords}, f"{path.name}:{call.lineno} {ast.unparse(call)}"


# What a family does at the first call of a model (reading, verifying) is part of the call.
CASES = {
    "conv": (lambda: nets.conv4(filters=8), nets.image_tasks, {}),
    "mlp": (nets.mlp, nets.vector_tasks, {}),
    "flat": (nets.Tied, nets.vector_tasks, {}),
    "flat, int8": (nets.Tied, nets.vector_tasks, {"task_state": "int8"}),
    "reference": (nets.Recurrent, nets.image_tasks, {"backend": "torch"}),
    "maml": (nets.mlp, nets.vector_tasks, {"method": "maml"}),
    "maml, Adam": (nets.mlp, nets.vector_tasks, {"method": "maml", "inner_rule": Adam(weight_decay=0.1)}),
    "dropout, one by one": (nets.FunctionalDropout, nets.vector_tasks, {"batching": "one-by-one", "seed": 3}),
}


@contextmanager
def elsewhere() -> Iterator[None]:
    """The default device holds no data, so that whatever is made there fails."""
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)  # as it was; any other value stays active as a mode


def results_of(model: nn.Module, data: tuple[torch.Tensor, ...], options: dict[str, object]) -> list[torch.Tensor]:
    method = {"method": options.get("method", "sign-maml"), "backend": options.get("backend", "auto")}
    found = signmaml_ext.meta_step(model, *data, inner_lr=0.02, inner_steps=2, **options)  # type: ignore[arg-type]
    grads = [value for value in nets.grads(model).values() if value is not None]
    adapted = signmaml_ext.adapt(model, *data[:2], inner_lr=0.02, inner_steps=2, seed=3, **method)  # type: ignore[arg-type]
    return [found.query_loss, *grads, *adapted.values()]


@pytest.mark.parametrize("case", CASES)
def test_a_meta_step(case):
    make, draw, options = CASES[case]
    model = make().float()
    data = tuple(value.float() if value.is_floating_point() else value for value in draw())
    again = copy.deepcopy(model)
    with elsewhere():  # first, because a model is verified once
        found = results_of(model, data, options)
        assert "backend" in str(signmaml_ext.explain(model, *data, **options))
    assert all(torch.equal(a, b) for a, b in zip(found, results_of(again, data, options), strict=True))


def test_a_training_run(tmp_path):
    """A model and images on the CPU; sampling, training, validation, checkpoints and the test at the end."""
    trainer, again = (toy_run.toy_trainer(tmp_path / name, iterations=6) for name in ("a", "b"))
    with elsewhere():
        found = trainer.fit().test
    assert found == again.fit().test
