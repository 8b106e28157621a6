"""Hidden expression on held-out spatial blocks (about 20 % of the cells).

All methods train on the other cells only, with the test cells dropped. Then 15 % of the entries of the test cells
are hidden, chosen without looking at their values (most are zeros in sparse data), and predicted from what is left
in the whole section. The truth is log-normalized by totals of whole cells. No method sees these totals: its input is
scaled by what is visible of a cell, over the share that these genes have in the training cells, also where a method
hides entries of training cells to learn from. FIMP gets counts (or the volumes' values), which it scales itself.
"""

from __future__ import annotations

import _baselines
import _fimp
import _harness
import _networks_masked
from _problems import hidden_expression

GROUPS = {
    "baselines": _baselines.MASKED,
    "networks": _networks_masked.MASKED,
    **_fimp.groups(_fimp.masked),
}

if __name__ == "__main__":
    _harness.main(
        "masked_expression",
        __doc__,
        ("dlpfc", "starmap", "merfish"),
        lambda data, args, seed: hidden_expression(data, args.data, seed),
        GROUPS,
        default=("baselines", "networks", "fimp", "controls"),
    )
