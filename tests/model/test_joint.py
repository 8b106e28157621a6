"""Nodes with tokens of several modalities, of which some lack one."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from graph_toys import data_of
from mudata import MuData
from scipy import sparse

from fimp_sc.data import BlockDataset, Destinations
from fimp_sc.data._modality import quiet_mudata
from fimp_sc.model import FIMP
from fimp_sc.model.predict._reference import remember
from fimp_sc.model.train._train import _split
from fimp_sc.nn._layers import run_layers

NAMES = ["rna", "image", "bold"]
SIZE = {"n_latent": 16, "n_heads": 2, "n_tokens": 6, "token_size": {"image": 3, "bold": 4}}
TRAIN = {"max_epochs": 2, "accelerator": "cpu", "batch_size": 16, "enable_progress_bar": False}
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(scope="module")
def model(_joint, copied_mudata) -> FIMP:
    """Trained with labels; the weights are then shaken, so that all of them have a say. Not to be changed."""
    mdata = copied_mudata(_joint)
    FIMP.setup_mudata(mdata, modality=NAMES, labels_key="kind")
    model = FIMP(mdata, **SIZE)
    model.train(**TRAIN)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weights in model.module.network.parameters():
            weights += 0.2 * torch.randn(weights.shape, generator=generator)
    data = data_of(model, mdata)
    remember(model, data, *_split(model, data, 0.1, None, None))
    return model


def has(mdata: MuData, name: str) -> np.ndarray:
    return mdata.obs_names.isin(mdata[name].obs_names)


def test_training_moves_all_parts(joint) -> None:
    FIMP.setup_mudata(joint, modality=NAMES)
    model = FIMP(joint, **SIZE)
    before = {name: value.clone() for name, value in model.module.named_parameters()}
    model.train(**TRAIN)
    moved = {name for name, value in model.module.named_parameters() if (value != before[name]).any()}
    for i, part in enumerate(("image", "bold")):
        assert any(name.startswith(f"network.sequences.embeddings.{i}") for name in moved), part
        assert any(name.startswith(f"network.sequences.heads.{i}") for name in moved), part
    assert any(name.startswith("network.embedding") for name in moved)
    assert all(torch.isfinite(value).all() for value in model.module.parameters())
    assert np.isfinite(np.asarray(model.history["train_loss"], dtype=float)).all()


def test_every_node_has_an_embedding_and_labels(model) -> None:
    embedding = model.get_latent_representation()
    assert embedding.shape == (24, 16)
    assert np.isfinite(embedding).all()
    assert np.unique(embedding.round(4), axis=0).shape == (24, 16)
    soft = model.predict(soft=True)
    np.testing.assert_allclose(soft.sum(axis=1), 1, rtol=1e-5)
    assert list(soft.index) == list(model.adata.obs_names)
    assert list(soft.columns) == ["one", "two"]


def test_absent_nodes_are_not_learned_from(model) -> None:
    data = data_of(model)
    nodes = np.arange(24)
    for name in ("image", "bold"):
        here = has(model.adata, name)
        assert 0 < here.sum() < 24
        fields = data.sequences[name].fields(nodes, 24, (0.5, 0.5), seed=0)
        target = fields["target_mask"].numpy()
        assert not target[~here].any()
        assert target[here].any(1).all()
        np.testing.assert_array_equal(fields["padding"].numpy(), np.repeat(~here[:, None], target.shape[1], 1))


def test_tokens_of_absent_nodes_are_not_read(model) -> None:
    """Whatever stands there, in own tokens and in those of neighbors."""
    data, network = data_of(model), model.module.eval().network
    batch = BlockDataset(data, n_layers=2, n_tokens=6)[Destinations(np.arange(24), 0)]
    with torch.no_grad():
        tokens, padding = network.tokens(batch)
        lacking = np.zeros(24, dtype=int)
        for name, n in (("image", 4), ("bold", 3)):
            lacking += n * ~has(model.adata, name)
        # Behind the summary token come those of sequences.
        np.testing.assert_array_equal(padding[:, 1:8].sum(1).numpy(), lacking[batch["nodes"].numpy()])
        noise = torch.randn(tokens.shape, generator=torch.Generator().manual_seed(1)) * 50
        found = run_layers(network.layers, torch.where(padding[..., None], noise, tokens), padding, batch, n_queries=1)
        expected = run_layers(network.layers, tokens, padding, batch, n_queries=1)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "how",
    [
        {"strategy": "layers"},
        {"strategy": "blocks", "batch_size": 3},
        {"strategy": "layers", "batch_size": 5},
        {"distribute": True, "batch_size": 7},
    ],
)
def test_blocks_give_the_result_of_the_whole_graph(model, how) -> None:
    data, network = data_of(model), model.module.eval().network
    batch = BlockDataset(data, n_layers=2, n_tokens=6)[Destinations(np.arange(24), 0)]
    with torch.no_grad():
        whole = network(batch).numpy()
    expected = np.empty_like(whole)
    expected[batch["nodes"][: len(whole)].numpy()] = whole
    np.testing.assert_allclose(model.get_latent_representation(**how), expected, **CLOSE)
    for name in ("image", "bold"):
        one = model.get_reconstruction(modality=name, strategy="blocks", batch_size=100)
        here = has(model.adata, name)
        np.testing.assert_allclose(
            model.get_reconstruction(modality=name, **how)[here], one[here], rtol=1e-3, atol=0.01
        )


def shuffled(mdata: MuData, seed: int = 0) -> MuData:
    """Change the order of modalities, of the nodes in each, and thereby of those in the whole object."""
    rng = np.random.default_rng(seed)
    with quiet_mudata():
        parts = {name: mdata[name][rng.permutation(mdata[name].n_obs)].copy() for name in NAMES[::-1]}
        out = MuData(parts)
    order = mdata.obs_names.get_indexer(out.obs_names)
    out.obs["kind"] = pd.Series(mdata.obs["kind"].to_numpy()[order], index=out.obs_names)
    out.obsm["spatial"] = mdata.obsm["spatial"][order]
    out.obsp["spatial_connectivities"] = mdata.obsp["spatial_connectivities"][order][:, order]
    return out


def test_the_order_of_rows_does_not_matter(model) -> None:
    other = shuffled(model.adata)
    assert list(other["image"].obs_names) != list(model.adata["image"].obs_names)
    order = model.adata.obs_names.get_indexer(other.obs_names)
    twin = FIMP.load_query_data(other, model)
    np.testing.assert_allclose(twin.get_latent_representation(), model.get_latent_representation()[order], **CLOSE)
    np.testing.assert_allclose(twin.get_expression(), model.get_expression()[order], **CLOSE)
    hidden = np.random.default_rng(0).random((24, 4)) < 0.4
    name = {"modality": "image"}
    found = twin.get_reconstruction(hidden=hidden[order], **name)
    expected = model.get_reconstruction(hidden=hidden, **name)[order]
    patches = hidden[order].reshape(-1, 2, 2).repeat(3, 1).repeat(3, 2)
    np.testing.assert_allclose(found[patches], expected[patches], rtol=1e-3, atol=0.01)


@pytest.mark.parametrize("name", NAMES)
def test_each_modality_has_a_say_in_the_others(model, name, copied_mudata) -> None:
    """The embedding of its nodes, and what is predicted of the other modalities there."""
    mdata = copied_mudata(model.adata)
    part, rng = mdata[name], np.random.default_rng(0)
    if name == "image":
        part.obsm["pixels"] = rng.integers(0, 255, part.obsm["pixels"].shape, dtype=np.uint8)
    else:
        part.X = part.X[rng.permutation(part.n_obs)]
    twin = FIMP.load_query_data(mdata, model)
    moved = np.abs(twin.get_latent_representation() - model.get_latent_representation()).max(1) > 1e-3
    assert moved[has(mdata, name)].mean() > 0.8
    for other in {"image", "bold"} - {name}:
        before, after = (m.get_reconstruction(modality=other) for m in (model, twin))
        assert (np.abs(before - after) > 1e-3).mean() > 0.3


def test_expression_of_all_nodes(model) -> None:
    values = model.get_expression()
    assert values.shape == (24, 14)
    assert np.isfinite(values).all()
    assert (values >= 0).all()


def test_hidden_expression_has_no_influence(model, copied_mudata) -> None:
    """Nor through the total of a node. Rows are those of the whole object."""
    before, rng = shuffled(model.adata), np.random.default_rng(0)
    hidden, after = rng.random((24, 14)) < 0.4, copied_mudata(before)
    rows = after.obs_names.get_indexer(after["rna"].obs_names)
    assert (rows != np.arange(len(rows))).any()
    values = after["rna"].X.toarray()
    for row, where in enumerate(hidden[rows]):
        values[row, where] = rng.poisson(9, where.sum())
    assert (values != after["rna"].X.toarray()).any(1).mean() > 0.5
    after["rna"].X = sparse.csr_matrix(values)
    found = [FIMP.load_query_data(mdata, model).get_expression(hidden=hidden) for mdata in (before, after)]
    np.testing.assert_allclose(found[1], found[0], **CLOSE)


def test_a_modality_must_be_chosen_for_reconstruction(model) -> None:
    with pytest.raises(ValueError, match=r"\['image', 'bold'\]: found None"):
        model.get_reconstruction()
    assert model.get_reconstruction(modality="image").shape == (24, 6, 6, 1)
    assert model.get_reconstruction(modality="bold").shape == (24, 12)


# scvi-tools asks mudata in a way that is to be changed.
@pytest.mark.filterwarnings("ignore:The method mod_names is deprecated:FutureWarning")
@pytest.mark.parametrize("save", ["save", "save_pretrained"])
def test_a_saved_model_gives_the_same(model, save, tmp_path, copied_mudata) -> None:
    getattr(model, save)(tmp_path / "model")
    mdata = copied_mudata(model.adata)
    if save == "save":
        again = FIMP.load(str(tmp_path / "model"), adata=mdata, accelerator="cpu")
    else:
        again = FIMP.from_pretrained(tmp_path / "model", mdata, accelerator="cpu")
    np.testing.assert_array_equal(again.get_latent_representation(), model.get_latent_representation())
    np.testing.assert_array_equal(again.predict(), model.predict())
    for name in ("image", "bold"):
        expected = model.get_reconstruction(modality=name)
        np.testing.assert_array_equal(again.get_reconstruction(modality=name), expected)
    query = FIMP.load_query_data(mdata, tmp_path / "model")
    np.testing.assert_array_equal(query.get_latent_representation(), model.get_latent_representation())


def test_another_object(model, copied_mudata) -> None:
    """With nodes, genes and times of its own, and with nodes that lack other modalities."""
    mdata = copied_mudata(model.adata)
    with quiet_mudata():
        names = mdata.obs_names[5:20]
        parts = {name: part[part.obs_names.isin(names)].copy() for name, part in mdata.mod.items()}
        parts["rna"] = parts["rna"][3:, ::-1].copy()
        parts["rna"].var_names = [*parts["rna"].var_names[:-2], "new1", "new2"]
        parts["bold"] = parts["bold"][:, :9].copy()
        parts["bold"] = parts["bold"][2:].copy()
        query = MuData(parts)
    rows = mdata.obs_names.get_indexer(query.obs_names)
    query.obsm["spatial"] = mdata.obsm["spatial"][rows]
    near = np.ones((len(rows), len(rows))) - np.eye(len(rows))
    query.obsp["spatial_connectivities"] = sparse.csr_matrix(near)
    twin = FIMP.load_query_data(query, model)
    assert np.isfinite(twin.get_latent_representation()).all()
    assert set(twin.predict()) <= {"one", "two"}
    assert twin.get_reconstruction(modality="bold").shape == (query.n_obs, 9)
    assert np.isfinite(twin.get_reconstruction(modality="bold")[:, :8]).all()
    expression = twin.get_expression()
    assert np.isnan(expression[:, -2:]).all()
    assert np.isfinite(expression[:, :-2]).all()


@pytest.mark.parametrize("missing", ["image", "rna"])
def test_an_object_without_one_of_the_modalities_is_refused(model, missing, copied_mudata) -> None:
    mdata = copied_mudata(model.adata)
    del mdata.mod[missing]
    with pytest.raises(KeyError, match=missing):
        FIMP.load_query_data(mdata, model)


def test_no_training_node_with_values_is_an_error(joint) -> None:
    FIMP.setup_mudata(joint, modality=["rna", "image"])
    model = FIMP(joint, n_latent=16, n_heads=2)
    without = np.flatnonzero(~has(joint, "image"))
    with pytest.raises(ValueError, match="No training node has values"):
        model.train(train_indices=without, validation_indices=[], **TRAIN)
