"""The tables on the pages match the result files and never mix machines."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("page", ["README.md", "docs/benchmarks.md", "docs/evidence.md"])
def test_pages_show_the_committed_results(page):
    import report

    text = (ROOT / page).read_text(encoding="utf-8")
    assert text == report.filled(text), "run: python benchmarks/report.py --write"


def test_every_table_has_a_place():
    import report

    pages = [(ROOT / page).read_text(encoding="utf-8") for page in report.PAGES]
    shown = [place[2] for page in pages for place in report.PLACE.finditer(page)]
    assert sorted(shown) == sorted(report.TABLES), "each once"
    assert all(page.count("<!-- table: ") == page.count("<!-- end table -->") for page in pages)


def test_workloads_are_defined_once():
    import report
    import workloads

    assert {letter: workload.summary for letter, workload in workloads.WORKLOADS.items()} == report.WORKLOADS


def test_results_of_two_machines_are_refused(tmp_path):
    import report

    common = {"benchmark": "meta_step", "processor": "p", "threads": 2, "torch": "2.8"}
    for number in (1, 2):
        path = tmp_path / f"{number}.json"
        path.write_text(json.dumps({**common, "device": f"machine {number}"}))
    with pytest.raises(ValueError, match="one machine"):
        report.read("meta_step", tmp_path)


def summary(value):
    return {"median": value, "low": value / 2, "high": value * 2, "n": 3}


STAMP = {"device": "this CPU", "processor": "this CPU", "threads": 2, "torch": "2.8", "python": "3.12",
         "commit": "abc", "date": "2026-01-02 03:04", "device_type": "cpu", "instruction_set": "avx2",
         "load_before": 0.25,
         "command": "python benchmarks/bench_meta_step.py"}  # fmt: skip


def test_numbers_come_from_the_files(tmp_path):
    import report

    def row(ms, speedup):
        shares = {"share_of_matrix": summary(0.125), "gflops": summary(9.0)}
        return {"time_ms": summary(ms), "speedup": summary(speedup), "memory_mib": 10 * ms, **shares}

    point = {
        "tasks": 3, "steps": 5, "gflop": 1.5, "matrix_gflops": summary(72.0), "skipped": {"higher": "not installed"},
        "implementations": {"sequential loop": row(80.0, 1.0), "signmaml_ext, cpu": row(16.0, 4.75)},
    }  # fmt: skip
    result = {"benchmark": "meta_step", "workload": "A", "points": [point], **STAMP}
    (tmp_path / "meta_step_A_cpu.json").write_text(json.dumps(result))
    text = report.printed(tmp_path)
    assert "| **signmaml_ext, cpu** | 16 ms, 4.75x |" in text
    assert "higher: not installed (A)" in text and "this CPU, avx2, 2 threads" in text
    assert f"| A | {report.WORKLOADS['A']} | 3 | 1.5 |" in text
    assert "| A | cpu | 4.75 (2.38 to 9.5) | - | 0.20 |" in text
    assert "| **signmaml_ext, cpu** | 9 (12%) |" in text and "| large matrix product | 72 |" in text
    assert "| 16 ms | 4.75x | - | 160 / 800 |" in text
    assert "### kernels" not in text and report.content("stages", tmp_path) == report.NOTHING


def test_maml_is_compared_with_its_fastest_peer_and_with_sign_maml(tmp_path):
    import report

    ours = {"time_ms": summary(8.0), "speedup": summary(10.0), "speedup_over_best_peer": summary(6.0)}
    rows = {"sequential loop": {"time_ms": summary(80.0)}, "higher": {"time_ms": summary(48.0)}}
    rows["signmaml_ext, cpu"] = {**ours, "times_sign_maml": summary(3.5)}
    point = {"tasks": 3, "steps": 5, "gflop": 1.5, "best_peer": "higher", "implementations": rows, "skipped": {}}
    result = {"benchmark": "meta_step_maml", "workload": "A", "points": [point], **STAMP}
    (tmp_path / "meta_step_A_maml_cpu.json").write_text(json.dumps(result))
    text = report.content("meta-steps of maml", tmp_path)
    assert "| A | cpu | 8 ms | 10 (5 to 20) | 6 (3 to 12), higher | 3.5 (1.75 to 7) |" in text
    assert report.content("meta-steps", tmp_path) == report.NOTHING, "the tables of sign-maml do not have it"


def test_what_learnable_rates_cost(tmp_path):
    import report

    row = {"workload": "D", "method": "maml", "ms": summary(5.0)}
    row["ratio"] = {"one": summary(1.125), "an element": summary(1.5)}
    result = {"benchmark": "rates", "steps": 5, "results": [row], **STAMP}
    (tmp_path / "rates_cpu.json").write_text(json.dumps(result))
    assert report.content("rates", tmp_path).splitlines()[-1] == "| D, maml | 5 ms | 1.12 | 1.50 |"
