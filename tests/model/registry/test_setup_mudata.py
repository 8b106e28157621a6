"""Registration of signals, images, features and several modalities: what is found, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
from anndata import AnnData
from graph_toys import data_of
from mudata import MuData
from scipy import sparse

import fimp_sc
from fimp_sc.data._modality import quiet_mudata
from fimp_sc.model import FIMP

SMALL = {"n_latent": 16, "n_heads": 2}
SCVI = ("_scvi_uuid", "_scvi_manager_uuid")


def setup_args(data, **how):
    FIMP.setup_mudata(data, **how) if hasattr(data, "mod") else FIMP.setup_anndata(data, **how)
    return FIMP(data, **SMALL).registry["setup_args"]


@pytest.fixture
def table():
    """Features of 15 nodes with a graph under a name of its own."""
    rng = np.random.default_rng(0)
    ring = np.roll(np.eye(15), 1, axis=0)
    return fimp_sc.pp.features(rng.normal(size=(15, 6)), ring, connectivities_key="ring")


@pytest.mark.filterwarnings("ignore:.*are left out")
@pytest.mark.parametrize("modality", [None, "fmri", ["fmri"]])
def test_signals(recordings, modality, only_changed) -> None:
    with only_changed(recordings, *(("", "uns", key) for key in SCVI)):
        found = setup_args(recordings, modality=modality)
    assert (found["library_key"], found["connectivities_key"]) == ("recording", "spatial_connectivities")
    (shape,) = FIMP(recordings, token_size=5, **SMALL).module.sequences.values()
    assert (shape.n_tokens, shape.token_size, shape.n_coordinates) == (9, 5, 3)


def test_signals_without_coordinates(recordings) -> None:
    del recordings["fmri"].obsm["spatial"]
    FIMP.setup_mudata(recordings)
    with pytest.warns(UserWarning, match="left out"):
        model = FIMP(recordings, **SMALL)
    assert model.module.sequences["fmri"].n_coordinates == 0


@pytest.mark.parametrize("role", ["labels_key", "batch_key", "library_key"])
@pytest.mark.parametrize("modality", [None, "feature", ["feature"]])
def test_columns_of_the_whole_object_are_to_be_pushed(table, role, modality) -> None:
    table.obs["group"] = ["a", "b", "c"] * 5
    with pytest.raises(KeyError, match=r"mdata.push_obs\(columns=\['group'\], mods=\['feature'\]\)"):
        FIMP.setup_mudata(table, modality=modality, **{role: "group"})
    table.push_obs(columns=["group"], mods=["feature"])  # as the message says
    if role == "library_key":  # edges join no two samples
        table["feature"].obsp["ring"] = sparse.csr_matrix(np.kron(np.ones((5, 5)), np.eye(3)))
    assert setup_args(table, modality=modality, **{role: "group"})[role] == "group"


@pytest.mark.filterwarnings("ignore:.*are left out")
@pytest.mark.parametrize("n_times", [12, 20, 39])
def test_short_recordings_have_several_tokens(recordings, n_times) -> None:
    """What is hidden is predicted from the others, on their scale."""
    adata = recordings["fmri"][:, :n_times].copy()
    FIMP.setup_anndata(adata)
    (shape,) = FIMP(adata, **SMALL).module.sequences.values()
    assert shape.n_tokens > 1


def test_images(pictures, only_changed) -> None:
    with only_changed(pictures, *(("", "uns", key) for key in SCVI)):
        FIMP.setup_mudata(pictures, modality="image", labels_key="site")
    with pytest.warns(UserWarning, match="the 2 lowest rows of images"):
        model = FIMP(pictures, token_size=3, **SMALL)
    shape = model.module.sequences["image"]
    assert (shape.n_tokens, shape.token_size) == (2 * 3, 3 * 3 * 3)
    assert model.classes == ["bright", "dark"]


@pytest.mark.filterwarnings("ignore:.*are left out")
@pytest.mark.parametrize("which", ["recordings", "pictures"])
def test_a_modality_alone_is_an_anndata_object(which, request) -> None:
    mdata = request.getfixturevalue(which)
    (name,) = mdata.mod
    adata = mdata[name].copy()
    found = setup_args(adata)
    assert found["library_key"] == ("recording" if which == "recordings" else None)
    assert len(FIMP(adata, **SMALL).module.sequences) == 1
    assert FIMP(adata, **SMALL).module.value_head is None


def test_features(table) -> None:
    found = setup_args(table)
    assert found["connectivities_key"] == "ring"
    FIMP.setup_mudata(table)
    model = FIMP(table, **SMALL)
    assert model.module.sequences == {}
    assert list(model.genes) == list(table["feature"].var_names)
    state = model.registry["field_registries"]["X"]["state_registry"]
    assert state["input_scale"] == "real"


def test_features_that_look_like_counts_are_real_numbers_too() -> None:
    values = np.random.default_rng(0).integers(0, 5, (15, 6)).astype(float)
    mdata = fimp_sc.pp.features(values, np.roll(np.eye(15), 1, axis=0))
    FIMP.setup_mudata(mdata)
    assert FIMP(mdata, **SMALL).registry["field_registries"]["X"]["state_registry"]["input_scale"] == "real"


def test_own_keys_go_before_those_of_the_modality(recordings) -> None:
    adata = recordings["fmri"]
    adata.obs["half"] = adata.obs["recording"].astype(str) + np.where(np.arange(24) % 12 < 6, "a", "b")
    halves = adata.obs["half"].to_numpy()
    adata.obsp["own"] = sparse.csr_matrix((halves[:, None] == halves) & ~np.eye(24, dtype=bool))
    FIMP.setup_mudata(recordings, library_key="half", connectivities_key="own")
    with pytest.warns(UserWarning, match="left out"):
        model = FIMP(recordings, **SMALL)
    found = model.registry["setup_args"]
    assert (found["library_key"], found["connectivities_key"]) == ("half", "own")


def test_several_modalities(joint, only_changed) -> None:
    with only_changed(joint, *(("", "uns", key) for key in SCVI)):
        FIMP.setup_mudata(joint, modality=["rna", "image", "bold"], labels_key="kind")
    model = FIMP(joint, token_size={"image": 2, "bold": 4}, **SMALL)
    assert {name: s.n_tokens for name, s in model.module.sequences.items()} == {"image": 9, "bold": 3}
    assert list(model.genes) == list(joint["rna"].var_names)
    assert model.classes == ["one", "two"]
    assert model.summary_stats.n_cells == 24


def test_one_of_several_has_its_own_nodes_and_graph(joint) -> None:
    FIMP.setup_mudata(joint, modality="image")
    model = FIMP(joint, **SMALL)
    assert model.summary_stats.n_cells == 18
    assert list(model.module.sequences) == ["image"]


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ({"modality": "brain"}, KeyError, "'brain'.*mdata.mod"),
        ({"modality": ["rna", "brain"]}, KeyError, "'brain'.*mdata.mod"),
        ({}, ValueError, r"3 modalities: choose one with modality=, of \['rna', 'image', 'bold'\]"),
        ({"modality": []}, ValueError, r"list of names that is not empty \(or None\), found \[\]"),
        ({"modality": ["rna", "rna"]}, ValueError, "once each"),
        ({"modality": ["rna", "image"], "labels_key": "none"}, KeyError, "none"),
        ({"modality": ["rna", "image"], "library_key": "none"}, KeyError, "none"),
    ],
)
def test_errors_of_names(joint, how, error, message, only_changed) -> None:
    with only_changed(joint), pytest.raises(error, match=message):
        FIMP.setup_mudata(joint, **how)


def test_several_modalities_need_a_graph_of_all_nodes(joint) -> None:
    del joint.obsp["spatial_connectivities"]
    with pytest.raises(
        KeyError, match=r"one graph of all 24 nodes: store it in mdata.obsp\['spatial_connectivities'\]"
    ):
        FIMP.setup_mudata(joint, modality=["rna", "image", "bold"])


def test_a_graph_of_a_modality_with_all_nodes_will_do(joint) -> None:
    """Its rows are in the order of the modality, those of the nodes in that of the whole object."""
    graph = joint.obsp["spatial_connectivities"]
    everything = joint.obs_names[::-1]
    whole = AnnData(np.random.default_rng(0).normal(size=(24, 10)).astype(np.float32))
    whole.obs_names = everything
    whole.uns["fimp_modality"] = {"kind": "signal"}
    whole.obsp["spatial_connectivities"] = graph[::-1][:, ::-1]
    with quiet_mudata():
        other = MuData({"rna": joint["rna"], "whole": whole})
    FIMP.setup_mudata(other, modality=["rna", "whole"])
    model = FIMP(other, **SMALL)
    order = joint.obs_names.get_indexer(other.obs_names)
    found = data_of(model, other).graph.csr.toarray() != 0
    expected = graph.toarray()[order][:, order] != 0
    np.testing.assert_array_equal(found & ~np.eye(24, dtype=bool), expected)


@pytest.mark.parametrize(
    ("value", "message"), [(np.nan, "NaN or infinite.*'0:3'"), (np.inf, "NaN or infinite"), (None, "constant.*'0:3'")]
)
def test_signals_that_cannot_be_used(recordings, value, message) -> None:
    adata = recordings["fmri"]
    name = adata.obs_names[3]
    if value is None:
        adata.X[3] = 7.0
    else:
        adata.X[3, 5] = value
    with pytest.raises(ValueError, match=message.replace("0:3", name)):
        FIMP.setup_mudata(recordings)


def test_pixels_must_have_the_shape_of_an_image(pictures) -> None:
    pictures["image"].uns["fimp_modality"]["image_shape"] = [8, 8, 3]
    with pytest.raises(ValueError, match="8 × 8 pixels × 3 channels"):
        FIMP.setup_mudata(pictures)


def test_a_kind_nobody_knows(pictures) -> None:
    pictures["image"].uns["fimp_modality"]["kind"] = "film"
    with pytest.raises(ValueError, match="'film'"):
        FIMP.setup_mudata(pictures)


@pytest.mark.parametrize("which", ["recordings", "pictures"])
def test_layers_are_for_expression(which, request) -> None:
    mdata = request.getfixturevalue(which)
    (name,) = mdata.mod
    mdata[name].layers["raw"] = np.ones(mdata[name].shape)
    with pytest.raises(ValueError, match="layer='raw' is for expression and features"):
        FIMP.setup_mudata(mdata, layer="raw")


def test_a_layer_of_the_table_among_several(joint) -> None:
    """Nothing else of the table is read."""
    table = joint["rna"]
    table.layers["raw"], table.X = table.X.copy(), table.X * np.float32(np.nan)
    FIMP.setup_mudata(joint, modality=["rna", "image"], layer="raw")
    model = FIMP(joint, **SMALL)
    model.train(1, accelerator="cpu", enable_progress_bar=False)
    assert np.isfinite(model.get_latent_representation()).all()
    with pytest.raises(ValueError, match="NaN"):
        FIMP.setup_mudata(joint, modality=["rna", "image"])


def test_an_absent_graph(pictures) -> None:
    del pictures["image"].obsp["spatial_connectivities"]
    with pytest.raises(KeyError, match="spatial_connectivities"):
        FIMP.setup_mudata(pictures)


def test_edges_that_join_recordings(recordings) -> None:
    graph = recordings["fmri"].obsp["spatial_connectivities"].tolil()
    graph[0, 20] = 1
    recordings["fmri"].obsp["spatial_connectivities"] = graph.tocsr()
    with pytest.raises(ValueError, match="recording"):
        FIMP.setup_mudata(recordings)


@pytest.mark.parametrize(
    ("which", "size", "message"),
    [
        ("recordings", 0, "between 1 and 47, the time points of the signals: found 0"),
        ("recordings", 48, "between 1 and 47"),
        ("pictures", 9, "between 1 and 8, the pixels of the shorter side of the images: found 9"),
        ("pictures", -1, "between 1 and 8"),
        ("recordings", {"fmr": 5}, r"token_size is for signals and images, \['fmri'\] here"),
        ("table", 5, r"token_size is for signals and images, \[\] here: found 5"),
        ("table", {"feature": 5}, r"token_size is for signals and images, \[\] here"),
    ],
)
def test_token_sizes_out_of_range(which, size, message, request) -> None:
    mdata = request.getfixturevalue(which)
    FIMP.setup_mudata(mdata)
    with pytest.raises(ValueError, match=message):
        FIMP(mdata, token_size=size, **SMALL)


@pytest.mark.parametrize(
    ("which", "size", "message"),
    [
        ("recordings", 20, "'fmri': the last 7 of 47 time points, which do not fill a segment of 20, are left out"),
        ("pictures", 3, "the 2 lowest rows of images"),
        ("pictures", 5, "3 lowest rows and the 4 rightmost columns of images of 8 × 9 pixels"),
    ],
)
def test_a_warning_says_what_is_left_out(which, size, message, request, recwarn) -> None:
    mdata = request.getfixturevalue(which)
    FIMP.setup_mudata(mdata)
    FIMP(mdata, token_size=size, **SMALL)
    texts = [str(warning.message) for warning in recwarn]
    assert len(texts) == 1
    assert message in texts[0]
