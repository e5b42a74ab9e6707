"""The operators as torch sees them: schema, fake twins, version counters, torch.compile."""

from __future__ import annotations

import pytest
import torch

from helpers.cases.flat_buffers import DTYPES, flags
from signmaml_ext import meta_accumulate_, sign_step_

STEPS = {
    "one rate": lambda dtype: (torch.ones(1, dtype=dtype), None, None),
    "rate each, mask each": lambda dtype: (torch.ones(7, dtype=dtype), None, torch.arange(7) % 2 == 0),
    "a segment": lambda dtype: (torch.ones(2, dtype=dtype), torch.tensor([0, 3, 7]), torch.tensor([True, False])),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", STEPS)
def test_sign_step_passes_opcheck(device, dtype, form):
    tables = [None if table is None else table.to(device) for table in STEPS[form](dtype)]
    buffers = [torch.randn(3, 7, dtype=dtype, device=device) for _ in range(2)]
    torch.library.opcheck(torch.ops.signmaml_ext.sign_step_.default, (*buffers, *tables, flags(3, device)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("skip", [False, True])
def test_meta_accumulate_passes_opcheck(device, dtype, skip):
    out, grads = torch.randn(7, dtype=dtype, device=device), torch.randn(3, 7, dtype=dtype, device=device)
    torch.library.opcheck(torch.ops.signmaml_ext.meta_accumulate_.default, (out, grads, flags(3, device), skip))


def test_changed_tensors_get_a_new_version(device):
    params, grads, nonfinite = torch.zeros(2, 3, device=device), torch.ones(2, 3, device=device), flags(2, device)
    lr, out = torch.ones(1, device=device), torch.zeros(3, device=device)
    sign_step_(params, grads, lr, nonfinite=nonfinite)
    meta_accumulate_(out, grads, nonfinite=nonfinite)
    versions = [tensor._version for tensor in (params, out, nonfinite, grads, lr)]
    assert versions == [1, 1, 2, 0, 0]


def test_autograd_notices_that_a_saved_tensor_was_stepped(device):
    x = torch.ones(1, 3, device=device, requires_grad=True)
    saved = x.detach().clone()
    loss = (x * saved).sum()
    sign_step_(saved, torch.ones(1, 3, device=device), torch.ones(1, device=device), nonfinite=flags(1, device))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_operators_survive_torch_compile_without_a_graph_break(device):
    def step(params, grads, lr, out, nonfinite):
        params = params * 1
        sign_step_(params, 2 * grads, lr, nonfinite=nonfinite)
        meta_accumulate_(out, params, nonfinite=nonfinite)
        return params + 1

    def arguments():
        torch.manual_seed(1)
        buffers = torch.randn(2, 5), torch.randn(2, 5), torch.ones(1), torch.zeros(5), flags(2)
        return [tensor.to(device) for tensor in buffers]

    eager, compiled = arguments(), arguments()
    expected = step(*eager)
    found = torch.compile(step, backend="aot_eager", fullgraph=True)(*compiled)
    assert torch.equal(found, expected)
    for a, b in zip(compiled, eager, strict=True):
        assert torch.equal(a, b)


def test_inference_tensors_are_stepped(device):
    with torch.inference_mode():
        params = torch.zeros(1, 3, device=device)
        sign_step_(params, torch.ones(1, 3, device=device), torch.ones(1, device=device), nonfinite=flags(1, device))
        assert params.tolist() == [[-1.0] * 3]
