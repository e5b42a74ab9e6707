"""The CPU backend's threads: forked children, several callers at once, signals."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest
import torch

from helpers.cases.flat_buffers import assert_same_bits, expected_step, flags, gradients
from signmaml_ext import sign_step_

BIG = 400_000

FORK = f"""
import os, signal, sys, torch
from signmaml_ext import sign_step_

params, grads = torch.zeros(2, {BIG}), torch.ones(2, {BIG})
lr, nonfinite = torch.ones(1), torch.zeros(2, dtype=torch.bool)

def step():
    torch.set_num_threads(2)
    sign_step_(params, grads, lr, nonfinite=nonfinite)
    torch.set_num_threads(1)  # torch's own threads do not survive a fork

step()
children = []
for _ in range(4):
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        step()
        step()
        os._exit(0 if bool((params == -3).all()) else 1)
    children.append(child)
step()
statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
assert statuses == [0] * 4, statuses
assert bool((params == -2).all())
"""


@pytest.mark.slow
def test_forked_children_get_threads_of_their_own():
    done = subprocess.run([sys.executable, "-c", FORK], capture_output=True, text=True, timeout=120, cwd="/")
    assert done.returncode == 0, done.stderr


def test_callers_at_once_do_not_disturb_one_another(threads):
    torch.set_num_threads(2)
    lr, failures = torch.tensor([0.5]), []

    def work(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        params = torch.randn(2, BIG, generator=generator)
        grads = torch.randn(2, BIG, generator=generator)
        for _ in range(5):
            expected, _ = expected_step(params, grads, lr)
            sign_step_(params, grads, lr, nonfinite=flags(2))
            if not torch.equal(params, expected):
                failures.append(seed)

    callers = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not failures


@pytest.mark.parametrize("count", [1, 2, 3, 64])
def test_many_small_calls(threads, count):
    """Calls in quick succession, so that threads wake late and find the work done."""
    grads, lr = gradients(3, 70_000, torch.float32), torch.tensor([0.5])
    params = torch.zeros(3, 70_000)
    torch.set_num_threads(count)
    for _ in range(500):
        sign_step_(params, grads, lr, nonfinite=flags(3))
    torch.set_num_threads(1)
    assert_same_bits(params, expected_step(torch.zeros(3, 70_000), grads, 500 * lr)[0])
