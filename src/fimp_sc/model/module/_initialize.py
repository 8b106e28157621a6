"""Initialization of the module from its training nodes: statistics, components and heads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy import sparse
from scvi.module.base import BaseModuleClass
from torch import Tensor, nn

from fimp_sc._recipe import recipe
from fimp_sc.model.module._linear_smoother import fit_components, principal_components, shared_components

if TYPE_CHECKING:
    from collections.abc import Iterable

    from fimp_sc.data import Batch, GeneStatistics, SequenceShape, SequenceStatistics
    from fimp_sc.nn._heads import LabelHead, ValueHead
    from fimp_sc.nn._network import Network


# Of the mean square, in units of which less is rounding.
_LEAST_VARIANCE = 1e-8


def _least_variance(square: float) -> float:
    return max(_LEAST_VARIANCE * square, float(np.finfo(np.float32).tiny))


class StartingModule(BaseModuleClass):
    """A module that knows statistics of its training nodes and starts from simple linear models of them.

    Attributes
    ----------
    network, value_head, label_head, label_head_alone
        Network and heads.
    sequences
        By modality: tokens of signals and images.
    """

    network: Network
    value_head: ValueHead | None
    label_head: LabelHead | None
    label_head_alone: LabelHead | None
    sequences: dict[str, SequenceShape]
    statistics: nn.ModuleDict
    embedding_mean: Tensor
    embedding_std: Tensor
    gene_mean: Tensor
    gene_fraction: Tensor
    target_sum: Tensor
    value_variance: Tensor
    batch_name: Tensor
    batch_gain: Tensor
    gene_key: np.ndarray
    class_weight: Tensor

    @torch.no_grad()
    def set_statistics(self, statistics: GeneStatistics, train: sparse.csr_matrix) -> None:
        """Set what the training cells tell about genes.

        Parameters
        ----------
        statistics
            Of the training cells.
        train
            ``(n_cells, n_features)`` CSR log-normalized expression of training cells.
        """
        self.gene_mean.copy_(torch.from_numpy(statistics.mean))
        self.gene_fraction.copy_(torch.from_numpy(statistics.fraction))
        self.target_sum.copy_(torch.as_tensor(statistics.target_sum))
        square = float(train.power(2).mean())
        variance = square - float(np.square(statistics.mean).mean())
        self.value_variance.fill_(max(variance, _least_variance(square)))

    def set_gains(self, names: np.ndarray, gains: np.ndarray) -> None:
        """Set the factors of genes in technical batches.

        Parameters
        ----------
        names
            ``(n_batches,)`` int64, hashes of their names.
        gains
            ``(n_batches, n_features)``.
        """
        self.batch_name = torch.from_numpy(names.copy()).to(self.batch_name.device)
        self.batch_gain = torch.from_numpy(gains).to(self.batch_gain.device)

    def set_class_weight(self, counts: np.ndarray, balance: float = 0.0) -> None:
        """Set what an error in each class costs.

        Parameters
        ----------
        counts
            ``(n_labels,)`` training cells per class.
        balance
            0 weighs cells alike, 1 classes alike.
        """
        counts = np.maximum(counts, 1)
        weight = (counts / counts.mean()) ** -balance
        self.class_weight.copy_(torch.from_numpy(weight * counts.sum() / (weight * counts).sum()))

    def set_sequence_statistics(self, name: str, statistics: SequenceStatistics) -> None:
        """Set what the training nodes tell about a modality of signals or images."""
        buffers: Any = self.statistics[str(list(self.sequences).index(name))]
        buffers.mean.fill_(statistics.mean)
        buffers.std.fill_(statistics.std)
        buffers.center.copy_(torch.from_numpy(statistics.center))
        buffers.spread.copy_(torch.from_numpy(statistics.spread))

    def start_from_components(self, name: str, tokens: Tensor) -> None:
        """Let the tokens of a modality start as their principal components.

        Parameters
        ----------
        name
            Of the modality.
        tokens
            ``(n, p)`` standardized numbers of training nodes.
        """
        numbers = tokens.double()
        basis = torch.linalg.eigh(numbers.T @ numbers).eigenvectors.flip(1)
        sequences: Any = self.network.sequences
        sequences.embeddings[sequences.names.index(name)].start_from(basis.float().to(self.device))

    @torch.no_grad()
    def fit_heads(self, batches: Iterable[Batch], ridge: float) -> None:
        """Set the heads that read signals and images to least squares over the hidden tokens of some blocks.

        Parameters
        ----------
        batches
            Blocks with hidden tokens.
        ridge
            Added to the diagonal of the normal equations.
        """
        square: dict[str, Tensor] = {}
        product: dict[str, Tensor] = {}
        for batch in batches:
            states = self.network.states(batch, self.network.n_queries(batch, reconstruct=True))
            for name, own in self.network.split(states, batch).items():
                nodes = batch["sequences"][name]
                hidden = nodes["target_mask"]
                x = torch.nn.functional.pad(own[hidden], (0, 1), value=1.0).double()
                square[name] = square.get(name, 0) + x.T @ x
                product[name] = product.get(name, 0) + x.T @ nodes["target"][hidden].double()
        for name, head in self.network.heads.items():
            if name in square:
                eye = torch.eye(len(square[name]), dtype=torch.float64, device=self.device)
                weight = torch.linalg.solve(square[name] + ridge * eye, product[name]).float()
                linear: Any = head
                linear.weight.copy_(weight[:-1].T)
                linear.bias.copy_(weight[-1])

    def start_from_vectors(self, vectors: np.ndarray, known: np.ndarray) -> None:
        """Use pretrained vectors of genes, ``(n_genes, width)``, where ``known``: they stay as they are."""
        if self.network.gene_table is None:
            raise TypeError("Only FIMP-base of genes starts from their vectors.")
        self.network.gene_table.start_from_vectors(vectors, known)

    @torch.no_grad()
    def start_from_embeddings(self, embedding: np.ndarray) -> None:
        """Let the heads of a foundation model see standardized embeddings, and start by predicting gene means.

        Embeddings of one tissue differ little from each other beside their common mean, which would hide from a
        linear map what they say about a cell.

        Parameters
        ----------
        embedding
            ``(n_cells, width)`` of some training cells.
        """
        std = embedding.std(0)
        self.embedding_mean.copy_(torch.from_numpy(embedding.mean(0)))
        self.embedding_std.copy_(torch.from_numpy(np.maximum(std, 1e-3 * max(float(std.max()), 1e-6))))
        if self.value_head is not None:
            nn.init.zeros_(self.value_head.loading)

    @torch.no_grad()
    def start_as_smoother(
        self,
        train: sparse.csr_matrix,
        near: sparse.csr_matrix,
        validation: sparse.csr_matrix,
        around: sparse.csr_matrix,
        mean: np.ndarray,
        *,
        neighbor_weight: float = 1.0,
        drop_noise: bool = False,
        random_state: int = 0,
    ) -> None:
        """Let training start as the best linear smoother of leading components.

        The gene loadings become the leading principal components of the training cells, so the summary token of a
        cell is its vector of PCA scores, beside which the layers write the scores of its neighbors' mean. How much a
        component of either tells about hidden entries is measured on the validation cells, and sets how strongly the
        value head reads it: components that only memorize the noise of the training cells start at zero. Where
        principal components of single cells are mostly noise, those are taken that cells share with their neighbors.

        Parameters
        ----------
        train, validation
            ``(n_cells, n_features)`` CSR log-normalized expression.
        near
            ``(n_train, n_train)`` CSR, a row averages over a training cell's neighbors among these.
        around
            ``(n_validation, n_features)`` CSR, mean expression around each validation cell.
        mean
            ``(n_features,)`` mean expression of the training cells.
        neighbor_weight
            Of neighbors beside the cell itself, where components are taken that both share.
        drop_noise
            Whether the summary leaves out the last components, which tell nothing: their columns are free for what is
            learned.
        random_state
            Seed.
        """
        if self.network.gene_table is None or self.value_head is None:
            raise TypeError("Only FIMP-base of genes starts from principal components.")
        n_own, n_neighborhood = self.network.n_own, self.network.n_neighborhood
        n_components = min(n_own, min(train.shape) - 1) if recipe().components else 0
        least = _least_variance(float(train.power(2).mean()))
        if n_components < 1 or float(self.value_variance) <= 1.001 * least:
            return
        deviation = np.sqrt(np.maximum(np.asarray(train.power(2).mean(0)).ravel() - mean**2, 0.0))
        if not deviation.any():
            return  # all cells are alike
        gene_scale = np.maximum(deviation, 1e-3 * float(deviation.max())) ** recipe().gene_scale
        scaled = sparse.csr_matrix(train @ sparse.diags(1.0 / gene_scale))
        shared = min(n_components, n_neighborhood)
        how = (gene_scale, validation, around, mean, shared, random_state, self.gene_key)
        loadings, fit = fit_components(principal_components(scaled, n_components, random_state), *how)
        if fit.signal < recipe().mostly_signal and near.nnz and n_components < train.shape[1]:
            components = shared_components(scaled, near, neighbor_weight, n_components, random_state)
            loadings, fit = fit_components(components, *how)
        encode, decode, spread = loadings
        columns = np.zeros((len(mean), n_own + shared))
        columns[:, :n_components] = decode * fit.own
        columns[:, n_own:] = decode[:, :shared] * fit.neighbors
        if drop_noise:
            kept = max(fit.n_telling, shared)
            encode[:, kept:] = columns[:, kept:n_components] = 0.0
        self.network.gene_table.start_from(encode)
        self.value_head.start_from(columns)
        deviations = np.ones(n_own + shared)
        deviations[:n_components] = spread
        deviations[n_own:] = spread[:shared]
        for head in (self.label_head, self.label_head_alone):
            if head is not None:
                head.start_from(deviations)
