"""The clock and the statistics of the benchmarks; nothing is asserted about how long anything takes."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch


def test_rounds_are_interleaved_and_ratios_paired():
    import harness

    calls: list[str] = []
    candidates = {name: lambda name=name: calls.append(name) for name in "abc"}
    found = harness.compare(candidates, seconds=0, device=torch.device("cpu"), least=4, flush=lambda: calls.append("-"))
    assert "".join(calls)[-24:] == "-a-b-c-c-b-a-a-b-c-c-b-a"
    assert {len(samples) for samples in found.samples.values()} == {4}
    paired = harness.Comparison({"ours": [1.0, 2.0, 4.0], "theirs": [3.0, 6.0, 4.0]})
    assert paired.ratio("ours", "theirs").median == 3
    assert paired.rate("ours", 8e6).median == 4  # GB/s of 8 MB in 2 ms


def test_short_calls_are_repeated_within_a_sample():
    import harness

    calls: list[int] = []
    harness.compare({"a": lambda: calls.append(1)}, seconds=0, device=torch.device("cpu"), least=2, sample_ms=5)
    assert len(calls) > 20


def test_summary_has_median_and_quartiles():
    import harness

    summary = harness.Summary.of([5, 1, 2, 4, 3])
    assert (summary.low, summary.median, summary.high, summary.samples) == (2, 3, 4, 5)
    assert harness.Summary.of([7]) == harness.Summary(7, 7, 7, 1)


def test_stamp_says_where_and_how(tmp_path):
    import harness

    path = tmp_path / "result.json"
    harness.write(path, {**harness.stamp(torch.device("cpu")), "time": harness.Summary.of([1.23456789])})
    written = json.loads(path.read_text())
    for key in ("command", "device", "threads", "torch", "driver", "commit", "date", "load_before", "instruction_set"):
        assert key in written
    assert written["time"] == {"median": 1.2346, "low": 1.2346, "high": 1.2346, "n": 1}


def test_peak_memory_sees_what_was_used_and_freed():
    import harness

    watched = harness.PeakMemory(torch.device("cpu"))
    torch.ones(40 << 20, dtype=torch.uint8)  # freed at once
    assert 35 < watched.mib() < 60


@pytest.mark.slow
@pytest.mark.parametrize("method", ["sign-maml", "fo-maml", "maml"])
def test_peers_give_the_meta_gradient_of_the_definition(method):
    """The checks of bench_meta_step accept every implementation available here and catch a wrong one."""
    import bench_meta_step
    from peers import Step
    from workloads import WORKLOADS

    problem = replace(WORKLOADS["D"].problem(tasks=4, steps=2, device=torch.device("cpu")), method=method)
    checker = bench_meta_step.Checker(problem)
    checked = []
    for each in bench_meta_step.implementations():
        if each.slow_to_prepare or each.why_not(problem) is not None:
            continue
        checker.check(each)
        assert checker.drift(each.prepare(problem)) < 1
        checked.append(each.name)
    assert {"sequential loop", "torch.func vmap", "signmaml_ext, cpu"} <= set(checked)
    assert ("hand-tuned PyTorch" in checked) == (method != "maml"), "its gradients are of first order"

    def one_step_less(problem):
        base = bench_meta_step.importlib.import_module("peers.sequential")
        return Step(lambda: base.meta_step(problem.with_steps(max(problem.steps - 1, 0))))

    wrong = bench_meta_step.Implementation("wrong", lambda problem: None, one_step_less)
    with pytest.raises(bench_meta_step.WrongGradient, match="float64"):
        checker.check(wrong)


class SimulatedDevice:
    """torch.cuda as far as the clock uses it, with a host that is slower than the device. Times are in clock cycles."""

    HOST, DEVICE = 500_000, 1_000  # to queue a call, and to run it

    def __init__(self) -> None:
        self.now, self.free_at, self.sleeps = 0, 0, []
        device = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing
                self.at = 0

            def record(self) -> None:
                self.at = device.free_at = max(device.free_at, device.now)

            def query(self) -> bool:
                return self.at <= device.now

            def synchronize(self) -> None:
                device.now = max(device.now, self.at)

            def elapsed_time(self, end: Event) -> float:
                return float(end.at - self.at)

        self.Event = Event

    def synchronize(self, _: object) -> None:
        self.now = max(self.now, self.free_at)

    def _sleep(self, cycles: int) -> None:
        self.sleeps.append(cycles)
        self.free_at = max(self.free_at, self.now) + cycles

    def launch(self) -> None:
        self.now += self.HOST
        self.free_at = max(self.free_at, self.now) + self.DEVICE


def test_short_kernels_are_timed_without_the_host(monkeypatch):
    import harness

    simulated = SimulatedDevice()
    for name in ("Event", "synchronize", "_sleep"):
        assert hasattr(torch.cuda, name)
        monkeypatch.setattr(torch.cuda, name, getattr(simulated, name))
    device = torch.device("cuda")
    found = harness.compare({"a": simulated.launch}, seconds=0, device=device, sample_ms=20_000, queued=True)
    assert found.samples["a"] == [SimulatedDevice.DEVICE] * 3
    assert simulated.sleeps[0] < simulated.sleeps[1] <= harness.LONGEST_SLEEP, "the first sleep was too short"
    found = harness.compare({"a": simulated.launch}, seconds=0, device=device, sample_ms=20_000)
    assert min(found.samples["a"]) > SimulatedDevice.HOST / 2, "without the sleep, the host's time is seen"

    def waiting() -> None:
        simulated.launch()
        simulated.synchronize(device)

    harness.compare({"a": waiting}, seconds=0, device=device, queued=True)  # ends although the host always waits
    assert max(simulated.sleeps) <= 4 * harness.LONGEST_SLEEP
