"""Training of FIMP."""

from __future__ import annotations

import logging
import os
import tempfile
import warnings
from collections.abc import Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, WeightAveraging
from torch.optim.swa_utils import get_ema_multi_avg_fn

from fimp_sc._logging import ONE_AT_A_TIME, no_chatter
from fimp_sc._options import checked
from fimp_sc._recipe import recipe
from fimp_sc.data import BlockSplitter, split_by_blocks
from fimp_sc.model.predict._labels import fit_mixtures, reset_mixtures, with_embeddings
from fimp_sc.model.predict._linear_labels import fit_linear_labels, has_linear_labels
from fimp_sc.model.predict._reconstruct import hidden_tokens
from fimp_sc.model.predict._reference import remember
from fimp_sc.model.registry._graph_data import graph_data, node_indices, sequence_size, study_of, tables_of
from fimp_sc.model.train._checkpoint import KeptTraining, training_marks
from fimp_sc.model.train._initialize import start_from_data
from fimp_sc.model.train._plan import trained_weights
from fimp_sc.model.train._runner import seeded, unchanged_if_it_fails
from fimp_sc.model.train._schedule import Schedule

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from lightning.pytorch import LightningModule, Trainer

    from fimp_sc.data import GraphData
    from fimp_sc.data._study import Study
    from fimp_sc.model._fimp import FIMP

logger = logging.getLogger(__name__)

# Enough to keep an accelerator busy; on a CPU making batches and training would only take turns.
_WORKERS_ACCELERATOR = 4


class _BestWeights(Callback):
    """Remember the weights of the epoch with the lowest validation loss.

    In memory: the checkpoints of scvi-tools' trainer land in the user's working directory. Placed before the weight
    averaging, so that it sees the averaged weights that were validated.
    """

    def __init__(self) -> None:
        self.loss = np.inf
        self.weights: dict[str, torch.Tensor] = {}
        self._validated: dict[str, torch.Tensor] = {}

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._validated = trained_weights(pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        loss = float(trainer.callback_metrics["validation_loss"])
        if loss < self.loss:
            self.loss, self.weights = loss, self._validated

    def state_dict(self) -> dict[str, Any]:
        return {"loss": float(self.loss), "weights": self.weights}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.loss, self.weights = state_dict["loss"], state_dict["weights"]


@checked
def train(
    model: FIMP,
    max_epochs: int | None = None,
    *,
    accelerator: str = "auto",
    devices: int | list[int] | str = "auto",
    num_workers: int | None = None,
    validation_size: float = 0.1,
    train_indices: Sequence[int] | None = None,
    validation_indices: Sequence[int] | None = None,
    hidden: Any = None,
    batch_size: int | None = None,
    mask_ratio: tuple[float, float] | None = None,
    gene_mask_ratio: float | None = None,
    mask_cells: float | None = None,
    class_balance: float | None = None,
    early_stopping: bool = True,
    early_stopping_patience: int | None = None,
    early_stopping_min_delta: float | None = None,
    plan_kwargs: dict[str, Any] | None = None,
    checkpoint: str | Path | None = None,
    **trainer_kwargs: Any,
) -> None:
    """Train on masked expression, and on labels where there are some.

    A training that fails or is interrupted leaves the model as it was. Trainings of several threads run one after
    the other, as they draw random numbers from generators that threads share.

    Parameters
    ----------
    max_epochs
        Upper limit of epochs; by default as many as make about 600 steps, between 8 and 100; of FIMP-base from
        4,000 training cells on more, up to 2,400; where there are no genes 800 steps, in up to 400 epochs.
    accelerator
        Kind of device, ``"cpu"``, ``"gpu"``, ``"cuda"`` or ``"mps"``; ``"auto"`` takes a GPU when there is one.
    devices
        Number of devices, or a list of their indices; ``"auto"`` takes what Lightning finds. With several devices
        give ``strategy="ddp"`` too: every device then takes some of the blocks of an epoch, so that a step covers
        ``devices`` times ``batch_size`` cells.
    num_workers
        Processes that make batches ahead of their use; by default up to 4 with a GPU, none without.
    validation_size
        Fraction of cells held out for validation in whole spatial blocks.
    train_indices, validation_indices
        Positions of cells to train on and to validate with, instead of ``validation_size``. Cells in neither are seen
        as neighbors only.
    hidden
        Values that are kept for tests, neither shown nor learned from: boolean, True where a value is hidden. Of
        expression ``(n_obs, n_vars)``, of signals and images ``(n_obs, n_tokens)``, ``(n_obs, n_times)`` or ``(n_obs,
        height, width)``; of several modalities a dictionary by name. Totals of cells are of what is visible, also where
        genes are masked to learn from.
    batch_size
        Destinations per step; by default 64 to 256, so that an epoch has at least some 24 steps; of signals whole
        recordings.
    mask_ratio
        Smallest and largest fraction of a cell's genes, or of a node's segments or patches, hidden in training; each
        draws its own. By default from 0 to 0.4, and from 0.1 to 0.6 where there are no genes.
    gene_mask_ratio
        Largest fraction of genes hidden in a whole block, by default 0.3, so that the model copes with other
        gene panels.
    mask_cells
        Probability that a cell is masked at all. By default 1 without labels or without genes, and 0.5 otherwise,
        so that labels are learned from cells as they are predicted. With 0 labels are learned alone: of a frozen
        foundation model embeddings are then computed once, and epochs cost next to nothing; so they are where a
        foundation model reads values that it cannot predict, such as texts.
    class_balance
        0 weighs cells alike, 1 classes alike, in the label loss; by default 0.5.
    early_stopping
        Stop when the validation loss no longer improves. With validation cells the weights of the best epoch are
        kept in any case.
    early_stopping_patience
        Validations without improvement to wait for, by default 3, and 6 where there are labels or no genes.
    early_stopping_min_delta
        A smaller gain is none; by default 2e-4.
    plan_kwargs
        Passed to the training plan (``lr``, ``weight_decay``, ...). By default ``lr`` grows with the number of
        steps, from 5e-4 to 8e-3 (4e-3 with labels), and so does ``lr_loadings``, from 2e-3.
    checkpoint
        Folder for ``training.ckpt``, a checkpoint of Lightning that is written after every epoch. Where the folder
        holds one, that training is gone on with: the same call again loses no more than the epoch in which the
        first was killed or interrupted. On one device the result is that of a training without the stop; several
        share the blocks of an epoch in another way then. The file stays when the training is over. It is read as
        tensors and plain values, so no code in it is run; the state of callbacks of your own must be of these.
    **trainer_kwargs
        Passed to :class:`scvi.train.Trainer` and so to Lightning.

    Raises
    ------
    ValueError
        When several devices are named without a strategy, indices overlap or leave nothing to train on, ``hidden`` has
        another shape or names no modality, another loss is to stop training, or ``checkpoint`` is of a training of
        other data or arguments, or damaged.
    IndexError
        When indices are out of range.
    KeyboardInterrupt
        When it is interrupted.

    Examples
    --------
    >>> import fimp_sc as fimp
    >>> from fimp_sc.model import FIMP
    >>> adata = fimp.datasets.toy_communication(n_obs=200, n_genes=40)
    >>> fimp.pp.spatial_graph(adata, library_key="section")
    >>> FIMP.setup_anndata(adata, labels_key="cell_type", library_key="section")
    >>> model = FIMP(adata)
    >>> model.train(max_epochs=1, enable_progress_bar=False)
    >>> len(model.history["train_loss"])
    1

    More epochs follow on the first, or, with ``checkpoint``, on a training that was stopped:

    >>> model.train(max_epochs=1, enable_progress_bar=False)
    >>> len(model.history["train_loss"])
    2
    >>> model = FIMP(adata)
    >>> model.train(max_epochs=1, checkpoint="kept", enable_progress_bar=False)
    """
    unknown = {"early_stopping_monitor", "early_stopping_mode"} & set(trainer_kwargs)
    if unknown:
        raise ValueError(f"{min(unknown)} cannot be chosen: training stops by the validation loss.")
    _check_devices(devices, accelerator, trainer_kwargs.get("strategy"))
    module = model.module
    if module.value_head is None and module.label_head is None and not module.network.heads:
        raise ValueError(
            "There is nothing to learn: this foundation model does not predict what it reads, and there are no "
            "labels. Use it without training (zero_shot=True in fimp_sc.tl.embed), or name labels with labels_key=."
        )
    numbers = recipe()
    gene_mask_ratio = numbers.gene_mask_ratio if gene_mask_ratio is None else gene_mask_ratio
    class_balance = numbers.class_balance if class_balance is None else class_balance
    least_gain = numbers.least_gain if early_stopping_min_delta is None else early_stopping_min_delta
    study = study_of(model, None)
    unseen = _unseen(model, study, hidden)
    data = graph_data(model, study, **unseen)
    train_idx, val_idx = _split(model, data, validation_size, train_indices, validation_indices)
    asked = {
        "max_epochs": max_epochs, "batch_size": batch_size, "mask_ratio": mask_ratio,
        "gene_mask_ratio": gene_mask_ratio, "mask_cells": mask_cells, "class_balance": class_balance,
        "early_stopping": early_stopping, "early_stopping_patience": early_stopping_patience,
        "early_stopping_min_delta": least_gain, "plan_kwargs": plan_kwargs,
    }  # fmt: skip
    kept = []
    if checkpoint is not None:
        marks = training_marks(model, data, (train_idx, val_idx), unseen, asked, trainer_kwargs)
        kept = [KeptTraining(checkpoint, marks)]
    schedule = Schedule.of(data, train_idx, batch_size, pretrained=module.network.pretrained)
    mask_ratio = schedule.mask_ratio if mask_ratio is None else mask_ratio
    if mask_cells is None:
        learned = module.value_head is not None or bool(module.network.heads)
        mask_cells = schedule.mask_cells if learned else 0.0
    with unchanged_if_it_fails(model):
        if model.classes:
            label = data.label[train_idx]
            module.set_class_weight(np.bincount(label[label >= 0], minlength=len(model.classes)), class_balance)
        if not model.is_trained:
            data = start_from_data(model, study, data, train_idx, val_idx, mask_ratio, unseen)
        # Signals are shown differently every time.
        varied = any(source.by_node for source in data.sequences.values())
        if module.network.frozen and mask_cells == 0 and not varied:
            if on_gpu(accelerator):
                model.to_device(f"cuda:{devices[0] if isinstance(devices, list) else 0}")
            data = with_embeddings(model, data, train_idx, val_idx)
        splitter = BlockSplitter(
            data,
            train_idx,
            val_idx,
            batch_size=schedule.batch_size,
            n_layers=model.n_layers,
            n_tokens=model.n_tokens,
            tiles_per_batch=schedule.tiles_per_batch,
            mask_ratio=mask_ratio,
            gene_mask_ratio=gene_mask_ratio,
            mask_cells=mask_cells,
            random_state=model.random_state,
            num_workers=_workers(accelerator) if num_workers is None else num_workers,
            pin_memory=on_gpu(accelerator),
        )
        if max_epochs is None:
            max_epochs = schedule.epochs(len(splitter.train_dataloader()))
        validated = len(val_idx) > 0
        patience = schedule.patience if early_stopping_patience is None else early_stopping_patience
        # Lightning's own callback: that of scvi-tools prints when it stops, asked to be quiet or not.
        stopping = EarlyStopping("validation_loss", min_delta=least_gain, patience=patience)
        best = _BestWeights()
        callbacks = [
            *trainer_kwargs.pop("callbacks", []),
            *([best] if validated else []),
            *([stopping] if early_stopping and validated else []),
            # This form of averaging leaves weights that do not change as they are, to the bit.
            WeightAveraging(use_buffers=False, multi_avg_fn=get_ema_multi_avg_fn(numbers.averaging)),
            *kept,  # last, to see what the others write
        ]
        with tempfile.TemporaryDirectory() as folder, seeded(model.random_state), _quiet():
            module.train()
            plan = model._training_plan_cls(module, **(schedule.plan | (plan_kwargs or {})))
            runner = model._train_runner_cls(
                model,
                training_plan=plan,
                data_splitter=splitter,
                max_epochs=max_epochs,
                accelerator=accelerator,
                devices=devices,
                callbacks=callbacks,
                **{
                    "default_root_dir": folder,
                    "check_val_every_n_epoch": schedule.validate_every(max_epochs) if validated else None,
                    **({"ckpt_path": kept[0].path} if kept and kept[0].found else {}),
                    **trainer_kwargs,
                },
            )
            runner()
            if best.weights:
                plan.load_state_dict(best.weights, strict=False)
        module.eval()
        known = val_idx[data.label[val_idx] >= 0]
        with ONE_AT_A_TIME:
            reset_mixtures(model)
            linear = has_linear_labels(model)
            if module.label_head is not None and (model.messages or linear) and len(known):
                if linear:
                    fit_linear_labels(model, data, train_idx)
                fit_mixtures(model, data, train_idx, known, data.label[known])
            remember(model, data, train_idx, val_idx)


def _unseen(model: FIMP, study: Study, hidden: Any) -> dict[str, Any]:
    """Return what is hidden, by modality or of the only one, as arguments of :func:`graph_data`."""
    if hidden is None:
        return {}
    tables = [table.name for table in tables_of(model, study)]
    known = [*tables, *model.module.sequences]
    if not isinstance(hidden, Mapping):
        if len(known) > 1:
            raise ValueError(f"hidden is one array for several modalities: pass a dictionary, with keys of {known}.")
        hidden = {known[0]: hidden}
    unknown = sorted(set(hidden) - set(known))
    if unknown:
        raise ValueError(f"hidden names {unknown[0]!r}, but the model reads {known}.")
    tokens, n_obs = {}, study.nodes.n_obs
    for name in model.module.sequences:
        if name in hidden:
            kind, size = sequence_size(model, study, name)
            tokens[name] = hidden_tokens(hidden[name], kind, n_obs, size, model.token_sizes[name])
    return {"hidden": {name: hidden[name] for name in tables if name in hidden}, "hidden_tokens": tokens}


def _split(
    model: FIMP,
    data: GraphData,
    validation_size: float,
    train_indices: Sequence[int] | None,
    validation_indices: Sequence[int] | None,
) -> tuple[np.ndarray, np.ndarray]:
    if train_indices is None and validation_indices is None:
        train_idx, val_idx = split_by_blocks(
            data.coordinates, data.library, validation_size, model.random_state, data.rank
        )
    else:
        nodes = data.label
        val_idx = np.unique(node_indices(nodes, [] if validation_indices is None else validation_indices))
        rest = np.setdiff1d(np.arange(len(nodes)), val_idx)
        train_idx = rest if train_indices is None else np.unique(node_indices(nodes, train_indices))
    shared = np.intersect1d(train_idx, val_idx)
    if len(shared):
        raise ValueError(f"train_indices and validation_indices share {len(shared)} cells, {shared[:3]} among them")
    if not len(train_idx):
        raise ValueError("No cell is left to train on: check train_indices and validation_size.")
    if model.classes and not (data.label[train_idx] >= 0).any():
        raise ValueError("No training cell has a label: check labels_key, unlabeled_category and the split.")
    return train_idx, val_idx


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave out what Lightning and scvi-tools say routinely, and warnings about what is so by design."""
    with no_chatter(), warnings.catch_warnings():
        # Blocks are made on the fly in the main process, and few of them are logged per epoch.
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        warnings.filterwarnings("ignore", message=".*number of training batches.*")
        warnings.filterwarnings("ignore", message=".*GPU available but not used.*")
        # scvi-tools disables its own early stopping there; ours asks all processes.
        warnings.filterwarnings("ignore", message=".*automatically disabled due to the use of DDP.*")
        # A frozen foundation model stays in evaluation.
        warnings.filterwarnings("ignore", message=".*in eval mode.*")
        # Lightning's own use of torch.
        warnings.filterwarnings("ignore", message=".*LeafSpec.*is deprecated.*", category=FutureWarning)
        yield


def on_gpu(accelerator: str) -> bool:
    """Tell whether ``accelerator``, as Lightning names it, means a CUDA device on this machine."""
    return accelerator in ("gpu", "cuda") or (accelerator == "auto" and torch.cuda.is_available())


def _check_devices(devices: Any, accelerator: str, strategy: Any) -> None:
    """Refuse devices that Lightning would refuse once everything is ready, and several without a strategy.

    Left to itself, Lightning starts the script of the user once more for each further device, and kills all of them
    when one fails.
    """
    on_cpu = accelerator == "cpu" or not (torch.cuda.is_available() or torch.backends.mps.is_available())
    number = int(devices) if isinstance(devices, str) and devices.isdigit() else devices
    if on_cpu and devices != "auto" and not (isinstance(number, int) and number > 0):
        raise ValueError(
            f"devices={devices!r} names GPUs, and training is on the CPU: leave devices out, or pass a number of "
            "processes."
        )
    several = len(devices) > 1 if isinstance(devices, list) else isinstance(number, int) and number not in (0, 1)
    if several and strategy is None:
        raise ValueError(
            f"devices={devices!r} runs the whole script once for each device: confirm with strategy='ddp' (in a "
            "notebook 'ddp_notebook'), or leave devices out."
        )


def _workers(accelerator: str) -> int:
    return min(_WORKERS_ACCELERATOR, max((os.cpu_count() or 1) - 1, 1)) if on_gpu(accelerator) else 0
