"""Shared fixtures."""

from __future__ import annotations

import json
import os
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData
from mudata import MuData
from scipy import sparse

import fimp_sc
from fimp_sc.data._modality import quiet_mudata

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

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


@pytest.fixture(scope="session")
def _recordings() -> MuData:
    rng = np.random.default_rng(0)
    waves = rng.normal(size=(3, 47)).cumsum(1)
    bold = rng.normal(size=(2, 12, 3)) @ waves * 20 + rng.normal(size=(2, 12, 47)) * 10 + 1e3
    return fimp_sc.pp.fmri(
        bold, coordinates=rng.normal(size=(12, 3)), n_neighbors=2, labels={"lobe": ["front", "back", "side"] * 4}
    )


@pytest.fixture
def recordings(_recordings: MuData) -> MuData:
    """Modality "fmri": 2 recordings x 12 regions x 47 time points with places, a graph and "lobe"; may be changed."""
    return _copy(_recordings)


@pytest.fixture(scope="session")
def _pictures() -> MuData:
    rng = np.random.default_rng(1)
    tint = rng.integers(0, 150, (20, 1, 1, 3))
    pixels = (tint + rng.integers(0, 100, (20, 8, 9, 3))).astype(np.uint8)
    labels = {"site": np.where(tint.sum((1, 2, 3)) > 220, "bright", "dark")}
    return fimp_sc.pp.images(pixels, coordinates=rng.random((20, 2)), n_neighbors=2, labels=labels)


@pytest.fixture
def pictures(_pictures: MuData) -> MuData:
    """Modality "image": 20 images of 8 x 9 pixels with a graph and "site"; may be changed."""
    return _copy(_pictures)


@pytest.fixture(scope="session")
def _joint() -> MuData:
    rng = np.random.default_rng(2)
    names, points = np.array([f"n{i}" for i in range(24)]), rng.random((24, 2))
    kind = rng.integers(0, 2, 24)
    rna, image, bold = np.arange(2, 24), rng.permutation(24)[:18], np.sort(rng.permutation(24)[:20])
    bold = np.union1d(bold, np.setdiff1d(np.arange(24), np.union1d(rna, image)))
    counts = rng.poisson(1 + 3 * (kind[:, None] == np.arange(14) % 2)).astype(np.float32)
    genes = pd.DataFrame(index=[f"g{i}" for i in range(14)])
    parts = {
        "rna": AnnData(sparse.csr_matrix(counts[rna]), pd.DataFrame(index=names[rna]), genes),
        "image": fimp_sc.pp.images(
            rng.integers(0, 255, (18, 6, 6, 1), dtype=np.uint8), coordinates=points[image], names=names[image],
            n_neighbors=2,
        )["image"],
        "bold": AnnData(rng.normal(5, 2, (len(bold), 12)).astype(np.float32), pd.DataFrame(index=names[bold])),
    }  # fmt: skip
    parts["bold"].uns["fimp_modality"] = {"kind": "signal"}
    with quiet_mudata():
        mdata = MuData(parts)
    row = [int(name[1:]) for name in mdata.obs_names]
    mdata.obs["kind"] = pd.Categorical(np.array(["one", "two"])[kind[row]])
    mdata.obsm["spatial"] = points[row]
    near = np.linalg.norm(points[row][:, None] - points[row], axis=2).argsort(1)[:, 1:4]
    graph = sparse.csr_matrix((np.ones(near.size), (np.repeat(np.arange(24), 3), near.ravel())), shape=(24, 24))
    mdata.obsp["spatial_connectivities"] = graph
    return mdata


@pytest.fixture
def joint(_joint: MuData) -> MuData:
    """Expression ("rna"), images ("image", in another order) and signals ("bold") of 24 nodes; each lacks some.

    A graph of all nodes, their coordinates and their "kind" are in the whole object. A copy that a test may change.
    """
    return _copy(_joint)


def _copy(mdata: MuData) -> MuData:
    with quiet_mudata():
        return mdata.copy()


@pytest.fixture(scope="session")
def copied_mudata() -> Callable[[MuData], MuData]:
    """Copy a MuData object without warnings about future versions."""
    return _copy


def _contents(mdata: MuData) -> dict[tuple[str, ...], Any]:
    """Return a deep copy of everything in an object, by modality ("" for the whole), attribute and key."""
    found: dict[tuple[str, ...], Any] = {}
    for name, part in {"": mdata, **mdata.mod}.items():
        found[name, "names"] = [list(part.obs_names), list(part.var_names)]
        if name:
            found[name, "X"] = deepcopy(part.X)
        for kind in ("obs", "var", "obsm", "varm", "obsp", "varp", "layers", "uns"):
            entries = getattr(part, kind, None)
            # Recent anndata lists X among layers, as None.
            for key in () if entries is None else [key for key in entries if key is not None]:
                found[name, kind, key] = deepcopy(entries[key])
    return found


def _assert_same(a: Any, b: Any, where: str) -> None:
    assert type(a) is type(b), where
    if sparse.issparse(a):
        assert a.dtype == b.dtype, where
        a, b = a.toarray(), b.toarray()
    if isinstance(a, np.ndarray):
        assert a.dtype == b.dtype, where
        np.testing.assert_array_equal(a, b, err_msg=where)
    elif isinstance(a, pd.Series):
        pd.testing.assert_series_equal(a, b)
    elif isinstance(a, pd.DataFrame):
        pd.testing.assert_frame_equal(a, b)
    elif hasattr(a, "items"):
        assert list(a) == list(b), where
        for key in a:
            _assert_same(a[key], b[key], f"{where}/{key}")
    else:
        assert a == b, where


@pytest.fixture(scope="session")
def only_changed() -> Callable[..., Any]:
    """Context in which a MuData object gains the named entries, ``(modality, attribute, key)``, and nothing else."""

    @contextmanager
    def check(mdata: MuData, *written: tuple[str, ...]) -> Iterator[None]:
        before = _contents(mdata)
        yield
        after = _contents(mdata)
        assert set(after) - set(before) == set(written)
        assert set(before) <= set(after)
        for place, value in before.items():
            _assert_same(value, after[place], "/".join(place))

    return check
