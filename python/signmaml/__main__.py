"""`python -m signmaml`, and so `torchrun ... -m signmaml`: the command `signmaml`."""

from __future__ import annotations

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
