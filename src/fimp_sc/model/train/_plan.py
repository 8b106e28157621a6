"""The training plan: losses, optimizer and learning rates."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch

from fimp_sc._recipe import recipe
from fimp_sc.nn._heads import MIXTURE_WEIGHTS

if TYPE_CHECKING:
    from scvi.module.base import LossOutput

    from fimp_sc.data import Batch
    from fimp_sc.model.module._module import FIMPModule


class FIMPTrainingPlan(pl.LightningModule):
    """AdamW with cosine decay; logs train and validation losses per epoch.

    Losses are means over cells, and those of labels over labeled cells; an epoch without any has none. The validation
    loss is that of all validation cells at once: its labels are predicted by the mixture that suits these best. The
    train loss is the mean of what steps minimize.

    Parameters
    ----------
    module
        The module to train.
    lr
        Peak learning rate, by default 5e-4.
    lr_loadings
        Peak learning rate of the gene loadings, by default 2e-3 of their own size. They start as principal components,
        whose entries are small and fit the training cells already: at the common rate ten steps would erase them.
    lr_head
        Peak learning rate of the label head, by default 5e-3. It is a linear map that starts at zero: at the common
        rate it would be the layers below that bend to it.
    lr_foundation
        Peak learning rate of what is trained of a foundation model, by default 1e-4.
    weight_decay
        Of all weights but the tables of genes, by default none.
    gradient_clip
        Largest gradient norm, by default 1.
    """

    def __init__(
        self,
        module: FIMPModule,
        *,
        lr: float | None = None,
        lr_loadings: float | None = None,
        lr_head: float | None = None,
        lr_foundation: float | None = None,
        weight_decay: float = 0.0,
        gradient_clip: float | None = None,
    ) -> None:
        super().__init__()
        self.module = module
        numbers = recipe()
        self.lr = numbers.lr if lr is None else lr
        self.lr_loadings = numbers.lr_loadings if lr_loadings is None else lr_loadings
        self.lr_head = numbers.lr_head if lr_head is None else lr_head
        self.lr_foundation = numbers.lr_foundation if lr_foundation is None else lr_foundation
        self.weight_decay = weight_decay
        self.gradient_clip = numbers.gradient_clip if gradient_clip is None else gradient_clip
        self.n_obs_training: int | None = None
        self.n_obs_validation: int | None = None
        # Of the cells of an epoch so far, by name: the sum of a loss, and their number.
        self._sums: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        _, _, losses = self.module(batch)
        how = self._log_losses(losses, "train")
        self.log("train_loss", losses.loss, prog_bar=True, **how)
        if "label_loss" in losses.extra_metrics:
            n_labeled = _n_labeled(batch)
            self._add("label_train", losses.extra_metrics["label_loss"].float() * n_labeled, n_labeled)
        return losses.loss

    def on_train_epoch_end(self) -> None:
        if "label_train" not in self._sums:
            return
        loss, n_labeled = self._total("label_train")
        if n_labeled:
            self.log("label_loss_train", loss / n_labeled, sync_dist=True)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        _, generative, losses = self.module(batch)
        self._log_losses(losses, "validation")
        others = [value for name, value in losses.extra_metrics.items() if name != "label_loss"]
        n_obs = torch.tensor(losses.n_obs_minibatch, device=losses.loss.device)
        self._add("unlabeled", sum(others, start=losses.loss.new_zeros(())).float() * n_obs, n_obs)
        if self.module.label_head is not None:
            self._add("label_validation", self.module.log_loss(generative, batch["label"]), _n_labeled(batch))

    def on_validation_epoch_end(self) -> None:
        loss, n_obs = self._total("unlabeled")
        loss = loss / n_obs
        if self.module.label_head is not None:
            log_loss, n_labeled = self._total("label_validation")
            self._fit_weight(log_loss)
            if n_labeled:
                label_loss = log_loss.min() / n_labeled
                self.log("label_loss_validation", label_loss, sync_dist=True)
                loss = loss + self.module.label_weight * label_loss
        self.log("validation_loss", loss, prog_bar=True, sync_dist=True)

    def _fit_weight(self, log_loss: torch.Tensor) -> None:
        if self.module.label_head_alone is not None and log_loss.any():
            self.module.neighbor_weight.copy_(MIXTURE_WEIGHTS[int(log_loss.argmin())])

    def _log_losses(self, losses: LossOutput, mode: str) -> dict[str, Any]:
        """Log what is a mean over all cells of the epoch, and return how to."""
        how = {"on_step": False, "on_epoch": True, "sync_dist": True, "batch_size": losses.n_obs_minibatch}
        named = {f"{name}_{mode}": value for name, value in losses.extra_metrics.items() if name != "label_loss"}
        self.log_dict(named, **how)
        return how

    def _add(self, name: str, loss: torch.Tensor, n_cells: torch.Tensor) -> None:
        """Add to the sums of the epoch.

        Not left to Lightning, which divides by zero where weights are, and rounds their mean over processes.
        """
        sums = self._sums.get(name, (0.0, 0))
        self._sums[name] = sums[0] + loss.detach(), sums[1] + n_cells

    def _total(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the sums of the epoch over all processes, and start anew."""
        loss, n_cells = (self.trainer.strategy.reduce(total, reduce_op="sum") for total in self._sums.pop(name))
        return loss, n_cells

    def configure_optimizers(self) -> dict[str, Any]:
        groups: dict[str, dict[str, Any]] = {
            "weights": {"lr": self.lr, "weight_decay": self.weight_decay},
            "tables": {"lr": self.lr, "weight_decay": 0.0},
            "head": {"lr": self.lr_head, "weight_decay": self.weight_decay},
            "foundation": {"lr": self.lr_foundation, "weight_decay": self.weight_decay},
        }
        members: dict[str, list[torch.nn.Parameter]] = {name: [] for name in groups}
        for name, parameter in self.module.named_parameters():
            if not parameter.requires_grad:
                continue
            if self.module.network.pretrained and name.startswith("network."):
                members["foundation"].append(parameter)
            elif name.endswith("loading"):
                # A table that starts at zero must be able to leave it.
                size = max(float(parameter.detach().square().mean().sqrt()), 0.1 * len(parameter) ** -0.5)
                groups[name] = {"lr": self.lr_loadings * size, "weight_decay": 0.0}
                members[name] = [parameter]
            elif name in ("network.embedding.identity", "value_head.bias"):
                members["tables"].append(parameter)
            else:
                members["head" if name.startswith("label_head") else "weights"].append(parameter)
        optimizer = torch.optim.AdamW(
            [{"params": members[name], **group} for name, group in groups.items() if members[name]]
        )
        total = max(int(self.trainer.estimated_stepping_batches), 1)

        last = recipe().last_rate

        def rate(step: int) -> float:
            return last + (1.0 - last) * 0.5 * (1.0 + math.cos(math.pi * min(step / total, 1.0)))

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # A checkpoint may leave out what is here already.
        state = self.state_dict()
        for weights in stored_weights(checkpoint):
            weights.update((name, state[name]) for name in frozen(self) - set(weights))

    def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        self.clip_gradients(optimizer, gradient_clip_val=self.gradient_clip, gradient_clip_algorithm="norm")


def frozen(module: torch.nn.Module) -> set[str]:
    """Return the names of what training does not change: nearly all of a frozen foundation model."""
    return {name for name, parameter in module.named_parameters() if not parameter.requires_grad}


def trained_weights(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return a copy of all weights and buffers that training may change."""
    fixed = frozen(module)
    return {name: value.detach().cpu().clone() for name, value in module.state_dict().items() if name not in fixed}


def stored_weights(checkpoint: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the weights in a checkpoint of Lightning, by name: averaged ones, and those in training."""
    return [checkpoint[name] for name in ("state_dict", "current_model_state") if name in checkpoint]


def _n_labeled(batch: Batch) -> torch.Tensor:
    return (batch["label"] >= 0).sum()
