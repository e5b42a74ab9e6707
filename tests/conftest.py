"""Settings of the whole suite."""

from __future__ import annotations

import pytest
import torch

import signmaml_ext


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=["torch", "cpu"])
def backend(request: pytest.FixtureRequest) -> str:
    """Every backend that runs on this machine and serves batched modules; the same tests hold for all."""
    reason = signmaml_ext.dispatch.backend_status()[request.param]
    if reason is not None:
        pytest.skip(f"backend {request.param}: {reason}")
    return request.param
