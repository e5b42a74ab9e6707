"""The count of torch's operations in a meta-step of any module."""

from __future__ import annotations

import pytest
from torch import nn

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")


@pytest.fixture
def model() -> nn.Module:
    from zoo_models import conv4

    return conv4(lambda filters: nn.GroupNorm(4, filters))


@pytest.mark.parametrize("steps", [1, 3])
def test_the_operations_that_the_definition_names_are_counted(model, steps):
    """Four convolutions a pass, one pass a step and one for the query set; one step on flat buffers for all tasks."""
    import operations

    counts = operations.count(model, steps=steps, method="sign-maml", size=16)
    assert counts["convolution"] == counts["convolution_backward"] == 4 * (steps + 1)
    assert counts["sign_step_"] == steps and counts["meta_accumulate_"] == 1
    assert "view" not in counts and "_unsafe_view" not in counts


@pytest.mark.parametrize("method", ["sign-maml", "fo-maml", "maml"])
def test_counts_grow_by_the_step_and_not_by_sizes(model, method):
    import operations

    options = {"method": method, "size": 16, "tasks": 3}
    one, two, three = (operations.count(model, steps=n, **options) for n in (1, 2, 3))
    assert three.total() - two.total() == two.total() - one.total() > 50
    assert operations.count(model, steps=2, **options | {"size": 20}) == two
    more = operations.count(model, steps=2, **options | {"tasks": 4}) - two
    assert set(more) == ({"convolution"} if method == "maml" else set()), more
    assert two["_local_scalar_dense"] == 0, "the host would wait for the device"


def test_views_and_allocations_are_no_operations():
    import operations
    import torch

    with operations.Operations() as found:
        (torch.empty(3, 4).zero_().t().reshape(2, 6)[0] + 1).sum()
    assert found.counts == {"zero_": 1, "clone": 1, "add": 1, "sum": 1}
