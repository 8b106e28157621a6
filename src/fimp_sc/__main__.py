"""Run the command line with ``python -m fimp_sc``."""

from __future__ import annotations

import sys

from fimp_sc.cli import main

if __name__ == "__main__":
    sys.exit(main())
