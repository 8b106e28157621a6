"""Noisy digits at places of a simulated town, where images nearby tend to show the same digit.

Simulated: the town, and where the images are. Real: the 1,797 handwritten digits of scikit-learn, each used once. The
town has 30 districts, each with a digit that most of its images show (about 3 in 4 of the 6 nearest neighbours show the
same digit), and the pixels get so much noise that one image alone is hard to tell. Whole blocks of about 30 nearby
images are training (60 %), validation (20 %, for early stopping and hyperparameters) and test (20 %). Transductive: the
test images are there in training, without their labels.

With --street instead: the 32 real street photos end to end, from coordinates to embedding and reconstruction.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path

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
from _common import Results, folds, label_scores, parse, parser

TITLES = {"fimp": "FIMP", "shuffled": "FIMP, shuffled positions"}
N_DISTRICTS, OWN_DIGIT = 30, 0.95  # share of a district's places that ask for its digit
NOISE = 0.5  # standard deviation of the pixels' noise, where black is 0 and white 1
N_NEIGHBOURS, BLOCK_SIZE = 6, 30
CENTRE, DEGREES = (55.70, 13.19), (0.02, 0.036)  # latitude, longitude; a town of about 2.2 × 2.2 km


def town(seed: int, noise: float = NOISE) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
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
    pixels = digits.images[image] / 16 + noise * rng.normal(size=(n, 8, 8))
    # Values beyond black and white are kept apart: half of the range is for the noise on either side.
    shown = np.clip((pixels + 1) / 3, 0, 1)
    return np.round(255 * shown).astype(np.uint8), digits.target[image], CENTRE + (places - 0.5) * DEGREES


def split(places: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Training, validation and test images, boolean (n,), in whole spatial blocks."""
    from fimp_sc.data import spatial_blocks

    fold = folds(spatial_blocks(places / DEGREES, BLOCK_SIZE, random_state=seed), 5, seed)
    return fold > 1, fold == 1, fold == 0


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


def convolution(
    x: np.ndarray, labels: np.ndarray, train: np.ndarray, validation: np.ndarray, seed: int, quick: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Predicted digits (n,) and embedding (n, 64) of standardised images (n, 64); validation images choose dropout."""
    images, target = torch.from_numpy(x).reshape(-1, 1, 8, 8), torch.from_numpy(labels)
    rng, best, made = np.random.default_rng(seed), np.inf, (labels, x)
    for dropout in (0.2, 0.5):
        torch.manual_seed(seed)
        model = ImageNetwork(dropout)

        def loss(nodes: np.ndarray, model: nn.Module = model) -> torch.Tensor:
            return functional.cross_entropy(model(images[nodes]), target[nodes])

        def losses(loss=loss) -> Iterator[torch.Tensor]:
            yield from (loss(part) for part in np.array_split(rng.permutation(np.flatnonzero(train)), 17))

        score = networks.fit(
            model,
            losses,
            lambda f=loss: f(validation).item(),
            lr=1e-3,
            weight_decay=5e-4,
            epochs=2 if quick else 60,
            patience=10,
        )
        if score < best:
            with torch.no_grad():
                best, made = score, (model(images).argmax(1).numpy(), model.embed(images).numpy())
    return made


def logistic(x: np.ndarray, labels: np.ndarray, train: np.ndarray, validation: np.ndarray) -> np.ndarray:
    """Predicted labels of all nodes; C is that of best accuracy on the validation nodes."""
    models = [make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=3000)) for c in (0.001, 0.01, 0.1, 1.0)]
    fitted = [model.fit(x[train], labels[train]) for model in models]
    return max(fitted, key=lambda model: model.score(x[validation], labels[validation])).predict(x)


def baselines(mdata, labels: np.ndarray, train: np.ndarray, validation: np.ndarray, seed: int, quick: bool) -> Iterator:
    """Yield (method, function that predicts the digits of all images)."""
    adata = mdata["image"]
    graph = sp.csr_matrix(adata.obsp["spatial_connectivities"])
    pixels = np.asarray(adata.obsm["pixels"], np.float32)
    x = (pixels - pixels[train].mean()) / pixels[train].std()
    epochs = 2 if quick else None
    yield "MLP", partial(networks.classify, "MLP", x, graph, labels, train, validation, seed, epochs)
    trained = cache(partial(convolution, x, labels, train, validation, seed, quick))
    yield "CNN", lambda: trained()[0]
    places = np.radians(adata.obsm["spatial"])
    near = KNeighborsClassifier(10, metric="haversine").fit(places[train], labels[train])
    yield "majority of the 10 nearest training images", partial(near.predict, places)
    mean = normalize(graph, norm="l1")

    def around(hops: int) -> np.ndarray:
        means = [trained()[1]]
        for _ in range(hops):
            means.append(mean @ means[-1])
        return logistic(np.hstack(means), labels, train, validation)

    yield "logistic on CNN, own + neighbours", partial(around, 1)
    yield "logistic on CNN, own + neighbours + theirs", partial(around, 2)
    for kind in networks.KINDS:
        yield kind, partial(networks.classify, kind, x, graph, labels, train, validation, seed, epochs)


def fimp(mdata, train: np.ndarray, validation: np.ndarray, args: argparse.Namespace, seed: int) -> np.ndarray:
    """Digits of all images from FIMP; ``obs["label"]`` is "Unknown" for the test images, which train without it."""
    from fimp_sc.model import FIMP

    FIMP.setup_mudata(mdata, modality="image", labels_key="label", unlabeled_category="Unknown")
    model = FIMP(mdata, token_size=2, random_state=seed)
    model.train(
        max_epochs=args.max_epochs,
        accelerator=args.accelerator,
        train_indices=np.flatnonzero(~validation),
        validation_indices=np.flatnonzero(validation),
        enable_progress_bar=False,
    )
    return np.asarray(model.predict()).astype(str)


def street(folder: Path, args: argparse.Namespace) -> None:
    """Train on the real photos, embed them, reconstruct a fifth of their patches; print what it took."""
    import fimp_sc
    from fimp_sc.model import FIMP

    stored = np.load(Path(folder) / "street_images_opensfm_224.npz")
    images, started = stored["images"], time.perf_counter()
    names = [f"{site}_{name}" for site, name in zip(stored["site"], stored["filename"], strict=True)]
    places = np.column_stack([stored["lat"], stored["lon"]])
    mdata = fimp_sc.pp.images(images, coordinates=places, names=names, n_neighbors=4, radius_km=1.0)
    FIMP.setup_mudata(mdata, modality="image")
    model = FIMP(mdata, token_size=16, random_state=0)
    print(f"graph and model: {time.perf_counter() - started:.1f} s")
    started = time.perf_counter()
    epochs = 20 if args.max_epochs is None else args.max_epochs
    model.train(max_epochs=epochs, accelerator=args.accelerator, enable_progress_bar=False)
    print(f"{epochs} epochs: {time.perf_counter() - started:.1f} s")
    started = time.perf_counter()
    print(f"embedding {model.get_latent_representation().shape}: {time.perf_counter() - started:.1f} s")
    side = images.shape[1] // 16
    hidden = np.random.default_rng(0).random((len(images), side * side)).argsort(1) < round(0.2 * side * side)
    started = time.perf_counter()
    made = np.asarray(model.get_reconstruction(hidden=hidden), np.float64)
    print(f"reconstruction {made.shape}: {time.perf_counter() - started:.1f} s")
    gap = hidden.reshape(-1, side, side).repeat(16, 1).repeat(16, 2)
    seen = ~gap[..., None]
    mean = (images * seen).sum((1, 2), keepdims=True) / seen.sum((1, 2), keepdims=True)
    for method, filled in (
        ("mean of the visible pixels of an image", np.broadcast_to(mean, images.shape)),
        ("FIMP", made),
    ):
        print(f"MSE of hidden patches (pixels 0 to 255), {method}: {((filled - images)[gap] ** 2).mean():.0f}")


def main() -> None:
    """Run the methods and write the table."""
    import fimp_sc

    p = parser(__doc__)
    p.add_argument("--street", action="store_true", help="the real street photos instead")
    p.add_argument("--noise", type=float, default=NOISE, help="of the pixels, where black is 0 and white 1")
    args = parse(p)
    if args.street:
        street(args.data, args)
        return
    results = Results("images", args)
    data = "digits" if args.noise == NOISE else f"digits, noise {args.noise:g}"
    for seed in range(args.seeds):
        pixels, labels, places = town(seed, args.noise)
        train, validation, test = split(places, seed)
        known = np.where(test, "Unknown", labels.astype(str))
        mdata = fimp_sc.pp.images(pixels, coordinates=places, labels=known, n_neighbors=N_NEIGHBOURS)
        graph = sp.coo_matrix(mdata["image"].obsp["spatial_connectivities"])
        print(f"{(labels[graph.row] == labels[graph.col]).mean():.0%} of neighbours show the same digit.")
        if "baselines" in args.methods:
            for method, predict in baselines(mdata, labels, train, validation, seed, args.quick):
                if results.wants(data, method, seed):
                    started = time.perf_counter()
                    results.add(data, method, seed, label_scores(labels[test], predict()[test]), started)
        for method in [m for m in TITLES if m in args.methods and results.wants(data, TITLES[m], seed)]:
            started = time.perf_counter()
            if method == "shuffled":
                moved = np.random.default_rng(seed).permutation(places)
                mdata = fimp_sc.pp.images(pixels, coordinates=moved, labels=known, n_neighbors=N_NEIGHBOURS)
            predicted = fimp(mdata, train, validation, args, seed)
            results.add(data, TITLES[method], seed, label_scores(labels[test], predicted[test]), started)
        results.finish()  # after each seed, so that a run cut short keeps its rows


if __name__ == "__main__":
    main()
