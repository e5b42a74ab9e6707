"""Two machines on one: network namespaces with a cable between them."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

CABLE = "cable"
ADDRESSES = ("10.77.0.1", "10.77.0.2")


@dataclass(frozen=True)
class TwoMachines:
    """Names of two namespaces; in each, an interface `CABLE` with an address of `ADDRESSES` leads to the other."""

    names: tuple[str, str]

    def start(self, machine: int, command: Sequence[str], **environment: str) -> subprocess.Popen[str]:
        """Starts a program on machine 0 or 1."""
        return subprocess.Popen(
            ["ip", "netns", "exec", self.names[machine], *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parent,  # not the checkout, whose sources would hide the installed package
            env={**os.environ, **environment},
        )

    def pull_the_cable(self) -> None:
        _ip("-n", self.names[0], "link", "set", CABLE, "down")


@contextlib.contextmanager
def two_machines() -> Iterator[TwoMachines]:
    """Creates the two machines; skips the test where that is not allowed."""
    if shutil.which("ip") is None:
        pytest.skip("two machines: iproute2 is not installed")
    if os.geteuid() != 0:
        pytest.skip("two machines: network namespaces need root")
    tag = uuid.uuid4().hex[:6]
    names = (f"signmaml-{tag}-a", f"signmaml-{tag}-b")
    try:
        try:
            for name in names:
                _ip("netns", "add", name)
            _ip("-n", names[0], "link", "add", CABLE, "type", "veth", "peer", "name", CABLE, "netns", names[1])
        except subprocess.CalledProcessError as error:
            pytest.skip(f"two machines: network namespaces are not allowed here ({error.stderr.strip()})")
        for name, address in zip(names, ADDRESSES, strict=True):
            _ip("-n", name, "address", "add", f"{address}/24", "dev", CABLE)
            _ip("-n", name, "link", "set", CABLE, "up")
            _ip("-n", name, "link", "set", "lo", "up")
        yield TwoMachines(names)
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)
