"""Importing it leaves the clone's root out of the import path: the sources there would hide the installed package.

`python -m pytest` puts the current folder first, which is the root.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]
