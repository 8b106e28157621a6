"""How FIMP is optimised."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch

from fimp_sc.nn import FoundationNetwork
from fimp_sc.nn._heads import SHARES

if TYPE_CHECKING:
    from fimp_sc.data import Batch
    from fimp_sc.model._module import FIMPModule

_WARMUP_STEPS = 20


class FIMPTrainingPlan(pl.LightningModule):
    """AdamW with warm-up and cosine decay; logs train and validation losses per epoch.

    Parameters
    ----------
    module
        The module to train.
    lr
        Peak learning rate.
    lr_loadings
        Peak learning rate of the gene loadings, as a share of their own size. They start as principal components,
        whose entries are small and fit the training cells already: at the common rate ten steps would erase them.
    lr_head
        Peak learning rate of the label head. It is a linear map that starts at zero: at the common rate it would be
        the layers below that bend to it.
    lr_foundation
        Peak learning rate of what is trained of a foundation model.
    weight_decay
        Of all weights but the tables of genes.
    gradient_clip
        Largest gradient norm.
    """

    def __init__(
        self,
        module: FIMPModule,
        *,
        lr: float = 5e-4,
        lr_loadings: float = 2e-3,
        lr_head: float = 5e-3,
        lr_foundation: float = 1e-4,
        weight_decay: float = 1e-2,
        gradient_clip: float = 1.0,
    ) -> None:
        super().__init__()
        self.module = module
        self.lr, self.lr_loadings, self.lr_head, self.lr_foundation = lr, lr_loadings, lr_head, lr_foundation
        self.weight_decay = weight_decay
        self.gradient_clip = gradient_clip
        self.n_obs_training: int | None = None
        self.n_obs_validation: int | None = None
        # Log loss of the validation cells for each share of the prediction with neighbours.
        self._mixtures = torch.zeros(len(SHARES))

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        return self._step(batch, "train")

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._step(batch, "validation")

    def on_validation_epoch_start(self) -> None:
        self._mixtures = torch.zeros(len(SHARES), device=self.device)

    def on_validation_epoch_end(self) -> None:
        if self.module.label_head_alone is None:
            return
        mixtures = self.trainer.strategy.reduce(self._mixtures, reduce_op="sum")
        if mixtures.any():
            self.module.neighbour_share.copy_(SHARES[int(mixtures.argmin())])

    def _step(self, batch: Batch, mode: str) -> torch.Tensor:
        _, generative, losses = self.module(batch)
        if mode == "validation":
            mixtures = self.module.mixture_loss(generative, batch["label"])
            self._mixtures += 0.0 if mixtures is None else mixtures
        how = {"on_step": False, "on_epoch": True, "sync_dist": True, "batch_size": losses.n_obs_minibatch}
        self.log(f"{mode}_loss", losses.loss, prog_bar=True, **how)
        self.log_dict({f"{name}_{mode}": value for name, value in losses.extra_metrics.items()}, **how)
        return losses.loss

    def configure_optimizers(self) -> dict[str, Any]:
        groups: dict[str, dict[str, Any]] = {
            "weights": {"lr": self.lr, "weight_decay": self.weight_decay},
            "tables": {"lr": self.lr, "weight_decay": 0.0},
            "head": {"lr": self.lr_head, "weight_decay": self.weight_decay},
            "foundation": {"lr": self.lr_foundation, "weight_decay": self.weight_decay},
        }
        foundation = isinstance(self.module.network, FoundationNetwork)
        members: dict[str, list[torch.nn.Parameter]] = {name: [] for name in groups}
        for name, parameter in self.module.named_parameters():
            if not parameter.requires_grad:
                continue
            if foundation and name.startswith("network."):
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

        def rate(step: int) -> float:
            warmup = min((step + 1) / _WARMUP_STEPS, 1.0)
            return warmup * (0.05 + 0.95 * 0.5 * (1.0 + math.cos(math.pi * min(step / total, 1.0))))

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        self.clip_gradients(optimizer, gradient_clip_val=self.gradient_clip, gradient_clip_algorithm="norm")
