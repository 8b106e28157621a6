"""Figures of MuData objects find the results where the tools wrote them."""

from __future__ import annotations

import anndata as ad
import mudata
import numpy as np
import pandas as pd
import pytest

from fimp_sc import pl, tl
from fimp_sc.data._modality import quiet_mudata

NAMES = ["rna", "image", "bold"]
QUICK = {
    "max_epochs": 1, "accelerator": "cpu", "verbose": False, "train_kwargs": {"batch_size": 32},
    "model_kwargs": {"n_latent": 16, "n_heads": 2, "n_tokens": 6, "token_size": {"image": 3, "bold": 4}},
}  # fmt: skip
AGAIN = {"accelerator": "cpu", "verbose": False}
pytestmark = pytest.mark.filterwarnings("ignore:.*are left out. Choose another token_size")


@pytest.fixture(params=["now", "read back"])
def embedded(joint, request, tmp_path) -> mudata.MuData:
    """Three modalities of 24 nodes embedded together, whose graph only the signals of all nodes have."""
    tl.embed(joint, modality=NAMES, **QUICK)
    if request.param == "now":
        return joint
    with quiet_mudata():
        joint.write(tmp_path / "object.h5mu")
        return mudata.read_h5mu(tmp_path / "object.h5mu")


def points(ax) -> np.ndarray:
    return np.asarray(ax.collections[0].get_offsets())


def numbers(ax) -> np.ndarray:
    return np.ma.filled(ax.collections[0].get_array().astype(float), np.nan)


def test_results_of_several_modalities_are_found(embedded) -> None:
    mdata = embedded
    tl.niches(mdata, 2, verbose=False)
    assert list(mdata.obs["fimp_niche"].value_counts().index) == ["0", "1"]
    assert not any("fimp_niche" in part.obs for part in mdata.mod.values())
    assert list(mdata.uns["fimp_niche"]["params"]["modality"]) == NAMES
    axes = pl.spatial(mdata, ["fimp_niche", ("X_fimp", 1), "kind", "g3"], show=False)
    np.testing.assert_array_equal(points(axes[0, 0]), mdata.obsm["spatial"][:, :2])
    np.testing.assert_allclose(numbers(axes[1, 0]), mdata.obsm["X_fimp"][:, 1])
    gene = pd.Series(mdata["rna"][:, "g3"].X.toarray().ravel(), mdata["rna"].obs_names)
    assert mdata["rna"].n_obs < mdata.n_obs
    np.testing.assert_array_equal(numbers(axes[3, 0]), gene.reindex(mdata.obs_names))
    table = pd.crosstab(mdata.obs["fimp_niche"], mdata.obs["kind"], normalize="index").to_numpy()
    drawn = pl.niche_composition(mdata, groupby="kind", kind="heatmap", show=False).images[0].get_array()
    np.testing.assert_allclose(drawn, table)


def test_attention_and_imputed_values_of_several_modalities_are_drawn(embedded) -> None:
    mdata = embedded
    tl.attention(mdata, "kind", min_edges=1, n_permutations=10, **QUICK)
    tl.gene_pairs(mdata, "kind", min_edges=1, min_support=0, n_permutations=10, verbose=False)
    assert pl.attention(mdata, show=False) is not None
    assert pl.gene_pairs(mdata, show=False) is not None
    ax = pl.attention_arrows(mdata, mdata.obs_names[5], show=False)
    assert len(ax.patches) == mdata.obsp["fimp_attention"][[5]].nnz > 0
    tl.impute(mdata, **AGAIN)
    made = pl.imputation(mdata, "g3", show=False)
    rows = mdata.obs_names.get_indexer(mdata["rna"].obs_names)
    np.testing.assert_array_equal(points(made[0, 1]), mdata.obsm["spatial"][rows][:, :2])
    place = list(mdata["rna"].var_names).index("g3")
    np.testing.assert_allclose(numbers(made[0, 1]), mdata["rna"].layers["fimp"][:, place])
    assert "spatial" not in mdata["rna"].obsm, "what is drawn is not written"
    assert pl.history(tl.get_model(mdata), show=False) is not None


def test_graph_and_columns_of_a_modality_serve_niches_of_several(joint) -> None:
    """As after pp.spatial_graph on the expression, before the MuData was made."""
    whole, sites, rows = joint.obsp["spatial_connectivities"], joint.obsm["spatial"], joint.obs_names
    rng = np.random.default_rng(0)
    with quiet_mudata():
        table = ad.AnnData(rng.poisson(3, (len(rows), 5)).astype(np.float32), pd.DataFrame(index=rows))
        table.var_names = list("abcde")
        table.obsp["spatial_connectivities"], table.obsm["spatial"] = whole, sites
        table.obs["color"] = np.where(np.arange(len(rows)) % 2, "red", "blue")
        mdata = mudata.MuData({"rna": table, "image": joint["image"].copy()})
    assert "spatial_connectivities" not in mdata.obsp
    how = QUICK | {"model_kwargs": {"n_latent": 16, "n_heads": 2, "token_size": 3}}
    tl.embed(mdata, modality=["rna", "image"], **how)
    tl.niches(mdata, 2, labels_key="color", verbose=False)
    assert mdata.uns["fimp_niche"]["composition"].to_numpy().sum() == len(rows)
    (ax,) = pl.spatial(mdata, "fimp_niche", show=False)[0]
    np.testing.assert_array_equal(points(ax), np.asarray(sites)[:, :2])
    tl.niches(mdata, 2, modality=["rna", "image"], key_added="again", verbose=False)
    assert list(mdata.obs["again"]) == list(mdata.obs["fimp_niche"])


def test_one_modality_is_named_or_found(joint) -> None:
    how = QUICK | {"model_kwargs": {"n_latent": 16, "n_heads": 2, "token_size": 3}}
    tl.embed(joint, modality="image", **how)
    tl.niches(joint, 2, smooth=0, verbose=False)
    assert set(joint["image"].obs["fimp_niche"]) == {"0", "1"}
    assert "fimp_niche" not in joint.obs
    tl.niches(joint, 3, modality="image", smooth=0, key_added="three", verbose=False)
    (ax,) = pl.spatial(joint, "three", show=False)[0]
    np.testing.assert_array_equal(points(ax), joint["image"].obsm["spatial"])
    (named,) = pl.spatial(joint, "three", modality="image", show=False)[0]
    np.testing.assert_array_equal(points(named), points(ax))
    with pytest.raises(KeyError, match="X_fimp"):
        tl.niches(joint, 2, modality="rna")
    with pytest.raises(ValueError, match="is for MuData objects"):
        tl.niches(joint["image"], 2, modality="image")
    with pytest.raises(ValueError, match="is for MuData objects"):
        pl.spatial(joint["image"], "three", modality="image", show=False)
    with pytest.raises(KeyError, match="none"):
        pl.spatial(joint, "none", show=False)
