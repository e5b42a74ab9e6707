"""Many mutants in one build: each place that a mutation changes holds all variants, and a number selects one.

`combine` writes such sources. A place is widened to a whole expression or to whole statements, and becomes

    (mutant(3) ? (VARIANT 3) : (ORIGINAL))        if (mutant(3)) { VARIANT 3 } else { ORIGINAL }

`Runner` runs the cases on a mutant in a separate process, forked from one that has already loaded torch and the module:
`mutants.py MODULE CASES`, which reads one line of JSON per mutant. CASES is a module of helpers/cases/, whose `GROUPS`
hold functions of the native module, by their names.

Only a case that reaches a mutant's place can notice it. So every case first runs on the unchanged sources, where
`mutant` writes down which places it passes. Then each mutant runs on the cases of its group that reach it, in their
order, until one notices it.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from difflib import SequenceMatcher
from pathlib import Path
from queue import SimpleQueue
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import pytest

# Included by every changed file.
HEADER = "mutants.h"
SELECTOR = "signmaml_mutant"
REACHED = "signmaml_mutants_reached"
MOST = 4096  # mutants
HEADER_TEXT = f"""#pragma once
extern "C" {{
// 0: the sources as they are; else the number of the mutant that runs.
inline __attribute__((visibility("default"))) int {SELECTOR} = 0;
// Mutants whose place has been passed.
inline __attribute__((visibility("default"))) unsigned char {REACHED}[{MOST}] = {{}};
}}
inline bool mutant(int number) {{
    {REACHED}[number] = 1;
    return number == {SELECTOR};
}}
"""


UNCHANGED = 0


class Mutation(NamedTuple):
    """Replaces `old`, which must occur exactly once in a file below csrc/, by `new`."""

    name: str
    file: str
    old: str
    new: str
    message: str = ""  # regular expression that the report must match; empty: anything


def mutate(text: str, mutation: Mutation) -> str:
    """The file's text with one mutation."""
    count = text.count(mutation.old)
    assert count == 1, f"{mutation.name}: {mutation.file} holds {count} of {mutation.old!r}"
    return text.replace(mutation.old, mutation.new)


# ---- C++ as tokens ---------------------------------------------------------------------------------------------------

_TOKEN = re.compile(
    r"//[^\n]*|\#[^\n]*|\"(?:\\.|[^\"\\])*\"|\w+(?:\.\d\w*)?"
    r"|<=|>=|==|!=|&&|\|\||\+\+|--|->|::|\+=|-=|\*=|/=|%=|\|=|&=|\S"
)
_OPENING, _CLOSING = "([{", ")]}"
_ASSIGNING = {"=", "+=", "-=", "*=", "/=", "%=", "|=", "&="}
_BEFORE_EXPRESSION = {";", ",", "return", "else"} | _ASSIGNING
_HEADERS = {"if", "for", "while", "switch", "constexpr"}  # keywords before the brackets of a statement's head


class _Tokens:
    """Tokens of a text, with their positions and the matching bracket of each bracket."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.spans = [match.span() for match in _TOKEN.finditer(text)]
        self.words = [text[start:end] for start, end in self.spans]
        self.partner: dict[int, int] = {}
        opened: list[int] = []
        for i, word in enumerate(self.words):
            if word in _OPENING:
                opened.append(i)
            elif word in _CLOSING and opened:
                self.partner[i] = opened.pop()
                self.partner[self.partner[i]] = i

    def source(self, start: int, end: int) -> str:
        return self.text[self.spans[start][0] : self.spans[end - 1][1]] if start < end else ""

    def is_comment(self, i: int) -> bool:
        return self.words[i].startswith(("//", "#"))

    def is_block(self, i: int) -> bool:
        """Whether the brace opens statements, not an initialiser."""
        return self.words[i] == "{" and not (re.fullmatch(r"\w+|\]", self.words[i - 1]) and self.words[i - 1] != "else")

    def ends_statement(self, i: int) -> bool:
        return self.words[i] == ";" or (self.words[i] == "}" and self.is_block(self.partner[i]))

    def balanced(self, start: int, end: int) -> bool:
        brackets = [i for i in range(start, end) if self.words[i] in _OPENING + _CLOSING]
        return all(start <= self.partner.get(i, -1) < end for i in brackets)

    def is_expression(self, start: int, end: int) -> bool:
        top, i = [], start
        if not self.balanced(start, end):
            return False
        while i < end:
            top.append(self.words[i])
            i = self.partner[i] + 1 if self.words[i] in _OPENING else i + 1
        return bool(top) and not set(top) & (_ASSIGNING | _HEADERS | {";", ",", "return", "else", "continue"})

    def is_statements(self, start: int, end: int) -> bool:
        words = [i for i in range(start, end) if not self.is_comment(i)]
        return not words or (self.balanced(start, end) and self.ends_statement(words[-1]))

    def widened_to_expression(self, start: int, end: int) -> tuple[int, int]:
        for partner in [self.partner.get(i, i) for i in range(start, end)]:
            start, end = min(start, partner), max(end, partner + 1)
        while start > 0 and (word := self.words[start - 1]) not in _BEFORE_EXPRESSION and word not in _OPENING:
            if word in _CLOSING:
                opening = self.partner[start - 1]
                if self.words[opening - 1] in _HEADERS or self.is_block(opening):
                    break
                start = opening
            elif self.is_comment(start - 1):
                break
            else:
                start -= 1
        while end < len(self.words) and (word := self.words[end]) not in _CLOSING and word not in (";", ","):
            if word == "{" and self.is_block(end):
                break
            end = self.partner[end] + 1 if word in _OPENING else end + 1
        return start, end

    def widened_to_statements(self, start: int, end: int) -> tuple[int, int]:
        while start > 0:
            before = start - 1
            word = self.words[before]
            if word in (";", "else") or self.is_comment(before) or self.is_block(before):
                if word != ";" or not self._in_head(before):
                    break
            elif word in _CLOSING:
                opening = self.partner[before]
                if self.words[opening - 1] in _HEADERS or self.is_block(opening):
                    break
                before = opening
            start = before
        i = start
        while i < end or not (i > start and self.ends_statement(i - 1)):
            if i == len(self.words) or self.words[i] in _CLOSING:
                return start, end
            i = self.partner[i] + 1 if self.words[i] in _OPENING else i + 1
        return start, i

    def _in_head(self, i: int) -> bool:
        """Whether a semicolon is one of `for (...; ...; ...)`."""
        while i > 0:
            i -= 1
            if self.words[i] in _CLOSING:
                i = self.partner[i]
            elif self.words[i] in _OPENING:
                return self.words[i] == "("
        return False


# ---- mutants in one text ---------------------------------------------------------------------------------------------


class _Place(NamedTuple):
    start: int
    end: int
    is_expression: bool


class _Change:
    """One mutation: the tokens it changes, and the mapping from tokens of the original to those of the mutant."""

    def __init__(self, original: _Tokens, mutant: _Tokens) -> None:
        self.original, self.mutant = original, mutant
        old, new = original.words, mutant.words
        first = next(i for i in range(len(old) + 1) if old[i : i + 1] != new[i : i + 1])
        last = 0
        while last < min(len(old), len(new)) - first and old[-1 - last] == new[-1 - last]:
            last += 1
        matcher = SequenceMatcher(None, old[first : len(old) - last], new[first : len(new) - last], autojunk=False)
        self.hunks = [
            (i1 + first, i2 + first, j1 + first, j2 + first)
            for tag, i1, i2, j1, j2 in matcher.get_opcodes()
            if tag != "equal"
        ]

    def in_mutant(self, start: int, end: int) -> tuple[int, int]:
        """The mutant's token range for one of the original, which must not cut a hunk."""
        grown_before = sum((j2 - j1) - (i2 - i1) for i1, i2, j1, j2 in self.hunks if i1 < start)
        inside = [hunk for hunk in self.hunks if start <= hunk[0] and hunk[1] <= end]
        grown = sum((j2 - j1) - (i2 - i1) for i1, i2, j1, j2 in inside)
        return start + grown_before, end + grown_before + grown

    def fits(self, place: _Place) -> bool:
        if any(i1 < edge < i2 for i1, i2, _, _ in self.hunks for edge in (place.start, place.end)):
            return False
        pairs = ((self.original, (place.start, place.end)), (self.mutant, self.in_mutant(place.start, place.end)))
        if place.is_expression:
            return all(tokens.is_expression(*span) for tokens, span in pairs)
        return all(tokens.is_statements(*span) for tokens, span in pairs)

    def places(self) -> list[_Place]:
        """The hunks' own expressions if each is one; otherwise the statements that contain them all."""
        found: list[_Place] = []
        for first, last, _, _ in self.hunks:
            place = _Place(*self.original.widened_to_expression(first, last), True)
            if found and place.start < found[-1].end:
                place = found.pop()
            found.append(place)
        if all(map(self.fits, found)):
            return found
        place = _Place(*self.original.widened_to_statements(self.hunks[0][0], self.hunks[-1][1]), False)
        assert self.fits(place), f"neither an expression nor statements: {self.original.source(place.start, place.end)}"
        return [place]


def switched(text: str, variants: Mapping[int, str], is_expression: bool) -> str:
    """The code of a place with all its variants, one of which is selected at run time."""

    def closed(code: str) -> str:
        return code + "\n" if "//" in code or "#" in code else code

    if is_expression:
        chosen = "".join(f"mutant({number}) ? ({closed(code)}) : " for number, code in variants.items())
        return f"({chosen}({closed(text)}))"
    chosen = "".join(f"if (mutant({number})) {{ {closed(code)} }} else " for number, code in variants.items())
    return f"{{ {chosen}{{ {closed(text)} }} }}"


def combine(
    text: str, mutations: Mapping[int, Mutation], switch: Callable[[str, Mapping[int, str], bool], str] = switched
) -> str:
    """The text of a file with all its mutants, by number; 0 selects the unchanged file."""
    original = _Tokens(text)
    changes = {number: _Change(original, _Tokens(mutate(text, each))) for number, each in mutations.items()}
    places = sorted((place, number) for number, change in changes.items() for place in change.places())
    groups: list[tuple[_Place, list[int]]] = []
    for place, number in places:
        if groups and place.start < groups[-1][0].end:
            groups[-1] = (_united(original, groups[-1][0], place), [*groups[-1][1], number])
        else:
            groups.append((place, [number]))
    pieces, at = [], 0
    for place, numbers in groups:
        begin, finish = original.spans[place.start][0], original.spans[place.end - 1][1]
        variants = {}
        for number in dict.fromkeys(numbers):
            assert changes[number].fits(place), f"{mutations[number].name}: cannot share its place"
            variants[number] = changes[number].mutant.source(*changes[number].in_mutant(place.start, place.end))
        pieces += [text[at:begin], switch(text[begin:finish], variants, place.is_expression)]
        at = finish
    return "".join([*pieces, text[at:]])


def _united(tokens: _Tokens, one: _Place, other: _Place) -> _Place:
    """A place that contains both."""
    for outer, inner in ((one, other), (other, one)):
        if outer.start <= inner.start and inner.end <= outer.end and (not outer.is_expression or inner.is_expression):
            return outer
    span = min(one.start, other.start), max(one.end, other.end)
    return _Place(*tokens.widened_to_statements(*span), False)


def write(source: Path, mutations: Sequence[Mutation]) -> None:
    """Writes all mutants into a copy of the sources; the first has number 1."""
    assert len(mutations) < MOST
    by_file: dict[str, dict[int, Mutation]] = {}
    for number, mutation in enumerate(mutations, 1):
        by_file.setdefault(mutation.file, {})[number] = mutation
    (source / "csrc" / HEADER).write_text(HEADER_TEXT)
    for file, of_file in by_file.items():
        path = source / "csrc" / file
        path.write_text(f'#include "{HEADER}"\n{combine(path.read_text(), of_file)}')


def build_for_cpu(folder: Path, mutations: Sequence[Mutation]) -> Path:
    """Builds the package's own module with all mutants of the CPU backend, in one instruction set; returns its path."""
    from helpers.devices import emulated

    source = folder / "source"
    emulated.copy_sources(source)
    write(source, mutations)
    # The module exports its entry and nothing else; here, the number of the mutant and what it reached too.
    lists, entry = source / "CMakeLists.txt", "global: PyInit__C;"
    assert lists.read_text().count(entry) == 1
    lists.write_text(lists.read_text().replace(entry, f"{entry} {SELECTOR}; {REACHED};"))
    emulated.configure(source, folder / "build", "CMAKE_BUILD_TYPE=Debug", "CMAKE_CXX_FLAGS_DEBUG=-O0")
    return emulated.compile_module(folder / "build", "_C")


def assert_every_variant_is_the_mutant(text: str, mutations: Mapping[int, Mutation]) -> None:
    """Each variant selected from the combined file equals the file with that one mutation."""
    for chosen in (UNCHANGED, *mutations):
        found = combine(text, mutations, lambda text, variants, _, chosen=chosen: variants.get(chosen, text))
        expected = text if chosen == UNCHANGED else mutate(text, mutations[chosen])
        assert "".join(found.split()) == "".join(expected.split())


# ---- running the cases -----------------------------------------------------------------------------------------------


class Outcome(NamedTuple):
    """How a mutant ended: the exit status of its process (minus the signal that killed it), all its output, and the
    mutants whose places each case passed, if all ended well."""

    code: int
    said: str
    reached: dict[str, list[int]]

    @property
    def report(self) -> str:
        """The last line: the error's message."""
        return self.said.strip().splitlines()[-1] if self.said.strip() else f"signal {-self.code}"

    def assert_caught(self) -> None:
        """The cases found the mutant, and did not just take too long."""
        assert self.code != 0, f"the mutant passed every case that reaches it\n{self.said}"
        assert self.code != -signal.SIGALRM, f"the cases did not end within {SECONDS} s"


class Runner:
    """Runs the cases on one mutant at a time; one runner per processor works in parallel."""

    def __init__(self, module: Path, cases: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(module), cases], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(self, number: int, group: str, cases: Sequence[str]) -> Outcome:
        """Runs these cases of a group on a mutant, in their order, until one fails."""
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps([number, group, cases]), file=self._process.stdin, flush=True)
        return Outcome(*json.loads(self._process.stdout.readline()))

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)
        self._process.stdout.close()


def groups_of(cases: str) -> dict[str, dict[str, Callable[[ModuleType], None]]]:
    """The cases of a module of helpers/cases/, by group and name."""
    found: dict[str, dict[str, Callable[[ModuleType], None]]] = importlib.import_module(f"helpers.cases.{cases}").GROUPS
    return found


class Outcomes:
    """Outcomes of the chosen mutants, by number and group, which run in parallel in the background."""

    def __init__(self, module: Path, cases: str, chosen: Sequence[tuple[int, str]]) -> None:
        workers = min(len(os.sched_getaffinity(0)), len(chosen))
        self._runners = [Runner(module, cases) for _ in range(workers)]
        self._idle: SimpleQueue[Runner] = SimpleQueue()
        for runner in self._runners:
            self._idle.put(runner)
        self._pool = ThreadPoolExecutor(workers)
        self._groups = groups_of(cases)
        self._found: dict[tuple[int, str], Future[Outcome]] = {}
        # The unchanged sources first, because the mutants wait for these.
        unchanged = [(UNCHANGED, group) for group in dict.fromkeys(group for _, group in chosen)]
        for each in dict.fromkeys((*unchanged, *chosen)):
            self._found[each] = self._pool.submit(self._run, *each)

    def _run(self, number: int, group: str) -> Outcome:
        cases = list(self._groups[group])
        if number != UNCHANGED:
            reached = self[UNCHANGED, group].reached
            cases = [name for name in cases if number in reached.get(name, ())]
            if not cases:
                return Outcome(0, "no case reaches the mutant", {})
        runner = self._idle.get()
        try:
            return runner.run(number, group, cases)
        finally:
            self._idle.put(runner)

    def __getitem__(self, which: tuple[int, str]) -> Outcome:
        return self._found[which].result()

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)
        for runner in self._runners:
            runner.close()


def chosen_of(
    items: Sequence[pytest.Item], file: str, numbers: Mapping[str, int], group_of: Callable[[Mutation], str]
) -> list[tuple[int, str]]:
    """Mutants and groups that the collected tests of a file ask for by `mutation` and `group`, in their order."""
    chosen = []
    for item in items:
        values = item.callspec.params if hasattr(item, "callspec") else {}
        if item.path == Path(file) and "mutation" in values:
            chosen.append((numbers[values["mutation"].name], group_of(values["mutation"])))
        elif item.path == Path(file) and "group" in values:
            chosen.append((UNCHANGED, values["group"]))
    return chosen


SECONDS = 300  # limit per mutant; then a signal ends it, which does not count as caught


def _in_child(path: str, cases: Mapping[str, Callable[[ModuleType], None]], number: int) -> dict[str, list[int]]:
    """Runs in the forked process: selects the mutant, runs the cases and returns the mutants whose places each passed.
    An error ends the process."""
    from helpers.devices import emulated

    signal.alarm(SECONDS)
    library = ctypes.CDLL(path)
    ctypes.c_int.in_dll(library, SELECTOR).value = number
    places = (ctypes.c_ubyte * MOST).in_dll(library, REACHED)
    native, reached = emulated.load(Path(path)), {}
    for name, case in cases.items():
        ctypes.memset(places, 0, MOST)
        case(native)
        reached[name] = [place for place, passed in enumerate(bytes(places)) if passed]
    return reached


def _serve(path: str, cases: str) -> None:
    import traceback

    import torch

    from helpers.devices import emulated

    groups = groups_of(cases)  # once, before the forks
    torch.set_num_threads(1)  # other threads do not survive a fork
    emulated.load(Path(path))
    # The first calls of these import hundreds of modules, which takes longer than most cases.
    torch.testing.assert_close(torch.zeros(1), torch.zeros(1))
    torch.use_deterministic_algorithms(torch.are_deterministic_algorithms_enabled())
    gc.freeze()  # so that collections in forked processes do not copy shared pages
    for line in sys.stdin:
        number, group, names = json.loads(line)
        with tempfile.TemporaryFile() as said, tempfile.TemporaryFile() as places:
            child = os.fork()
            if child == 0:
                os.dup2(said.fileno(), 1)
                os.dup2(said.fileno(), 2)
                code = 1
                try:
                    reached = _in_child(path, {name: groups[group][name] for name in names}, number)
                    os.write(places.fileno(), json.dumps(reached).encode())
                    code = 0
                except BaseException:
                    traceback.print_exc()
                finally:
                    sys.stderr.flush()
                    os._exit(code)
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            said.seek(0)
            places.seek(0)
            outcome = Outcome(code, said.read().decode(errors="replace"), json.loads(places.read() or b"{}"))
            print(json.dumps(outcome), flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    _serve(*sys.argv[1:])
