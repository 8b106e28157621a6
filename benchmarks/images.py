"""Noisy digits at places of a simulated town, where images nearby tend to show the same digit.

Simulated: the town, and where the images are. Real: the 1,797 handwritten digits of scikit-learn, each used once. The
town has 30 districts, each with a digit that most of its images show (about 3 in 4 of the 6 nearest neighbors show the
same digit), and the pixels get so much noise that one image alone is hard to tell. Whole blocks of about 30 nearby
images are training (60 %), validation (20 %, for early stopping and hyperparameters) and test (20 %). Transductive: the
test images are there in training, without their labels.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from sklearn.cluster import KMeans
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler, normalize
from torch import nn
from torch.nn import functional

import _graph_networks as networks
import _harness
import _nodes
from _common import folds
from _harness import Fit, Run
from _nodes import Nodes

N_DISTRICTS, OWN_DIGIT = 30, 0.95  # share of a district's places that ask for its digit
NOISE = 0.5  # standard deviation of the pixels' noise, where black is 0 and white 1
N_NEIGHBORS, BLOCK_SIZE = 6, 30
CENTER, DEGREES = (55.70, 13.19), (0.02, 0.036)  # latitude, longitude; a town of about 2.2 × 2.2 km


def town(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Images uint8 (n, 8, 8), labels (n,) and places (n, 2) as latitude and longitude."""
    rng = np.random.default_rng(seed)
    digits = load_digits()
    n = len(digits.target)
    places = rng.random((n, 2))
    district = KMeans(N_DISTRICTS, n_init=1, random_state=seed).fit_predict(places)  # of about equal size
    wanted = rng.permutation(np.arange(N_DISTRICTS) % 10)[district]
    left = [list(rng.permutation(np.flatnonzero(digits.target == d))) for d in range(10)]
    image = np.empty(n, int)
    for i in rng.permutation(n):
        digit = wanted[i]
        if rng.random() > OWN_DIGIT or not left[digit]:  # any image that is left
            counts = np.array([len(one) for one in left])
            digit = rng.choice(10, p=counts / counts.sum())
        image[i] = left[digit].pop()
    pixels = digits.images[image] / 16 + NOISE * rng.normal(size=(n, 8, 8))
    # Values beyond black and white are kept apart: half of the range is for the noise on either side.
    shown = np.clip((pixels + 1) / 3, 0, 1)
    return np.round(255 * shown).astype(np.uint8), digits.target[image], CENTER + (places - 0.5) * DEGREES


def split(places: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Training, validation and test images, boolean (n,), in whole spatial blocks."""
    from fimp_sc.data import spatial_tiles

    fold = folds(spatial_tiles(places / DEGREES, BLOCK_SIZE, random_state=seed), 5, seed)
    return fold > 1, fold == 1, fold == 0


@dataclass(frozen=True)
class Images(Nodes):
    """Nodes whose features are pixels, standardized; `places` are latitude and longitude, (n, 2)."""

    places: np.ndarray


def problem(data: str, args: Any, seed: int) -> tuple[Images, Callable[[np.ndarray], dict[str, float]]]:
    """The town without the labels of its test images, and the scores of these."""
    import fimp_sc

    pixels, truth, places = town(seed)
    train, validation, test = split(places, seed)
    labels = np.where(test, -1, truth)

    def build(order: np.ndarray) -> Any:
        how = {"labels": _nodes.known(labels), "n_neighbors": N_NEIGHBORS}
        return fimp_sc.pp.images(pixels, coordinates=places[order], **how)

    adata = build(np.arange(len(labels)))["image"]
    x = np.asarray(adata.obsm["pixels"], np.float32)
    x = (x - x[train].mean()) / x[train].std()
    graph = sp.csr_matrix(adata.obsp["spatial_connectivities"])
    return Images(x, graph, labels, train, validation, build, places), _nodes.scores(truth, test)


def nearest(problem: Images, run: Run) -> Fit:
    """Majority of the 10 nearest training images."""
    places, train = np.radians(problem.places), problem.train
    near = KNeighborsClassifier(10, metric="haversine").fit(places[train], problem.labels[train])
    return Fit(near.predict(places))


class ImageNetwork(nn.Module):
    """A small convolutional network for (n, 1, 8, 8); `embed` gives what its last layer sees."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.Flatten(), nn.Dropout(dropout),
            nn.Linear(1024, 64), nn.ReLU(), nn.Dropout(dropout),
        )  # fmt: skip
        self.last = nn.Linear(64, 10)

    def embed(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.layers(x))


def convolution(problem: Images, run: Run) -> tuple[Fit, np.ndarray]:
    """Digits of all images and their embedding (n, 64); validation images choose dropout."""
    images, target = torch.from_numpy(problem.x).reshape(-1, 1, 8, 8), torch.from_numpy(problem.labels)
    rng, started, trainings = np.random.default_rng(run.seed), time.process_time(), []
    for dropout in (0.2, 0.5):
        torch.manual_seed(run.seed)
        model = ImageNetwork(dropout)

        def loss(nodes: np.ndarray, model: nn.Module = model) -> torch.Tensor:
            return functional.cross_entropy(model(images[nodes]), target[nodes])

        def losses(loss: Callable = loss) -> Iterator[torch.Tensor]:
            yield from (loss(part) for part in np.array_split(rng.permutation(np.flatnonzero(problem.train)), 17))

        def validate(loss: Callable = loss) -> float:
            return loss(problem.validation).item()

        how = {"lr": 1e-3, "weight_decay": 5e-4, "epochs": 2 if run.quick else 60, "patience": 10}
        trainings.append(networks.fit(model, losses, validate, **how))
    best = min(trainings, key=lambda training: training.best)
    fit = networks.chosen(trainings, best, started)
    with torch.no_grad():
        return replace(fit, values=best.model(images).argmax(1).numpy()), best.model.embed(images).numpy()


def around(problem: Images, run: Run, hops: int) -> Fit:
    """Logistic regression on the embedding of the convolutional network and its means over neighbors of neighbors."""
    fit, embedding = convolution(problem, run)
    means, mean = [embedding], normalize(problem.graph, norm="l1")
    for _ in range(hops):
        means.append(mean @ means[-1])
    models = [make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=3000)) for c in (0.001, 0.01, 0.1, 1.0)]
    return replace(fit, values=_nodes.most_accurate(problem, np.hstack(means), models))


BASELINES = {
    "CNN": lambda problem, run: convolution(problem, run)[0],
    "majority of the 10 nearest training images": nearest,
    "logistic on CNN, own + neighbors": partial(around, hops=1),
    "logistic on CNN, own + neighbors + theirs": partial(around, hops=2),
}
GROUPS = _nodes.groups(BASELINES, "FIMP, shuffled positions", token_size=2)

if __name__ == "__main__":
    default = ("baselines", "networks", "fimp", "controls")
    _harness.main("images", __doc__, ("digits",), problem, GROUPS, default=default, more=())
