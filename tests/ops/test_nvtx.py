"""Native CUDA calls are marked for profilers; calls on the CPU are not."""

from __future__ import annotations

import pytest
import torch

from signmaml_ext.nvtx import Range


@pytest.fixture
def marks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    found: list[str] = []
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", lambda name: found.append(f"push {name}"))
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", lambda: found.append("pop"))
    return found


def test_a_range_on_cuda_is_closed_even_by_an_error(marks):
    with pytest.raises(RuntimeError, match="launch"), Range("sign_step", torch.device("cuda", 0)):
        assert marks == ["push sign_step"]
        raise RuntimeError("launch")
    assert marks == ["push sign_step", "pop"]


def test_no_range_on_the_cpu(marks):
    with Range("sign_step", torch.device("cpu")):
        pass
    assert marks == []
