"""The README's tables are those of the result files, and tables never mix machines."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_readme_shows_the_committed_results():
    import report

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = text.split(report.BEGIN)[1].split(report.END)[0].strip()
    assert shown == report.section(), "run: python benchmarks/report.py --write"


def test_the_page_on_any_module_shows_the_committed_results():
    import bench_zoo

    page = (ROOT / "docs" / "any_module.md").read_text(encoding="utf-8")
    for name, table in (("zoo_cpu.json", bench_zoo.rows), ("zoo_compiled_cpu.json", bench_zoo.compiled_rows)):
        results = json.loads((ROOT / "benchmarks" / "results" / name).read_text())["results"]
        assert table(results) in page


def test_every_picture_of_the_section_is_there():
    import report

    names = [part.split(")")[0] for part in report.section().split("](") if part.startswith("docs/")]
    assert [name for name in names if not (ROOT / name).is_file()] == []


def test_results_of_two_machines_are_refused(tmp_path):
    import report

    common = {"benchmark": "meta_step", "processor": "p", "threads": 2, "torch": "2.8"}
    for number in (1, 2):
        path = tmp_path / f"{number}.json"
        path.write_text(json.dumps({**common, "device": f"machine {number}"}))
    with pytest.raises(ValueError, match="one machine"):
        report.read("meta_step", tmp_path)


def test_numbers_come_from_the_files(tmp_path):
    import report

    def summary(value):
        return {"median": value, "low": value, "high": value, "n": 3}

    def row(ms, speedup):
        shares = {"share_of_matrix": summary(0.125), "gflops": summary(9.0)}
        return {"time_ms": summary(ms), "speedup": summary(speedup), "memory_mib": 10 * ms, **shares}

    point = {
        "tasks": 3, "steps": 5, "gflop": 1.5, "matrix_gflops": summary(72.0), "skipped": {"higher": "not installed"},
        "implementations": {"sequential loop": row(80.0, 1.0), "signmaml_ext, cpu": row(16.0, 4.75)},
    }  # fmt: skip
    stamp = {"device": "this CPU", "processor": "this CPU", "threads": 2, "torch": "2.8", "python": "3.12",
             "commit": "abc", "date": "2026-01-02 03:04", "device_type": "cpu", "instruction_set": "avx2",
             "load_before": 0.25,
             "command": "python benchmarks/bench_meta_step.py"}  # fmt: skip
    result = {"benchmark": "meta_step", "workload": "A", "points": [point], **stamp}
    (tmp_path / "meta_step_A_cpu.json").write_text(json.dumps(result))
    text = report.section(tmp_path)
    assert "| **signmaml_ext, cpu** | 16 ms, 4.75x, 12% |" in text
    assert "higher: not installed (A)" in text and "this CPU, avx2, 2 threads" in text
    assert "| A | cpu | 4.75 (4.75 to 4.75) | - | 9 of 72 GFLOP/s | 12% | 0.20 |" in text


@pytest.mark.slow
def test_gpu_check_says_when_there_is_no_gpu(tmp_path):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    script = ROOT / "benchmarks" / "gpu_check.sh"
    environment = {"PATH": "/usr/bin:/bin", "PYTHON": __import__("sys").executable}
    done = subprocess.run([str(script), str(tmp_path / "out")], capture_output=True, text=True, env=environment)
    assert done.returncode == 3 and "no CUDA device" in done.stdout
    assert "no CUDA device" in (tmp_path / "out" / "summary.txt").read_text()
    bad = subprocess.run(
        [str(script), str(tmp_path), "--part", "tset"], capture_output=True, text=True, env=environment
    )
    assert bad.returncode == 2 and "tset" in bad.stderr
