"""Train and validation cells, separated in space."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import numpy as np

from fimp_sc.data._loader import BlockDataset, BlockSampler, block_loader
from fimp_sc.data.graph._tiles import spatial_tiles

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch.utils.data import DataLoader

    from fimp_sc.data._batch import Batch
    from fimp_sc.data._loader import GraphData

# Blocks small enough to sample the whole section, large enough that most validation cells have no training neighbor.
_CELLS_PER_SPLIT_BLOCK = 64
_MIN_SPLIT_BLOCKS = 20


def split_by_blocks(
    coordinates: NDArray[np.floating],
    library: NDArray[np.int64],
    validation_size: float,
    random_state: int,
    rank: NDArray[np.int64] | None = None,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Put whole spatial blocks into validation until they hold ``validation_size`` of the nodes.

    Parameters
    ----------
    coordinates
        ``(n_obs, n_dims)``.
    library
        ``(n_obs,)`` sample of each node.
    validation_size
        Fraction of nodes, from 0 to below 1.
    random_state
        Seed.
    rank
        ``(n_obs,)``, order in which nodes are looked at, which decides where they lie level; by default as they come.

    Returns
    -------
    Train and validation indices, sorted, int64.

    Raises
    ------
    ValueError
        When ``validation_size`` is out of range.
    """
    if not 0 <= validation_size < 1:
        raise ValueError(f"validation_size must be in [0, 1), found {validation_size}")
    n_obs = len(library)
    rng = np.random.default_rng(random_state)
    size = max(min(_CELLS_PER_SPLIT_BLOCK, n_obs // _MIN_SPLIT_BLOCKS), 1)
    nodes = np.arange(n_obs) if rank is None else np.argsort(rank)
    block = np.empty(n_obs, dtype=np.int64)
    block[nodes] = spatial_tiles(coordinates[nodes], size, library=library[nodes], random_state=rng)
    order = rng.permutation(block.max() + 1)
    held = np.cumsum(np.bincount(block)[order]) <= round(validation_size * n_obs)
    validation = np.isin(block, order[held])
    return np.flatnonzero(~validation), np.flatnonzero(validation)


class BlockSplitter(pl.LightningDataModule):
    """Loaders of training and validation blocks, as scvi-tools' train runner expects them.

    Validation masks and cuts are the same in every epoch, so that losses of epochs can be compared.

    Parameters
    ----------
    data
        What blocks are made of.
    train_idx, val_idx
        Destinations to train on, and to validate with. Cells of the others may appear in a halo: their expression is
        seen, their loss and label are not.
    batch_size, tiles_per_batch, random_state
        See :class:`BlockSampler`.
    num_workers, pin_memory
        See :func:`block_loader`.
    **dataset_kwargs
        Passed to :class:`BlockDataset`.
    """

    def __init__(
        self,
        data: GraphData,
        train_idx: NDArray[np.int64],
        val_idx: NDArray[np.int64],
        *,
        batch_size: int,
        tiles_per_batch: int = 1,
        random_state: int = 0,
        num_workers: int = 0,
        pin_memory: bool = False,
        **dataset_kwargs: Any,
    ) -> None:
        super().__init__()
        self.data = data
        self.train_idx, self.val_idx, self.test_idx = train_idx, val_idx, np.empty(0, dtype=np.int64)
        self.n_train, self.n_val = len(train_idx), len(val_idx)
        self._cuts: dict[str, Any] = {"batch_size": batch_size, "random_state": random_state}
        self._tiles_per_batch = tiles_per_batch
        self._how: dict[str, Any] = {"num_workers": num_workers, "pin_memory": pin_memory}
        self._dataset_kwargs = dataset_kwargs
        self._epoch = 0

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.trainer.current_epoch if self.trainer is not None else 0}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._epoch = state_dict["epoch"]

    def train_dataloader(self) -> DataLoader[Batch]:
        sampler = BlockSampler(
            self.data,
            self.train_idx,
            tiles_per_batch=self._tiles_per_batch,
            shuffle=True,
            epoch=self._epoch,
            **self._cuts,
        )
        return block_loader(BlockDataset(self.data, vary=True, **self._dataset_kwargs), sampler, **self._how)

    def val_dataloader(self) -> DataLoader[Batch] | list[Any]:
        if not self.n_val:
            return []
        # Validation does not need small steps, and hides nothing for whole genes: it asks how well the panel at
        # hand is predicted.
        dataset = BlockDataset(self.data, **{**self._dataset_kwargs, "gene_mask_ratio": 0.0})
        return block_loader(dataset, BlockSampler(self.data, self.val_idx, **self._cuts), **self._how)
