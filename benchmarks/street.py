"""Real street photos end to end: coordinates, graph, training, embedding, and a fifth of their patches reconstructed.

32 photos of mapillary/OpenSfM: enough to see that the steps work on real images, too few for scores.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np

from _common import parse, parser


def main() -> None:
    """Run all steps and print what they took."""
    import fimp_sc
    from fimp_sc.model import FIMP

    args = parse(parser(__doc__, epochs=True))
    stored = np.load(Path(args.data) / "street_images_opensfm_224.npz")
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


if __name__ == "__main__":
    main()
