"""Cell types on held-out spatial blocks (about 20 % of the cells) of one data set.

Transductive by default: the labels of the test blocks are hidden, but their expression is there while training, for
FIMP as for the neighbor means of the baselines. With --inductive the test cells are dropped before training, so
that training cells at the edge of a test block have fewer or other neighbors; they come back for the prediction.
PCA, scaling and the target of the log-normalization always come from the training cells alone.

With --random single cells are held out instead of blocks. Their neighbors are labeled then, and spots next to each
other share tissue: such figures are too good, and are there to show by how much.
"""

from __future__ import annotations

import argparse

import _harness
from _problems import Annotation, Scores, held_out_blocks
from annotate_section import GROUPS


def options(p: argparse.ArgumentParser) -> None:
    """What this task has beside the common arguments."""
    how = p.add_mutually_exclusive_group()
    how.add_argument("--inductive", action="store_true", help="train on the training cells alone")
    how.add_argument("--random", action="store_true", help="hold out single cells")


def problem(data: str, args: argparse.Namespace, seed: int) -> tuple[Annotation, Scores]:
    """The data set without the labels of held-out cells, and the scores of these."""
    return held_out_blocks(data, args.data, seed, inductive=args.inductive, scattered=args.random)


def name(args: argparse.Namespace) -> str:
    """Of the CSV."""
    return "annotate_blocks" + ("_inductive" if args.inductive else "_random" if args.random else "")


if __name__ == "__main__":
    _harness.main(
        "annotate_blocks",
        __doc__,
        ("merfish", "starmap", "dlpfc"),
        problem,
        GROUPS,
        default=("baselines", "networks", "fimp", "controls"),
        options=options,
        rename=name,
    )
