"""The model card: what a shared model is, for those who find it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fimp_sc.data.sequences._kinds import sequence_kind
from fimp_sc.data.storage._elements import shorten

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_TAGS = ("fimp-sc", "single-cell", "spatial-transcriptomics", "graph-neural-network", "anndata")
_SCALES = {
    "counts": "counts (non-negative integers); scaled to a common total and log1p transformed inside",
    "normalized": "non-negative values; scaled to a common total and log1p transformed inside",
    "log": "log-normalized values, used as they are",
    "real": "any numbers, used as they are",
}
_MOST_SHOWN = 50
_LOADING = """```python
import fimp_sc
model = fimp_sc.model.FIMP.from_pretrained("folder-or-owner/name")
fimp_sc.tl.embed(adata, model=model)  # adata: cells with expression and coordinates
```

`pip install fimp-sc`; a name on the hub takes `pip install huggingface_hub` too. Genes are matched by name. The folder
holds JSON, text and safetensors only: loading it runs no code of its own."""
_CITATION = """FIMP: Foundation Model-Informed Message Passing for Graph Neural Networks,
[arXiv:2210.09475](https://arxiv.org/abs/2210.09475)."""


def model_card(config: Mapping[str, Any], n_parameters: int) -> str:
    """Return the text of a model card, with the front matter of the Hugging Face hub.

    Parameters
    ----------
    config
        What ``config.json`` holds.
    n_parameters
        Of network and heads.
    """
    params, classes = config["init_params"], config["classes"]
    tags = [*_TAGS, *([params["foundation"]["name"]] if params["foundation"] else [])]
    front = ["---", "library_name: fimp-sc", "license: unknown", "tags:", *(f"- {tag}" for tag in tags), "---"]
    sections = {
        **_introduction(config),
        "How to load": _LOADING,
        "Architecture": _list(_architecture(params, n_parameters)),
        **_contents(config),
        "Classes": f"{len(classes):,}: {shorten([_code(label) for label in classes], _MOST_SHOWN)}."
        if classes
        else "None: the model was set up without labels.",
        "Training data": _list(_training(config)),
        "Versions": _list([f"{name} {number}" for name, number in config["versions"].items()]),
        "License": _license(params),
        "Citation": _CITATION,
    }
    body = [f"{'##' if number else '#'} {title}\n\n{text}" for number, (title, text) in enumerate(sections.items())]
    return "\n".join(front) + "\n\n" + "\n\n".join(body) + "\n"


def _introduction(config: Mapping[str, Any]) -> dict[str, str]:
    labels = " and labels" if config["classes"] else ""
    if not config.get("sequences"):
        return {
            "FIMP model of a tissue": "Embeds cells of a spatial transcriptomics section from their own genes and "
            f"those of their neighbors, and predicts expression{labels}. Attention runs between the gene tokens of "
            "neighboring cells (foundation-informed message passing, arXiv:2210.09475)."
        }
    return {
        "FIMP model of a graph": "Embeds nodes from their own tokens and those of their neighbors, and predicts "
        f"hidden tokens{labels}. Attention runs between the tokens of neighboring nodes (foundation-informed message "
        "passing, arXiv:2210.09475)."
    }


def _contents(config: Mapping[str, Any]) -> dict[str, str]:
    out, genes = {}, config["genes"]
    if genes:
        out["Genes"] = f"{len(genes):,}, in `config.json`: {shorten([_code(gene) for gene in genes], 10)}."
    if config.get("sequences"):
        lines = [
            f"{_code(name)}: {_code(state['kind'])}, "
            + ", ".join(f"{what}: {number:,}" for what, number in _sizes(state))
            for name, state in config["sequences"].items()
        ]
        out["Signals and images"] = _list(lines)
    return out


def _sizes(state: Mapping[str, Any]) -> list[tuple[str, int]]:
    return list(zip(sequence_kind(state["kind"]).size_names, state["size"], strict=False))


def _architecture(params: Mapping[str, Any], n_parameters: int) -> list[str]:
    shared = [f"tokens of a cell: {params['n_tokens']}", f"parameters: {n_parameters:,}"]
    if not params["messages"]:
        shared.append("no messages between cells")
    elif params["use_weights"]:
        shared.append("messages are weighed by the graph")
    foundation = params["foundation"]
    if foundation:
        settings = (params["architecture"] or {}).get("foundation") or {}
        return [
            f"message passing by the stack of {_code(foundation['name'])}, read from {_code(foundation['checkpoint'])}",
            *(f"{name}: {_code(foundation[name])}" for name in ("train", "neighbor_states", "aggregate")),
            *(f"{name}: {value}" for name, value in settings.items()),
            *shared,
        ]
    vectors = params["gene_embeddings"]
    return [
        f"FIMP-base: {params['n_layers']} layers ({_code(params['layer'])}), {params['reduce']} over neighbors",
        f"width {params['n_latent']}, {params['n_heads']} heads",
        *([f"started from pretrained vectors of genes ({_code(vectors)})"] if vectors else []),
        *shared,
    ]


def _training(config: Mapping[str, Any]) -> list[str]:
    setup = {name: value for name, value in config["setup_args"].items() if value is not None}
    lines = [
        f"cells: {config['n_cells']:,}",
        *([f"values: {_SCALES[config['input_scale']]}"] if config["input_scale"] else []),
        *(
            f"{_code(name)}: {len(table['genes']):,} columns, {_SCALES[table['input_scale']]}"
            for name, table in config.get("tables", {}).items()
        ),
        "set up with " + ", ".join(f"{name}={_code(value)}" for name, value in setup.items()),
    ]
    if not config["is_trained"]:
        return [*lines, "not trained: weights are as the model was built"]
    for name in ("train_loss", "validation_loss"):
        values = config["history"].get(name, {}).get("values") or [None]
        if values[-1] is not None:
            lines.append(f"{name.replace('_', ' ')} after {len(values)} epochs: {values[-1]:.4g}")
    return [*lines, "tissue, species and source: not stated; add them here"]


def _license(params: Mapping[str, Any]) -> str:
    text = "Not stated: the author of this model should choose one, here and in the first lines of this file."
    if params["foundation"]:
        text += f" The weights include those of {_code(params['foundation']['name'])}, whose license holds for them."
    elif params["gene_embeddings"]:
        text += " The weights include pretrained vectors of genes, whose license holds for them."
    return text


def _list(items: Sequence[str]) -> str:
    return "\n".join(f"- {item}" for item in items)


def _code(text: Any) -> str:
    """Names come from data: no line break or backtick of theirs may end the code that they are shown as."""
    return f"`{' '.join(str(text).replace('`', chr(39)).split())}`"
