"""FIMP with a foundation model as the creator of messages: embedding, training, saving."""

from __future__ import annotations

import pickle
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from graph_toys import data_of
from scipy import sparse

import fimp_sc
from fimp_sc.model import FIMP
from fimp_sc.nn._foundation import FoundationNetwork
from fimp_sc.pretrained import load

TOLERANCE = {"rtol": 1e-4, "atol": 2e-5}
# Of the values of `distinct`.
LOG = {"input_scale": "log"}
QUICK = {"max_epochs": 1, "accelerator": "cpu", "batch_size": 64, "enable_progress_bar": False}


def naive_tokens(adata, genes: list[str], known: set[str], n_tokens: int) -> list[dict[str, float]]:
    """Bins of the highest expressed known genes of each cell, for distinct values."""
    cells = []
    for values in np.asarray(adata[:, genes].X.todense()):
        shown = [i for i, gene in enumerate(genes) if gene in known and values[i] > 0]
        edges = np.quantile(values[shown], np.linspace(0, 1, 8))
        best = sorted(shown, key=lambda i: -values[i])[:n_tokens]
        cells.append({genes[i]: float(np.digitize(values[i], edges)) for i in best})
    return cells


@torch.no_grad()
def by_hand(adata, checkpoint, *, alone=False, **stack) -> np.ndarray:
    """The embedding from a dense table of tokens of the whole vocabulary, without blocks."""
    foundation = load("scgpt", checkpoint, **stack)
    model, vocabulary = foundation.read(), foundation.vocabulary()
    cells = naive_tokens(adata, list(map(str, adata.var_names)), set(vocabulary), 10)
    width = max(map(len, cells))
    ids, values = torch.zeros(len(cells), width, dtype=torch.int64), torch.zeros(len(cells), width)
    padding = torch.ones(len(cells), width, dtype=torch.bool)
    for i, cell in enumerate(cells):
        ids[i, : len(cell)] = torch.tensor([vocabulary[gene] for gene in cell])
        values[i, : len(cell)] = torch.tensor(list(cell.values()))
        padding[i, : len(cell)] = False
    tokens, padding = model.embedding(ids, values, padding)
    graph = sparse.csr_matrix(adata.obsp["spatial_connectivities"])
    indptr, indices = (torch.from_numpy(part.astype(np.int64)) for part in (graph.indptr, graph.indices))
    out = model.stack.alone(tokens, padding) if alone else model.stack(tokens, padding, indptr, indices)
    return (out[:, 0] / out[:, 0].norm(dim=1, keepdim=True)).numpy()


# Zero-shot ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["evolving", "static"])
@pytest.mark.parametrize("aggregate", ["layer", "final"])
def test_embedding_without_training_equals_tokens_and_stack(distinct, make, checkpoint, source, aggregate) -> None:
    mode = {"neighbor_states": source, "aggregate": aggregate}
    model = make(distinct, LOG, **mode)
    assert not model.is_trained
    z = model.get_latent_representation()
    assert z.shape == (120, 16)
    assert z.dtype == np.float32
    np.testing.assert_allclose(z, by_hand(distinct, checkpoint, **mode), **TOLERANCE)
    np.testing.assert_allclose(np.linalg.norm(z, axis=1), 1, rtol=1e-5)


def test_modes_differ(distinct, make) -> None:
    modes = [{}, {"neighbor_states": "static"}, {"aggregate": "final"}, {"self_loops": False}, {"n_tokens": 4}]
    results = [make(distinct, LOG, **mode).get_latent_representation() for mode in modes]
    for i, one in enumerate(results):
        for other in results[i + 1 :]:
            assert np.abs(one - other).max() > 1e-2


def test_without_edges_a_cell_is_what_the_foundation_model_makes_of_it(distinct, make, checkpoint) -> None:
    graph = sparse.lil_matrix((120, 120))
    graph[0, 1] = 1.0
    distinct.obsp["spatial_connectivities"] = graph.tocsr()
    with pytest.warns(UserWarning, match="119 of 120 nodes have no neighbors"):
        model = make(distinct, LOG)
    z = model.get_latent_representation()
    expected = by_hand(distinct, checkpoint, alone=True)
    np.testing.assert_allclose(z[1:], expected[1:], **TOLERANCE)
    assert np.abs(z[0] - expected[0]).max() > 1e-3


def test_stored_self_loops_are_not_counted_twice(distinct, make) -> None:
    expected = make(distinct, LOG).get_latent_representation()
    distinct.obsp["spatial_connectivities"] = sparse.csr_matrix(
        distinct.obsp["spatial_connectivities"] + sparse.identity(120)
    )
    np.testing.assert_allclose(make(distinct, LOG).get_latent_representation(), expected, **TOLERANCE)


def test_samples_and_batches_do_not_matter_but_for_edges(tissue, make) -> None:
    """Bins are made of values that are not centered."""
    expected = make(tissue).get_latent_representation()
    setup = {"library_key": "section", "batch_key": "batch"}
    tissue.obs["batch"] = np.array(["x", "y", "z"])[np.arange(120) % 3]
    np.testing.assert_allclose(make(tissue, setup).get_latent_representation(), expected, **TOLERANCE)


def test_cells_without_a_known_gene_have_an_embedding(distinct, make) -> None:
    values = distinct.X.toarray()
    values[:5] = 0
    values[:5, [0, 7]] = 1.0
    distinct.X = sparse.csr_matrix(values)
    graph = sparse.lil_matrix(distinct.obsp["spatial_connectivities"])
    graph[:2] = 0
    distinct.obsp["spatial_connectivities"] = graph.tocsr()
    with pytest.warns(UserWarning, match="have no neighbors"):
        z = make(distinct, LOG).get_latent_representation(batch_size=1)
    assert np.isfinite(z).all()
    # Nothing is left of them but <cls>.
    np.testing.assert_allclose(z[0], z[1], **TOLERANCE)


def test_order_of_cells_and_genes_does_not_matter(distinct, make) -> None:
    rng = np.random.default_rng(0)
    cells, genes = rng.permutation(120), rng.permutation(40)
    moved = distinct[cells, genes].copy()
    expected = make(distinct, LOG).get_latent_representation()[cells]
    np.testing.assert_allclose(make(moved, LOG).get_latent_representation(), expected, **TOLERANCE)


def test_scale_of_the_values_does_not_matter(tissue, make) -> None:
    expected = make(tissue).get_latent_representation()
    tissue.X = tissue.X.log1p() * np.float32(0.7)
    np.testing.assert_allclose(make(tissue, {"input_scale": "log"}).get_latent_representation(), expected, **TOLERANCE)


@pytest.mark.parametrize("how", [{"batch_size": 7}, {"strategy": "layers"}, {"strategy": "blocks", "distribute": True}])
def test_how_it_is_computed_does_not_matter(tissue, make, how: dict) -> None:
    for mode in ({}, {"aggregate": "final"}):
        model = make(tissue, **mode)
        np.testing.assert_allclose(
            model.get_latent_representation(**how), model.get_latent_representation(), **TOLERANCE
        )
    rows = [5, 90, 5, 1]
    np.testing.assert_allclose(
        model.get_latent_representation(indices=rows, **how), model.get_latent_representation()[rows], **TOLERANCE
    )


def test_what_needs_training_says_so_before_it(tissue, make) -> None:
    model = make(tissue, {"labels_key": "label"})
    model.get_latent_representation()
    for ask in (model.predict, model.get_expression):
        with pytest.raises(Exception, match="train"):
            ask()
    assert not model.is_trained


# Training -------------------------------------------------------------------------------------------------------------

MAY_CHANGE = {
    "frozen": (),
    "full": ("embedding.", "stack.", "decoder."),
    "last:1": ("stack.layers.1.", "decoder."),
    "lora:2": ("decoder.", ".up", ".down"),
}


@pytest.mark.parametrize("trained", MAY_CHANGE)
def test_training_changes_what_it_says(tissue, make, trained: str) -> None:
    model = make(tissue, {"labels_key": "label"}, train=trained)
    before = {name: value.clone() for name, value in model.module.state_dict().items()}
    zero_shot = model.get_latent_representation()
    model.train(**QUICK)
    assert model.is_trained
    assert np.isfinite(model.history["train_loss"].to_numpy(dtype=float)).all()
    assert ("decoder_loss_train" in model.history) == (trained != "frozen")
    changed = {name for name, value in model.module.state_dict().items() if not torch.equal(value, before[name])}
    assert {"value_head.loading", "label_head.score.weight", "embedding_mean"} <= changed
    inner = {name.removeprefix("network.") for name in changed if name.startswith("network.")}
    allowed = MAY_CHANGE[trained]
    assert {name for name in inner if not name.startswith(allowed) and not name.endswith(allowed)} == set()
    for part in allowed:
        assert any(name.startswith(part) or name.endswith(part) for name in inner), part
    difference = np.abs(model.get_latent_representation() - zero_shot).max()
    assert (difference < 1e-6) == (trained == "frozen")
    assert model.predict(soft=True).shape == (120, 4)
    expression = model.get_expression()
    assert expression.shape == tissue.shape
    assert np.isfinite(expression).all()


def test_checkpoint_without_a_decoder_trains(tissue, make, scgpt_checkpoint) -> None:
    folder = scgpt_checkpoint(list(tissue.var_names), decoder=False)
    model = make(tissue, folder=folder, train="last:1")
    with pytest.raises(ValueError, match="no expression decoder"):
        model.get_expression(decoder=True)
    model.train(**QUICK)
    assert "decoder_loss_train" not in model.history
    assert np.isfinite(model.get_expression()).all()


def test_genes_are_spelled_as_in_the_object(tissue, make, scgpt_checkpoint) -> None:
    """Whatever the vocabulary calls them: mouse genes of the object are known to it as human ones."""
    folder = scgpt_checkpoint([name.upper() for name in tissue.var_names])
    tissue.var_names = [name.capitalize() for name in tissue.var_names]
    model = make(tissue, folder=folder, species="mouse", orthologs="uppercase")
    mouse = [str(name) for name in tissue.var_names[:2]]
    assert model.genes.tolist() == tissue.var_names.tolist()
    assert np.isfinite(model.get_expression(genes=mouse, decoder=True)).all()
    with pytest.raises(KeyError, match=f"Not among the .*{mouse[0].upper()}.*Did you mean"):
        model.get_expression(genes=[mouse[0].upper()], decoder=True)


def test_cells_that_hide_nothing_are_trained_on_as_they_are_embedded(tissue, make) -> None:
    """Without hidden genes there is nothing to ask for: tokens that ask would change the cell."""
    model = make(tissue, train="full")
    splitter = fimp_sc.data.BlockDataset(
        data_of(model, tissue), n_layers=1, n_tokens=10, mask_ratio=(0.0, 0.0), mask_cells=0.0
    )
    batch = splitter[fimp_sc.data.Destinations(np.arange(20), 0)]
    assert batch["query_padding"].all()
    model.module.eval()
    with torch.no_grad():
        z = torch.nn.functional.normalize(model.module.inference(batch)["embedding"])
    np.testing.assert_allclose(z, model.get_latent_representation(indices=range(20)), **TOLERANCE)


def test_frozen_model_learns_labels(tissue, make) -> None:
    """Two halves of the tissue that differ in ten genes."""
    kind = (tissue.obsm["spatial"][:, 0] > np.median(tissue.obsm["spatial"][:, 0])).astype(int)
    values = tissue.X.toarray()
    values[:, 1:20:2] += 30 * kind[:, None]
    tissue.X = sparse.csr_matrix(values)
    tissue.obs["kind"] = pd.Categorical(np.array(["a", "b"])[kind])
    model = make(tissue, {"labels_key": "kind"}, n_tokens=40)
    test = np.arange(0, 120, 3)
    model.train(
        30, accelerator="cpu", batch_size=32, enable_progress_bar=False, plan_kwargs={"lr_head": 0.05},
        train_indices=np.setdiff1d(np.arange(120), test),
    )  # fmt: skip
    right = model.predict(indices=test) == tissue.obs["kind"].to_numpy()[test]
    assert right.mean() > 0.9


def test_labels_are_smoothed_as_suits_the_validation_cells(tissue, make) -> None:
    """It predicts with neighbors alone; the mean over a cell and its neighbors still counts as fitted."""
    model = make(tissue, {"labels_key": "label"}, train="frozen")
    held = np.arange(0, 120, 2)
    model.train(**{**QUICK, "validation_indices": held})
    smoothed = model.smoothing_weight
    model.module.smoothing_weight.zero_()
    own = np.log(np.maximum(model.predict(soft=True).to_numpy().astype(float), 1e-6))
    joined = (tissue.obsp["spatial_connectivities"].toarray() != 0) | np.eye(120, dtype=bool)
    mean = joined / joined.sum(1, keepdims=True)
    known = held[tissue.obs["label"].isin(model.classes).to_numpy()[held]]
    code = np.array([model.classes.index(name) for name in tissue.obs["label"].iloc[known]])

    def twice(share: float) -> np.ndarray:
        step = share * mean + (1 - share) * np.eye(120)
        found = np.exp(step @ step @ own)
        return found / found.sum(1, keepdims=True)

    losses = [-np.log(twice(share)[known, code]).sum() for share in np.linspace(0, 1, 21)]
    assert smoothed == pytest.approx(np.argmin(losses) / 20)
    assert model.neighbor_weight == 1.0
    model.module.smoothing_weight.fill_(0.6)
    np.testing.assert_allclose(model.predict(soft=True), twice(0.6), atol=1e-5)


def test_labeled_model_is_the_same_with_the_same_seed(tissue, make) -> None:
    results = []
    for seed in (0, 0, 1):
        model = make(tissue, {"labels_key": "label"}, train="lora", random_state=seed)
        model.train(**QUICK)
        results.append(model.predict(soft=True).to_numpy())
    np.testing.assert_array_equal(results[0], results[1])
    assert np.abs(results[0] - results[2]).max() > 1e-4


# Saving ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trained", ["untrained", "frozen", "lora:2"])
def test_saved_model_does_not_need_the_checkpoint_again(tissue, make, checkpoint, tmp_path, trained: str) -> None:
    folder = shutil.copytree(checkpoint, tmp_path / "checkpoint")
    how = {} if trained == "untrained" else {"train": trained}
    model = make(tissue, folder=folder, neighbor_states="static", **how)
    if how:
        model.train(**QUICK)
    shutil.rmtree(folder)
    expected = model.get_latent_representation()
    model.save(str(tmp_path / "model"))
    loaded = FIMP.load(str(tmp_path / "model"), adata=tissue, accelerator="cpu")
    assert loaded.is_trained == model.is_trained == bool(how)
    np.testing.assert_allclose(loaded.get_latent_representation(), expected, **TOLERANCE)
    shuffled = tissue[:, ::-1].copy()
    for reference in (model, tmp_path / "model"):
        query = FIMP.load_query_data(tissue.copy(), reference)
        np.testing.assert_allclose(query.get_latent_representation(), expected, **TOLERANCE)
        other = FIMP.load_query_data(shuffled, reference)
        np.testing.assert_allclose(other.get_latent_representation(), expected, **TOLERANCE)
    if how:
        np.testing.assert_allclose(loaded.get_expression(), model.get_expression(), **TOLERANCE)


def contents(value):
    """Yield whatever is in nested containers."""
    yield value
    if isinstance(value, dict):
        for part in value.items():
            yield from contents(list(part))
    elif isinstance(value, list | tuple | set):
        for part in value:
            yield from contents(part)


def test_parameters_that_are_saved_are_plain(tissue, make, checkpoint) -> None:
    vectors = {gene: np.ones(3) + i for i, gene in enumerate(tissue.var_names)}
    for model in (make(tissue), FIMP(tissue, gene_embeddings=vectors)):
        for value in contents(model.init_params_):
            assert isinstance(value, str | int | float | bool | dict | list | tuple | set | None), value
    assert make(tissue).init_params_["non_kwargs"]["foundation"]["checkpoint"] == str(checkpoint)


@pytest.mark.parametrize("trained", ["frozen", "lora"])
def test_module_can_be_sent_to_workers(tissue, make, trained: str) -> None:
    module = make(tissue, train=trained).module
    again = pickle.loads(pickle.dumps(module))
    assert isinstance(again.network, FoundationNetwork)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), module.parameters(), strict=True))
