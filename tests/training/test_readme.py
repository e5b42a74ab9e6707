"""The code in the README runs as it stands, but for the number of iterations."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

README = Path(__file__).resolve().parents[2] / "README.md"


@pytest.mark.slow
def test_training_loop_of_the_readme(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert "range(100)" in code
    exec(code.replace("range(100)", "range(2)"), {})
    iteration, loss, accuracy = capsys.readouterr().out.split()
    assert iteration == "0" and float(loss) > 0 and 0 <= float(accuracy) <= 1
