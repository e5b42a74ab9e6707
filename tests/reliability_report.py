"""What was tried and what survived: python -m tests.reliability_report [--write] [--examples N] [--iterations N].

Runs longer versions of what tests/reliability runs, each part in turn, and prints one table; `--write` keeps it in
docs/reliability.md. A part that finds something ends the report with its error.
"""

from __future__ import annotations

import argparse
import ast
import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "reliability.md"
sys.path.insert(0, str(ROOT / "tests"))

Row = tuple[str, str, str]  # part, tried, outcome


def properties(options: argparse.Namespace) -> list[Row]:
    """Bad input, drawn at random and anew for every report."""
    from reliability import bad_input

    rows = []
    for name in bad_input.PROPERTIES:
        outcomes = bad_input.run(name, options.examples, repeatable=False)
        tried = sum(outcomes.values())
        rows.append(
            (f"bad input: {name}", f"{tried} inputs", f"{outcomes['served']} served, {outcomes['refused']} refused")
        )
    return rows


def native(options: argparse.Namespace) -> list[Row]:
    """The installed native module, against Python and with arbitrary structs."""
    from reliability import native_cases
    from signmaml_ext._loader import C

    command = [sys.executable, native_cases.__file__, C.__file__, str(options.examples // 20)]
    counts = ast.literal_eval(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    served, refused = counts.pop("struct served"), counts.pop("struct refused")
    calls = ", ".join(f"{count} {name}" for name, count in counts.items())
    return [
        ("native operators, every instruction set", calls, "as in Python; the same bits for any number of threads"),
        ("native structs of any content", f"{served + refused} calls", f"{served} served, {refused} refused, no crash"),
    ]


def sanitizers(options: argparse.Namespace) -> list[Row]:
    """The CPU backend compiled with sanitizers."""
    return pytest_rows("sanitizers (address, undefined, thread)", "test_native.py", "under_sanitizers")


def faults(options: argparse.Namespace) -> list[Row]:
    """A fault at every step of writing to disk."""
    import torch

    from reliability import test_faults

    torch.set_num_threads(1)  # faults run in forked processes, and other threads do not survive a fork
    rows = []
    with tempfile.TemporaryDirectory() as place:
        whole = Path(place) / "whole"
        test_faults.trainer(whole).fit()
        numbers = list(test_faults.step_numbers(Path(place) / "count", every=1))
        for check, what in (
            (test_faults.check_killed_at, "killed (SIGKILL)"),
            (test_faults.check_no_space_at, "no space"),
        ):
            for number in numbers:
                check(Path(place) / f"{what}-{number}", whole, number)
            rows.append(
                (
                    f"faults: {what} at each step of a run towards the disk",
                    f"{len(numbers)} steps",
                    f"{len(numbers)} survived: what was saved is whole, the resumed run has the same bits",
                )
            )
    return rows


def others(options: argparse.Namespace) -> list[Row]:
    """Parts that run whole test files."""
    return [
        *pytest_rows("hostile files", "test_hostile_files.py"),
        *pytest_rows(
            "faults: disks, clocks, locks, NaN, memory", "test_faults.py", "not some_steps and not every_step"
        ),
        *pytest_rows("several processes", "test_distributed.py"),
        *pytest_rows("two machines", "test_two_machines.py"),
        *pytest_rows("determinism", "test_determinism.py"),
    ]


def pytest_rows(part: str, file: str, chosen: str = "") -> list[Row]:
    """Runs a file of tests; the last line that pytest prints is the outcome."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"tests/reliability/{file}"]
    done = subprocess.run(command + (["-k", chosen] if chosen else []), cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{part}:\n{done.stdout[-6000:]}")
    outcome = done.stdout.strip().splitlines()[-1].split(" in ")[0].strip("= ")
    return [(part, f"`tests/reliability/{file}`", outcome)]


def endurance(options: argparse.Namespace) -> list[Row]:
    """A long run, once uninterrupted and once killed repeatedly."""
    from reliability import long_run

    with tempfile.TemporaryDirectory() as place:
        command = [sys.executable, long_run.__file__, "--both", place, str(options.iterations), str(options.kills)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT / "tests")}
        said = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
    found = json.loads(said.strip().splitlines()[-1])
    if not found["same_as_uninterrupted"] or found["records_found"] != found["records_expected"]:
        raise SystemExit(f"endurance: {found}")
    same = f"{found['records_found']} of {found['records_expected']} records; the bits of an uninterrupted run"
    course = (
        f"memory {found['memory_growth_mib']:+.2f} MiB, iterations a CPU second {100 * found['rate_change']:+.1f} %"
    )
    return [
        ("long run, killed and resumed", f"{found['iterations']} iterations, {found['kills']} kills", same),
        ("long run, last fifth against the second fifth", f"{found['iterations']} iterations", course),
    ]


PARTS: dict[str, Callable[[argparse.Namespace], list[Row]]] = {
    "properties": properties,
    "native": native,
    "faults": faults,
    "others": others,
    "sanitizers": sanitizers,
    "endurance": endurance,
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Runs the reliability tests at length and prints their figures.")
    parser.add_argument("--examples", type=int, default=1000, help="inputs of each property (1000)")
    parser.add_argument("--iterations", type=int, default=20_000, help="of the long run (20000)")
    parser.add_argument("--kills", type=int, default=20, help="that hit the long run (20)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="which parts to run (all)")
    parser.add_argument("--write", action="store_true", help="keep the table in docs/reliability.md")
    options = parser.parse_args()
    rows: list[Row] = []
    for name in options.parts:
        began = time.monotonic()
        rows += PARTS[name](options)
        print(f"{name}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    if options.write:
        PAGE.write_text(with_rows(PAGE.read_text(encoding="utf-8"), rows), encoding="utf-8")
    print(with_rows(EMPTY, rows))


EMPTY = "| part | tried | outcome | on |\n|---|---|---|---|\n"


def with_rows(page: str, rows: list[Row]) -> str:
    """The page with these rows in its table; they replace earlier rows of the same part."""
    import torch

    when = datetime.datetime.now(datetime.timezone.utc).date()
    on = f"{when}, torch {torch.__version__}, {os.cpu_count()} cores"
    before, after = page.split(EMPTY)
    kept = [line for line in after.splitlines() if line.startswith("| ")]
    lines = {line.split(" | ")[0]: line for line in kept}
    lines |= {f"| {part}": f"| {part} | {tried} | {outcome} | {on} |" for part, tried, outcome in rows}
    rest = after[sum(len(line) + 1 for line in kept) :]
    return before + EMPTY + "".join(f"{line}\n" for line in sorted(lines.values())) + rest


if __name__ == "__main__":
    main()
