"""FIMP's variants as methods: what differs from the defaults is what their names say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytestmark = [
    # A few cells lack many genes.
    pytest.mark.filterwarnings("ignore:.* are zero for every cell:UserWarning"),
]


@pytest.fixture
def problems(load_script):
    return load_script("_problems")


@pytest.fixture
def fimp(load_script):
    return load_script("_fimp")


@pytest.fixture
def run(load_script):
    return load_script("_harness").Run(0, True, Path(), "cpu")


@pytest.fixture
def small(problems):
    """A problem of hidden expression of 200 cells."""
    problem, _ = problems.hidden_expression("toy", None, 0)
    keep = np.random.default_rng(0).permutation(problem.adata.n_obs)[:200]
    parts = problem.adata[keep].copy(), problem.test[keep], problem.hidden[keep]
    return problems.Masked("toy", *parts, problem.library_key)


def test_neighbors_of_the_graph(fimp, problems):
    adata = problems.without_labels("toy", None)[0].adata
    near = fimp.prepare(adata, "section", n_neighbors=3).obsp["spatial_connectivities"]
    # Symmetric: a cell may be the neighbor of more than three.
    assert near.getnnz(axis=1).min() >= 3
    shuffled = fimp.prepare(adata, "section", shuffle_seed=0, n_neighbors=3).obsp["spatial_connectivities"]
    xy, section = np.asarray(adata.obsm["spatial"]), adata.obs["section"].to_numpy()
    row, col = shuffled.nonzero()
    assert (section[row] == section[col]).all()
    distance = {name: np.linalg.norm(xy[g.nonzero()[0]] - xy[g.nonzero()[1]], axis=1).mean()
                for name, g in (("near", near), ("shuffled", shuffled))}  # fmt: skip
    assert distance["shuffled"] > 5 * distance["near"]
    # Of the same edges the shorter one has the larger weight.
    weighted = fimp.prepare(adata, "section", n_neighbors=3, near=True)
    weight, length = (weighted.obsp[f"spatial_{name}"].tocsr() for name in ("connectivities", "distances"))
    np.testing.assert_array_equal((weight > 0).toarray(), (near > 0).toarray())
    np.testing.assert_array_equal(np.argsort(-weight.data), np.argsort(length.data))


def test_hidden_values_do_not_reach_the_prediction(fimp, run, small):
    first = fimp.masked(small, run, fimp.DEFAULT["FIMP"])
    assert first.values.shape == (small.test.sum(), small.adata.n_vars)
    assert first.epochs == 1
    assert first.parameters > 10_000
    other = small.adata.copy()
    other.X = (other.X + 3 * small.hidden.astype(np.float32)).tocsr()
    other.layers["linear"] = (other.layers["linear"] + 3 * small.hidden.astype(np.float32)).tocsr()
    changed = fimp.masked(type(small)("toy", other, small.test, small.hidden, small.library_key), run, fimp.Variant())
    np.testing.assert_allclose(first.values, changed.values, atol=1e-5)


@pytest.mark.parametrize("name", ["FIMP, no messages", "FIMP, paper layer", "FIMP, near neighbors count more"])
def test_variants_differ_from_the_default(fimp, run, small, name):
    variant = {**fimp.CONTROLS, **fimp.ABLATIONS}[name]
    default, other = (fimp.masked(small, run, v).values for v in (fimp.Variant(), variant))
    assert np.abs(default - other).max() > 1e-3


def test_permuted_vectors_are_the_same_vectors_of_other_genes(fimp, run, problems, tmp_path):
    from dataclasses import replace

    adata = problems.without_labels("toy", None)[0].adata
    adata.var["human_symbol"] = adata.var_names
    names, values = adata.var_names[:50].to_numpy().astype("U"), np.random.default_rng(0).normal(size=(50, 8))
    np.savez(tmp_path / fimp.GENE_VECTORS, **dict(zip(("genes", "embeddings"), (names, values), strict=True)))
    there = replace(run, data=tmp_path)
    own, permuted = (fimp._with_vectors(adata, there, v)["gene_embeddings"] for v in fimp.VECTORS.values())
    assert own.names.tolist() == permuted.names.tolist() == names.tolist()
    np.testing.assert_allclose(own.values, values, rtol=1e-6)
    assert (own.values != permuted.values).any(axis=1).sum() > 40
    np.testing.assert_allclose(np.sort(own.values[:, 0]), np.sort(permuted.values[:, 0]))


def test_a_foundation_model_needs_its_files(fimp, run, small):
    with pytest.raises(ImportError, match="--checkpoint DIR names the folder of scGPT"):
        fimp.masked(small, run, fimp.FOUNDATION["FIMP-scGPT, frozen"])
