"""Any input gives a correct result or a clear error that leaves the model unchanged; see reliability/bad_input.py."""

from __future__ import annotations

import pytest

from reliability import bad_input

# Numbers of examples in a quick run (about a second) and in a long one (a few seconds).
EXAMPLES = {
    "meta_step, evaluate, adapt": (40, 300),
    "image sets": (100, 600),
    "samplers": (60, 400),
    "configurations": (100, 600),
    "configuration files": (100, 600),
    "command lines": (30, 150),
    "checkpoints": (100, 400),
    "pictures": (30, 150),
    "archives": (30, 150),
}


def check(name: str, examples: int) -> None:
    outcomes = bad_input.run(name, examples)
    assert outcomes["served"] > 0 and outcomes["refused"] > 0, (
        f"a property that never sees both shows little: {outcomes}"
    )


@pytest.mark.parametrize("name", bad_input.PROPERTIES)
def test_a_correct_result_or_a_clear_error(name: str) -> None:
    check(name, EXAMPLES[name][0])


@pytest.mark.slow
@pytest.mark.parametrize("name", bad_input.PROPERTIES)
def test_a_correct_result_or_a_clear_error_many_times(name: str) -> None:
    check(name, EXAMPLES[name][1])
