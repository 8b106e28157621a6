"""Where the time of `tl.embed` and `tl.annotate` goes, by part, from the first import of the package to the result.

Processor seconds of all threads of this process. What a part calls of another part counts for the other, but *imports*,
*start*, *validation* and *prediction* count whole. *Rest* is what is in no part: reading the file and Lightning's loops
among it.
"""

from __future__ import annotations

import argparse
import builtins
import importlib
import os
import time
from collections import defaultdict
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

FILES = {
    "dlpfc": ("dlpfc_visium_151673.h5ad", None),
    "merfish": ("merfish_hypothalamus_animal1.h5ad", "bregma"),
    "starmap": ("starmap_visual_cortex_1020.h5ad", None),
}
# Parts, in the order of a call, and the functions that they are: module, then class or function.
PARTS = {
    "graph": ["fimp_sc.tl._call._inputs:add_graph", "fimp_sc.data.graph._graph:NodeGraph.__init__"],
    "start": ["fimp_sc.model.train._train:start_from_data"],
    "blocks": ["fimp_sc.data._loader:BlockSampler._cut", "fimp_sc.data.graph._graph:NodeGraph.block"],
    "reading rows": [
        "fimp_sc.data.expression._reader:ExpressionReader.sparse_rows",
        "fimp_sc.data.expression._tokenizers:_centered",
    ],
    "masks": [
        "fimp_sc.data.expression._tokenizers:_masks",
        "fimp_sc.data.expression._reader:ExpressionReader.as_seen",
    ],
    "tokens": ["fimp_sc.data.expression._tokenizers:CenteredTokenizer.__call__"],
    "summary and token embedding": ["fimp_sc.nn._embedding:FeatureEmbedding.forward"],
    "layers, forward": ["fimp_sc.nn._network:run_layers"],
    "heads and losses": [
        "fimp_sc.model.module._module:FIMPModule.generative",
        "fimp_sc.model.module._module:FIMPModule.loss",
    ],
    "backward": ["torch:Tensor.backward"],
    "optimizer": [
        "torch.optim:AdamW.step",
        "torch.optim.lr_scheduler:LambdaLR.step",
        "fimp_sc.model.train._plan:FIMPTrainingPlan.configure_gradient_clipping",
    ],
    "averaging": ["lightning.pytorch.callbacks:WeightAveraging.on_train_batch_end"],
    "logging": ["lightning.pytorch:LightningModule.log"],
    "validation": ["lightning.pytorch.loops:_EvaluationLoop.run"],
    "prediction": [
        "fimp_sc.model.predict._inference:infer",
        "fimp_sc.model.train._train:fit_mixtures",
        "fimp_sc.model.train._train:remember",
    ],
}
WHOLE = ("imports", "start", "validation", "prediction")


class Profile:
    """Processor seconds by part; a part that runs within another is taken off that."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.calls: defaultdict[str, int] = defaultdict(int)
        self._running = ["rest"]
        self._since = time.process_time()

    def switch(self) -> None:
        """Give the time since the last switch to the part that is running."""
        now = time.process_time()
        self.seconds[self._running[-1]] += now - self._since
        self._since = now

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function, with its time counted for a part."""

        @wraps(function)
        def run(*args, **kwargs):
            if self._running[-1] in WHOLE:
                return function(*args, **kwargs)
            self.switch()
            self._running.append(part)
            self.calls[part] += 1
            try:
                return function(*args, **kwargs)
            finally:
                self.switch()
                self._running.pop()

        return run

    def watch(self) -> None:
        """Count the time of the functions of all parts."""
        for part, places in PARTS.items():
            for place in places:
                module, name = place.split(":")
                *owner, name = name.split(".")
                holder = importlib.import_module(module)
                holder = getattr(holder, owner[0]) if owner else holder
                setattr(holder, name, self.timed(part, getattr(holder, name)))

    def table(self) -> str:
        """Return the parts as a Markdown table."""
        self.switch()
        total = sum(self.seconds.values())
        lines = ["| part | CPU s | % | calls |", "|---|---|---|---|"]
        for part in ("imports", *PARTS, "rest"):
            spent = self.seconds[part]
            lines.append(f"| {part} | {spent:.2f} | {100 * spent / total:.0f} | {self.calls[part] or ''} |")
        return "\n".join([*lines, f"| all | {total:.2f} | 100 | |"])


def main() -> None:
    """Run one job in this process and print the table."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--job", choices=("embed", "annotate"), default="embed")
    p.add_argument("--datasets", choices=("toy", *FILES), default="toy")
    p.add_argument("--data", type=Path, default=os.environ.get("FIMP_SC_DATA", "../shared/data"))
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--max-epochs", type=int)
    p.add_argument("--quick", action="store_true", help="1 epoch: checks that the script runs")
    args = p.parse_args()

    profile = Profile()
    plain = builtins.__import__
    builtins.__import__ = profile.timed("imports", plain)
    try:
        run(args, profile)
    finally:
        builtins.__import__ = plain


def run(args: argparse.Namespace, profile: Profile) -> None:
    """Do the job and print where its time went."""
    import torch

    import fimp_sc

    torch.set_num_threads(args.threads)
    tool = profile.timed("imports", getattr)(fimp_sc, "tl").__dict__[args.job]
    profile.watch()
    if args.datasets == "toy":
        adata, library_key = fimp_sc.datasets.toy_tissue(), "section"
    else:
        import anndata

        file, library_key = FILES[args.datasets]
        adata = anndata.read_h5ad(Path(args.data) / file)
    options = {"max_epochs": 1 if args.quick else args.max_epochs, "library_key": library_key, "verbose": False}
    labels = {"labels_key": "cell_type"} if args.job == "annotate" else {}
    tool(adata, **labels, **options)
    model = fimp_sc.tl.get_model(adata)
    losses = model.history["validation_loss"]
    print(f"`tl.{args.job}`, {args.datasets}, threads: {args.threads}\n\n{profile.table()}\n")
    print(f"{len(losses)} epochs, least validation loss {float(losses.min().iloc[0]):.4f}")


if __name__ == "__main__":
    main()
