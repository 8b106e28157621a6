"""ViT between images, against the model itself."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from foundation_toys import ALONE, JOINED, ONE_EPOCH, QUICK, SIZES, N, assert_frozen, graph, weights_of

import fimp_sc
from fimp_sc.model import FIMP
from fimp_sc.pretrained import load

SIDE = 12
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
pytestmark = pytest.mark.filterwarnings("ignore:.*have no neighbors:UserWarning")


def make_pixels(channels=3, side=SIDE) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (N, side, side, channels)).astype(np.uint8)


def make_images(channels=3, side=SIDE):
    return fimp_sc.pp.images(make_pixels(channels, side), adjacency=graph(), labels={"site": list("ab") * (N // 2)})


@pytest.fixture(scope="module", params=[3, 1], ids=["color", "gray"])
def vit(request, tmp_path_factory):
    """A random vision transformer, its folder, and its class tokens of the images."""
    return save_vit(tmp_path_factory.mktemp("vit"), request.param)


@pytest.fixture(scope="module")
def color(tmp_path_factory):
    return save_vit(tmp_path_factory.mktemp("vit"), 3)


def save_vit(folder: Path, channels: int, patch: int | tuple[int, int] = 4) -> tuple[Path, int, np.ndarray]:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.ViTConfig(**SIZES, image_size=SIDE, patch_size=patch, num_channels=channels)
    model = transformers.ViTModel(config, add_pooling_layer=False).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        pixels = torch.from_numpy(make_pixels(channels)).permute(0, 3, 1, 2).float() / 127.5 - 1
        last = model(pixel_values=pixels).last_hidden_state[:, 0]
    model.save_pretrained(folder)
    return folder, channels, last.numpy()


def test_images_without_neighbors_are_embedded_by_vit_itself(vit, only_changed) -> None:
    folder, channels, expected = vit
    mdata = make_images(channels)
    with only_changed(mdata, ("image", "obsm", "X_fimp"), ("image", "uns", "X_fimp")):
        fimp_sc.tl.embed(mdata, foundation=load("vit", folder), zero_shot=True, **QUICK)
    found = mdata["image"].obsm["X_fimp"]
    np.testing.assert_allclose(found[ALONE], expected[ALONE], **CLOSE)
    assert (np.abs(found[JOINED] - expected[JOINED]).max(1) > 1e-2).all()


def test_images_are_labeled_and_imputed_while_vit_stays(vit) -> None:
    folder, channels, _ = vit
    mdata = make_images(channels)
    FIMP.setup_mudata(mdata, labels_key="site")
    model = FIMP(mdata, foundation=load("vit", folder))
    assert (model.token_sizes, model.n_layers) == ({"image": 4}, 1)
    before = weights_of(model)
    model.train(**ONE_EPOCH)
    assert_frozen(model, before)
    assert set(model.predict()) <= {"a", "b"}
    made = model.get_reconstruction()
    assert made.shape == (N, SIDE, SIDE, channels)
    assert np.isfinite(made).all()
    # The heads that were fitted know about colors, which lie around 128.
    assert 90 < made.mean() < 165


def test_hidden_patches_of_vit_have_no_influence(color) -> None:
    mdata, hidden = make_images(), np.random.default_rng(1).random((N, 9)) < 0.3
    FIMP.setup_mudata(mdata)
    model = FIMP(mdata, foundation=load("vit", color[0]))
    model.train(**ONE_EPOCH)
    first = model.get_reconstruction(hidden=hidden)
    other = make_images()
    pixels = other["image"].obsm["pixels"].reshape(N, 3, 4, 3, 4, 3).copy()
    pixels[np.nonzero(hidden)[0], np.nonzero(hidden)[1] // 3, :, np.nonzero(hidden)[1] % 3] = 77
    other["image"].obsm["pixels"] = pixels.reshape(N, -1)
    assert (other["image"].obsm["pixels"] != mdata["image"].obsm["pixels"]).any()
    second = FIMP.load_query_data(other, model).get_reconstruction(hidden=hidden)
    np.testing.assert_allclose(second, first, rtol=1e-4, atol=1e-2)


def test_tools_for_images_with_vit(color) -> None:
    mdata, how = make_images(), {"foundation": load("vit", color[0]), **QUICK}
    fimp_sc.tl.annotate(mdata, "site", **how)
    assert set(mdata["image"].obs["fimp_site"]) <= {"a", "b"}
    fimp_sc.tl.impute(mdata, **how)
    assert np.isfinite(mdata["image"].obsm["fimp"]).all()
    assert mdata["image"].obsm["fimp"].shape == (N, SIDE * SIDE * 3)


@pytest.mark.parametrize("trained", ["full", "last:1", "lora:2"])
def test_parts_of_vit_can_be_trained(color, trained: str) -> None:
    mdata = make_images()
    FIMP.setup_mudata(mdata, labels_key="site")
    model = FIMP(mdata, foundation=load("vit", color[0], train=trained))
    before = weights_of(model)
    model.train(**ONE_EPOCH)
    moved = {name for name, value in weights_of(model).items() if not torch.equal(value, before[name])}
    first_layer = {name for name in moved if name.startswith(("embedding.", "stack.layers.0."))}
    assert bool(first_layer) == (trained != "last:1")
    assert any(name.startswith("stack.layers.1.") for name in moved)
    if trained == "lora:2":
        assert all(name.endswith((".up", ".down")) for name in moved)


@pytest.mark.parametrize("trained", ["frozen", "lora:2"])
def test_a_saved_model_does_not_need_the_checkpoint(vit, tmp_path, trained: str) -> None:
    folder, channels, _ = vit
    mdata = make_images(channels)
    FIMP.setup_mudata(mdata, labels_key="site")
    model = FIMP(mdata, foundation=load("vit", folder, train=trained))
    model.train(**ONE_EPOCH)
    model.save_pretrained(tmp_path / "model")
    loaded = FIMP.from_pretrained(tmp_path / "model", make_images(channels), accelerator="cpu")
    np.testing.assert_array_equal(loaded.get_latent_representation(), model.get_latent_representation())
    np.testing.assert_array_equal(loaded.get_reconstruction(), model.get_reconstruction())
    np.testing.assert_array_equal(loaded.predict(soft=True), model.predict(soft=True))
    config = json.loads((tmp_path / "model" / "config.json").read_text(encoding="utf-8"))
    assert config["init_params"]["foundation"]["checkpoint"] == folder.name
    assert str(folder.parent) not in json.dumps(config)
    card = (tmp_path / "model" / "README.md").read_text(encoding="utf-8")
    assert "stack of `vit`" in card
    assert "- vit\n" in card


VIT_ERRORS = {
    "size": (lambda: make_images(side=8), {}, r"reads images of 12 × 12 pixels with 3 channels, found 8 × 8 with 3"),
    "gray": (lambda: make_images(1), {}, r"with 3 channels, found 12 × 12 with 1: .*image_size="),
    "token_size": (make_images, {"model_kwargs": {"token_size": 4}}, "token_size is that of foundation='vit' itself"),
    "brainlm": (
        make_images,
        {"name": "brainlm"},
        "foundation='brainlm' reads signals of brain regions, and .* kind 'patch'",
    ),
}


@pytest.mark.parametrize("case", VIT_ERRORS)
def test_what_vit_cannot_read_is_said(color, case: str, only_changed) -> None:
    make, how, message = VIT_ERRORS[case]
    mdata = make()
    how = {"foundation": load(how.get("name", "vit"), color[0]), "zero_shot": True, **QUICK, **how}
    how.pop("name", None)
    with only_changed(mdata), pytest.raises(ValueError, match=message):
        fimp_sc.tl.embed(mdata, **how)


def test_patches_that_are_no_squares_are_refused(tmp_path) -> None:
    mdata = make_images()
    FIMP.setup_mudata(mdata)
    with pytest.raises(ValueError, match="has patches of 4 × 2 pixels, and only square ones are supported"):
        FIMP(mdata, foundation=load("vit", save_vit(tmp_path, 3, (4, 2))[0]))


def test_vit_reads_no_signals_and_no_expression(color, recordings, tissue, make_model) -> None:
    FIMP.setup_mudata(recordings)
    with pytest.raises(ValueError, match="foundation='vit' reads images, and the modality is of kind 'signal'"):
        FIMP(recordings, foundation=load("vit", color[0]))
    with pytest.raises(ValueError, match="reads one modality, of images; this model is set up with expression"):
        make_model(tissue, foundation=load("vit", color[0]))


def test_foundations_of_sequences_read_one_modality(color, joint) -> None:
    FIMP.setup_mudata(joint, modality=["image", "rna"])
    with pytest.raises(ValueError, match=r"reads one modality, of images; this model is set up with \['image'\]"):
        FIMP(joint, foundation=load("vit", color[0]))


def test_embedding_without_messages_is_that_of_vit(vit) -> None:
    folder, channels, expected = vit
    mdata = make_images(channels)
    FIMP.setup_mudata(mdata, modality="image")
    for self_loops in (True, False):
        model = FIMP(mdata, foundation=load("vit", folder), self_loops=self_loops)
        alone = model.get_latent_representation(messages=False)
        np.testing.assert_allclose(alone, expected, **CLOSE)
        rows = [3, 0, 3]
        np.testing.assert_allclose(model.get_latent_representation(indices=rows, messages=False), alone[rows], **CLOSE)
        assert np.abs(model.get_latent_representation() - alone).max() > 1e-2
