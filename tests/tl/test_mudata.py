"""Tools on signals, images, features and several modalities: what is written where."""

from __future__ import annotations

import mudata
import numpy as np
import pandas as pd
import pytest

import fimp_sc
from fimp_sc.data._modality import quiet_mudata
from fimp_sc.model import FIMP

TOKEN_SIZE = {"fmri": 5, "image": 2, "bold": 4}
pytestmark = pytest.mark.filterwarnings("ignore:.*are left out. Choose another token_size")


def quickly(name: str | None = None, **model_kwargs) -> dict:
    """Arguments that make any tool train for a second on one core, quietly."""
    size = {} if name is None else {"token_size": TOKEN_SIZE[name]}
    return {
        "max_epochs": 1, "accelerator": "cpu", "verbose": False, "train_kwargs": {"batch_size": 32},
        "model_kwargs": {"n_latent": 16, "n_heads": 2, **size, **model_kwargs},
    }  # fmt: skip


AGAIN = {"accelerator": "cpu", "verbose": False}


@pytest.fixture
def table():
    """Features of 15 nodes, of which some have labels."""
    rng = np.random.default_rng(0)
    graph = np.roll(np.eye(15), 1, axis=0) + np.roll(np.eye(15), -1, axis=0)
    labels = {"label": np.where(np.arange(15) < 7, "low", "high")}
    return fimp_sc.pp.features(rng.normal(size=(15, 6)), graph, labels=labels)


KINDS = [("recordings", "fmri", "lobe"), ("pictures", "image", "site"), ("table", "feature", "label")]


@pytest.fixture(params=KINDS, ids=[kind[0] for kind in KINDS])
def kind(request):
    """Object, name of its modality, its labels, and arguments that make tools quick."""
    which, name, label = request.param
    return request.getfixturevalue(which), name, label, quickly(name if name in TOKEN_SIZE else None)


def test_embed(kind, only_changed) -> None:
    mdata, name, _, quick = kind
    with only_changed(mdata, (name, "obsm", "X_fimp"), (name, "uns", "X_fimp")):
        assert fimp_sc.tl.embed(mdata, modality=name, **quick) is None
    embedding = mdata[name].obsm["X_fimp"]
    assert embedding.shape == (mdata.n_obs, 16)
    assert embedding.dtype == np.float32
    assert np.isfinite(embedding).all()
    assert embedding.std() > 0
    np.testing.assert_array_equal(embedding, fimp_sc.tl.get_model(mdata).get_latent_representation())


def test_annotate(kind, only_changed) -> None:
    mdata, name, label, quick = kind
    adata = mdata[name]
    adata.obs[label] = adata.obs[label].astype(object)
    adata.obs.iloc[3, adata.obs.columns.get_loc(label)] = np.nan
    key = f"fimp_{label}"
    written = [("obs", key), ("obs", f"{key}_confidence"), ("obsm", f"{key}_probabilities"), ("uns", key)]
    with only_changed(mdata, *((name, *place) for place in written)):
        fimp_sc.tl.annotate(mdata, label, modality=name, **quick)
    classes = sorted(adata.obs[label].dropna().unique())
    assert list(adata.uns[key]["classes"]) == classes
    assert list(adata.obs[key].cat.categories) == classes
    assert adata.obs[key].notna().all()
    probabilities = adata.obsm[f"{key}_probabilities"]
    np.testing.assert_allclose(probabilities.sum(1), 1, rtol=1e-5)
    np.testing.assert_array_equal(adata.obs[key].cat.codes, probabilities.argmax(1))
    np.testing.assert_array_equal(adata.obs[f"{key}_confidence"], probabilities.max(1))


def place(name: str) -> tuple[str, str, str]:
    return name, "obsm" if name == "image" else "layers", "fimp"


def test_impute(kind, only_changed) -> None:
    mdata, name, _, quick = kind
    with only_changed(mdata, place(name), (name, "uns", "fimp")):
        fimp_sc.tl.impute(mdata, **quick)
    model = fimp_sc.tl.get_model(mdata, modality=name)
    values = getattr(mdata[name], place(name)[1])["fimp"]
    assert values.dtype == np.float32
    if name == "feature":
        np.testing.assert_allclose(values, model.get_expression(), rtol=1e-5, atol=1e-5)
        assert list(mdata[name].uns["fimp"]["genes"]) == list(mdata[name].var_names)
        assert np.isfinite(values).all()
        return
    assert "genes" not in mdata[name].uns["fimp"]
    assert "scale" not in mdata[name].uns["fimp"]["params"]
    expected = model.get_reconstruction().reshape(mdata.n_obs, -1)
    assert values.shape == (mdata[name].shape if name == "fmri" else (20, 8 * 9 * 3))
    np.testing.assert_array_equal(values, expected)
    # Two time points of 47, and one column of pixels of 9, fill no token.
    assert np.isnan(values).mean() == pytest.approx(2 / 47 if name == "fmri" else 1 / 9)


def test_results_survive_a_file(kind, tmp_path) -> None:
    mdata, name, label, quick = kind
    fimp_sc.tl.embed(mdata, **quick)
    fimp_sc.tl.annotate(mdata, label, **quick)
    fimp_sc.tl.impute(mdata, **quick)
    with quiet_mudata():
        mdata.write(tmp_path / "object.h5mu")
        again = mudata.read_h5mu(tmp_path / "object.h5mu")
    _, where, key = place(name)
    for attribute, entry in ((where, key), ("obsm", "X_fimp"), ("obsm", f"fimp_{label}_probabilities")):
        before, after = (getattr(data[name], attribute)[entry] for data in (mdata, again))
        np.testing.assert_array_equal(before, after)
    for entry in ("X_fimp", "fimp", f"fimp_{label}"):
        before, after = mdata[name].uns[entry], again[name].uns[entry]
        assert set(before) == set(after)
        assert after["random_state"] == 0
        assert after["epochs"] == 1
        assert after["versions"]["fimp-sc"] == fimp_sc.__version__
        assert after["params"]["connectivities_key"] == "spatial_connectivities"
        assert after["model"]["n_latent"] == 16
        if name in TOKEN_SIZE:
            assert after["model"]["token_size"] == TOKEN_SIZE[name]
    if name == "fmri":
        assert again[name].uns["fimp"]["params"]["library_key"] == "recording"


def test_impute_uses_the_model_of_embed(kind, trainings) -> None:
    mdata, name, label, quick = kind
    fimp_sc.tl.embed(mdata, modality=name, **quick)
    model = fimp_sc.tl.get_model(mdata, modality=name)
    fimp_sc.tl.impute(mdata, modality=name, **AGAIN)
    assert trainings == [model]
    assert fimp_sc.tl.get_model(mdata) is model
    fimp_sc.tl.annotate(mdata, label, **quick)
    fimp_sc.tl.impute(mdata, **AGAIN)
    assert len(trainings) == 2


def change_values(mdata, name) -> None:
    if name == "image":
        mdata[name].obsm["pixels"][0, 0] ^= 1
    else:
        mdata[name].X[0, 0] += 1


def change_graph(mdata, name) -> None:
    graph = mdata[name].obsp["spatial_connectivities"].tolil()
    graph[0, 3] = 1 - graph[0, 3]
    mdata[name].obsp["spatial_connectivities"] = graph.tocsr()


@pytest.mark.parametrize("change", [change_values, change_graph])
def test_a_stale_model_is_not_used(kind, trainings, change) -> None:
    mdata, name, _, quick = kind
    fimp_sc.tl.embed(mdata, **quick)
    change(mdata, name)
    fimp_sc.tl.impute(mdata, max_epochs=1, **AGAIN)
    assert len(trainings) == 2


@pytest.mark.parametrize("tool", ["embed", "annotate", "impute"])
def test_a_copy_has_the_results(kind, tool, only_changed, copied_mudata) -> None:
    mdata, name, label, quick = kind
    arguments = (label,) if tool == "annotate" else ()
    with only_changed(mdata):
        copy = getattr(fimp_sc.tl, tool)(mdata, *arguments, copy=True, **quick)
    written = {
        "embed": [("obsm", "X_fimp"), ("uns", "X_fimp")],
        "annotate": [
            ("obs", f"fimp_{label}"), ("obs", f"fimp_{label}_confidence"), ("obsm", f"fimp_{label}_probabilities"),
            ("uns", f"fimp_{label}"),
        ],
        "impute": [place(name)[1:], ("uns", "fimp")],
    }[tool]  # fmt: skip
    twin = copied_mudata(mdata)
    with only_changed(twin, *((name, *where) for where in written)):
        twin.mod[name] = copy[name]
        twin.obs = copy.obs
    with pytest.raises(KeyError, match="No model is known"):
        fimp_sc.tl.get_model(mdata)
    assert fimp_sc.tl.get_model(copy).is_trained


@pytest.mark.parametrize(
    ("name", "form"),
    [(name, form) for name in ("fmri", "image") for form in ("array", "tokens", "name")]
    + [("image", "name of pixels")],
)
def test_hidden(name, form, request) -> None:
    """Given as an array or as the name of where it is; it is what the model does not see."""
    mdata = request.getfixturevalue("recordings" if name == "fmri" else "pictures")
    adata, rng = mdata[name], np.random.default_rng(0)
    fimp_sc.tl.embed(mdata, **quickly(name))
    if name == "fmri":
        tokens = rng.random((24, 9)) < 0.3
        fine = np.zeros((24, 47), dtype=bool)
        fine[:, :45] = tokens.repeat(5, 1)
        adata.layers["hide"] = fine
    else:
        tokens = rng.random((20, 4 * 4)) < 0.3
        fine = np.zeros((20, 8, 9), dtype=bool)
        fine[:, :, :8] = tokens.reshape(20, 4, 4).repeat(2, 1).repeat(2, 2)
        adata.obsm["hide"] = fine.reshape(20, -1) if form == "name" else fine[..., None].repeat(3, 3).reshape(20, -1)
    hidden = {"array": fine, "tokens": tokens}.get(form, "hide")
    first = fimp_sc.tl.get_model(mdata)
    fimp_sc.tl.impute(mdata, hidden=hidden, **AGAIN)
    model = fimp_sc.tl.get_model(mdata)
    assert model is not first
    assert model.token_sizes == first.token_sizes
    expected = model.get_reconstruction(hidden=tokens).reshape(mdata.n_obs, -1)
    np.testing.assert_array_equal(getattr(adata, place(name)[1])["fimp"], expected)


@pytest.mark.parametrize("name", ["fmri", "image"])
def test_training_that_diverged_is_told_from_what_fills_no_token(name, request, only_changed, monkeypatch) -> None:
    mdata = request.getfixturevalue("recordings" if name == "fmri" else "pictures")
    shape = (24, 47) if name == "fmri" else (20, 8, 9, 3)
    monkeypatch.setattr(FIMP, "get_reconstruction", lambda self, **how: np.full(shape, np.nan, dtype=np.float32))
    with only_changed(mdata), pytest.raises(FloatingPointError, match="training diverged"):
        fimp_sc.tl.impute(mdata, **quickly(name))


def test_hidden_that_is_not_there(recordings, only_changed) -> None:
    with only_changed(recordings), pytest.raises(KeyError, match=r"'mask'.*layers"):
        fimp_sc.tl.impute(recordings, hidden="mask", **quickly("fmri"))


@pytest.mark.parametrize("how", [{"layer": "raw"}, {"genes": ["a"]}, {"scale": "counts"}])
def test_what_is_for_expression_is_refused(recordings, how, only_changed) -> None:
    recordings["fmri"].layers["raw"] = recordings["fmri"].X.copy()
    with only_changed(recordings), pytest.raises(ValueError, match=f"{next(iter(how))}=.*for expression and features"):
        fimp_sc.tl.impute(recordings, **quickly("fmri"), **how)


def test_values_that_cannot_be_used_change_nothing(recordings, only_changed) -> None:
    recordings["fmri"].X[2] = 5.0
    with only_changed(recordings), pytest.raises(ValueError, match="constant"):
        fimp_sc.tl.embed(recordings, **quickly("fmri"))


def test_token_size_out_of_range_changes_nothing(pictures, only_changed) -> None:
    with only_changed(pictures), pytest.raises(ValueError, match="token_size must be between 1 and 8"):
        fimp_sc.tl.impute(pictures, **quickly(token_size=20))


@pytest.mark.parametrize("tool", ["embed", "impute", "annotate"])
def test_modality_is_for_mudata(recordings, tool) -> None:
    arguments = ("lobe",) if tool == "annotate" else ()
    with pytest.raises(ValueError, match="modality='fmri' is for MuData objects, found an AnnData object"):
        getattr(fimp_sc.tl, tool)(recordings["fmri"], *arguments, modality="fmri", **quickly("fmri"))


def test_a_modality_alone_gives_the_same(recordings, copied_mudata) -> None:
    adata = copied_mudata(recordings)["fmri"].copy()
    fimp_sc.tl.embed(recordings, **quickly("fmri"))
    fimp_sc.tl.embed(adata, **quickly("fmri"))
    np.testing.assert_array_equal(adata.obsm["X_fimp"], recordings["fmri"].obsm["X_fimp"])


# scvi-tools asks mudata in a way that is to be changed.
@pytest.mark.filterwarnings("ignore:The method mod_names is deprecated:FutureWarning")
@pytest.mark.parametrize("how", ["model", "save", "save_pretrained"])
def test_a_trained_model_on_another_object(recordings, how, tmp_path, trainings) -> None:
    """Other recordings, shorter, under another name of the modality and of the recordings."""
    fimp_sc.tl.annotate(recordings, "lobe", **quickly("fmri"))
    model = given = fimp_sc.tl.get_model(recordings)
    if how != "model":
        given = tmp_path / "model"
        getattr(model, how)(given)
    rng = np.random.default_rng(5)
    points = recordings["fmri"].obsm["spatial"][:12]
    other = fimp_sc.pp.fmri(rng.normal(size=(3, 12, 32)), coordinates=points, n_neighbors=2, modality="bold")
    other["bold"].obs = other["bold"].obs.rename(columns={"recording": "scan"})
    other["bold"].uns["fimp_modality"]["library_key"] = "scan"
    fimp_sc.tl.embed(other, model=given, **AGAIN)
    fimp_sc.tl.annotate(other, "lobe", model=given, **AGAIN)
    fimp_sc.tl.impute(other, model=given, **AGAIN)
    assert len(trainings) == 1
    adata = other["bold"]
    assert np.isfinite(adata.obsm["X_fimp"]).all()
    assert set(adata.obs["fimp_lobe"]) <= {"front", "back", "side"}
    assert adata.layers["fimp"].shape == (36, 32)
    assert np.isfinite(adata.layers["fimp"][:, :30]).all()
    assert np.isnan(adata.layers["fimp"][:, 30:]).all()
    fimp_sc.tl.embed(recordings, model=given, **AGAIN)
    np.testing.assert_array_equal(recordings["fmri"].obsm["X_fimp"], model.get_latent_representation())


def test_a_model_that_does_not_fit_changes_nothing(recordings, pictures, only_changed) -> None:
    fimp_sc.tl.embed(recordings, **quickly("fmri"))
    model = fimp_sc.tl.get_model(recordings)
    with only_changed(pictures), pytest.raises(ValueError, match="reads a 'signal' modality, and this one is 'patch'"):
        fimp_sc.tl.embed(pictures, model=model, **AGAIN)


def test_recordings_of_a_scan(shared_data) -> None:
    """Two real subjects: shapes, NaN in what fills no segment, and values on the scale of each region."""
    with np.load(shared_data / "fmri_hcp_aal2_7subjects.npz") as stored:
        bold, structure = stored["bold"][:2, :30, :205], stored["sc"][:2, :30, :30]
        mdata = fimp_sc.pp.fmri(
            bold, connectivity=structure, coordinates=stored["roi_xyz"][:30], recordings=stored["subjects"][:2],
            labels={"cortex": np.where(stored["is_cortex"][:30], "yes", "no")}, top_fraction=0.2,
        )  # fmt: skip
    fimp_sc.tl.impute(mdata, modality="fmri", **{**quickly("fmri", token_size=20), "max_epochs": 8})
    fimp_sc.tl.embed(mdata, model=fimp_sc.tl.get_model(mdata), **AGAIN)
    adata = mdata["fmri"]
    values, truth = adata.layers["fimp"], adata.X
    assert values.shape == (60, 205)
    assert np.isnan(values[:, 200:]).all()
    assert np.isfinite(values[:, :200]).all()
    values, truth = values[:, :200].astype(float), truth[:, :200].astype(float)
    spread = truth.std(1)
    assert (np.abs(values.mean(1) - truth.mean(1)) < spread).all()
    assert (values.std(1) < 3 * spread).all()
    assert np.isfinite(adata.obsm["X_fimp"]).all()
    assert adata.obsm["X_fimp"].shape == (60, 16)


def test_photographs_of_streets(shared_data) -> None:
    with np.load(shared_data / "street_images_opensfm_224.npz") as stored:
        pixels, place = stored["images"][:, ::7, ::7], np.c_[stored["lat"], stored["lon"]]
        mdata = fimp_sc.pp.images(pixels, coordinates=place, labels={"site": stored["site"]}, n_neighbors=4)
    fimp_sc.tl.embed(mdata, modality="image", **{**quickly(token_size=8), "max_epochs": 8})
    fimp_sc.tl.impute(mdata, modality="image", **AGAIN)
    adata = mdata["image"]
    assert adata.obsm["X_fimp"].shape == (32, 16)
    assert np.isfinite(adata.obsm["X_fimp"]).all()
    values = adata.obsm["fimp"]
    assert values.shape == (32, 32 * 32 * 3)
    assert np.isfinite(values).all()
    assert pixels.mean() - pixels.std() < values.mean() < pixels.mean() + pixels.std()
    assert values.std() < 2 * pixels.std()
    fimp_sc.tl.annotate(mdata, "site", modality="image", **quickly(token_size=8))
    assert isinstance(adata.obs["fimp_site"].dtype, pd.CategoricalDtype)
    assert set(adata.obs["fimp_site"]) <= set(adata.obs["site"])
