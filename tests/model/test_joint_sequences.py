"""Signals and images together, without a table of values."""

from __future__ import annotations

import numpy as np
import pytest

from fimp_sc.model import FIMP

NAMES = ["image", "bold"]
SIZE = {"n_latent": 24, "n_heads": 2, "token_size": {"image": 3, "bold": 4}}
TRAIN = {"max_epochs": 1, "accelerator": "cpu", "enable_progress_bar": False}
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(scope="module")
def model(_joint, copied_mudata) -> FIMP:
    """Trained with labels; not to be changed."""
    mdata = copied_mudata(_joint)
    FIMP.setup_mudata(mdata, modality=NAMES, labels_key="kind")
    model = FIMP(mdata, **SIZE)
    model.train(**TRAIN)
    return model


def test_all_nodes_have_results(model) -> None:
    mdata = model.adata
    present = np.column_stack([mdata.obs_names.isin(mdata[name].obs_names) for name in NAMES])
    assert (present.sum(1) == 1).any()
    embedding = model.get_latent_representation()
    assert embedding.shape == (24, 24)
    assert np.isfinite(embedding[present.any(1)]).all()
    assert set(model.predict()) <= {"one", "two"}
    assert model.get_reconstruction(modality="image").shape == (24, 6, 6, 1)
    assert model.get_reconstruction(modality="bold").shape == (24, 12)
    with pytest.raises(ValueError, match="reads no expression"):
        model.get_expression()


def test_blocks_give_the_result_of_the_whole_graph(model) -> None:
    whole = model.get_latent_representation(strategy="blocks", batch_size=100)
    for how in ({"strategy": "blocks", "batch_size": 3}, {"strategy": "layers", "batch_size": 5}):
        np.testing.assert_allclose(model.get_latent_representation(**how), whole, **CLOSE)


@pytest.mark.parametrize("name", NAMES)
def test_each_modality_has_a_say(model, name: str, copied_mudata) -> None:
    mdata = copied_mudata(model.adata)
    if name == "image":
        mdata["image"].obsm["pixels"] = 255 - mdata["image"].obsm["pixels"]
    else:
        mdata["bold"].X = mdata["bold"].X[:, ::-1].copy()
    here = mdata.obs_names.isin(mdata[name].obs_names)
    changed = FIMP.load_query_data(mdata, model).get_latent_representation() - model.get_latent_representation()
    assert (np.abs(changed[here]).max(1) > 1e-4).all()


def test_a_saved_model_gives_the_same(model, tmp_path, copied_mudata) -> None:
    model.save_pretrained(tmp_path / "model")
    loaded = FIMP.from_pretrained(tmp_path / "model", copied_mudata(model.adata), accelerator="cpu")
    np.testing.assert_array_equal(loaded.get_latent_representation(), model.get_latent_representation())
    for name in NAMES:
        np.testing.assert_array_equal(loaded.get_reconstruction(modality=name), model.get_reconstruction(modality=name))


@pytest.mark.filterwarnings("ignore:.*left out")
@pytest.mark.parametrize(
    "how",
    [{"token_size": 47}, {"n_heads": 24}, {"layer": "paper", "reduce": "sum"}, {"self_loops": False, "n_layers": 1}],
    ids=["one token", "heads of one column", "paper", "no self-loops"],
)
def test_options_of_signals(recordings, how: dict) -> None:
    FIMP.setup_mudata(recordings)
    model = FIMP(recordings, **({"n_latent": 24, "n_heads": 2} | how))
    model.train(**TRAIN)
    assert np.isfinite(model.get_latent_representation()).all()
    made = model.get_reconstruction()
    whole = 47 // model.token_sizes["fmri"] * model.token_sizes["fmri"]
    assert np.isfinite(made[:, :whole]).all()
    assert np.isnan(made[:, whole:]).all()
