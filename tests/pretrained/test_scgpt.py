"""scGPT's checkpoint against outputs of the original program, and against torch's own encoder."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from scipy import sparse
from torch import Tensor, nn

from fimp_sc.pretrained import CheckpointError, load
from fimp_sc.pretrained._registry import foundation_reader

ARGS = {
    "embsize": 16,
    "nheads": 4,
    "d_hid": 24,
    "nlayers": 2,
    "n_bins": 7,
    "dropout": 0.2,
    "pad_value": -2,
    "mask_value": -1,
    "no_cls": True,
}
GENES = [f"G{i}" for i in range(9)]
VOCABULARY = {name: i for i, name in enumerate([*GENES[:4], "<cls>", *GENES[4:], "<pad>", "<eoc>"])}
PAD, CLS = VOCABULARY["<pad>"], VOCABULARY["<cls>"]
# Names of the same tensors in other programs, from those of torch's own attention.
DIALECTS = {
    "torch": [],
    "flash": [(r"in_proj_", "Wqkv.")],
    "wrapped flash": [(r"self_attn\.", "self_attn._impl."), (r"in_proj_", "Wqkv.")],
    "mirror": [(r"^encoder", "gene_encoder"), (r"^transformer_encoder", "transformer"), (r"^decoder", "expr_decoder")],
    "data parallel": [(r"^", "module.")],
}


class Reference(nn.Module):
    """scGPT of torch's own parts."""

    def __init__(self, d: int = 16) -> None:
        super().__init__()
        self.encoder = nn.ModuleDict({"embedding": nn.Embedding(len(VOCABULARY), d), "enc_norm": nn.LayerNorm(d)})
        self.value_encoder = nn.ModuleDict(
            {"linear1": nn.Linear(1, d), "linear2": nn.Linear(d, d), "norm": nn.LayerNorm(d)}
        )
        layer = nn.TransformerEncoderLayer(d, 4, 24, 0.0, batch_first=True)
        self.transformer_encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        relu = nn.LeakyReLU()
        self.decoder = nn.ModuleDict(
            {"fc": nn.Sequential(nn.Linear(d, d), relu, nn.Linear(d, d), relu, nn.Linear(d, 1))}
        )
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn_like(parameter) * 0.4)

    def forward(self, gene: Tensor, value: Tensor, padding: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        parts = self.value_encoder
        value = parts["linear2"](parts["linear1"](value.clamp(max=512.0)[..., None]).relu())
        tokens = self.encoder["enc_norm"](self.encoder["embedding"](gene)) + parts["norm"](value)
        hidden = self.transformer_encoder(tokens, src_key_padding_mask=padding)
        return tokens, hidden, self.decoder["fc"](hidden)[..., 0]


@pytest.fixture
def reference() -> Reference:
    torch.manual_seed(0)
    return Reference().eval()


def write(folder: Path, weights: dict[str, Tensor], *, name="best_model.pt", vocabulary=None, **args) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "args.json").write_text(json.dumps({k: v for k, v in (ARGS | args).items() if v is not None}))
    (folder / "vocab.json").write_text(json.dumps(VOCABULARY if vocabulary is None else vocabulary))
    save_file(weights, folder / name) if name.endswith("safetensors") else torch.save(weights, folder / name)
    return folder


def renamed(weights: dict[str, Tensor], dialect: str) -> dict[str, Tensor]:
    for pattern, name in DIALECTS[dialect]:
        weights = {re.sub(pattern, name, key): value for key, value in weights.items()}
    return weights


def sequences() -> tuple[Tensor, Tensor, Tensor]:
    """Ids, bins and padding of three nodes, without `<cls>`."""
    gene = torch.tensor([[0, 5, 9, 2], [8, 6, 0, 0], [3, 0, 0, 0]])
    value = torch.tensor([[1.0, 6, 3, 600], [2, 2, 0, 0], [5, 0, 0, 0]])
    return gene, value, torch.tensor([[0, 0, 0, 0], [0, 0, 1, 1], [0, 1, 1, 1]]).bool()


def same(a: nn.Module, b: nn.Module) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


@torch.no_grad()
@pytest.mark.parametrize("low_precision", [False, True])
def test_equals_the_original_program(shared_data: Path, low_precision: bool) -> None:
    folder = shared_data / "scgpt_tiny_checkpoint"
    if not folder.is_dir():
        pytest.skip(f"no {folder}")
    expected = {key: torch.from_numpy(array) for key, array in np.load(folder / "expected.npz").items()}
    model = load("scgpt", folder, cls_value=0.0).read()
    inputs = (expected[key][:, 1:] for key in ("gene_ids", "values", "padding"))
    with torch.autocast("cpu", torch.bfloat16, enabled=low_precision):
        tokens, padding = model.embedding(*inputs)
        first, *_, last = model.stack.alone_states(tokens, padding)
        out = {"token_embedding": tokens, "hidden_layer_1": first, "hidden": last}
        out |= {"predicted_value": model.decoder(last)}
        torch.testing.assert_close(model.stack.alone(tokens, padding), last)
    torch.testing.assert_close(padding, expected["padding"])
    for key, value in out.items():
        theirs, ours = expected[key][~padding], value[~padding].float()
        if low_precision:
            assert (ours - theirs).norm() < 2e-2 * theirs.norm()
        else:
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("dialect", DIALECTS)
def test_all_names_of_the_weights_give_what_torch_computes(tmp_path: Path, reference, dialect: str) -> None:
    model = load("scgpt", write(tmp_path, renamed(reference.state_dict(), dialect))).read()
    tokens, padding = model.embedding(*sequences())
    gene, value, absent = sequences()
    start = torch.full((3, 1), CLS)
    expected = reference(
        torch.cat([start, gene.masked_fill(absent, PAD)], 1),
        torch.cat([torch.full((3, 1), -2.0), value.masked_fill(absent, -2.0)], 1),
        torch.cat([torch.zeros(3, 1, dtype=torch.bool), absent], 1),
    )
    # Tokens are the same also where they are padding.
    torch.testing.assert_close(tokens, expected[0], rtol=1e-5, atol=1e-5)
    hidden = model.stack.alone(tokens, padding)
    for ours, theirs in zip((hidden, model.decoder(hidden)), expected[1:], strict=True):
        torch.testing.assert_close(ours[~padding], theirs[~padding], rtol=1e-5, atol=1e-5)
    # Nodes without neighbors are what the foundation model makes of them.
    none = torch.zeros(4, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
    torch.testing.assert_close(model.stack(tokens, padding, *none)[~padding], hidden[~padding])


def test_formats_of_the_file_give_the_same(tmp_path: Path, reference) -> None:
    weights = reference.state_dict()
    first = load("scgpt", write(tmp_path / "a", weights)).read()
    second = load("scgpt", write(tmp_path / "b", renamed(weights, "mirror"), name="model.safetensors")).read()
    for part in ("embedding", "stack", "decoder"):
        assert same(getattr(first, part), getattr(second, part))
    assert load("scgpt", tmp_path / "a").vocabulary() == {
        name: row for name, row in VOCABULARY.items() if name in GENES
    }


@torch.no_grad()
def test_only_the_rows_of_the_genes_are_kept(tmp_path: Path, reference) -> None:
    folder = write(tmp_path, reference.state_dict())
    whole = load("scgpt", folder).read()
    rows = np.array([VOCABULARY["G7"], -1, VOCABULARY["G2"], -1])
    part = load("scgpt", folder).read(rows)
    assert part.embedding.table.weight.shape == (len(rows) + 2, 16)
    assert not part.embedding.table.weight[[1, 3]].any()

    feature = torch.tensor([[0, 2, 1], [2, 3, 0]])
    value, padding = torch.tensor([[3.0, 1, 4], [5, 5, 0]]), torch.tensor([[0, 0, 0], [0, 0, 1]]).bool()
    tokens, padding = part.embedding(feature, value, padding)
    # Genes that the vocabulary lacks are padding.
    assert padding.tolist() == [[False, False, False, True], [False, False, True, True]]
    rows = torch.tensor([[VOCABULARY["G7"], 2, PAD], [2, PAD, PAD]])
    expected, _ = whole.embedding(rows, value, padding[:, 1:])
    torch.testing.assert_close(tokens, expected)


@torch.no_grad()
def test_hidden_genes_have_the_value_of_the_mask(tmp_path: Path, reference) -> None:
    embedding = load("scgpt", write(tmp_path, reference.state_dict()), cls_value=0.0).read().embedding
    gene = sequences()[0]
    tokens, _ = embedding(gene, torch.full(gene.shape, -1.0), torch.zeros_like(gene, dtype=torch.bool))
    torch.testing.assert_close(embedding.query_tokens(gene), tokens[:, 1:])
    torch.testing.assert_close(embedding.query_tokens(gene[0]), tokens[0, 1:])


@torch.no_grad()
def test_can_be_built_again_without_the_checkpoint(tmp_path: Path, reference) -> None:
    foundation = load("scgpt", write(tmp_path, reference.state_dict()), neighbor_states="static")
    read = foundation.read([VOCABULARY["G1"], -1, VOCABULARY["G3"]], dropout=0.1)
    config = json.loads(json.dumps(read.config))
    built = foundation_reader("scgpt").build(config, neighbor_states="static")
    assert built.config == read.config
    assert built.stack.neighbor_states == read.stack.neighbor_states == "static"
    assert built.embedding.dropout.p == built.stack.layers[0].dropout.p == 0.1
    for part in ("embedding", "stack", "decoder"):
        ours, theirs = getattr(built, part), getattr(read, part)
        assert not same(ours, theirs)
        ours.load_state_dict(theirs.state_dict())
    inputs = torch.tensor([[0, 1, 2]]), torch.tensor([[1.0, 2, 3]]), torch.zeros(1, 3, dtype=torch.bool)
    torch.testing.assert_close(built.embedding(*inputs), read.embedding(*inputs))


def test_other_heads_are_left_aside(tmp_path: Path, reference) -> None:
    weights = reference.state_dict()
    plain = load("scgpt", write(tmp_path / "a", weights)).read()
    heads = ["flag_encoder.weight", "cls_decoder.out_layer.bias", "mvc_decoder.W.weight", "decoder.zero_logit.0.bias"]
    more = load("scgpt", write(tmp_path / "b", weights | {key: torch.ones(2) for key in heads})).read()
    assert same(plain.stack, more.stack)
    # This decoder reads batch labels too.
    weights = {k: v for k, v in weights.items() if k != "decoder.fc.0.weight"}
    batches = {"decoder.fc.0.weight": torch.ones(16, 32), "batch_encoder.embedding.weight": torch.ones(3, 16)}
    assert load("scgpt", write(tmp_path / "c", weights | batches)).read().decoder is None
    without = {k: v for k, v in weights.items() if not k.startswith("decoder")}
    assert load("scgpt", write(tmp_path / "d", without)).read().decoder is None


def spatial_weights(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Those of scGPT-spatial: its decoder is a mixture of experts, and there is another one for neighborhoods."""
    weights = {k: v for k, v in weights.items() if not k.startswith("decoder")}
    weights |= {f"decoder.moe.experts.{i}.fc.{j}.weight": torch.ones(3, 16) for i in range(4) for j in (0, 2, 4)}
    weights |= {"decoder.moe.gate.gate.weight": torch.ones(4, 16), "decoder.experts.0.fc.0.weight": torch.ones(3)}
    return weights | {"impute_mvc_decoder.gene2query.weight": torch.ones(2), "mvc_decoder.W.weight": torch.ones(2)}


def test_decoders_of_scgpt_spatial_are_left_aside(tmp_path: Path, reference) -> None:
    plain = load("scgpt", write(tmp_path / "a", reference.state_dict())).read()
    folder = write(tmp_path / "b", spatial_weights(reference.state_dict()))
    spatial = load("scgpt", folder).read()
    assert same(plain.stack, spatial.stack)
    assert same(plain.embedding, spatial.embedding)
    assert spatial.decoder is None
    with pytest.raises(CheckpointError, match=r"has 1 tensors .*'decoder\.other\.weight'"):
        load(
            "scgpt",
            write(tmp_path / "c", spatial_weights(reference.state_dict()) | {"decoder.other.weight": torch.ones(2)}),
        ).read()


def test_counts_are_divided_by_the_means_of_scgpt_spatial(tmp_path: Path, reference) -> None:
    folder = write(tmp_path, spatial_weights(reference.state_dict()))
    rows = np.array([VOCABULARY[gene] for gene in GENES])
    mean = dict(zip(rows.tolist(), np.random.default_rng(0).uniform(0.5, 3, len(rows)).tolist(), strict=True))
    lacking = int(rows[4])
    table = [f"{gene},{value},1.0" for gene, value in mean.items() if gene != lacking]
    (folder / "all_dict_mean_std.csv").write_text("\n".join([",mean,std", *table]))
    model = load("scgpt", folder).read(rows)
    assert model.decoder is None
    assert model.embedding.reads_counts
    again = foundation_reader("scgpt").build(model.config)
    again.embedding.load_state_dict(model.embedding.state_dict())
    tokenizer = again.embedding.tokenizer(torch.arange(9), 0, 0, np.arange(9, dtype=np.uint64))
    counts = np.random.default_rng(1).integers(0, 30, (5, 9)).astype(np.float32)
    shown, pattern = torch.ones(1, 9, dtype=torch.bool), torch.zeros(5, dtype=torch.int64)
    feature, bins, padding = tokenizer(sparse.csr_matrix(counts), None, shown, pattern, 5)
    for i, cell in enumerate(counts):
        values = {j: cell[j] / mean[row] for j, row in enumerate(rows.tolist()) if cell[j] > 0 and row != lacking}
        best = sorted(values, key=lambda j: -values[j])[:5]
        edges = np.quantile(list(values.values()), np.linspace(0, 1, ARGS["n_bins"] - 1))
        assert feature[i][~padding[i]].tolist() == best
        # The authors' program counts the edges that are not larger, but for the largest value.
        expected = [min(np.searchsorted(edges, values[j] + 1e-6, side="right"), ARGS["n_bins"] - 1) for j in best]
        assert bins[i][~padding[i]].tolist() == expected


@pytest.mark.parametrize("table", ["gene,other\n1,2\n", "gene,mean\nx,2\n", "gene,mean\n1,0\n", "gene,mean\n1,nan\n"])
def test_means_that_cannot_be_used(tmp_path: Path, reference, table: str) -> None:
    folder = write(tmp_path, spatial_weights(reference.state_dict()))
    (folder / "all_dict_mean_std.csv").write_text(table)
    with pytest.raises(CheckpointError, match=r"all_dict_mean_std\.csv"):
        load("scgpt", folder).read()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"nheads": 5}, "'nheads' in .*args.json.* must divide 'embsize'"),
        ({"nheads": "4"}, "'nheads' in .*args.json.* must be a whole number .*found '4'"),
        ({"nlayers": True}, "'nlayers' in .*args.json.* found True"),
        ({"nlayers": 3}, "'nlayers' in .*args.json.* is 3, but .*best_model.pt.* has layers 0, 1"),
        ({"nlayers": 1}, "'nlayers' in .*args.json.* is 1, but .*best_model.pt.* has layers 0, 1"),
        ({"embsize": 32}, "'encoder.embedding.weight' in .*best_model.pt.* shape"),
        ({"d_hid": 25}, "'transformer_encoder.layers.0.linear1.weight' in .*best_model.pt.* shape"),
        ({"n_bins": 2}, "'n_bins' in .*args.json.* from 3"),
        ({"n_bins": None}, "args.json.* has no 'n_bins'"),
        ({"dropout": 1.5}, "'dropout' in .*args.json"),
        ({"pad_value": float("nan")}, "'pad_value' in .*args.json"),
        ({"input_emb_style": "scaling"}, "'input_emb_style' in .*args.json.* is 'scaling'"),
        ({"input_style": "log1p"}, "'input_style' in .*args.json.* is 'log1p'"),
        ({"pre_norm": True}, "'pre_norm' in .*args.json.* is True"),
    ],
)
def test_settings_that_do_not_fit(tmp_path: Path, reference, args: dict, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        load("scgpt", write(tmp_path, reference.state_dict(), **args)).read()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"G1": 0}, "ids .*vocab.json.* once"),
        ({"G1": 99}, "ids .*vocab.json.* once"),
        ({"G1": "1"}, "vocab.json.* whole number .*'1' for 'G1'"),
        ({"new": len(VOCABULARY)}, "vocab.json.* has 13 tokens, but 'encoder.embedding.weight' .* only 12 rows"),
        ({"<pad>": None, "other": PAD}, "vocab.json.* has no '<pad>'"),
        ({"<cls>": None, "other": CLS}, "vocab.json.* has no '<cls>'"),
    ],
)
def test_vocabularies_that_do_not_fit(tmp_path: Path, reference, change: dict, message: str) -> None:
    vocabulary = {name: row for name, row in (VOCABULARY | change).items() if row is not None}
    with pytest.raises(CheckpointError, match=message):
        load("scgpt", write(tmp_path, reference.state_dict(), vocabulary=vocabulary)).read()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"transformer_encoder.layers.1.self_attn.in_proj_weight": None}, "no tensor 'transformer_.*1.*Wqkv.weight'"),
        ({"transformer_encoder.layers.1.norm2.bias": torch.ones(3)}, "'.*layers.1.norm2.bias' in .*shape"),
        ({"value_encoder.norm.weight": torch.full((16,), torch.nan)}, "'value_encoder.norm.weight' in .*NaN"),
        ({"encoder.embedding.weight": None}, "no tensor 'encoder.embedding.weight'"),
        ({"bn.weight": torch.ones(16)}, "has 1 tensors .*'bn.weight'"),
        ({"decoder.fc.0.weight": None}, "has 5 tensors .*'decoder.fc.0.bias'"),
        ({"gene_encoder.embedding.weight": torch.ones(2)}, "same part"),
    ],
)
def test_weights_that_do_not_fit(tmp_path: Path, reference, change: dict, message: str) -> None:
    weights = {key: value for key, value in (reference.state_dict() | change).items() if value is not None}
    with pytest.raises(CheckpointError, match=message) as caught:
        load("scgpt", write(tmp_path, weights)).read()
    assert "best_model.pt" in str(caught.value)


class Trap:
    def __reduce__(self):
        return os.mkdir, ("trapped",)


def test_files_that_are_damaged_or_carry_code(tmp_path: Path, reference, monkeypatch) -> None:
    folder = write(tmp_path, reference.state_dict())
    path, content = folder / "best_model.pt", (folder / "best_model.pt").read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=r"best_model\.pt.*damaged"):
        load("scgpt", folder).read()
    monkeypatch.chdir(tmp_path)
    torch.save({"encoder.embedding.weight": Trap()}, path)
    with pytest.raises(CheckpointError, match=r"best_model\.pt.*carries code"):
        load("scgpt", folder).read()
    assert not (tmp_path / "trapped").exists()
    path.unlink()
    with pytest.raises(CheckpointError, match=r"has no 'best_model\.pt'"):
        load("scgpt", folder).read()


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ([-1, -1], "None of the 2 genes is in the vocabulary .*human"),
        ([12], "rows must be -1 or ids .* 0 to 11, found 12 to 12"),
        ([0.5], "whole numbers"),
    ],
)
def test_genes_that_cannot_be_had(tmp_path: Path, reference, chosen: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load("scgpt", write(tmp_path, reference.state_dict())).read(chosen)
