"""A training whose state is kept in a folder, so that one that was killed goes on from there."""

from __future__ import annotations

import logging
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from lightning.pytorch import Callback

import fimp_sc
from fimp_sc.data._study import resolve
from fimp_sc.data.expression._reader import JoinedExpression
from fimp_sc.data.sequences._kinds import sequence_kind
from fimp_sc.data.storage._checksums import checksum
from fimp_sc.data.storage._elements import shorten
from fimp_sc.data.validate._checks import get_matrix
from fimp_sc.model.registry._fields import X_KEY, ExpressionField, table_states
from fimp_sc.model.registry._graph_data import field_state
from fimp_sc.model.train._plan import frozen, stored_weights
from fimp_sc.pretrained.files._weights import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    from lightning.pytorch import LightningModule, Trainer

    from fimp_sc.data import GraphData
    from fimp_sc.model._fimp import FIMP

logger = logging.getLogger(__name__)

_FILE = "training.ckpt"
# Arguments of the trainer that say what is shown, and where.
_SHOWN = ("enable_", "progress_", "simple_", "log_", "default_root_dir")


class KeptTraining(Callback):
    """Write a checkpoint of Lightning before every epoch but the first, and restore what Lightning does not.

    That is the state of random numbers, which dropout draws from, and the history. When an epoch begins, all that
    concerns the one before is done: losses are logged, the best weights are known, and training was not stopped.

    Parameters
    ----------
    folder
        Where the checkpoint is, or will be.
    marks
        What the training is one of, by name. One with other marks is not gone on with.

    Raises
    ------
    CheckpointError
        The file in the folder cannot be read.
    ValueError
        It belongs to a training with other marks.
    """

    def __init__(self, folder: str | Path, marks: Mapping[str, str]) -> None:
        self.path = Path(folder).expanduser().absolute() / _FILE
        if self.path.parent.is_file():
            raise NotADirectoryError(f"checkpoint={str(folder)!r} is a file: name a folder.")
        self._marks = dict(marks)
        self._resumed: dict[str, Any] | None = None
        self.found = self.path.exists()
        if not self.found:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            return
        advice = f"Delete {str(self.path)!r} to train from the start, or name another folder with checkpoint=."
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of torch, about pickles that are none of its own
                kept = torch.load(self.path, map_location="cpu", weights_only=True)
            epoch, marks = kept["epoch"], kept["callbacks"][self.state_key]["marks"]
        except OSError:
            raise
        except Exception as error:
            what = f"{str(self.path)!r} is no checkpoint of a training, or it is damaged ({type(error).__name__})."
            raise CheckpointError(f"{what} {advice}") from error
        other = [name for name in self._marks if marks.get(name) != self._marks[name]]
        if other:
            raise ValueError(
                f"{str(self.path)!r} is of a training with another {shorten(other)}, which this one cannot go on with. "
                f"{advice}"
            )
        logger.info("Going on with the training in %s, after epoch %d.", folder, epoch)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._resumed is None:
            return
        # An epoch begins: Lightning would look for the rest of the one before, and find that all its batches are done.
        trainer.fit_loop.restarting = False
        curves = getattr(trainer.logger, "history", None)
        if isinstance(curves, dict):
            for name, (unit, index, values) in self._resumed["history"].items():
                curves[name] = pd.DataFrame({name: values}, index=pd.Index(index, name=unit), dtype=object)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._resumed is not None:
            _set_random_state(self._resumed["random"], pl_module.device)
            self._resumed = None
        elif trainer.current_epoch:
            beside = self.path.with_suffix(".part")
            trainer.save_checkpoint(beside, weights_only=False)
            if trainer.is_global_zero:
                with beside.open("rb+") as file:
                    os.fsync(file.fileno())
                beside.replace(self.path)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        for weights in stored_weights(checkpoint):
            for name in frozen(pl_module) & set(weights):
                del weights[name]
        curves = getattr(trainer.logger, "history", None)
        checkpoint["callbacks"][self.state_key] = {
            "marks": self._marks,
            "random": _random_state(pl_module.device),
            "history": {
                name: (curve.index.name, curve.index.tolist(), curve.iloc[:, 0].tolist())
                for name, curve in (curves if isinstance(curves, dict) else {}).items()
            },
        }

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._resumed = checkpoint["callbacks"][self.state_key]


def _random_state(device: torch.device) -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    return state | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def _set_random_state(state: dict[str, torch.Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def training_marks(
    model: FIMP,
    data: GraphData,
    split: tuple[np.ndarray, np.ndarray],
    unseen: Mapping[str, Any],
    arguments: Mapping[str, Any],
    trainer_kwargs: Mapping[str, Any],
) -> dict[str, str]:
    """Return what tells a training from others, by name: its data, the model that it starts from, its arguments.

    Parameters
    ----------
    model
        Before the training.
    data
        What it is trained on.
    split
        Training and validation nodes.
    unseen
        What is hidden, as arguments of ``_graph_data``.
    arguments, trainer_kwargs
        Of the training and of its trainer; of the latter, objects and what says what to show do not count.
    """
    setup = model.adata_manager.registry["setup_args"]
    values: list[Any] = []
    for source in data.expression.sources if isinstance(data.expression, JoinedExpression) else [data.expression]:
        values += [] if source is None else [source.batch, source.panel, source.measured]
    for modality in resolve(model.adata, setup.get("modality")).modalities:
        values += [] if modality.rows is None else [modality.rows]
        if modality.is_sequence:
            # Names of files tell images apart; they are not opened.
            elements = sequence_kind(modality.kind).parts(modality.adata).values()
            values += [value for element in elements for value in element.values()]
        else:
            values += [modality.adata.var_names, get_matrix(modality.adata, setup["layer"])]
    masks = [*unseen.get("hidden", {}).items(), *unseen.get("hidden_tokens", {}).items()]
    # Weights that are drawn at random are so from the seed, which is among the arguments of the model.
    drawn = {name for name, p in model.module.named_parameters() if p.requires_grad and not model.is_trained}
    start = [value for name, value in model.module.state_dict().items() if name not in drawn]
    graph = data.graph.csr
    plain = {name: v for name, v in trainer_kwargs.items() if isinstance(v, bool | int | float | str | None)}
    scales = [state[ExpressionField.SCALE] for state in table_states(field_state(model, X_KEY)).values()]
    marks = {
        "version": fimp_sc.__version__,
        "model": (model.init_params_["non_kwargs"], checksum(*start)),
        "values": (scales, checksum(*values)),
        "graph": checksum(graph.indptr, graph.indices, graph.data, data.coordinates, data.library),
        "labels": (model.classes, checksum(data.label)),
        "split": checksum(*split),
        "hidden": ([name for name, _ in masks], checksum(*(mask for _, mask in masks))),
        **arguments,
        **{name: value for name, value in plain.items() if not name.startswith(_SHOWN)},
    }
    return {name: repr(value) for name, value in marks.items()}
