"""Options are checked against one table before anything is computed or written."""

from __future__ import annotations

import inspect
from importlib import import_module

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse

import fimp_sc
from fimp_sc import _options
from fimp_sc.model import FIMP

NAN = float("nan")
# What the functions check by themselves, since it is data, or depends on data.
DATA = {
    "registry", "token_size", "architecture", "pairs", "features", "adjacency", "coordinates", "labels", "bold", "data",
    "connectivity", "image", "images", "image_size", "radius", "cell", "match", "nodes", "model", "texts", "edges",
}  # fmt: skip


@pytest.fixture
def section(small_toy):
    fimp_sc.pp.spatial_graph(small_toy, library_key="section")
    FIMP.setup_anndata(small_toy)
    return small_toy


@pytest.fixture
def model(section) -> FIMP:
    return FIMP(section, n_latent=16)


def test_every_option_of_a_public_function_has_a_rule() -> None:
    functions = [
        getattr(import_module(f"fimp_sc.{space}"), name)
        for space in ("tl", "pp", "pl")
        for name in import_module(f"fimp_sc.{space}").__all__
    ]
    functions = [function for function in functions if inspect.isfunction(function)]
    functions += [FIMP.__init__, FIMP.train, FIMP.predict, FIMP.get_latent_representation, FIMP.get_expression]
    functions += [FIMP.get_reconstruction, FIMP.get_edge_influence, FIMP.get_gene_attention]
    assert len(functions) > 25
    for function in functions:
        assert hasattr(function, "__wrapped__"), f"{function.__name__} is not checked"
        owner = function.__qualname__.removesuffix(".__init__").rpartition(".")[2]
        for name in set(inspect.signature(function).parameters) - DATA - {"self"}:
            assert _options.rule_of(owner, name) is not None, f"{owner}.{name}"


@pytest.mark.parametrize("name", ["embed", "annotate", "impute", "niches", "attention", "gene_pairs"])
def test_defaults_are_allowed(name) -> None:
    for parameter in inspect.signature(getattr(fimp_sc.tl, name)).parameters.values():
        rule = _options.rule_of(name, parameter.name)
        if rule is not None and parameter.default is not parameter.empty:
            rule.accept(parameter.default, parameter.name, none=parameter.default is None)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"n_heads": 0}, ValueError, "n_heads must be a whole number from 1 to 1024, found 0"),
        ({"n_heads": 3}, ValueError, "n_heads must divide the width: 64 is not a multiple of 3"),
        ({"n_layers": 0}, ValueError, "n_layers must be a whole number from 1 to 100"),
        ({"n_layers": 10**12}, ValueError, "n_layers must be a whole number from 1 to 100"),
        ({"n_latent": 1.5}, TypeError, "n_latent must be a whole number"),
        ({"n_latent": True}, TypeError, "n_latent must be a whole number"),
        ({"n_tokens": "16"}, TypeError, "n_tokens must be a whole number .* found '16'"),
        ({"dropout": 1.0}, ValueError, "dropout must be a finite number of at least 0 and below 1 .* found 1.0"),
        ({"dropout": NAN}, ValueError, "dropout must be .* found nan"),
        ({"label_weight": -1}, ValueError, "label_weight must be a finite number of at least 0, found -1"),
        ({"label_weight": float("inf")}, ValueError, "label_weight must be a finite number"),
        ({"messages": "False"}, TypeError, "messages must be True or False, found 'False'"),
        ({"self_loops": 1}, TypeError, "self_loops must be True or False, found 1"),
        ({"layer": "gcn"}, ValueError, "layer must be one of 'practical', 'paper', found 'gcn'"),
        ({"random_state": -1}, ValueError, "random_state must be a whole number from 0 to 4294967295, found -1"),
        ({"random_state": 2**32}, ValueError, "random_state must be .* found 4294967296"),
        ({"random_state": None}, TypeError, "random_state must be .* found None"),
        ({"n_latnet": 8}, TypeError, "unexpected keyword argument 'n_latnet'.* Did you mean n_latent="),
    ],
)
def test_model(section, options, error, message) -> None:
    with pytest.raises(error, match=message):
        FIMP(section, **options)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_epochs": 0}, ValueError, "max_epochs must be a whole number of at least 1 .* found 0"),
        ({"max_epochs": -1}, ValueError, "max_epochs must be"),
        ({"max_epochs": 1.5}, TypeError, "max_epochs must be a whole number"),
        ({"batch_size": 0}, ValueError, "batch_size must be a whole number of at least 1 .* found 0"),
        ({"batch_size": -1}, ValueError, "batch_size must be"),
        ({"batch_size": 1.5}, TypeError, "batch_size must be"),
        ({"mask_cells": 2}, ValueError, "mask_cells must be a finite number of at least 0 and at most 1"),
        ({"class_balance": -5}, ValueError, "class_balance must be"),
        ({"gene_mask_ratio": 5}, ValueError, "gene_mask_ratio must be"),
        ({"mask_ratio": (NAN, NAN)}, ValueError, "mask_ratio must be a pair"),
        ({"mask_ratio": (0.5, 0.1)}, ValueError, "mask_ratio must be a pair .* in increasing order"),
        ({"mask_ratio": 0.5}, TypeError, "mask_ratio must be a pair"),
        ({"early_stopping_patience": -3}, ValueError, "early_stopping_patience must be"),
        ({"early_stopping_min_delta": -1.0}, ValueError, "early_stopping_min_delta must be"),
        ({"validation_size": 1.0}, ValueError, "validation_size must be .* below 1"),
        ({"num_workers": -1}, ValueError, "num_workers must be"),
        ({"devices": 0}, ValueError, "devices must be"),
        ({"accelerator": "quantum"}, ValueError, "accelerator must be one of 'auto', 'gpu', 'cpu'"),
        ({"plan_kwargs": {"lr": -1}}, ValueError, r"plan_kwargs\['lr'\] must be a finite number above 0"),
        ({"plan_kwargs": {"lr_heat": 1}}, TypeError, "plan_kwargs has 'lr_heat', which .* Did you mean 'lr_head'"),
        ({"precisoin": 16}, TypeError, "keyword argument precisoin=.* Did you mean precision="),
        ({"lr": 1e-3}, TypeError, r"keyword argument lr=.* Pass it as plan_kwargs=\{'lr': ...\}"),
        ({"devices": -1, "accelerator": "cpu"}, ValueError, "devices=-1 names GPUs, and training is on the CPU"),
        ({"devices": 2, "accelerator": "cpu"}, ValueError, "devices=2 runs the whole script .* strategy='ddp'"),
        ({"devices": [0], "accelerator": "cpu"}, ValueError, r"devices=\[0\] names GPUs"),
    ],
)
def test_training(model, options, error, message) -> None:
    before = {name: value.clone() for name, value in model.module.state_dict().items()}
    with pytest.raises(error, match=message):
        model.train(**options)
    assert not model.is_trained
    assert all(torch.equal(value, before[name]) for name, value in model.module.state_dict().items())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"batch_size": -1}, ValueError, "batch_size must be"),
        ({"strategy": "fast"}, ValueError, "strategy must be one of 'auto', 'blocks', 'layers', found 'fast'"),
        ({"distribute": "no"}, TypeError, "distribute must be True or False"),
        ({"adata": pd.DataFrame()}, TypeError, "AnnData"),
    ],
)
def test_prediction(model, options, error, message) -> None:
    for method in (model.get_latent_representation, model.get_expression):
        with pytest.raises(error, match=message):
            method(**options)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"connectivities_key": 3}, TypeError, "connectivities_key must be the name of a key .* found 3"),
        ({"spatial_key": ["x", "y"]}, TypeError, r"spatial_key must be .* found \['x', 'y'\].*one entry of obsm"),
        ({"key_added": 3}, TypeError, "key_added must be the name of a key .* found 3"),
        ({"key_added": ""}, ValueError, "key_added must be .* not empty, found ''"),
        ({"random_state": 2**32}, ValueError, "random_state must be"),
        ({"verbose": "yes"}, TypeError, "verbose must be True or False"),
        ({"n_layers": 0}, ValueError, "n_layers must be"),
        ({"n_layers": 2, "model_kwargs": {"n_layers": 3}}, ValueError, "n_layers is given twice, by itself and in"),
        ({"n_latent": 8}, TypeError, r"unexpected keyword argument 'n_latent'. Pass it as model_kwargs=\{'n_latent'"),
        ({"batch_size": 8}, TypeError, "Pass it as train_kwargs="),
        ({"precision": 16}, TypeError, "Pass it as train_kwargs="),
        ({"lr": 3}, TypeError, r"Pass it as train_kwargs=\{'plan_kwargs': \{'lr': ...\}\}"),
        ({"train_kwargs": {"lr": 3}}, TypeError, r"Pass it as train_kwargs=\{'plan_kwargs': \{'lr': ...\}\}"),
        ({"train_kwargs": {"epochs": 3}}, TypeError, "Did you mean 'max_epochs'"),
        ({"distribute": True}, TypeError, "Pass it as inference_kwargs="),
        ({"max_epoch": 8}, TypeError, "Did you mean max_epochs="),
        ({"model_kwargs": {"n_heads": 0}}, ValueError, r"model_kwargs\['n_heads'\] must be"),
        ({"model_kwargs": {"heads": 2}}, TypeError, "model_kwargs has 'heads', which FIMP does not take"),
        ({"train_kwargs": {"plan_kwargs": {"lr": NAN}}}, ValueError, r"train_kwargs\['plan_kwargs'\]\['lr'\] must be"),
        ({"train_kwargs": [1]}, TypeError, "train_kwargs must be a dictionary"),
        ({"inference_kwargs": {"soft": True}}, TypeError, "inference_kwargs has 'soft'.*It takes batch_size, strategy"),
        ({"accelerator": "tpu"}, ValueError, "accelerator='tpu', but torch finds no such device on this machine"),
        ({"model": 3}, TypeError, "model must be a fimp_sc.model.FIMP, or the folder of a saved one .* found 3"),
    ],
)
def test_tools(small_toy, options, error, message, caplog) -> None:
    keys = [*small_toy.obsm, *small_toy.obsp, *small_toy.uns]
    with pytest.raises(error, match=message):
        fimp_sc.tl.embed(small_toy, **options)
    assert [*small_toy.obsm, *small_toy.obsp, *small_toy.uns] == keys
    assert "training on" not in caplog.text


def test_an_object_is_no_model(small_toy) -> None:
    with pytest.raises(TypeError, match=r"model must be a fimp_sc\.model\.FIMP.* found an AnnData"):
        fimp_sc.tl.embed(small_toy, model=small_toy)
    with pytest.raises(TypeError, match=r"model must be a trained model.* found an AnnData: fimp_sc\.tl\.get_model"):
        fimp_sc.pl.history(small_toy)


@pytest.mark.skipif(torch.cuda.is_available() or torch.backends.mps.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("name", ["gpu", "cuda", "mps"])
def test_device_that_is_not_there(small_toy, capsys, name) -> None:
    with pytest.raises(ValueError, match=f"accelerator='{name}', but torch finds no such device"):
        fimp_sc.tl.embed(small_toy, accelerator=name)
    assert "training" not in "".join(capsys.readouterr())


def test_scalars_of_numpy_count_as_those_of_python(section) -> None:
    model = FIMP(
        section, n_latent=np.int64(16), n_layers=np.uint8(1), dropout=np.float32(0.25), messages=np.bool_(True)
    )
    stored = model.init_params_["non_kwargs"]
    assert [type(stored[name]) for name in ("n_latent", "n_layers", "dropout", "messages")] == [int, int, float, bool]
    assert (stored["n_latent"], stored["n_layers"], stored["dropout"], stored["messages"]) == (16, 1, 0.25, True)


def test_size_of_the_model_is_an_option_of_the_tools(small_toy) -> None:
    fimp_sc.tl.embed(small_toy, library_key="section", n_tokens=5, n_layers=1, max_epochs=1, verbose=False)
    model = fimp_sc.tl.get_model(small_toy)
    assert (model.n_tokens, model.n_layers) == (5, 1)
    assert small_toy.uns["X_fimp"]["model"]["n_tokens"] == 5


def test_signatures_and_documentation_stay() -> None:
    assert list(inspect.signature(fimp_sc.tl.embed).parameters)[:2] == ["adata", "modality"]
    assert fimp_sc.tl.embed.__doc__.startswith("Embed each cell")
    assert fimp_sc.tl.embed.__module__ == "fimp_sc.tl._embed"
    with pytest.raises(TypeError, match=r"annotate\(\) missing a required argument: 'labels_key'"):
        fimp_sc.tl.annotate(None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x * 1e20, "largest value, with which float32 cannot compute"),
        (lambda x: x * 1e-30, "largest value, with which float32 cannot compute"),
    ],
)
def test_values_that_float32_cannot_hold(small_toy, change, message) -> None:
    small_toy.X = sparse.csr_matrix(change(small_toy.X.astype(np.float64)))
    with pytest.raises(ValueError, match=rf"adata\.X has .* {message}"):
        fimp_sc.tl.embed(small_toy, max_epochs=1)


def test_sparse_half_precision(small_toy) -> None:
    small_toy.X.data = small_toy.X.data.astype(np.float16)
    with pytest.raises(TypeError, match=r"adata\.X is a sparse matrix of float16.*astype\('float32'\)"):
        fimp_sc.tl.embed(small_toy, max_epochs=1)


def test_coordinates_whose_distances_overflow(small_toy) -> None:
    small_toy.obsm["spatial"] = small_toy.obsm["spatial"] * 1e300
    with pytest.raises(ValueError, match=r"adata\.obsm\['spatial'\] .*distances"):
        fimp_sc.tl.embed(small_toy, max_epochs=1)


def test_column_of_lists(small_toy) -> None:
    small_toy.obs["lists"] = pd.Series([[1]] * small_toy.n_obs, index=small_toy.obs_names, dtype=object)
    for call in (
        lambda: fimp_sc.tl.annotate(small_toy, "lists"),
        lambda: fimp_sc.tl.attention(small_toy, "lists"),
        lambda: fimp_sc.tl.gene_pairs(small_toy, "lists"),
        lambda: fimp_sc.pp.spatial_graph(small_toy, library_key="lists"),
    ):
        with pytest.raises(TypeError, match=r"adata\.obs\['lists'\] holds values of the type list"):
            call()
