"""What a module of signals and images takes over from its training nodes, against NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fimp_sc.data import SequenceShape, SequenceStatistics
from fimp_sc.data.sequences._kinds import patches
from fimp_sc.model import FIMP
from fimp_sc.model.module._module import FIMPModule

N, N_DST = 8, 6
SHAPES = {"bold": SequenceShape(5, 4, 2, aligned=False), "image": SequenceShape(3, 6)}
ONE_EPOCH = {"max_epochs": 1, "accelerator": "cpu", "enable_progress_bar": False}


def make_module(**kwargs) -> FIMPModule:
    torch.manual_seed(0)
    module = FIMPModule(0, n_latent=24, n_heads=2, sequences=SHAPES, dropout=0.0, **kwargs)
    with torch.no_grad():
        for parameter in module.network.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return module.eval()


def make_batch(seed: int, *, hidden: float = 0.4, without: str = "") -> dict:
    generator = torch.Generator().manual_seed(seed)
    indices = torch.tensor([(i + step) % N for i in range(N) for step in (1, 3)])
    sequences = {}
    for name, shape in SHAPES.items():
        target = torch.randn(N, shape.n_tokens, shape.token_size, generator=generator)
        masked = torch.rand(N, shape.n_tokens, generator=generator) < (0.0 if name == without else hidden)
        sequences[name] = {
            "value": target.masked_fill(masked[..., None], 0.0), "masked": masked,
            "padding": torch.zeros_like(masked), "position": torch.arange(shape.n_tokens),
            "coordinates": torch.randn(N, shape.n_coordinates, generator=generator),
            "target": target[:N_DST], "target_mask": masked[:N_DST],
        }  # fmt: skip
    return {
        "nodes": torch.arange(N), "n_nodes": [N, N, N_DST],
        "indptr": [torch.arange(0, 2 * N + 1, 2), torch.arange(0, 2 * N_DST + 1, 2)],
        "indices": [indices, indices[: 2 * N_DST]], "sequences": sequences,
    }  # fmt: skip


@pytest.mark.parametrize("ridge", [0.3, 50.0])
def test_heads_start_as_ridge_regression_on_hidden_tokens(ridge: float) -> None:
    module, batches = make_module(), [make_batch(seed) for seed in range(3)]
    states, numbers = {name: [] for name in SHAPES}, {name: [] for name in SHAPES}
    with torch.no_grad():
        for batch in batches:
            after, first = module.network.states(batch), 1
            for name, shape in SHAPES.items():
                hidden = batch["sequences"][name]["target_mask"].numpy()
                states[name].append(after[:, first : first + shape.n_tokens].numpy()[hidden])
                numbers[name].append(batch["sequences"][name]["target"].numpy()[hidden])
                first += shape.n_tokens
    before = {name: value.clone() for name, value in module.state_dict().items()}
    module.fit_heads(iter(batches), ridge)
    for name, shape in SHAPES.items():
        x, y = (np.concatenate(parts[name]).astype(np.float64) for parts in (states, numbers))
        assert len(x) > 10
        x = np.column_stack([x, np.ones(len(x))])
        weight = np.linalg.solve(x.T @ x + ridge * np.eye(x.shape[1]), x.T @ y)
        head = module.network.heads[name]
        np.testing.assert_allclose(head.weight.detach(), weight[:-1].T, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(head.bias.detach(), weight[-1], rtol=1e-3, atol=1e-4)
        assert head.weight.shape == (shape.token_size, 24)
    moved = {name for name, value in module.state_dict().items() if (value != before[name]).any()}
    assert moved == {f"network.sequences.heads.{i}.{part}" for i in (0, 1) for part in ("weight", "bias")}


def test_heads_of_what_was_never_hidden_predict_the_mean() -> None:
    module = make_module()
    before = {name: head.weight.clone() for name, head in module.network.heads.items()}
    module.fit_heads([make_batch(0, without="bold")], 0.3)
    heads = module.network.heads
    assert (heads["image"].weight != before["image"]).any()
    assert (heads["bold"].weight == 0).all()
    assert (heads["bold"].bias == 0).all()
    module = make_module()
    module.fit_heads([], 0.3)
    for name, head in module.network.heads.items():
        assert torch.equal(head.weight, before[name])


@pytest.mark.parametrize("name", SHAPES)
def test_tokens_start_as_principal_components(name: str) -> None:
    module, shape = make_module(), SHAPES[name]
    rng = np.random.default_rng(0)
    numbers = rng.normal(size=(40, shape.n_tokens, shape.token_size)) @ np.diag(np.arange(1, shape.token_size + 1.0))
    before = {key: value.clone() for key, value in module.state_dict().items()}
    module.start_from_components(name, torch.from_numpy(numbers.astype(np.float32)).flatten(0, 1))
    number = list(SHAPES).index(name)
    embedding = module.network.sequences.embeddings[number]
    directions = np.linalg.svd(numbers.reshape(-1, shape.token_size), full_matrices=False)[2]
    width = embedding.own.stop
    assert width == 4
    weight = embedding.value.weight.detach().numpy()
    cosine = (weight[:width] / 0.3 * directions[:width]).sum(1)
    np.testing.assert_allclose(np.abs(cosine), 1, atol=1e-4)
    np.testing.assert_allclose(np.linalg.norm(weight[:width], axis=1), 0.3, rtol=1e-4)
    moved = [key for key, value in module.state_dict().items() if (value != before[key]).any()]
    assert moved == [f"network.sequences.embeddings.{number}.value.weight"]
    np.testing.assert_array_equal(weight[width:], before[moved[0]][width:])


def test_statistics_are_kept_by_modality() -> None:
    module = make_module()
    known = SequenceStatistics(3.0, 2.0, np.array([1, 2], np.float32), np.array([4, 5], np.float32))
    module.set_sequence_statistics("bold", known)
    bold, image = module.statistics["0"], module.statistics["1"]
    assert (float(bold.mean), float(bold.std)) == (3.0, 2.0)
    assert (bold.center.tolist(), bold.spread.tolist()) == ([1, 2], [4, 5])
    assert (float(image.mean), float(image.std)) == (0.0, 1.0)
    module.set_sequence_statistics("image", SequenceStatistics(7.0, 8.0, np.zeros(0, "f"), np.ones(0, "f")))
    assert (float(image.mean), float(image.std), float(bold.mean)) == (7.0, 8.0, 3.0)
    assert {f"statistics.{i}.{key}" for i in (0, 1) for key in ("mean", "std", "center", "spread")} <= set(
        module.state_dict()
    )


def test_a_model_knows_its_training_nodes_alone(pictures, recordings) -> None:
    train = np.arange(0, 20, 2)
    FIMP.setup_mudata(pictures)
    model = _quiet_model(pictures, 3)
    model.train(train_indices=train, validation_indices=[1, 3], **ONE_EPOCH)
    pixels = patches(pictures["image"].obsm["pixels"].reshape(-1, 8, 9, 3)[train], 3)
    found = model.module.statistics["0"]
    assert float(found.mean) == pytest.approx(pixels.mean(dtype=np.float64), rel=1e-5)
    assert float(found.std) == pytest.approx(pixels.std(dtype=np.float64), rel=1e-5)
    FIMP.setup_mudata(recordings)
    model = _quiet_model(recordings, 5)
    model.train(train_indices=train, validation_indices=[1, 3], **ONE_EPOCH)
    places = recordings["fmri"].obsm["spatial"][train]
    np.testing.assert_allclose(model.module.statistics["0"].center, places.mean(0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(model.module.statistics["0"].spread, places.std(0), rtol=1e-4)


def _quiet_model(mdata, token_size: int) -> FIMP:
    with pytest.warns(UserWarning, match="left out"):
        return FIMP(mdata, n_latent=12, n_heads=2, token_size=token_size)
