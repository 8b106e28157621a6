"""A frozen foundation model is run once, whatever the number of epochs, and training gives the same numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from foundation_toys import SIZES, N, graph

import fimp_sc
from fimp_sc.model import FIMP
from fimp_sc.model.train import _train
from fimp_sc.pretrained import load

TRAIN = {"accelerator": "cpu", "enable_progress_bar": False, "batch_size": 32, "early_stopping": False}
pytestmark = pytest.mark.filterwarnings("ignore:.*have no neighbors:UserWarning")


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("vit")
    transformers.ViTModel(transformers.ViTConfig(**SIZES, image_size=12, patch_size=4)).save_pretrained(folder)
    return folder


@pytest.fixture
def images():
    pixels = np.random.default_rng(0).integers(0, 256, (N, 12, 12, 3)).astype(np.uint8)
    return fimp_sc.pp.images(pixels, adjacency=graph(), labels={"site": list("ab") * (N // 2)})


@pytest.fixture
def of_images(images, vit):
    def make(**foundation):
        FIMP.setup_mudata(images, labels_key="site")
        return FIMP(images, foundation=load("vit", vit, **foundation))

    return make


@pytest.fixture
def of_cells(tissue, make):
    return lambda **foundation: make(tissue, {"labels_key": "label"}, **foundation)


@pytest.fixture(params=["of_cells", "of_images"])
def build(request):
    return request.getfixturevalue(request.param)


def run_nodes(model: FIMP, **how) -> int:
    """Train, and return how many destinations the stack computed meanwhile."""
    seen: list[int] = []
    counting = model.module.network.stack.register_forward_hook(
        lambda stack, inputs, _: seen.append(len(inputs[2]) - 1)
    )
    model.train(**TRAIN, **how)
    counting.remove()
    return sum(seen)


def test_the_stack_runs_once(build) -> None:
    few, many = (run_nodes(build(), max_epochs=epochs, mask_cells=0) for epochs in (1, 6))
    assert few == many
    # Each node once, and samples of them for where heads start.
    assert few <= 3 * build().adata.n_obs
    assert run_nodes(build(), max_epochs=6) > 2 * few
    assert run_nodes(build(train="last:1"), max_epochs=6, mask_cells=0) > 2 * few


def test_numbers_are_those_without_it(build, monkeypatch) -> None:
    def trained():
        model = build()
        model.train(**TRAIN, max_epochs=5, mask_cells=0, plan_kwargs={"lr_head": 0.3})
        return model

    kept = trained()
    monkeypatch.setattr(_train, "with_embeddings", lambda model, data, *nodes: data)
    anew = trained()
    close = {"rtol": 1e-4, "atol": 1e-6}
    for name in ("label_loss_train", "validation_loss"):
        ours, theirs = (model.history[name].to_numpy(dtype=float) for model in (kept, anew))
        np.testing.assert_allclose(ours, theirs, **close)
        assert len(ours) == 5
    np.testing.assert_allclose(
        kept.module.label_head.score.weight.detach(), anew.module.label_head.score.weight.detach(), **close
    )
    assert np.abs(kept.module.label_head.score.weight.detach().numpy()).max() > 0.01
    np.testing.assert_allclose(kept.predict(soft=True), anew.predict(soft=True), **close)
    assert kept.smoothing_weight == anew.smoothing_weight
    np.testing.assert_allclose(kept.module.reference, anew.module.reference, **close)


def test_without_validation_and_with_few_training_nodes(build) -> None:
    model = build()
    model.train(**TRAIN, max_epochs=2, mask_cells=0, train_indices=[0, 1, 2, 3, 7], validation_size=0)
    assert np.isfinite(model.predict(soft=True).to_numpy()).all()


def test_what_was_not_learned_is_not_predicted(of_cells) -> None:
    model = of_cells()
    model.train(**TRAIN, max_epochs=1, mask_cells=0)
    with pytest.raises(ValueError, match="learned labels alone"):
        model.get_expression()
    model.train(**TRAIN, max_epochs=1)
    assert np.isfinite(model.get_expression()).all()


def test_tools_learn_labels_alone_and_values_anew(tissue, checkpoint, caplog) -> None:
    foundation = load("scgpt", checkpoint)
    quick = {"accelerator": "cpu", "verbose": False, "max_epochs": 2, "foundation": foundation, "n_tokens": 10}
    fimp_sc.tl.annotate(tissue, "label", **quick)
    labels = fimp_sc.tl.get_model(tissue)
    assert not labels.module.value_head.loading.any()
    with caplog.at_level("INFO", logger="fimp_sc"):
        fimp_sc.tl.impute(tissue, accelerator="cpu")
    assert "that one learned labels alone" in caplog.text
    values = fimp_sc.tl.get_model(tissue)
    assert values is not labels
    assert values.module.value_head.loading.any()
    assert np.isfinite(tissue.layers["fimp"]).all()


def test_labels_are_learned_with_masks_where_asked(tissue, checkpoint) -> None:
    foundation = load("scgpt", checkpoint)
    quick = {"accelerator": "cpu", "verbose": False, "max_epochs": 2, "foundation": foundation, "n_tokens": 10}
    fimp_sc.tl.annotate(tissue, "label", train_kwargs={"mask_cells": 0.5}, **quick)
    model = fimp_sc.tl.get_model(tissue)
    assert model.module.value_head.loading.any()
    fimp_sc.tl.impute(tissue, accelerator="cpu")
    assert fimp_sc.tl.get_model(tissue) is model
