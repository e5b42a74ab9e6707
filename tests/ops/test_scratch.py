"""Scratch memory of fused calls on the CPU: reused, bounded, never shared by two calls, never part of a result."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

import signmaml_ext
from helpers.cases.perceptrons import network, tasks_for
from signmaml.models import Conv4
from signmaml_ext import fused
from signmaml_ext.layers.run import NativeRun


def test_a_run_keeps_what_is_too_large_for_the_next_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of passes of usual layers: for its own next pass; smaller workspaces are those of all calls."""
    monkeypatch.setattr(fused, "KEPT_BYTES", 100)
    run = NativeRun(None, None, None)  # type: ignore[arg-type]  # memory does not depend on them
    places = []
    for size in (200, 150, 200):
        with run._workspace(size) as found:
            places.append(found.data_ptr())
    assert len(set(places)) == 1
    with run._workspace(100) as small:
        assert small.data_ptr() != places[0]


def address(scratch: fused.Scratch, size: int, dtype: torch.dtype = torch.float32) -> int:
    with scratch.of((size,), dtype) as buffer:
        assert buffer.shape == (size,) and buffer.dtype == dtype and buffer.is_contiguous()
        return buffer.data_ptr()


def test_one_buffer_stays_and_grows():
    scratch = fused.Scratch()
    first = address(scratch, 1000)
    assert address(scratch, 1000) == first
    assert address(scratch, 500, torch.float64) == first  # the same number of bytes
    larger = address(scratch, 100_000)
    assert address(scratch, 1000) == larger


def test_calls_at_the_same_time_have_their_own():
    scratch = fused.Scratch()
    with scratch.of((10,), torch.float32) as one, scratch.of((10,), torch.float32) as two:
        one.fill_(1.0)
        two.fill_(2.0)
        assert (one == 1.0).all() and (two == 2.0).all()


def test_nothing_large_is_kept(monkeypatch):
    scratch = fused.Scratch()
    monkeypatch.setattr(fused, "KEPT_BYTES", 4096)
    address(scratch, 1025)
    assert not scratch._kept
    address(scratch, 1024)
    assert [buffer.numel() for buffer in scratch._kept] == [4096]


def test_put_back_after_an_error():
    scratch = fused.Scratch()
    first = address(scratch, 1000)
    with pytest.raises(KeyError), scratch.of((10,), torch.float32):
        raise KeyError
    assert address(scratch, 1000) == first


def cases():
    mlp = network((3, 17, 4), nn.ReLU), tasks_for((3, 17, 4), "cross_entropy", 9, 5, 6, torch.float32)
    images = [torch.randn(3, 4, 1, 16, 16), torch.randint(3, (3, 4)), torch.randn(3, 5, 1, 16, 16)]
    conv = Conv4(3, 1, 8, 16), (*images, torch.randint(3, (3, 5)))
    return {"mlp": mlp, "conv": conv}


def outcome(model: nn.Module, data) -> list[torch.Tensor]:
    with torch.no_grad():
        model.zero_grad()
    result = signmaml_ext.meta_step(model, *data, inner_lr=0.01, inner_steps=2, backend="cpu")
    adapted = signmaml_ext.adapt(model, *data[:2], inner_lr=0.01, inner_steps=2, backend="cpu")
    grads = [parameter.grad.clone() for parameter in model.parameters()]
    return [*grads, result.query_loss, result.support_loss, *adapted.values()]


@pytest.mark.parametrize("family", ["mlp", "conv"])
def test_what_lies_in_it_does_not_matter(family):
    """Scratch is filled with NaN and with large numbers before a call; results of an earlier call do not change."""
    model, data = cases()[family]
    expected = outcome(model, data)
    copies = [value.clone() for value in expected]
    for byte in (0xFF, 0x7E):
        for scratch in (fused.MEAN_ROWS, fused.WORKSPACE):
            assert len(scratch._kept) == 1
            scratch._kept[0].fill_(byte)
        for found, value in zip(outcome(model, data), expected, strict=True):
            assert torch.equal(found, value)
    for copy, value in zip(copies, expected, strict=True):
        assert torch.equal(copy, value)


def test_several_threads():
    """Concurrent calls of different sizes give the same results as each call alone."""
    works = [cases()[family] for family in ("mlp", "conv", "mlp", "conv")]
    alone = [outcome(*work) for work in works]
    with ThreadPoolExecutor(len(works)) as pool:
        for _ in range(5):
            for found, expected in zip(pool.map(lambda work: outcome(*work), works), alone, strict=True):
                for a, b in zip(found, expected, strict=True):
                    assert torch.equal(a, b)
