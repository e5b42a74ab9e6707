"""Importing this removes the clone's root from the import path, where the sources would hide the installed package.

`python -m pytest` puts the current folder, which is the root, first in the path.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]
