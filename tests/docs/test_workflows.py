"""The GitHub workflows are well formed and test what the package claims to support. They cannot be run here."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))

pytestmark = pytest.mark.skipif(not WORKFLOWS, reason="a source tree without its hidden files")


@pytest.mark.slow
@pytest.mark.parametrize(
    "check",
    [["check_jsonschema", "--builtin-schema", "vendor.github-workflows"], ["yamllint", "--strict"]],
    ids=["schema", "yamllint"],
)
def test_workflows_pass_the_linters(check: list[str]) -> None:
    pytest.importorskip(check[0], reason="pip install '.[test]' brings the linters")
    done = subprocess.run(
        [sys.executable, "-m", *check, *map(str, WORKFLOWS)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_supported_python_is_tested_and_gets_a_wheel() -> None:
    supported = [
        classifier.rsplit(" ", 1)[1]
        for classifier in PROJECT["project"]["classifiers"]
        if classifier.startswith("Programming Language :: Python :: 3.")
    ]
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "tests.yml").read_text(encoding="utf-8"))["jobs"]
    assert jobs["quick"]["strategy"]["matrix"]["python"] == supported
    assert PROJECT["tool"]["cibuildwheel"]["build"] == [f"cp{version.replace('.', '')}-*" for version in supported]
