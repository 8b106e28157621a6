"""Cell types on held-out spatial blocks (about 20 % of the cells) of one data set.

Transductive by default: the labels of the test blocks are hidden, but their expression is there while training, for
FIMP as for the neighbour means of the baselines. With --inductive the test cells are dropped before training, so
that training cells at the edge of a test block have fewer or other neighbours; they come back for the prediction.
PCA, scaling and the target of the log-normalisation always come from the training cells alone.
"""

from __future__ import annotations

import argparse

import _harness
from _problems import held_out_blocks
from annotate_section import GROUPS


def options(p: argparse.ArgumentParser) -> None:
    """What this task has beside the common arguments."""
    p.add_argument("--inductive", action="store_true", help="train on the training cells alone")


if __name__ == "__main__":
    _harness.main(
        "annotate_blocks",
        __doc__,
        ("merfish", "starmap", "dlpfc"),
        lambda data, args, seed: held_out_blocks(data, args.data, seed, inductive=args.inductive),
        GROUPS,
        default=("baselines", "networks", "fimp", "controls"),
        options=options,
        rename=lambda args: "annotate_blocks_inductive" if args.inductive else "annotate_blocks",
    )
