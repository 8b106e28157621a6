"""How much training is enough, from what there is to learn from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from fimp_sc.data import GraphData

# An epoch over a small section is a handful of steps, over a large one it is thousands: budget steps, not epochs.
_STEPS, _EPOCHS = 600, (8, 100)
# Compact blocks that make up a batch: small enough for a batch to hold cells of several domains.
_CELLS_PER_PART = 64
_BATCH = (64, 256)
# Nodes of a recording that go into one batch: a part of it would read most of the others as neighbors.
_RECORDING = 512
_VALIDATIONS = 30
# Expression: up to this many training cells the linear model that training starts from is nearly all that can be
# learned, and small steps keep it; the more cells, the more and the larger the steps that pay.
FEW_CELLS = 4000
_MOST, _FASTEST, _FASTEST_LABELS = 4.0, 16.0, 8.0
_LR, _LR_LOADINGS = 5e-4, 2e-3


@dataclass(frozen=True)
class Schedule:
    """Size and number of steps, where the user does not say.

    Attributes
    ----------
    batch_size, parts
        See :class:`~fimp_sc.data.BlockSampler`.
    mask_ratio
        Smallest and largest hidden share of a node.
    steps, least_epochs, most_epochs, validations
        Of a training; 0 validations for one in every epoch.
    patience
        Validations without gain after which to stop.
    spare_labeled
        Whether half of the nodes go without a mask where there are labels, so that these are learned from nodes as they
        are predicted.
    plan
        Arguments of the training plan.
    """

    batch_size: int
    parts: int
    mask_ratio: tuple[float, float] = (0.0, 0.4)
    steps: int = _STEPS
    least_epochs: int = _EPOCHS[0]
    most_epochs: int = _EPOCHS[1]
    validations: int = 0
    patience: int = 3
    spare_labeled: bool = True
    plan: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls, data: GraphData, train_idx: NDArray[np.int64], batch_size: int | None, *, pretrained: bool = False
    ) -> Schedule:
        """Return the schedule for training nodes; a given ``batch_size`` is kept.

        A ``pretrained`` foundation model is fine-tuned with as many and as large steps on many cells as on few.
        """
        usual = int(np.clip(2 ** round(np.log2(max(len(train_idx) / 24, 1))), *_BATCH))
        labeled = bool((data.label[train_idx] >= 0).any())
        if data.source is not None:
            size = batch_size or usual
            more = 1.0 if pretrained else float(np.clip(2 * len(train_idx) / FEW_CELLS - 1, 1.0, _MOST))
            faster = min(more**3, _FASTEST_LABELS if labeled else _FASTEST)
            plan = {"lr": faster * _LR, "lr_loadings": faster**0.5 * _LR_LOADINGS} if more > 1 else {}
            # The few cells of some blocks say less reliably whether labels are still getting better.
            patience = 6 if labeled else 3
            return cls(size, max(size // _CELLS_PER_PART, 1), steps=round(more * _STEPS), patience=patience, plan=plan)
        # Signals and images start from less than expression does, and learn relations of pairs of nodes.
        largest = int(np.bincount(data.library[train_idx]).max())
        whole = data.library.max() > 0 and largest <= _RECORDING
        size = batch_size or (largest if whole else usual)
        return cls(
            size, 1 if whole else max(size // _CELLS_PER_PART, 1), mask_ratio=(0.1, 0.6), steps=800, most_epochs=400,
            validations=_VALIDATIONS, patience=6, spare_labeled=False, plan={"lr": 1e-3 if labeled else 2e-3},
        )  # fmt: skip

    def mask_cells(self, labeled: bool) -> float:
        """Return the probability that a node is masked at all."""
        return 0.5 if labeled and self.spare_labeled else 1.0

    def epochs(self, n_batches: int) -> int:
        """Return the number of epochs of ``n_batches`` steps."""
        return int(np.clip(round(self.steps / max(n_batches, 1)), self.least_epochs, self.most_epochs))

    def validate_every(self, epochs: int) -> int:
        """Return after how many epochs to validate."""
        return max(epochs // self.validations, 1) if self.validations else 1
