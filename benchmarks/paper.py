"""The paper's own data sets, which squidpy downloads, in the tasks and with all methods of this folder.

Slide-seqV2 of the hippocampus (41,786 beads × 4,000 genes) and seqFISH of the mouse embryo (19,416 cells × 351 genes):
hidden expression and cell types in held-out blocks. Arguments are passed on to `masked_expression.py` and
`annotate_blocks.py`; rows join their CSV files.
"""

from __future__ import annotations

import subprocess
import sys

from _common import HERE, ONLINE

TASKS = ("masked_expression", "annotate_blocks")

if __name__ == "__main__":
    for task in TASKS:
        subprocess.run([sys.executable, HERE / f"{task}.py", "--datasets", *ONLINE, *sys.argv[1:]], check=True)
