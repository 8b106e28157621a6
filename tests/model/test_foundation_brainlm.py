"""BrainLM between brain regions, against the model itself."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from foundation_toys import ALONE, JOINED, ONE_EPOCH, QUICK, SIZES, N, assert_frozen, graph, weights_of
from safetensors.torch import save_file

import fimp_sc
from fimp_sc.model import FIMP
from fimp_sc.pretrained import load

pytestmark = pytest.mark.filterwarnings("ignore:.*have no neighbors:UserWarning")


def linear(name: str, out: int, into: int) -> dict:
    return {f"{name}.weight": (out, into), f"{name}.bias": (out,)}


def norm(name: str) -> dict:
    return {f"{name}.weight": (24,), f"{name}.bias": (24,)}


def save_brainlm(folder: Path, layout: str) -> Path:
    """Random weights in the first format (segments of 5 time points) or the second (a picture of 24 x 24)."""
    segments = layout == "segments"
    shapes = {"vit.embeddings.cls_token": (1, 1, 24)} | norm("vit.layernorm")
    if segments:
        shapes |= linear("vit.embeddings.signal_embedding_projection", 24, 5)
        shapes |= linear("vit.embeddings.xyz_embedding_projection", 24, 3)
    else:
        shapes |= {"vit.embeddings.position_embeddings": (1, 37, 24)}
        shapes |= {f"vit.embeddings.patch_embeddings.projection.{k}": s for k, s in
                   (("weight", (24, 3, 4, 4)), ("bias", (24,)))}  # fmt: skip
    for i in range(2):
        at = f"vit.encoder.layer.{i}."
        attention = "attention.self." if segments else "attention.attention."
        for name in ("query", "key", "value"):
            shapes |= linear(at + attention + name, 24, 24)
        shapes |= linear(f"{at}attention.output.dense", 24, 24)
        shapes |= linear(f"{at}intermediate.dense", 40, 24) | linear(f"{at}output.dense", 24, 40)
        norms = ("attention.output.LayerNorm", "output.LayerNorm") if segments else (
            "layernorm_before", "layernorm_after")  # fmt: skip
        for name in norms:
            shapes |= norm(at + name)
        if segments:
            shapes[f"{at}attention.self.conv.weight"] = (3, 1, 7, 1)
    generator = torch.Generator().manual_seed(0)
    save_file({k: 0.3 * torch.randn(s, generator=generator) for k, s in shapes.items()}, folder / "model.safetensors")
    config = {**SIZES, "hidden_act": "gelu", "layer_norm_eps": 1e-12}
    config |= (
        {"model_type": "brainlm_mae", "timepoint_patching_size": 5, "conv_kernel_size": 7}
        if segments
        else {"model_type": "vit_mae", "image_size": [24, 24], "patch_size": 4, "num_channels": 3,
              "num_brain_voxels": 20, "num_timepoints_per_voxel": 14}
    )  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module", params=["segments", "picture"])
def layout(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def brainlm(layout, tmp_path_factory) -> Path:
    return save_brainlm(tmp_path_factory.mktemp("brainlm"), layout)


@pytest.fixture(scope="module")
def segments(tmp_path_factory) -> Path:
    return save_brainlm(tmp_path_factory.mktemp("brainlm"), "segments")


@pytest.fixture(scope="module")
def picture(tmp_path_factory) -> Path:
    return save_brainlm(tmp_path_factory.mktemp("brainlm"), "picture")


@pytest.fixture(scope="module")
def released(shared_data) -> Path:
    folder = shared_data / "brainlm_tiny_checkpoint"
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent")
    return folder


def make_bold(n_times=20, n_coordinates: int | None = 3, seed=0):
    rng = np.random.default_rng(seed)
    signals = 1000 + 20 * rng.normal(size=(N, n_times)).cumsum(1)
    places = None if n_coordinates is None else 30 * rng.normal(size=(N, n_coordinates))
    mdata = fimp_sc.pp.fmri(
        signals.astype(np.float32), connectivity=graph(), labels={"lobe": list("ab") * (N // 2)},
        coordinates=None if n_coordinates != 3 else places,
    )  # fmt: skip
    if n_coordinates == 2:
        mdata["fmri"].obsm["spatial"] = places
    return mdata


def alone(folder: Path, mdata, token_size: int) -> np.ndarray:
    """Return what BrainLM makes of each region by itself, averaged over tokens."""
    adata, foundation = mdata["fmri"], load("brainlm", folder).read()
    n_tokens = adata.n_vars // token_size
    signal = adata.X[:, : n_tokens * token_size].astype(np.float64)
    signal = (signal - signal.mean(1, keepdims=True)) / signal.std(1, keepdims=True)
    places = torch.from_numpy(adata.obsm["spatial"]).float()
    with torch.no_grad():
        tokens = foundation.embedding.tokens(
            torch.from_numpy(signal).float().unflatten(1, (n_tokens, token_size)), places
        )
        last = foundation.stack.alone(tokens, torch.zeros(tokens.shape[:2], dtype=torch.bool))
    return last.mean(1).numpy()


def test_regions_without_neighbors_are_embedded_by_brainlm_itself(segments, only_changed) -> None:
    mdata = make_bold(n_times=20)
    with only_changed(mdata, ("fmri", "obsm", "X_fimp"), ("fmri", "uns", "X_fimp")):
        fimp_sc.tl.embed(mdata, foundation=load("brainlm", segments), zero_shot=True, **QUICK)
    found, expected = mdata["fmri"].obsm["X_fimp"], alone(segments, mdata, 5)
    np.testing.assert_allclose(found[ALONE], expected[ALONE], rtol=1e-4, atol=1e-4)
    assert (np.abs(found[JOINED] - expected[JOINED]).max(1) > 1e-2).all()


def test_the_released_brainlm_embeds_regions(released) -> None:
    mdata = make_bold(n_times=200)
    fimp_sc.tl.embed(mdata, foundation=load("brainlm", released), zero_shot=True, **QUICK)
    expected = alone(released, mdata, 20)
    np.testing.assert_allclose(mdata["fmri"].obsm["X_fimp"][ALONE], expected[ALONE], rtol=1e-4, atol=1e-4)


def test_a_region_of_a_picture_is_embedded_by_its_class_token(picture) -> None:
    mdata = make_bold(n_times=14)
    fimp_sc.tl.embed(mdata, foundation=load("brainlm", picture), zero_shot=True, **QUICK)
    adata, foundation = mdata["fmri"], load("brainlm", picture).read()
    # Segments are as long as patches, and what does not fill one is left out.
    signal = adata.X[:, :12].astype(np.float64)
    signal = (signal - signal.mean(1, keepdims=True)) / signal.std(1, keepdims=True) / 5.6430855
    rows = adata.obsm["spatial"][:, 1].argsort().argsort() * 20 // N
    with torch.no_grad():
        tokens = foundation.embedding.tokens(torch.from_numpy(signal).float(), torch.from_numpy(rows))
        last = foundation.stack.alone(tokens, torch.zeros(tokens.shape[:2], dtype=torch.bool))[:, 0].numpy()
    np.testing.assert_allclose(adata.obsm["X_fimp"][ALONE], last[ALONE], rtol=1e-4, atol=1e-4)


def test_a_picture_is_embedded_and_labeled_but_not_reconstructed(picture) -> None:
    mdata = make_bold(n_times=14)
    FIMP.setup_mudata(mdata, labels_key="lobe")
    model = FIMP(mdata, foundation=load("brainlm", picture))
    before = weights_of(model)
    model.train(**ONE_EPOCH)
    assert_frozen(model, before)
    assert np.isfinite(model.get_latent_representation()).all()
    assert set(model.predict()) <= {"a", "b"}
    with pytest.raises(ValueError, match=r"embeds signals and does not reconstruct them.*first format \(13M\)"):
        model.get_reconstruction()


def test_a_picture_without_labels_has_nothing_to_learn(picture) -> None:
    mdata = make_bold(n_times=14)
    for tool in (fimp_sc.tl.embed, fimp_sc.tl.impute):
        with pytest.raises(ValueError, match=r"nothing to learn.*zero_shot=True"):
            tool(mdata, foundation=load("brainlm", picture), **QUICK)


def test_signals_are_reconstructed_by_brainlm(segments) -> None:
    mdata = make_bold(n_times=23)
    FIMP.setup_mudata(mdata)
    model = FIMP(mdata, foundation=load("brainlm", segments))
    assert model.token_sizes == {"fmri": 5}
    before = weights_of(model)
    model.train(**ONE_EPOCH)
    assert_frozen(model, before)
    made = model.get_reconstruction()
    assert np.isfinite(made[:, :20]).all()
    assert np.isnan(made[:, 20:]).all()
    assert (np.abs(made[:, :20].mean(1) - mdata["fmri"].X.mean(1)) < 300).all(), "on the scale of each region"


def test_a_saved_brainlm_does_not_need_the_checkpoint(layout, brainlm, tmp_path) -> None:
    def make():
        return make_bold(n_times=20 if layout == "segments" else 12)

    mdata = make()
    FIMP.setup_mudata(mdata, labels_key="lobe")
    model = FIMP(mdata, foundation=load("brainlm", brainlm))
    model.train(**ONE_EPOCH)
    model.save_pretrained(tmp_path / "model")
    loaded = FIMP.from_pretrained(tmp_path / "model", make(), accelerator="cpu")
    np.testing.assert_array_equal(loaded.get_latent_representation(), model.get_latent_representation())
    np.testing.assert_array_equal(loaded.predict(soft=True), model.predict(soft=True))
    if layout == "segments":
        np.testing.assert_array_equal(loaded.get_reconstruction(), model.get_reconstruction())


@pytest.mark.parametrize(("n_coordinates", "found"), [(None, 0), (2, 2)])
def test_brainlm_needs_places_in_millimeters(brainlm, n_coordinates, found: int, only_changed) -> None:
    mdata = make_bold(n_coordinates=n_coordinates)
    message = rf"in millimeters of MNI space: obsm\['spatial'\] must hold 3 coordinates, found {found}"
    with only_changed(mdata), pytest.raises(ValueError, match=message):
        fimp_sc.tl.embed(mdata, foundation=load("brainlm", brainlm), zero_shot=True, **QUICK)


def test_what_brainlm_cannot_read_is_said(segments, picture, pictures) -> None:
    FIMP.setup_mudata(pictures)
    with pytest.raises(ValueError, match=r"foundation='brainlm' reads signals of brain regions, .* kind 'patch'"):
        FIMP(pictures, foundation=load("brainlm", segments))
    mdata = make_bold(n_times=25)
    FIMP.setup_mudata(mdata)
    with pytest.raises(ValueError, match="reads up to 24 time points, found 25: cut the recordings"):
        FIMP(mdata, foundation=load("brainlm", picture))
    with pytest.raises(ValueError, match="token_size is that of foundation='brainlm' itself"):
        FIMP(mdata, foundation=load("brainlm", segments), token_size=5)
