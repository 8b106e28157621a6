"""Shared fixtures."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib as mpl
import pytest
import torch

import fimp_sc

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from anndata import AnnData

mpl.use("Agg")
# More threads than free cores make small tensors many times slower.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder with real sections; tests that need it are skipped where it is absent."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("FIMP_SC_DATA", default))
    if not folder.is_dir():
        pytest.skip(f"real data not found in {folder}; set FIMP_SC_DATA to the folder that holds it")
    return folder


@pytest.fixture(scope="session")
def _toy() -> AnnData:
    return fimp_sc.datasets.toy_tissue(n_obs=240, random_state=0)


@pytest.fixture
def toy(_toy: AnnData) -> AnnData:
    """Toy tissue of 240 cells x 765 genes in two sections; a copy that a test may change."""
    return _toy.copy()


@pytest.fixture
def small_toy(_toy: AnnData) -> AnnData:
    """Toy tissue of 240 cells x the 60 genes with most molecules; a copy that a test may change."""
    genes = _toy.X.sum(axis=0).A1.argsort()[::-1][:60]
    return _toy[:, genes].copy()


@pytest.fixture(autouse=True)
def _close_figures() -> Iterator[None]:
    yield
    from matplotlib import pyplot as plt

    plt.close("all")


@pytest.fixture(scope="session")
def scgpt_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Write a checkpoint of scGPT, two layers 16 wide with random weights, whose vocabulary has the given genes."""

    def write(genes: Sequence[str], *, decoder: bool = True) -> Path:
        folder = tmp_path_factory.mktemp("scgpt")
        names = ["<pad>", *genes[: len(genes) // 2], "<cls>", *genes[len(genes) // 2 :], "<eoc>"]
        args = {"embsize": 16, "nheads": 2, "d_hid": 24, "nlayers": 2, "n_bins": 9, "dropout": 0.2}
        (folder / "args.json").write_text(json.dumps(args | {"pad_value": -2, "mask_value": -1}))
        (folder / "vocab.json").write_text(json.dumps({name: i for i, name in enumerate(names)}))
        shapes = {"encoder.embedding": (len(names), 16), "encoder.enc_norm": (16,), "value_encoder.norm": (16,)}
        shapes |= {"value_encoder.linear1": (16, 1), "value_encoder.linear2": (16, 16)}
        for i in range(2):
            parts = {"self_attn.Wqkv": (48, 16), "self_attn.out_proj": (16, 16), "linear1": (24, 16)}
            parts |= {"linear2": (16, 24), "norm1": (16,), "norm2": (16,)}
            shapes |= {f"transformer_encoder.layers.{i}.{name}": shape for name, shape in parts.items()}
        if decoder:
            shapes |= {"decoder.fc.0": (16, 16), "decoder.fc.2": (16, 16), "decoder.fc.4": (1, 16)}
        generator = torch.Generator().manual_seed(0)
        weights = {}
        for name, shape in shapes.items():
            # Norms about one, maps of about the size of their inputs.
            weight = torch.randn(shape, generator=generator) * (0.2 if len(shape) == 1 else shape[1] ** -0.5)
            weights[f"{name}.weight"] = weight + 1.0 * (len(shape) == 1)
            if name != "encoder.embedding":
                weights[f"{name}.bias"] = torch.randn(shape[0], generator=generator) * 0.2
        torch.save(weights, folder / "best_model.pt")
        return folder

    return write
