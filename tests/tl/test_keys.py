"""Names of results, and keys that later calls take from earlier ones."""

from __future__ import annotations

import inspect
import logging
import re
import sys
import types

import anndata as ad
import mudata
import numpy as np
import pytest

import fimp_sc
from fimp_sc import tl
from fimp_sc.data._modality import quiet_mudata

AGAIN = {"accelerator": "cpu", "verbose": False}


@pytest.fixture
def prepared(tissue):
    """Tissue with counts in a layer, other coordinates, a mask and a graph."""
    tissue.layers["counts"] = tissue.X.copy()
    tissue.layers["mask"] = np.zeros(tissue.shape, dtype=bool)
    tissue.obsm["places"] = tissue.obsm["spatial"][:, ::-1].copy()
    tissue.obs["kit"] = np.where(np.arange(tissue.n_obs) % 2, "a", "b")
    fimp_sc.pp.spatial_graph(tissue, library_key="section")
    return tissue


def keys_of(adata) -> dict:
    """Keys that the model of an object was registered with."""
    return tl.get_model(adata).adata_manager.registry["setup_args"]


# Names of results -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    ("call", "argument"),
    [
        (lambda a, **k: tl.impute(a, layer="counts", key_added="counts", **k), "layer"),
        (lambda a, **k: tl.impute(a, hidden="mask", key_added="mask", **k), "hidden"),
        (lambda a, **k: tl.embed(a, key_added="spatial", **k), "spatial_key"),
        (lambda a, **k: tl.embed(a, spatial_key="places", key_added="places", **k), "spatial_key"),
        (lambda a, **k: tl.embed(a, key_added="spatial_neighbors", **k), "the graph"),
        (lambda a, **k: tl.annotate(a, "label", key_added="label", **k), "labels_key"),
        (lambda a, **k: tl.annotate(a, "label", library_key="section", key_added="section", **k), "library_key"),
        (lambda a, **k: tl.annotate(a, "label", batch_key="t_confidence", key_added="t", **k), "batch_key"),
        (lambda a, **k: tl.attention(a, "label", key_added="spatial_connectivities", **k), "connectivities_key"),
        (lambda a, **k: tl.attention(a, "label", key_added="spatial_distances", **k), "the graph"),
        (lambda a, **k: tl.gene_pairs(a, "label", key_added="spatial_neighbors", **k), "the graph"),
        (lambda a, **k: tl.niches(a, 3, labels_key="label", key_added="label", **k), "labels_key"),
        (lambda a, **k: tl.niches(a, 3, library_key="section", key_added="section", **k), "library_key"),
    ],
)
def test_what_a_call_reads_is_never_replaced(prepared, trainings, unchanged, call, argument, overwrite) -> None:
    prepared.obs["t_confidence"] = prepared.obs["kit"]
    with unchanged(prepared), pytest.raises(ValueError, match=rf"key_added=.* would replace .*reads \({argument}\)"):
        call(prepared, overwrite=overwrite)
    assert trainings == []


CALLS = {
    "embed": tl.embed,
    "annotate": lambda a, **k: tl.annotate(a, "label", **k),
    "impute": tl.impute,
    "attention": lambda a, **k: tl.attention(a, "label", n_permutations=10, **k),
    "niches": lambda a, **k: tl.niches(
        a, 3, **{name: v for name, v in k.items() if name in ("key_added", "overwrite")}
    ),
}
PLACES = {
    "embed": [("obsm", "mine"), ("uns", "mine")],
    "annotate": [("obs", "mine"), ("obs", "mine_confidence"), ("obsm", "mine_probabilities"), ("uns", "mine")],
    "impute": [("layers", "mine"), ("obsm", "mine"), ("uns", "mine")],
    "attention": [("obsp", "mine"), ("uns", "mine")],
    "niches": [("obs", "mine"), ("uns", "mine"), ("uns", "mine_colors")],
}


@pytest.mark.parametrize(("tool", "slot", "name"), [(tool, *place) for tool in PLACES for place in PLACES[tool]])
def test_what_is_of_the_user_is_not_replaced(prepared, trainings, unchanged, tool, slot, name) -> None:
    kept = {"obs": np.arange(100), "uns": {"params": "of something else"}, "layers": prepared.X.copy()}
    kept |= {"obsm": np.zeros((100, 2)), "obsp": prepared.obsp["spatial_distances"].copy()}
    getattr(prepared, slot)[name] = kept[slot]
    with (
        unchanged(prepared),
        pytest.raises(ValueError, match=rf"replace adata\.{slot}\['{name}'\], which .* did not write"),
    ):
        CALLS[tool](prepared, key_added="mine")
    assert trainings == []


@pytest.mark.parametrize("tool", CALLS)
def test_overwriting_on_request(prepared, quick, tool) -> None:
    prepared.obsm["X_fimp"] = np.random.default_rng(0).normal(size=(100, 4))
    for slot, name in PLACES[tool]:
        getattr(prepared, slot)[name] = prepared.X.copy() if slot == "layers" else {
            "obs": np.arange(100), "uns": "mine", "obsm": np.zeros((100, 2)), "obsp": prepared.obsp["spatial_distances"]
        }[slot]  # fmt: skip
    CALLS[tool](prepared, key_added="mine", overwrite=True, **quick)
    assert prepared.uns["mine"]["tool"] == f"tl.{tool}"
    CALLS[tool](prepared, key_added="mine", **quick)  # its own


def test_results_are_recognized_after_a_file(prepared, quick, tmp_path, unchanged) -> None:
    for tool in ("embed", "annotate", "impute"):
        CALLS[tool](prepared, **quick)
    prepared.write_h5ad(tmp_path / "tissue.h5ad")
    again = ad.read_h5ad(tmp_path / "tissue.h5ad")
    for tool in ("embed", "annotate", "impute"):
        CALLS[tool](again, **quick)
    for call, key, other in (
        ("niches", "fimp_label", "annotate"), ("annotate", "fimp", "impute"), ("embed", "fimp", "impute")
    ):  # fmt: skip
        with unchanged(again), pytest.raises(ValueError, match=rf"a result of fimp_sc\.tl\.{other}"):
            CALLS[call](again, key_added=key)


def test_results_of_version_0_1_are_recognized(prepared, quick) -> None:
    for tool, key in (("annotate", "fimp_label"), ("impute", "fimp")):
        CALLS[tool](prepared, **quick)
        del prepared.uns[key]["tool"], prepared.uns[key]["order"]
        CALLS[tool](prepared, **quick)
        del prepared.uns[key]["tool"]
        with pytest.raises(ValueError, match=rf"a result of fimp_sc\.tl\.{tool}"):
            CALLS["niches"](prepared, key_added=key)


def test_names_that_tools_choose_do_not_meet_on_the_toy(tissue) -> None:
    tools = (tl.embed, tl.impute, tl.niches, tl.attention, tl.gene_pairs)
    parameters = [inspect.signature(tool).parameters for tool in tools]
    names = {p["key_added"].default for p in parameters}
    toys = (fimp_sc.datasets.toy_tissue(60), fimp_sc.datasets.toy_communication(100))
    assert not names & {f"fimp_{column}" for toy in toys for column in toy.obs}


# Keys of earlier calls ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("from_file", [False, True])
def test_later_calls_take_the_keys_of_the_earlier(prepared, quick, trainings, tmp_path, caplog, from_file) -> None:
    prepared.X = prepared.X * 0
    keys = {
        "layer": "counts", "library_key": "section", "batch_key": "kit", "spatial_key": "places",
        "input_scale": "normalized", "connectivities_key": "near_connectivities",
    }  # fmt: skip
    tl.embed(prepared, **keys, **quick)
    adata, explicit = prepared, prepared.copy()
    if from_file:
        prepared.write_h5ad(tmp_path / "tissue.h5ad")
        adata = ad.read_h5ad(tmp_path / "tissue.h5ad")
    with caplog.at_level(logging.INFO, logger="fimp_sc"):
        options = quick if from_file else AGAIN
        silent = {"train_kwargs": options["train_kwargs"] | {"enable_progress_bar": False}} if from_file else {}
        tl.impute(adata, **options | silent | {"verbose": True})
    found = keys_of(adata)
    assert {name: found[name] for name in keys} == keys
    said = [r.getMessage() for r in caplog.records if r.getMessage().startswith("As in")]
    assert len(said) == 1
    assert "'X_fimp'" in said[0]
    assert all(f"{name}={value!r}" in said[0] for name, value in keys.items())
    assert len(trainings) == 1 + from_file
    tl.impute(explicit, **keys, **quick)
    np.testing.assert_array_equal(adata.layers["fimp"], explicit.layers["fimp"])
    params = adata.uns["fimp"]["params"]
    assert {name: params[name] for name in keys} == keys


def test_arguments_win_over_earlier_calls(prepared, quick) -> None:
    tl.embed(prepared, layer="counts", library_key="section", input_scale="counts", **quick)
    tl.impute(prepared, library_key="kit", spatial_key="spatial", connectivities_key="own_connectivities", **quick)
    assert prepared.uns["fimp"]["params"]["library_key"] == "kit"
    assert prepared.uns["fimp"]["params"]["layer"] == "counts"
    assert prepared.uns["fimp"]["params"]["connectivities_key"] == "own_connectivities"
    prepared.X = prepared.X.log1p()
    tl.impute(prepared, layer="X", library_key="section", connectivities_key="spatial_connectivities", **quick)
    assert "layer" not in prepared.uns["fimp"]["params"]
    assert prepared.uns["fimp"]["params"]["input_scale"] == "auto"  # "counts" were those of the layer
    assert prepared.uns["fimp"]["input_scale"] == "log"


def test_a_layer_may_be_called_x(prepared, quick) -> None:
    prepared.layers["X"] = prepared.X * 2
    tl.embed(prepared, layer="X", **quick)
    assert prepared.uns["X_fimp"]["params"]["layer"] == "X"


def test_the_latest_call_counts_also_in_a_file(prepared, quick, tmp_path) -> None:
    tl.embed(prepared, key_added="z", layer="counts", **quick)
    tl.embed(prepared, key_added="a", layer="X", library_key="section", **quick)
    prepared.write_h5ad(tmp_path / "tissue.h5ad")
    for adata in (prepared, ad.read_h5ad(tmp_path / "tissue.h5ad")):
        tl.impute(adata, **quick)
        assert "layer" not in adata.uns["fimp"]["params"]
        assert keys_of(adata)["library_key"] == "section"
    tl.embed(prepared, key_added="z", layer="counts", **quick)
    tl.impute(prepared, **AGAIN)
    assert prepared.uns["fimp"]["params"]["layer"] == "counts"


def test_keys_that_are_gone(prepared, quick, unchanged, trainings) -> None:
    tl.embed(prepared, layer="counts", library_key="section", **quick)
    n = len(trainings)
    for slot, key, argument in (("layers", "counts", "layer"), ("obs", "section", "library_key")):
        kept = getattr(prepared, slot)[key]
        del getattr(prepared, slot)[key]
        with unchanged(prepared), pytest.raises(KeyError, match=rf"{key}.*{argument} of the call that wrote.*X_fimp"):
            tl.impute(prepared, **AGAIN)
        getattr(prepared, slot)[key] = kept
    assert len(trainings) == n


def test_niches_take_samples_and_graph_of_the_embedding(prepared, quick) -> None:
    tl.embed(prepared, library_key="section", connectivities_key="own_connectivities", **quick)
    del prepared.obsp["spatial_connectivities"]
    tl.niches(prepared, 3, n_seeds=2, verbose=False)
    params = prepared.uns["fimp_niche"]["params"]
    assert (params["library_key"], params["connectivities_key"]) == ("section", "own_connectivities")
    # Niches hold no layer, and are no call that others follow.
    tl.impute(prepared, **AGAIN)
    assert prepared.uns["fimp"]["params"]["library_key"] == "section"


def change_graph(adata) -> None:
    fimp_sc.pp.spatial_graph(adata, n_neighbors=3, library_key="section", overwrite=True)


def change_values(adata) -> None:
    adata.X.data[:3] += 1


@pytest.mark.parametrize(
    ("change", "options", "why"),
    [
        (None, {}, None),
        (change_graph, {}, "the graph changed since"),
        (change_values, {}, "values changed since"),
        (None, {"layer": "counts"}, "layer changed since"),
        (None, {"batch_key": "kit"}, r"batch_key, obs\['kit'\] changed since"),
        (None, {"max_epochs": 2}, "another max_epochs"),
        (None, {"random_state": 5}, "another random_state"),
        (None, {"model_kwargs": {"n_latent": 24, "n_heads": 3}}, "n_latent, n_heads given now"),
        (None, {"hidden": "mask"}, "saw what is hidden now"),
    ],
)
def test_the_log_says_why_a_model_is_not_used_again(prepared, quick, trainings, caplog, change, options, why) -> None:
    tl.embed(prepared, library_key="section", **quick)
    prepared.layers["mask"][0, 0] = True
    if change is not None:
        change(prepared)
    with caplog.at_level(logging.INFO, logger="fimp_sc"):
        how = AGAIN if why is None else quick | {"model_kwargs": None, "train_kwargs": None}
        tl.impute(prepared, **how | {"verbose": True} | options)
    assert len(trainings) == 1 + (why is not None)
    if why is None:
        assert "Using the model of the call before" in caplog.text
    else:
        assert re.search(rf"Not using the model of the call before: .*{why}", caplog.text)


def test_the_same_settings_once_more_are_no_others(prepared, quick, trainings, caplog) -> None:
    tl.embed(prepared, library_key="section", **quick)
    again = {"n_layers": 2, **quick, "verbose": True}
    with caplog.at_level(logging.INFO, logger="fimp_sc"):
        tl.impute(prepared, **quick | {"verbose": True})
        assert len(trainings) == 1
        assert "Using the model of the call before" in caplog.text
        tl.impute(prepared, **again)
        assert "n_layers given now" in caplog.text
        tl.impute(prepared, **again)
    assert len(trainings) == 2


def test_the_log_says_that_no_model_is_left(prepared, quick, caplog) -> None:
    with caplog.at_level(logging.INFO, logger="fimp_sc"):
        tl.impute(prepared, **quick | {"verbose": True})
        assert "not in this session" not in caplog.text
        tl.impute(prepared.copy(), **quick | {"verbose": True})
    assert "not in this session, or was of another object" in caplog.text


# Several modalities ---------------------------------------------------------------------------------------------------

SMALL = {
    "max_epochs": 1, "accelerator": "cpu", "verbose": False, "train_kwargs": {"batch_size": 32},
    "model_kwargs": {"n_latent": 16, "n_heads": 2, "n_tokens": 6, "token_size": {"image": 3, "bold": 4}},
}  # fmt: skip


def test_the_modality_of_the_earlier_call(joint, only_changed, trainings) -> None:
    one = SMALL | {"model_kwargs": {"n_latent": 16, "n_heads": 2, "token_size": 2}}
    tl.embed(joint, modality="image", **one)
    with only_changed(joint, ("image", "obsm", "fimp"), ("image", "uns", "fimp")):
        tl.impute(joint, **AGAIN)
    assert len(trainings) == 1


def test_modalities_of_the_earlier_call(joint, only_changed, trainings, tmp_path, caplog) -> None:
    tl.embed(joint, modality=["rna", "image", "bold"], **SMALL)
    written = [("rna", "layers", "fimp"), ("image", "obsm", "fimp"), ("bold", "layers", "fimp"), ("", "uns", "fimp")]
    with only_changed(joint, *written, ("rna", "uns", "fimp")), caplog.at_level(logging.INFO, logger="fimp_sc"):
        tl.impute(joint, accelerator="cpu")
    assert "modality=['rna', 'image', 'bold']" in caplog.text
    assert len(trainings) == 1
    with quiet_mudata():
        joint.write(tmp_path / "joint.h5mu")
        again = mudata.read_h5mu(tmp_path / "joint.h5mu")
    tl.impute(again, **SMALL)
    assert list(again.uns["fimp"]["params"]["modality"]) == ["rna", "image", "bold"]
    tl.embed(joint, modality="image", **SMALL | {"model_kwargs": {"n_latent": 16, "n_heads": 2, "token_size": 2}})
    with pytest.raises(ValueError, match="3 modalities: choose one"):
        tl.impute(joint, **AGAIN)


# A model by its name --------------------------------------------------------------------------------------------------


def test_a_model_on_the_hub(reference, section, tmp_path, monkeypatch) -> None:
    reference.save_pretrained(tmp_path / "saved")
    hub, asked = types.ModuleType("huggingface_hub"), []
    hub.snapshot_download = lambda name, **_: (asked.append(name), str(tmp_path / "saved"))[1]
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    monkeypatch.chdir(tmp_path)
    other = section.copy()
    tl.annotate(section, "label", model="owner/name", **AGAIN)
    tl.annotate(other, "label", model=reference, **AGAIN)
    assert asked == ["owner/name"]
    np.testing.assert_array_equal(section.obsm["fimp_label_probabilities"], other.obsm["fimp_label_probabilities"])
    with pytest.raises(ValueError, match="There is no folder 'nowhere'"):
        tl.annotate(section, "label", model="nowhere", **AGAIN)
