"""Cell types on a held-out section: train on DLPFC 151673, annotate 151674, which has another gene list.

FIMP trains on all genes of 151673 and annotates 151674 without retraining. The baselines use the genes that both
sections have. PCA, scaling and the target of the log-normalization come from 151673 alone.
"""

from __future__ import annotations

import _baselines
import _fimp
import _harness
import _networks_annotation
from _problems import held_out_section

GROUPS = {
    "baselines": _baselines.ANNOTATION,
    "networks": _networks_annotation.ANNOTATION,
    **_fimp.groups(_fimp.annotate),
}

if __name__ == "__main__":
    _harness.main(
        "annotate_section",
        __doc__,
        ("dlpfc",),
        lambda data, args, seed: held_out_section(args.data),
        GROUPS,
        default=("baselines", "networks", "fimp", "controls"),
    )
