"""Tools on several modalities at once: what is written where."""

from __future__ import annotations

import mudata
import numpy as np
import pytest
from graph_toys import data_of
from scipy import sparse

import fimp_sc
from fimp_sc.data._modality import quiet_mudata

TOKEN_SIZE = {"fmri": 5, "image": 2, "bold": 4}
pytestmark = pytest.mark.filterwarnings("ignore:.*are left out. Choose another token_size")


def quickly(name: str | None = None, **model_kwargs) -> dict:
    """Arguments that make any tool train for a second on one core, quietly."""
    size = {} if name is None else {"token_size": TOKEN_SIZE[name]}
    return {
        "max_epochs": 1, "accelerator": "cpu", "verbose": False, "train_kwargs": {"batch_size": 32},
        "model_kwargs": {"n_latent": 16, "n_heads": 2, **size, **model_kwargs},
    }  # fmt: skip


ALL = quickly(n_tokens=6, token_size={"image": 3, "bold": 4})
NAMES = ["rna", "image", "bold"]
AGAIN = {"accelerator": "cpu", "verbose": False}


def test_one_modality_of_several(joint, only_changed) -> None:
    with only_changed(joint, ("image", "obsm", "X_fimp"), ("image", "uns", "X_fimp")):
        fimp_sc.tl.embed(joint, modality="image", **quickly("image"))
    assert joint["image"].obsm["X_fimp"].shape == (18, 16)
    assert fimp_sc.tl.get_model(joint, modality="image").is_trained
    for other in ("rna", NAMES):
        with pytest.raises(KeyError, match="No model is known"):
            fimp_sc.tl.get_model(joint, modality=other)
    assert fimp_sc.tl.get_model(joint) is fimp_sc.tl.get_model(joint, modality="image")


def test_several_modalities(joint, only_changed, trainings) -> None:
    with only_changed(joint, ("", "obsm", "X_fimp"), ("", "uns", "X_fimp")):
        fimp_sc.tl.embed(joint, modality=NAMES, **ALL)
    model = fimp_sc.tl.get_model(joint, modality=NAMES)
    assert joint.obsm["X_fimp"].shape == (24, 16)
    np.testing.assert_array_equal(joint.obsm["X_fimp"], model.get_latent_representation())
    written = [("rna", "layers", "fimp"), ("image", "obsm", "fimp"), ("bold", "layers", "fimp"), ("", "uns", "fimp")]
    written.append(("rna", "uns", "fimp"))
    with only_changed(joint, *written):
        fimp_sc.tl.impute(joint, modality=NAMES, **AGAIN)
    assert trainings == [model]
    expected = {
        "rna": model.get_expression(),
        "image": model.get_reconstruction(modality="image").reshape(24, -1),
        "bold": model.get_reconstruction(modality="bold"),
    }
    for name, values in expected.items():
        where = joint[name].obsm if name == "image" else joint[name].layers
        rows = joint.obs_names.get_indexer(joint[name].obs_names)
        np.testing.assert_array_equal(where["fimp"], values[rows])
    written = [("obs", "fimp_kind"), ("obs", "fimp_kind_confidence"), ("obsm", "fimp_kind_probabilities")]
    with only_changed(joint, *(("", *where) for where in [*written, ("uns", "fimp_kind")])):
        fimp_sc.tl.annotate(joint, "kind", modality=NAMES, **ALL)
    assert joint.obs["fimp_kind"].notna().all()


def test_imputed_values_of_a_modality_are_drawn(joint) -> None:
    """With what the whole object says of them, though a modality lacks the column that tells the samples apart."""
    names = joint.obs_names
    joint.obs["half"] = np.where(np.arange(24) < 12, "a", "b")
    ring = np.roll(np.eye(12), 1, axis=1)
    joint.obsp["spatial_connectivities"] = sparse.csr_matrix(sparse.block_diag([sparse.csr_matrix(ring)] * 2))
    fimp_sc.tl.impute(joint, modality=NAMES, library_key="half", **ALL)
    rna = joint["rna"]
    rna.obsm["spatial"] = joint.obsm["spatial"][names.get_indexer(rna.obs_names)]
    model = fimp_sc.tl.get_model(joint, modality=NAMES)
    axes = fimp_sc.pl.imputation(rna, "g3", show=False)
    measured = data_of(model).expression.rows(names.get_indexer(rna.obs_names))
    np.testing.assert_allclose(axes[0, 0].collections[0].get_array(), measured[:, 3], rtol=1e-5)
    fimp_sc.tl.impute(joint, modality=NAMES, library_key="half", genes=["g3"], **AGAIN)
    assert "fimp" not in rna.layers


def test_results_of_several_modalities_survive_a_file(joint, tmp_path) -> None:
    fimp_sc.tl.embed(joint, modality=NAMES, **ALL)
    fimp_sc.tl.annotate(joint, "kind", modality=NAMES, **ALL)
    fimp_sc.tl.impute(joint, modality=NAMES, **ALL)
    with quiet_mudata():
        joint.write(tmp_path / "object.h5mu")
        again = mudata.read_h5mu(tmp_path / "object.h5mu")
    np.testing.assert_array_equal(again.obsm["X_fimp"], joint.obsm["X_fimp"])
    assert list(again.obs["fimp_kind"]) == list(joint.obs["fimp_kind"])
    assert list(again.uns["fimp"]["genes"]) == list(joint["rna"].var_names)
    assert list(again.uns["fimp"]["params"]["modality"]) == NAMES
    assert again.uns["X_fimp"]["model"]["token_size"] == {"image": 3, "bold": 4}


def test_nodes_without_any_of_the_modalities_are_nan(joint) -> None:
    names = ["image", "bold"]
    lacking = ~joint.obs_names.isin([*joint["image"].obs_names, *joint["bold"].obs_names])
    if not lacking.any():
        keep = joint.obs_names[4:]
        with quiet_mudata():
            joint.mod["image"] = joint["image"][joint["image"].obs_names.isin(keep)].copy()
            joint.mod["bold"] = joint["bold"][joint["bold"].obs_names.isin(keep)].copy()
        lacking = ~joint.obs_names.isin([*joint["image"].obs_names, *joint["bold"].obs_names])
    assert 0 < lacking.sum() < 24
    quick = quickly(token_size={"image": 3, "bold": 4})
    fimp_sc.tl.embed(joint, modality=names, **quick)
    np.testing.assert_array_equal(np.isnan(joint.obsm["X_fimp"]).all(1), lacking)
    assert np.isfinite(joint.obsm["X_fimp"][~lacking]).all()
    fimp_sc.tl.annotate(joint, "kind", modality=names, **quick)
    np.testing.assert_array_equal(joint.obs["fimp_kind"].isna(), lacking)
    np.testing.assert_array_equal(joint.obs["fimp_kind_confidence"].isna(), lacking)
    fimp_sc.tl.impute(joint, modality=names, **quick)
    assert np.isfinite(joint["image"].obsm["fimp"]).all()
    assert np.isfinite(joint["bold"].layers["fimp"]).all()


def test_hidden_of_several_modalities(joint, trainings) -> None:
    """By name, each modality has its own, in its own order; those that have none hide nothing."""
    rng = np.random.default_rng(0)
    tokens = rng.random((18, 4)) < 0.4
    joint["image"].obsm["hide"] = tokens.reshape(18, 2, 2).repeat(3, 1).repeat(3, 2).reshape(18, -1)
    joint["bold"].layers["hide"] = (rng.random((joint["bold"].n_obs, 3)) < 0.4).repeat(4, 1)
    fimp_sc.tl.embed(joint, modality=NAMES, **ALL)
    fimp_sc.tl.impute(joint, modality=NAMES, hidden="hide", **AGAIN)
    assert len(trainings) == 2
    model = fimp_sc.tl.get_model(joint, modality=NAMES)
    fimp_sc.tl.impute(joint, modality=NAMES, hidden="hide", **AGAIN)
    assert len(trainings) == 2
    rows = joint.obs_names.get_indexer(joint["image"].obs_names)
    hidden = np.zeros((24, 4), dtype=bool)
    hidden[rows] = tokens
    expected = model.get_reconstruction(modality="image", hidden=hidden).reshape(24, -1)[rows]
    np.testing.assert_array_equal(joint["image"].obsm["fimp"], expected)
    rows = joint.obs_names.get_indexer(joint["bold"].obs_names)
    hidden = np.zeros((24, 12), dtype=bool)
    hidden[rows] = joint["bold"].layers["hide"]
    expected = model.get_reconstruction(modality="bold", hidden=hidden)[rows]
    np.testing.assert_array_equal(joint["bold"].layers["fimp"], expected)
    rows = joint.obs_names.get_indexer(joint["rna"].obs_names)
    np.testing.assert_array_equal(joint["rna"].layers["fimp"], model.get_expression()[rows])


def test_hidden_of_several_modalities_must_be_named(joint, only_changed) -> None:
    hidden = np.zeros((24, 4), dtype=bool)
    with only_changed(joint), pytest.raises(ValueError, match="name"):
        fimp_sc.tl.impute(joint, modality=NAMES, hidden=hidden, **ALL)
    with only_changed(joint), pytest.raises(KeyError, match="'hide'"):
        fimp_sc.tl.impute(joint, modality=NAMES, hidden="hide", **ALL)


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ({}, ValueError, "3 modalities: choose one with modality="),
        ({"modality": "brain"}, KeyError, "'brain'"),
        ({"modality": ["rna", "brain"]}, KeyError, "'brain'"),
        ({"modality": []}, ValueError, "modality must be a name or a list of names that is not empty"),
        ({"modality": ["rna", "rna"]}, ValueError, "once each"),
        ({"modality": "image", "connectivities_key": "none_connectivities"}, KeyError, "none_connectivities"),
        ({"modality": "rna"}, KeyError, "spatial"),
        ({"modality": ["rna", "image"], "layer": "none"}, KeyError, "none"),
        ({"modality": NAMES, "connectivities_key": "none_connectivities"}, KeyError, "one graph of all 24 nodes"),
        ({"modality": NAMES, "library_key": "none"}, KeyError, "none"),
        ({"modality": "image", "library_key": "none"}, KeyError, "none"),
    ],
)
@pytest.mark.parametrize("tool", ["embed", "annotate", "impute"])
def test_errors_change_nothing(joint, how, error, message, tool, only_changed) -> None:
    for part in ("rna", "image"):
        joint[part].obs["kind"] = joint.obs["kind"].reindex(joint[part].obs_names)
    arguments = ("kind",) if tool == "annotate" else ()
    with only_changed(joint), pytest.raises(error, match=message):
        getattr(fimp_sc.tl, tool)(joint, *arguments, **{**quickly(), **how})


@pytest.mark.filterwarnings("ignore:The method mod_names is deprecated:FutureWarning")
def test_a_trained_model_of_several_modalities_on_another_object(joint, copied_mudata, tmp_path) -> None:
    other = copied_mudata(joint)
    fimp_sc.tl.annotate(joint, "kind", modality=NAMES, **ALL)
    model = fimp_sc.tl.get_model(joint, modality=NAMES)
    model.save(str(tmp_path / "model"))
    other.obsp["mine_connectivities"] = other.obsp["spatial_connectivities"]
    del other.obsp["spatial_connectivities"], other.obs["kind"]
    how = {"modality": NAMES, "connectivities_key": "mine_connectivities", "model": tmp_path / "model", **AGAIN}
    fimp_sc.tl.embed(other, **how)
    fimp_sc.tl.annotate(other, "kind", **how)
    fimp_sc.tl.impute(other, **how)
    np.testing.assert_array_equal(other.obsm["X_fimp"], model.get_latent_representation())
    np.testing.assert_array_equal(other.obs["fimp_kind"], model.predict())
    rows = other.obs_names.get_indexer(other["bold"].obs_names)
    np.testing.assert_array_equal(other["bold"].layers["fimp"], model.get_reconstruction(modality="bold")[rows])
