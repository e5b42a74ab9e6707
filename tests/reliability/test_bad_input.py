"""Whatever comes in: a correct result or a clear error, and the model as it was; see helpers/bad_input.py."""

from __future__ import annotations

import pytest

from helpers import bad_input

# Examples of a quick run and of a long one: about two and about ten seconds.
EXAMPLES = {
    "meta_step, evaluate, adapt": (60, 500),
    "image sets": (150, 1000),
    "samplers": (100, 500),
    "configurations": (150, 1000),
    "configuration files": (150, 1000),
    "command lines": (50, 300),
    "checkpoints": (150, 1000),
    "pictures": (40, 300),
    "archives": (40, 300),
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
