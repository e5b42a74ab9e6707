"""Invalid switches and a missing or broken nvcc end a build at once, with one line that says why."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.programs.installs import Environment, without_nvcc

pytestmark = [pytest.mark.packaging, pytest.mark.slow]

REFUSED = {
    "architectures": (
        {"TORCH_CUDA_ARCH_LIST": "banana"},
        "TORCH_CUDA_ARCH_LIST: expected numbers such as '8.0;9.0+PTX'",
    ),
    "jobs": ({"MAX_JOBS": "x"}, "MAX_JOBS: expected a whole number of at least 1, found 'x'"),
    "flag": ({"SIGNMAML_NO_CUDA": "maybe"}, "SIGNMAML_NO_CUDA: expected 1 or 0, found 'maybe'"),
    "both flags": (
        {"FORCE_CUDA": "1", "SIGNMAML_NO_CUDA": "1"},
        "FORCE_CUDA and SIGNMAML_NO_CUDA: expected at most one",
    ),
    "no nvcc": (
        {"FORCE_CUDA": "1", **without_nvcc()},
        "FORCE_CUDA is set, but: CUDA_HOME is /no/cuda, and there is no bin/nvcc in it.",
    ),
    "no program": (
        {"CUDACXX": "/no/nvcc"},
        "CUDACXX: expected the path of nvcc, found '/no/nvcc', which is no program",
    ),
    "broken nvcc": ({"CUDACXX": "/bin/false"}, "the nvcc found, /bin/false, cannot compile a three-line file."),
}


@pytest.fixture(scope="module")
def builder(build_requirements: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """An environment with everything a build needs, so that no test waits for an isolated one."""
    environment = Environment.create(tmp_path_factory.mktemp("builder"))
    environment.lend(build_requirements)
    return environment


@pytest.mark.parametrize("switches, reason", REFUSED.values(), ids=REFUSED)
def test_build_is_refused_in_one_line(source, builder, switches, reason):
    said = builder.pip_install("--no-build-isolation", "--no-deps", source, fails=True, **switches)
    errors = [
        line.strip() for line in said.splitlines() if line.strip().startswith("error: ") and "subprocess" not in line
    ]
    assert len(errors) == 1, said
    assert errors[0].startswith(f"error: {reason}")
    assert "Traceback" not in said
