"""gpu_check.sh: its dry runs, its course on a machine with a GPU (acted by a script), and how it sums tests up."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

from helpers.programs import shared

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu_check.sh"
PARTS = {
    1: ["build", "platform", "conv", "meta_step", "graphs", "ops", "sanitizer"],
    2: ["kernels", "meta_step_others", "sanitizer_rest", "training"],
    3: ["run"],
}
LINE = re.compile(r"^(\w+) +(\d+) s  (.*)$", re.MULTILINE)


def gpu_check(
    *words: object, python: Path | str = sys.executable, **variables: str
) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": "/usr/bin:/bin", "PYTHON": str(python), "SIGNMAML_NO_CUDA": "1", **variables}
    return subprocess.run([str(SCRIPT), *map(str, words)], capture_output=True, text=True, env=environment)


def said(out: Path) -> dict[str, str]:
    """What the summary says of each part, in its order."""
    return {name: words for name, _, words in LINE.findall((out / "summary.txt").read_text())}


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["OUT", "--part", "tset"], "tset"),
        (["OUT", "--call", "2", "--part", "conv"], "conv"),  # a part of another call
        (["OUT", "--call", "4"], "4"),
        (["OUT", "--call"], "--call"),
        (["OUT", "--dry"], "--dry"),
        (["OUT", "OUT2"], "gpu_check.sh"),
        (["--dry-run"], "gpu_check.sh"),
    ],
)
def test_bad_arguments_are_refused(tmp_path, words, found):
    done = gpu_check(*(tmp_path / word if word.startswith("OUT") else word for word in words))
    assert done.returncode == 2 and found in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_bad_limit_is_refused(tmp_path):
    done = gpu_check(tmp_path / "out", GPU_CHECK_SECONDS="9 minutes")
    assert done.returncode == 2 and "9 minutes" in done.stderr


def test_help_is_the_header():
    done = gpu_check("--help")
    assert done.returncode == 0 and "--dry-run" in done.stdout and done.stdout.endswith("(and no --dry-run).\n")


def test_parts_leave_each_other_their_time():
    text = SCRIPT.read_text()
    kept = {name: int(seconds) for name, seconds in re.findall(r"\[(\w+)\]=(\d+)", text)}
    limit = int(re.search(r"GPU_CHECK_SECONDS:-(\d+)", text).group(1))
    for parts in PARTS.values():
        assert sum(kept[name] for name in {"build", *parts}) <= limit <= 9 * 60 - 10


# --- without a GPU ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dry_runs(tmp_path_factory) -> tuple[Path, dict[int, subprocess.CompletedProcess[str]], dict[int, dict[str, str]]]:
    """All calls into one folder, so the package is built once."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    out = tmp_path_factory.mktemp("gpu_check") / "out"
    done, summaries = {}, {}
    # A loaded machine of two cores may take longer to build than a call has; call 3 uses up all that it has.
    patient = {"GPU_CHECK_SECONDS": "1500"}
    for call in PARTS:
        done[call] = gpu_check(out, "--call", call, "--dry-run", **shared.launcher(), **({} if call == 3 else patient))
        summaries[call] = said(out)
    return out, done, summaries


@pytest.mark.slow
@pytest.mark.parametrize("call", PARTS)
def test_dry_run(dry_runs, call):
    out, done, summaries = dry_runs
    assert done[call].returncode == 0, done[call].stdout
    assert done[call].stdout.startswith("no CUDA device")
    found = summaries[call]
    assert [name for name in found if name != "build"] == [name for name in PARTS[call] if name != "build"]
    assert next(iter(found)) == "build"
    absent = {"conv", "graphs", "sanitizer", "meta_step_others", "sanitizer_rest"}
    for name, words in found.items():
        assert words.startswith("not here: no CUDA device" if name in absent else "ok"), (name, words)
    with tarfile.open(out / f"gpu_check_{call}.tar") as tar:
        names = tar.getnames()
        assert {"summary.txt", "report.md", *(f"logs/{name}.log" for name in found)} <= set(names)
        assert all(
            re.fullmatch(r"\w+\.(txt|md)|results/\w+\.json|junit/\w+\.xml|logs/\w+\.log|run/.*", n) for n in names
        )
        assert f"{PARTS[call][-1]} " in tar.extractfile("summary.txt").read().decode()
    kinds = {1: "results/meta_step_D_cpu.json", 2: "results/methods_official_cpu.json", 3: "run/metrics.jsonl"}
    assert kinds[call] in names
    assert ("holds this tree" in (out / "logs" / "build.log").read_text()) or call == 1


@pytest.mark.slow
def test_dry_run_of_tests_and_of_a_run_that_its_time_ends(dry_runs):
    out, done, summaries = dry_runs
    assert re.search(r"^  test_torch_contract: [1-9]\d* passed, 0 failed, 0 skipped$", done[1].stdout, re.MULTILINE)
    assert re.search(r"^  test_sanitizers_on_gpu: [1-9]\d* passed, 0 failed", done[1].stdout, re.MULTILINE)
    assert re.fullmatch(r"ok: iteration \d+ of 60000, stopped at the call's end", summaries[3]["run"])
    history = [json.loads(line) for line in (out / "run" / "metrics.jsonl").read_text().splitlines()]
    assert history[-1]["iteration"] > 0 and (out / "run" / "last.safetensors").is_file()


@pytest.mark.slow
def test_no_gpu_is_exit_code_3(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = gpu_check(tmp_path / "out")
    assert done.returncode == 3 and "no CUDA device" in done.stdout
    assert "no CUDA device" in (tmp_path / "out" / "summary.txt").read_text()


# --- with a GPU, acted -----------------------------------------------------------------------------------------------

# An interpreter that claims to have a GPU, notes its arguments, and does nothing but what the script relies on.
ACTOR = """#!/bin/bash
case "$*" in
  *is_available*) exit 0 ;;
  *get_device_capability*) echo 9.0; exit 0 ;;
  *junit_counts.py* | *report.py*) exec {python} "$@" ;;
esac
echo "OMP=${{OMP_NUM_THREADS:-}} $*" >>{notes}
for word; do case $word in --junitxml=*) junit=${{word#--junitxml=}} ;; esac; done
case "$*" in
  *--collect-only*) printf 'tests/ops/test_on_gpu.py::test_%s\\n' a b; exit 0 ;;
  *test_graphs_on_gpu.py*)
    echo '<testsuite><testcase name="good"/><testcase name="bad[1]"><failure/></testcase></testsuite>' >"$junit"
    exit 1 ;;
  *test_training_on_gpu.py*) exec sleep 60 ;;
  *pytest*) echo '<testsuite><testcase name="good"/><testcase name="no"><skipped/></testcase></testsuite>' >"$junit" ;;
  *sanitizer.py*) echo 'compute-sanitizer is not installed'; exit 77 ;;
esac
exit 0
"""


@pytest.fixture
def actor(tmp_path) -> Path:
    path = tmp_path / "python"
    path.write_text(ACTOR.format(python=sys.executable, notes=tmp_path / "notes"))
    path.chmod(0o755)
    return path


def test_course_of_the_first_call(tmp_path, actor):
    out = tmp_path / "out"
    parts = [
        word for name in ("build", "platform", "conv", "meta_step", "ops", "sanitizer") for word in ("--part", name)
    ]
    done = gpu_check(out, *parts, python=actor)
    assert done.returncode == 0, done.stdout
    assert list(said(out)) == ["build", "platform", "conv", "meta_step", "ops", "sanitizer"]
    assert said(out)["sanitizer"] == "not here: compute-sanitizer is not installed"
    assert "  test_conv_on_gpu: 1 passed, 0 failed, 1 skipped" in done.stdout
    notes = (tmp_path / "notes").read_text().splitlines()
    cores = len(os.sched_getaffinity(0))
    (conv,) = (note for note in notes if "test_conv_on_gpu.py" in note)
    assert conv.startswith(f"OMP={cores} -m pytest") and "-x" not in conv.split()
    assert [note.split()[-1] for note in notes if "test_on_gpu.py" in note] == ["tests/ops/test_on_gpu.py"]
    assert [note.split()[-1] for note in notes if "sanitizer.py" in note] == ["memcheck", "racecheck"]
    assert sum("gpu_cases.py" in note for note in notes) == 1
    assert sum("pip install" in note for note in notes) == 1
    # The next call finds the package, and takes parts in its own order.
    done = gpu_check(out, "--part", "ops", "--part", "conv", python=actor)
    assert list(said(out)) == ["build", "conv", "ops"]
    assert sum("pip install" in note for note in (tmp_path / "notes").read_text().splitlines()) == 1


@pytest.mark.slow  # waits for its time limit
def test_failures_and_limits_are_named_and_the_rest_still_runs(tmp_path, actor):
    out = tmp_path / "out"
    done = gpu_check(
        out, "--part", "graphs", "--part", "ops", python=actor, GPU_CHECK_SECONDS="55"
    )  # 15 seconds but for what is kept for ops
    assert done.returncode == 1
    assert list(said(out)) == ["build", "graphs", "ops"] and said(out)["graphs"].startswith("FAILED (exit 1)")
    assert "  test_graphs_on_gpu: 1 passed, 1 failed, 0 skipped\n    failed: bad[1]\n" in done.stdout
    assert "  test_training_on_gpu: no result" in done.stdout
    assert said(out)["ops"] == "ok", "it has the time that was kept for it"
    with tarfile.open(out / "gpu_check_1.tar") as tar:
        assert "junit/test_graphs_on_gpu.xml" in tar.getnames()


# --- counts of tests -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_counts_of_a_real_pytest_whose_failures_are_printed_at_once(tmp_path):
    import junit_counts

    tests = tmp_path / "test_some.py"
    tests.write_text(
        "import pytest\n"
        "def test_good(): pass\n"
        "def test_bad(): assert 1 == 2\n"
        "@pytest.mark.skip\n"
        "def test_absent(): pass\n"
        "@pytest.fixture\n"
        "def broken():\n"
        "    yield\n"
        "    raise OSError('afterwards')\n"
        "def test_late(broken): pass\n"
        "def test_end():\n"
        "    import os\n"
        "    if 'ENDS' in os.environ: os._exit(1)\n"
    )
    file = tmp_path / "test_some.xml"
    words = [sys.executable, "-m", "pytest", "-p", "helpers.programs.failures_at_once", "-p", "no:cacheprovider"]
    words += ["-v", "--tb=short", f"--junitxml={file}", str(tests)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tests"), "PYTHONUNBUFFERED": "1"}
    # Ends as a process does that is killed: no junit file, but what failed before is there.
    ended = subprocess.run(words, capture_output=True, text=True, env={**environment, "ENDS": "1"}, cwd=tmp_path)
    assert "FAILED NOW: test_some.py::test_bad (call)" in ended.stdout and "assert 1 == 2" in ended.stdout
    assert "no result" in junit_counts.lines(file)[0]
    whole = subprocess.run(words, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert whole.returncode == 1, whole.stdout
    assert junit_counts.lines(file) == [
        "  test_some: 2 passed, 2 failed, 1 skipped", "    failed: test_bad", "    failed: test_late"
    ]  # fmt: skip
    file.write_text("<testsuite>")
    assert "damaged" in junit_counts.lines(file)[0]


def test_the_sanitizers_watch_every_kernel() -> None:
    """By a part of its name, as compute-sanitizer takes it."""
    listed = re.search(
        r"^KERNELS = \((.*?)^\)", (ROOT / "tests/gpu/sanitizer.py").read_text(), re.DOTALL | re.MULTILINE
    )
    assert listed is not None
    parts = re.findall(r'"(\w+)"', listed[1])
    sources = "\n".join(path.read_text() for path in sorted((ROOT / "csrc" / "kernels").glob("*.cuh")))
    kernels = set(re.findall(r"__global__ [^;{]*?\b(\w+_kernel)\(", sources))
    assert len(kernels) > 20
    assert {kernel for kernel in kernels if not any(part in kernel for part in parts)} == set()
