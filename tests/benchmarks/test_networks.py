"""Graph networks of the benchmarks on planted answers, and what they must not see."""

from __future__ import annotations

from types import SimpleNamespace

import anndata
import numpy as np
import pytest
import scipy.sparse as sp

pytest.importorskip("torch_geometric")
RUN = SimpleNamespace(seed=0, quick=False, data=None, accelerator="cpu")


@pytest.fixture
def networks(load_script):
    return load_script("_networks")


@pytest.fixture
def masked(load_script):
    return load_script("_networks_masked")


@pytest.fixture
def annotation(load_script):
    return load_script("_networks_annotation")


@pytest.fixture
def graphmae(load_script):
    return load_script("_graphmae")


def sheet(x: np.ndarray, side: int, seed: int = 0):
    """Section of cells on a jittered square grid, with expression `x` and symbols S0, S1, …"""
    places = np.stack(np.meshgrid(np.arange(side), np.arange(side)), -1).reshape(-1, 2).astype(float)
    adata = anndata.AnnData(sp.csr_matrix(x.astype(np.float32)))
    adata.obsm["spatial"] = places + np.random.default_rng(seed).normal(0, 0.05, places.shape)
    adata.var["human_symbol"] = [f"S{i}" for i in range(adata.n_vars)]
    return adata


def patchwork(side: int, n_vars: int, seed: int = 0, noise: float = 0.3) -> tuple[np.ndarray, np.ndarray]:
    """Patches of 4 x 4 cells, each with a random value for each gene; (n, n_vars), and the patch of each cell."""
    rng = np.random.default_rng(seed)
    grid = np.arange(side) // 4
    patch = (grid[:, None] * (side // 4 + 1) + grid).ravel()
    levels = rng.random((patch.max() + 1, n_vars)) * 3
    return np.maximum(levels[patch] + rng.normal(0, noise, (side**2, n_vars)), 0.01), patch


def masked_problem(adata, full: np.ndarray, seed: int = 0):
    """Hide 15 % of the entries of the cells in a corner."""
    xy = adata.obsm["spatial"]
    test = (xy[:, 0] < np.median(xy[:, 0])) & (xy[:, 1] < np.median(xy[:, 1]))
    hidden = (np.random.default_rng(seed).random(full.shape) < 0.15) & test[:, None]
    adata = adata.copy()
    adata.X = sp.csr_matrix(np.where(hidden, 0, full).astype(np.float32))
    problem = SimpleNamespace(data="starmap", adata=adata, test=test, hidden=sp.csr_matrix(hidden), library_key=None)
    return problem, hidden[test]


def explained(problem, fit, full: np.ndarray, hidden: np.ndarray) -> float:
    """R² around the gene means of the training cells."""
    truth, mean = full[problem.test], full[~problem.test].mean(0)
    return 1 - ((truth - fit.values)[hidden] ** 2).sum() / ((truth - mean)[hidden] ** 2).sum()


@pytest.fixture
def short(masked, monkeypatch):
    """One configuration, fast enough for a test."""
    monkeypatch.setattr(masked, "CONFIGURATIONS", ((1e-2, 0.0, 0.0),))
    monkeypatch.setattr(masked, "EPOCHS", 40)
    return masked


@pytest.mark.parametrize("name", ["GCN, expression", "GraphSAGE, PCs"])
def test_neighbors_tell_hidden_values_unless_places_are_shuffled(short, name):
    full, _ = patchwork(32, 10)  # genes are independent: only neighbors know
    problem, hidden = masked_problem(sheet(full, 32), full)
    fit = short.MASKED[name](problem, RUN)
    assert fit.values.shape == hidden.shape
    assert explained(problem, fit, full, hidden) > 0.2
    rng, order = np.random.default_rng(1), np.arange(len(full))
    for cells in (problem.test, ~problem.test):  # each by itself: no patch of the test is there to be learned by heart
        order[cells] = rng.permutation(order[cells])
    shuffled, hidden = masked_problem(sheet(full[order], 32), full[order])
    assert explained(shuffled, short.MASKED[name](shuffled, RUN), full[order], hidden) < 0.05


@pytest.mark.parametrize("features", ["expression", "PCs"])
def test_hidden_entries_are_not_seen_even_if_they_are_there(short, features):
    full, _ = patchwork(16, 10)
    problem, _ = masked_problem(sheet(full, 16), full)
    first = short.MASKED[f"GraphSAGE, {features}"](problem, SimpleNamespace(**{**vars(RUN), "quick": True})).values
    told = problem.adata.X.toarray()
    told[problem.hidden.toarray()] = 50
    problem.adata.X = sp.csr_matrix(told)
    second = short.MASKED[f"GraphSAGE, {features}"](problem, SimpleNamespace(**{**vars(RUN), "quick": True})).values
    np.testing.assert_array_equal(first, second)
    assert first.std() > 0


@pytest.mark.parametrize("kind", ["MLP", "GIN"])
def test_seeds_reproduce_and_differ(short, kind, monkeypatch):
    monkeypatch.setattr(short, "EPOCHS", 3)
    full, _ = patchwork(16, 10)
    problem, _ = masked_problem(sheet(full, 16), full)
    runs = [short.MASKED[f"{kind}, PCs"](problem, SimpleNamespace(**{**vars(RUN), "seed": s})) for s in (0, 0, 1)]
    np.testing.assert_array_equal(runs[0].values, runs[1].values)
    assert not np.allclose(runs[0].values, runs[2].values)
    assert runs[0].epochs == 3


def test_validation_cells_are_in_no_loss(masked, networks):
    import torch

    rng = np.random.default_rng(0)
    x = sp.csr_matrix(rng.random((80, 12)).astype(np.float32))
    inputs = masked.Inputs(x, np.arange(12), "expression")
    validation = np.arange(80) < 10
    centered = torch.from_numpy(inputs.center(x))
    other = centered.clone()
    other[:10] = 7
    alone = networks.Graph(sp.csr_matrix((80, 80)))  # without edges cells are seen in their own loss alone
    weights = []
    for values in (centered, other):
        model, _ = masked.train("GCN", inputs, values, alone, validation, 0, quick=True)
        weights.append(model.head.weight.detach().numpy())
    assert np.abs(weights[0]).max() > 0
    np.testing.assert_array_equal(*weights)


def test_hidden_entries_are_drawn_anew_at_their_share(masked):
    draws = masked.HiddenEntries((400, 50), 0)
    first, second = draws.draw().numpy().copy(), draws.draw().numpy()
    assert first.mean() == pytest.approx(0.15, abs=0.01)
    assert (first & second).mean() == pytest.approx(0.15**2, abs=0.005)


def test_pcs_are_those_of_sklearn_with_gene_means_where_hidden(masked):
    import torch
    from sklearn.decomposition import PCA

    x = np.random.default_rng(0).random((50, 9)).astype(np.float32)
    genes = np.random.default_rng(1).permutation(9)
    inputs = masked.Inputs(sp.csr_matrix(x), genes, "PCs")
    hidden = np.random.default_rng(2).random(x.shape) < 0.3
    got = inputs(torch.from_numpy(inputs.center(sp.csr_matrix(x))), torch.from_numpy(hidden[:, genes])).numpy()
    pca = PCA(8).fit(x)
    linear = np.expm1(x)
    total, share = np.where(hidden, 0, linear).sum(1), linear.sum(0) / linear.sum()
    seen = np.log1p(linear * (np.median(linear.sum(1)) * (~hidden @ share) / total)[:, None])
    want = pca.transform(np.where(hidden, x.mean(0), seen))
    want /= pca.transform(x).std()
    np.testing.assert_allclose(np.abs(got), np.abs(want), atol=2e-4)


@pytest.mark.parametrize("kind", ["MLP", "GCN", "GraphSAGE", "GAT", "GIN", "GPS"])
def test_sections_do_not_mix(networks, kind):
    import torch

    torch.manual_seed(0)
    sections = np.array(["a", "b"])[np.arange(20) % 2]
    ring = sp.csr_matrix((np.ones(20), (np.arange(20), (np.arange(20) + 2) % 20)), shape=(20, 20))
    model = networks.Network(kind, 5, 3).eval()
    x = torch.randn(20, 5)
    changed = x.clone()
    changed[1::2] += 1
    graph = networks.Graph(ring, sections)
    with torch.no_grad():
        before, after = model(x, graph), model(changed, graph)
        alone = model(x[::2], networks.Graph(ring[::2][:, ::2]))
    torch.testing.assert_close(before[::2], after[::2])
    torch.testing.assert_close(before[::2], alone)
    assert not torch.allclose(before[1::2], after[1::2])


def test_only_the_best_configuration_goes_on_and_keeps_its_best_weights(networks):
    import torch

    scores = {0: iter([3.0, 2.5, 9.0]), 1: iter([4.0, 1.0, 0.5, 2.0, 2.0, 2.0])}
    seen: dict[int, list[float]] = {0: [], 1: []}

    def training(i: int):
        model = torch.nn.Linear(1, 1, bias=False)

        def validate() -> float:
            seen[i].append(model.weight.item())
            return next(scores[i])

        return networks.Training(model, lambda: [model.weight.sum()], validate, lr=0.1, patience=2)

    runs = [training(0), training(1)]
    assert networks.choose(runs, 2, 10) == 1
    assert [r.epochs for r in runs] == [2, 5]
    assert runs[1].finish().weight.item() == seen[1][2]


def labeled(seed: int, n_vars: int = 30):
    """Counts of two kinds of cells in halves of a section; kind and side agree."""
    rng = np.random.default_rng(seed)
    kind = (np.arange(256) % 16 >= 8).astype(int)
    rates = 1 + 2 * (np.arange(n_vars) % 2 == kind[:, None])
    adata = sheet(rng.poisson(rates), 16, seed)
    adata.obs["label"] = np.array(["left", "right"])[kind]
    return adata


def annotation_problem(reference, query):
    xy = reference.obsm["spatial"]
    blocks = (xy[:, 0] // 4).astype(int) * 10 + (xy[:, 1] // 4).astype(int)
    return SimpleNamespace(
        data="starmap", reference=reference, query=query, library_key=None, blocks=blocks, target=45.0
    )


@pytest.mark.parametrize("name", ["MLP, expression", "GPS, PCs", "GraphSAGE, PCs, smoothed", "GAT, gene vectors"])
def test_planted_labels_on_another_section_with_other_genes(annotation, name, monkeypatch, tmp_path):
    monkeypatch.setattr(annotation, "CONFIGURATIONS", annotation.CONFIGURATIONS[2:])
    monkeypatch.setattr(annotation, "EPOCHS", 40)
    rng = np.random.default_rng(0)
    symbols = np.array([f"S{i}" for i in range(3, 30)])
    np.savez(tmp_path / annotation.VECTORS, genes=symbols, values=rng.normal(size=(27, 12)).astype(np.float32))
    reference, query = labeled(0), labeled(1)[:, 2:][:, ::-1].copy()
    truth = query.obs["label"].to_numpy().copy()
    query.obs["label"] = "Unknown"
    run = SimpleNamespace(**{**vars(RUN), "data": tmp_path})
    fit = annotation.ANNOTATION[name](annotation_problem(reference, query), run)
    assert (fit.values == truth).mean() > 0.9


def test_labels_of_cells_to_annotate_are_not_among_the_answers(annotation, monkeypatch):
    monkeypatch.setattr(annotation, "CONFIGURATIONS", annotation.CONFIGURATIONS[2:])
    monkeypatch.setattr(annotation, "EPOCHS", 40)
    adata = labeled(0)
    truth = adata.obs["label"].to_numpy().copy()
    xy = adata.obsm["spatial"]
    unknown = xy[:, 1] < 4
    adata.obs.loc[unknown, "label"] = "Unknown"
    fit = annotation.ANNOTATION["GraphSAGE, expression"](annotation_problem(adata, adata), RUN)
    assert set(fit.values) == {"left", "right"}
    assert (fit.values[unknown] == truth[unknown]).mean() > 0.9


def test_gene_vectors_are_summed_by_centered_expression(annotation, tmp_path):
    vectors = np.random.default_rng(0).normal(size=(28, 4)).astype(np.float32)
    np.savez(tmp_path / annotation.VECTORS, genes=[f"S{i}" for i in range(27, -1, -1)], values=vectors[::-1])
    adata = labeled(0)
    run = SimpleNamespace(**{**vars(RUN), "data": tmp_path})
    got = annotation.inputs(annotation_problem(adata, adata), "gene vectors", run)[0]
    counts = adata.X.toarray()
    values = np.log1p(counts / counts.sum(1, keepdims=True) * 45)[:, :28]
    want = sum((values[:, [g]] - values[:, g].mean()) * vectors[g] for g in range(28))
    np.testing.assert_allclose(got, want / want.std(0), atol=1e-4)


@pytest.mark.parametrize("features", ["expression", "PCs"])
def test_graphmae_separates_planted_domains(graphmae, features, monkeypatch):
    from sklearn.cluster import KMeans
    from sklearn.metrics import adjusted_rand_score

    monkeypatch.setattr(graphmae, "CONFIGURATIONS", graphmae.CONFIGURATIONS[2:])
    monkeypatch.setattr(graphmae, "EPOCHS", 60)
    adata = labeled(0)
    truth = adata.obs.pop("label")
    problem = SimpleNamespace(data="starmap", adata=adata, library_key=None)
    fit = graphmae.EMBEDDING[f"GraphMAE, {features}"](problem, RUN)
    assert fit.values.shape == (256, graphmae.WIDTH)
    got = KMeans(2, n_init=5, random_state=0).fit_predict(fit.values)
    assert adjusted_rand_score(truth, got) > 0.8


def test_masked_nodes_are_neither_seen_nor_decoded_from_themselves(graphmae, networks):
    import torch

    torch.manual_seed(0)
    graph = networks.Graph(sp.csr_matrix(np.eye(6, k=1) + np.eye(6, k=-1)))
    model = graphmae.GraphMAE(4, 0.0).eval()
    masked = torch.tensor([[False], [True], [False], [False], [False], [False]])
    x = torch.randn(6, 4)
    other = x.clone()
    other[1] = 100
    torch.testing.assert_close(model(x, graph, masked), model(other, graph, masked))
    everything = model(x, graph, torch.ones(6, 1, dtype=torch.bool))
    torch.testing.assert_close(everything, everything[:1].expand(6, -1))  # nothing is left to tell nodes apart


def test_scaled_cosine_error_by_hand(graphmae):
    import torch

    predicted = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    truth = torch.tensor([[5.0, 0.0], [3.0, 0.0]])
    assert graphmae.scaled_cosine_error(predicted, truth).item() == pytest.approx(0.5)  # (0² + 1²) / 2


def test_untrained_network_has_no_trained_numbers(graphmae):
    problem = SimpleNamespace(data="starmap", adata=labeled(0), library_key=None)
    fit = graphmae.EMBEDDING["GraphSAGE, untrained"](problem, RUN)
    assert (fit.parameters, fit.epochs) == (0, 0)
    assert fit.values.std(0).min() > 0
