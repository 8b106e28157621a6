"""Every tuned number of training and prediction, in one place.

Each heuristic can be switched off here, which is how ``--methods recipe`` of the benchmarks finds out what it is worth.
"""

from __future__ import annotations

from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass(frozen=True)
class Recipe:
    """Tuned numbers, in the order in which training and prediction use them."""

    # Network
    tokens: int = 16
    tokens_foundation: int = 200
    width: int = 64
    width_sequences: int = 128
    dropout: float = 0.2
    # Of nodes that are sequences and have labels; without labels there is none.
    dropout_sequences: float = 0.5
    # Length of random gene identities.
    identity: float = 0.3

    # Initialization: batches with center="matched": neighbors among which cells of two batches must be of each other,
    # components in which they are, rounds, and at most so many cells.
    matching_neighbors: int = 20
    matching_components: int = 20
    matching_rounds: int = 5
    cells_matching: int = 5000

    # Initialization: components of training cells, and the linear smoother that reads them
    components: bool = True
    # Exponent of a gene's standard deviation by which genes are divided: 0 is covariance, where a few strong genes
    # decide, and 1 correlation, where noise does.
    gene_scale: float = 0.5
    # Exponent of a component's standard deviation: 0 leaves scores as they are, 1 whitens them.
    whitening: float = 0.5
    # Whether factors of components are fitted to hidden entries of validation cells; else all are 1, of neighbors 0.
    smoother: bool = True
    smoother_hidden: float = 0.15
    # Largest factors of own and of neighbors' scores. A score of the cell is signal and noise, so that its factor is at
    # most 1; the mean over neighbors may understate what they share with the cell. A handful of validation cells would
    # give any number by chance.
    largest_factors: tuple[float, float] = (1.0, 2.0)
    # Fraction of signal in components of single cells below which components shared with neighbors are taken instead,
    # and the weight of neighbors there: without labels they alone tell signal from noise.
    mostly_signal: float = 0.4
    neighbor_weight: float = 4.0
    neighbor_weight_labels: float = 1.0
    # Whether the summary leaves out components that tell nothing, and the fraction of signal at which one tells
    # something. Labels, and training on many cells, make use of components that tell nothing by themselves.
    drop_noise: bool = True
    telling: float = 0.05
    cells_components: int = 50_000
    cells_smoother: int = 4096

    # Initialization: layers
    # Whether layers start by writing the mean of neighbors beside a cell's own components.
    layers: bool = True
    # Size of the first layer's message; later layers average these messages again and bring them back to full size, so
    # that the widest neighborhood counts most. It is what carries domains, and the nearest cells are seen in any case.
    first_message: float = 0.3
    # Scale of queries and keys at the start, and the fraction of the usual random start that remains.
    layer_focus: float = 1.4
    layer_noise: float = 0.1
    # The same of sequences: logits of a token of the same position; of a source's summary relative to it, and where
    # summaries hold what nodes show, so that tokens leave them alone; of masked tokens; and of queries, in the column
    # of each head that summaries and masked tokens answer to.
    sequence_focus: float = 10.0
    sequence_summary: float = -0.5
    sequence_whole_summary: float = -6.0
    sequence_masked: float = -8.0
    sequence_bias: float = 4.0
    sequence_noise: float = 0.05
    # Size of messages, and of those of later layers.
    sequence_message: float = 4.0
    sequence_later: float = 0.3
    # Foundation models, signals and images.
    cells_standardized: int = 256
    nodes_components: int = 1000
    nodes_per_block: int = 128
    blocks_heads: int = 4
    ridge_heads: float = 0.3

    # Schedule: an epoch over a small section is a handful of steps, over a large one thousands, so steps are budgeted.
    steps: int = 600
    epochs: tuple[int, int] = (8, 100)
    batch: tuple[int, int] = (64, 256)
    # Tiles that make up a batch are small enough for a batch to hold cells of several domains.
    cells_per_tile: int = 64
    # Up to this many training cells the linear model that training starts from is nearly all that can be learned, and
    # small steps keep it; the more cells, the more and the larger the steps that pay.
    few_cells: int = 4000
    most_steps: float = 4.0
    fastest: float = 16.0
    fastest_labels: float = 8.0
    patience: int = 3
    # The few cells of some blocks say less reliably whether labels are still getting better.
    patience_labels: int = 6
    # The masked loss is relative to gene means, so that a smaller gain is one that no result shows.
    least_gain: float = 2e-4
    # Signals and images start from less than expression does, and learn relations of pairs of nodes.
    steps_sequences: int = 800
    most_epochs_sequences: int = 400
    validations_sequences: int = 30
    patience_sequences: int = 6
    lr_sequences: float = 2e-3
    lr_sequences_labels: float = 1e-3
    # Nodes of a recording that go into one batch: a part of it would read most of the others as neighbors.
    recording: int = 512

    # Masking
    mask_ratio: tuple[float, float] = (0.0, 0.4)
    mask_ratio_sequences: tuple[float, float] = (0.1, 0.6)
    gene_mask_ratio: float = 0.3
    # Probability that a cell is masked at all where there are labels, so that these are learned from cells as they are
    # predicted.
    mask_cells_labels: float = 0.5

    # Optimizer
    lr: float = 5e-4
    lr_loadings: float = 2e-3
    lr_head: float = 5e-3
    lr_foundation: float = 1e-4
    gradient_clip: float = 1.0
    last_rate: float = 0.05
    # Weights used are an exponential average over some tens of steps, which evens out what single blocks ask for.
    averaging: float = 0.97

    # Labels
    class_balance: float = 0.5
    # Whether labels are also predicted from each cell without its neighbors.
    self_prediction: bool = True
    # Where neighbors count nothing in the first epochs, as with cell types, the network would be late to learn what
    # they tell.
    least_neighbor_weight: float = 0.3
    # Most genes that a linear model of labels reads beside the network, cells that it is fitted to, and the inverse
    # strength of its ridge where all genes together have a variance of 1. A panel has genes that neither tokens nor
    # components show; a whole transcriptome has more of them than cells, and a linear model of them adds nothing.
    linear_genes: int = 5000
    linear_cells: int = 10_000
    linear_strength: float = 200.0
    smoothing: bool = True
    # Shifts of a whole section that predictions of other sections must stand, and their size in standard deviations of
    # cells along each component: neighboring sections of one donor differ by about 0.4 (DLPFC 151673, 151674).
    shifts: int = 16
    shift: float = 0.5
    cells_per_shift: int = 2000

    # Niches: the likeliest of few starts of a mixture is often far from the likeliest of all, and with it from the
    # domains of the tissue: of one embedding of DLPFC 151674 the adjusted Rand index was 0.45 to 0.62 by the draw after
    # 5 starts, and 0.62 after 20. Large objects have so few that cells times starts stay below the second number.
    niche_starts: int = 30
    cells_starts: int = 600_000
    # A cell that fits the niches of a reference less than this fraction of its own cells fits none; an object with more
    # such cells than the second number is said to be unlike it. Of 151674 with the niches of 151673 there are 0.03, of
    # a crop of two layers 0.06, of another tissue 1.
    least_fit: float = 0.01
    many_unfit: float = 0.2

    # Other objects
    # With center="batch" the mean of a batch is shrunk toward the training mean as if so many cells were added to it.
    prior_cells: float = 20.0
    # An object is said to be unlike training where more than this fraction of cells is further from the nearest
    # training cell than this fraction of validation cells. Crops of one class and sections with distorted counts reach
    # 0.3 on DLPFC, another tissue or species and permuted names of genes 0.99. A model of a few hundred cells with few
    # counts tells much less: most of its distances are noise.
    far: float = 0.5
    usual: float = 0.99
    # Validation cells below which this distance is not known: that of m such cells is shorter than most others by
    # chance with a probability of 0.5**m.
    fewest_seen: int = 10


RECIPE = Recipe()
_current: ContextVar[Recipe] = ContextVar("recipe", default=RECIPE)


def recipe() -> Recipe:
    """Return the numbers that are in use."""
    return _current.get()


@contextmanager
def changed(**numbers: Any) -> Iterator[Recipe]:
    """Train and predict with other numbers, for experiments.

    Parameters
    ----------
    **numbers
        Fields of :class:`Recipe`. A model that was trained so must be used within the same context.

    Examples
    --------
    >>> from fimp_sc import _recipe
    >>> with _recipe.changed(averaging=0.0) as numbers:
    ...     numbers.averaging
    0.0
    """
    token = _current.set(replace(_current.get(), **numbers))
    try:
        yield _current.get()
    finally:
        _current.reset(token)
