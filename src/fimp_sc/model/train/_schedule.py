"""The schedule: size and number of steps, from the number of training nodes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from fimp_sc._recipe import recipe

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from fimp_sc.data import GraphData


@dataclass(frozen=True)
class Schedule:
    """Size and number of steps, where the user does not say.

    Attributes
    ----------
    batch_size, tiles_per_batch
        See :class:`~fimp_sc.data.BlockSampler`.
    mask_ratio
        Smallest and largest hidden fraction of a node.
    steps, least_epochs, most_epochs, validations
        Of a training; 0 validations for one in every epoch.
    patience
        Validations without gain after which to stop.
    mask_cells
        Probability that a node is masked at all.
    plan
        Arguments of the training plan.
    """

    batch_size: int
    tiles_per_batch: int
    mask_ratio: tuple[float, float]
    steps: int
    least_epochs: int
    most_epochs: int
    patience: int
    mask_cells: float = 1.0
    validations: int = 0
    plan: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        data: GraphData,
        train_idx: NDArray[np.int64],
        batch_size: int | None = None,
        *,
        pretrained: bool = False,
    ) -> Schedule:
        """Return the schedule for training nodes; a given ``batch_size`` is kept.

        A ``pretrained`` foundation model is fine-tuned with as many and as large steps on many cells as on few.
        """
        numbers = recipe()
        usual = int(np.clip(2 ** round(np.log2(max(len(train_idx) / 24, 1))), *numbers.batch))
        labeled = bool((data.label[train_idx] >= 0).any())
        least, most = numbers.epochs
        if data.expression is not None:
            size = batch_size or usual
            more = 1.0
            if not pretrained:
                more = float(np.clip(2 * len(train_idx) / numbers.few_cells - 1, 1.0, numbers.most_steps))
            faster = min(more**3, numbers.fastest_labels if labeled else numbers.fastest)
            return cls(
                size,
                max(size // numbers.cells_per_tile, 1),
                numbers.mask_ratio,
                round(more * numbers.steps),
                least,
                most,
                numbers.patience_labels if labeled else numbers.patience,
                numbers.mask_cells_labels if labeled else 1.0,
                plan={"lr": faster * numbers.lr, "lr_loadings": faster**0.5 * numbers.lr_loadings} if more > 1 else {},
            )
        largest = int(np.bincount(data.library[train_idx]).max())
        whole = data.library.max() > 0 and largest <= numbers.recording
        size = batch_size or (largest if whole else usual)
        return cls(
            size,
            1 if whole else max(size // numbers.cells_per_tile, 1),
            numbers.mask_ratio_sequences,
            numbers.steps_sequences,
            least,
            numbers.most_epochs_sequences,
            numbers.patience_sequences,
            validations=numbers.validations_sequences,
            plan={"lr": numbers.lr_sequences_labels if labeled else numbers.lr_sequences},
        )

    def epochs(self, n_batches: int) -> int:
        """Return the number of epochs of ``n_batches`` steps."""
        return int(np.clip(round(self.steps / max(n_batches, 1)), self.least_epochs, self.most_epochs))

    def validate_every(self, epochs: int) -> int:
        """Return after how many epochs to validate."""
        return max(epochs // self.validations, 1) if self.validations else 1
