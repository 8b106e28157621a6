"""Small modalities to draw."""

from __future__ import annotations

import warnings

import anndata as ad
import numpy as np
import pytest
from scipy import sparse

from fimp_sc import pp


@pytest.fixture(params=["backed", "lazy h5ad", "lazy zarr", "dask"])
def stored(request, tmp_path):
    """Bring an object to where its values stay out of memory."""

    def move(adata: ad.AnnData) -> ad.AnnData:
        if request.param == "dask":
            da = pytest.importorskip("dask.array")
            adata = adata.copy()
            adata.X = da.from_array(adata.X.toarray(), chunks=(50, 300)).map_blocks(sparse.csr_matrix)
            for held in (adata.layers, adata.obsm):
                for key in [key for key in held if key is not None]:
                    held[key] = da.from_array(held[key], chunks=(50, -1))
            return adata
        path = tmp_path / f"object.{'zarr' if 'zarr' in request.param else 'h5ad'}"
        with warnings.catch_warnings():
            # anndata says which version of zarr's format it will write some day.
            warnings.filterwarnings("ignore", ".*zarr v[23]", UserWarning)
            getattr(adata, f"write_{path.suffix[1:]}")(path)
        if request.param == "backed":
            return ad.read_h5ad(path, backed="r")
        pytest.importorskip("xarray")
        experimental = pytest.importorskip("anndata.experimental")
        if not hasattr(experimental, "read_lazy"):
            pytest.skip("this anndata reads nothing lazily")
        return experimental.read_lazy(path)

    return move


@pytest.fixture
def brain():
    """Two recordings of five regions, 30 time points every 2 s, and a reconstruction that misses the last two."""
    rng = np.random.default_rng(0)
    mdata = pp.fmri(
        rng.normal(size=(2, 5, 30)).cumsum(-1),
        coordinates=rng.normal(size=(5, 3)),
        region_names=list("ABCDE"),
        recordings=["first", "second"],
        sampling_interval=2.0,
        n_neighbors=2,
    )
    made = mdata["fmri"].X * 2
    made[:, 28:] = np.nan
    mdata["fmri"].layers["fimp"] = made
    return mdata


@pytest.fixture
def photos():
    """Four images of 4 × 8 pixels at the corners of a square of a degree at 60° north; edges along a path."""
    rng = np.random.default_rng(0)
    path = np.diag(np.ones(3), 1)
    return pp.images(
        rng.integers(0, 256, (4, 4, 8, 3)).astype(np.uint8),
        coordinates=[[59.5, 10], [60.5, 10], [60.5, 11], [59.5, 11]],
        adjacency=path + path.T,
        labels={"country": ["x", "x", "y", "z"], "height": [1.0, 2.0, np.nan, 5.0]},
    )
