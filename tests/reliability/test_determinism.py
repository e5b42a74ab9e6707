"""The bitwise equalities that docs/determinism.md promises."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import signmaml_ext
from helpers.cases import nets
from helpers.cases.toy_images import toy_images
from signmaml.episodes import EpisodeSampler
from signmaml_ext import meta_accumulate_, sign_step_
from signmaml_ext._loader import C

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def threads_restored() -> Iterator[None]:
    threads, isa = torch.get_num_threads(), C.cpu_isa()
    yield
    torch.set_num_threads(threads)
    C.select_cpu_isa(isa)


def test_the_tests_that_the_page_names_exist() -> None:
    page = (ROOT / "docs" / "determinism.md").read_text(encoding="utf-8")
    named = re.findall(r"`(tests/[\w/.]+)`", page)
    assert len(named) > 8
    assert all((ROOT / path).exists() for path in named)


def test_episodes_do_not_depend_on_the_split_into_calls_or_the_meta_batch() -> None:
    images = toy_images()
    one = EpisodeSampler(images, ways=3, shots=1, queries=2, tasks=12, seed=5)
    other = EpisodeSampler(images, ways=3, shots=1, queries=2, tasks=5, seed=5)
    whole = one.draw(1)  # tasks 12 to 23
    parts = [other.draw_tasks(12, 5), other.draw_tasks(17, 1), other.draw_tasks(18, 6)]
    for index, tensor in enumerate(whole):
        assert torch.equal(tensor, torch.cat([part[index] for part in parts]))


def flat_results() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    grads, params = (torch.randn(5, 100_003, generator=generator) for _ in range(2))
    sign_step_(params, grads, torch.tensor([0.3]), nonfinite=torch.zeros(5, dtype=torch.bool))
    out = torch.ones(100_003)
    meta_accumulate_(out, grads, nonfinite=torch.zeros(5, dtype=torch.bool))
    return [params, out]


def test_flat_operators_do_not_depend_on_threads_and_instruction_set(threads_restored: None) -> None:
    torch.set_num_threads(1)
    expected = flat_results()
    for isa in C.cpu_isas():
        C.select_cpu_isa(isa)
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert all(torch.equal(a, b) for a, b in zip(flat_results(), expected, strict=True)), (isa, threads)


def test_a_row_of_a_flat_operator_does_not_depend_on_its_company() -> None:
    generator = torch.Generator().manual_seed(0)
    grads, params = (torch.randn(5, 10_001, generator=generator) for _ in range(2))
    alone = params[2:3].clone()
    sign_step_(alone, grads[2:3].clone(), torch.tensor([0.3]), nonfinite=torch.zeros(1, dtype=torch.bool))
    sign_step_(params, grads, torch.tensor([0.3]), nonfinite=torch.zeros(5, dtype=torch.bool))
    assert torch.equal(params[2], alone[0])


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize("method", ["sign-maml", "fo-maml"])
def test_the_same_call_gives_the_same_bits(backend: str, method: str) -> None:
    if (backend, method) == ("cpu", "fo-maml"):
        pytest.skip("the native steps on flat buffers are sign steps")
    results, data = [], nets.vector_tasks(dtype=torch.float32)
    for _ in range(2):
        model = nets.mlp()
        for seed, parameter in enumerate(model.parameters()):
            generator = torch.Generator().manual_seed(seed)
            torch.nn.init.normal_(parameter, generator=generator)
        result = signmaml_ext.meta_step(model, *data, inner_lr=0.05, inner_steps=3, backend=backend, method=method)
        results.append([result.query_loss, result.support_loss, *(p.grad for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_dropout_of_a_task_does_not_depend_on_the_pieces() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 3)).double()
    data = nets.vector_tasks()
    arguments = {"inner_lr": 0.05, "inner_steps": 2, "seed": 7}
    whole = signmaml_ext.meta_step(model, *data, **arguments).query_loss
    for task in range(len(whole)):
        piece = [part[task : task + 1] for part in data]
        assert torch.equal(
            signmaml_ext.meta_step(model, *piece, first_task=task, **arguments).query_loss[0], whole[task]
        )


@pytest.mark.slow
def test_a_fresh_process_draws_the_same_episodes(tmp_path: Path) -> None:
    code = (
        "import torch; from signmaml.episodes import SinusoidSampler\n"
        "print(SinusoidSampler(shots=3, queries=3, tasks=2, seed=9).draw(4).query_y.flatten().tolist())"
    )
    command = [sys.executable, "-c", code]
    said = [subprocess.run(command, check=True, capture_output=True, text=True, cwd=tmp_path).stdout for _ in range(2)]
    assert said[0] == said[1] != ""
