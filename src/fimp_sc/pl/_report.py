"""One page of HTML with what the tools found in an object."""

from __future__ import annotations

import base64
import sys
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from html import escape
from importlib.metadata import version
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse

import fimp_sc
from fimp_sc._keys import records
from fimp_sc._option_rules import Names, Text
from fimp_sc._options import checked
from fimp_sc.data._modality import CONNECTIVITIES_KEY, SPATIAL_KEY
from fimp_sc.data.storage._elements import get_graph, get_obs, shorten
from fimp_sc.data.validate._checks import check_object
from fimp_sc.pl._attention import attention
from fimp_sc.pl._figure._common import results_of
from fimp_sc.pl._figure._rules import ReportFile
from fimp_sc.pl._figure._values import dense_entry
from fimp_sc.pl._gene_pairs import gene_pairs
from fimp_sc.pl._history import history
from fimp_sc.pl._niche_composition import niche_composition
from fimp_sc.pl._spatial import spatial

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

    from mudata import MuData

_DPI = 160
_SCREEN = 80  # dots per inch on the page
_LARGE = 480  # dots that a figure is wide which is moved rather than made smaller on a narrow screen
_ROWS = 20
_FEW = 4  # samples of which three components of an embedding are drawn
_PACKAGES = ("fimp-sc", "scvi-tools", "torch", "anndata", "scanpy", "squidpy", "numpy")

_STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 62rem; background: #fff; color: #1f2328;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, Helvetica, Arial, sans-serif; }
h1 { font-size: 1.6rem; margin: .5rem 0 0; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem; padding-top: .6rem; border-top: 1px solid #d8dee4; }
p { margin: .4rem 0; }
nav { display: flex; flex-wrap: wrap; gap: .2rem 1rem; margin: .8rem 0; }
a { color: #0550ae; }
.quiet { color: #57606a; font-size: .9rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; margin: .4rem 0; }
th, td { text-align: left; vertical-align: top; padding: .25rem 1rem .25rem 0; border-bottom: 1px solid #eaeef2; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
figure { margin: .8rem 0; overflow-x: auto; }
img { display: block; max-width: 100%; height: auto; }
img.large { max-width: max(100%, 35rem); }
figcaption { color: #57606a; font-size: .9rem; position: sticky; left: 0; }
@media (max-width: 40rem) { body { padding: .7rem; font-size: 15px; } th, td { padding-right: .7rem; } }
@media print { nav { display: none; } figure, table { break-inside: avoid; } img.large { max-width: 100%; } }
"""


@checked(file=ReportFile(), modality=Names(), title=Text())
def report(
    adata: AnnData | MuData,
    file: str | os.PathLike[str],
    *,
    modality: str | Sequence[str] | None = None,
    title: str = "fimp-sc report",
) -> Path:
    """Write one self-contained page of HTML with what the tools found in an object.

    It has sections for what is there: data and settings, graph, training (if :func:`fimp_sc.tl.get_model` knows the
    model), embedding, niches and their composition, predicted labels with confidence, influence, pairs of genes, genes
    matched with a vocabulary, calls and versions. Figures are inside the file, which needs no network.

    Parameters
    ----------
    adata
        Object with results of :mod:`fimp_sc.tl`, or without any; or a MuData object. It is not changed.
    file
        File to write, which ends in `.html`; one that is there is replaced.
    modality
        Of a MuData object, the one to report on, or the several; by default where results are found.
    title
        Heading of the page.

    Returns
    -------
    Path of the file.

    Raises
    ------
    FileNotFoundError
        If the folder does not exist.
    ValueError
        If `file` does not end in `.html`, the object has no cells, or results of several modalities are found.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> import fimp_sc as fimp
    >>> adata = fimp.datasets.toy_communication(n_obs=200, n_genes=40)
    >>> fimp.pp.spatial_graph(adata, library_key="section")
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     page = fimp.pl.report(adata, Path(folder) / "report.html")
    ...     "Graph" in page.read_text(encoding="utf-8")
    True
    """
    found, _ = results_of(adata, modality, lambda held, _: any(True for _ in records(held)))
    if not isinstance(found, AnnData):
        found = AnnData(obs=found.obs, obsm=dict(found.obsm), obsp=dict(found.obsp), uns=dict(found.uns))
    check_object(found)
    page = _Page(found, adata, modality)
    sections = {
        name: content
        for name, content in (
            ("Data", page.data()),
            ("Graph", page.graph()),
            ("Training", page.training()),
            ("Embedding", page.embedding()),
            ("Niches", page.niches()),
            ("Labels", page.labels()),
            ("Influence", page.influence()),
            ("Gene pairs", page.pairs()),
            ("Gene match", page.genes()),
            ("Calls", page.calls()),
            ("Versions", page.versions()),
        )
        if content
    }
    links = " ".join(f'<a href="#{_anchor(name)}">{name}</a>' for name in sections)
    body = "\n".join(
        f'<section id="{_anchor(name)}"><h2>{name}</h2>\n{content}</section>' for name, content in sections.items()
    )
    when = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    path = Path(file)
    path.write_text(
        f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<header><h1>{escape(title)}</h1>
<p class="quiet">Written by fimp-sc {escape(fimp_sc.__version__)}, {when}</p>
<nav aria-label="Sections">{links}</nav></header>
<main>
{body}
</main>
</body>
</html>
""",
        encoding="utf-8",
    )
    return path


class _Page:
    """Sections of the page, each HTML, or empty if the object has nothing for it."""

    def __init__(self, adata: AnnData, data: Any, modality: Any) -> None:
        self._adata, self._data, self._modality = adata, data, modality
        found = sorted(records(adata), key=lambda item: int(item[1].get("order", 0)))
        self._records = {key: dict(record) for key, record in found}
        self._library = self._setting("library_key", adata.obs)
        self._spatial = self._setting("spatial_key", adata.obsm) or (SPATIAL_KEY if SPATIAL_KEY in adata.obsm else None)
        self._graph = self._setting("connectivities_key", adata.obsp) or (
            CONNECTIVITIES_KEY if CONNECTIVITIES_KEY in adata.obsp else None
        )

    def _setting(self, name: str, held: Any) -> str | None:
        """Return what the latest call that tells named, if the object still has it."""
        named = [record["params"].get(name) for record in self._records.values()]
        there = [str(value) for value in named if value is not None and str(value) in held]
        return there[-1] if there else None

    def _of(self, tool: str, held: Any) -> list[str]:
        """Return the keys of results of a tool that the object still has."""
        return [key for key, record in self._records.items() if record.get("tool") == tool and key in held]

    def _map(self, color: Any, caption: str, adata: AnnData | None = None, **how: Any) -> str:
        if self._spatial is None:
            return ""
        how |= {"library_key": self._library, "spatial_key": self._spatial}
        return _picture(spatial(adata or self._adata, color, return_fig=True, **how), caption)

    def data(self) -> str:
        adata = self._adata
        rows: dict[str, Any] = {"Cells": adata.n_obs, "Genes": adata.n_vars}
        if hasattr(self._data, "mod"):
            rows["Modalities"] = ", ".join(self._data.mod)
        if self._library is not None:
            sizes = get_obs(adata, [self._library])[self._library].astype(str).value_counts(sort=False)
            rows[f"Samples ({self._library})"] = len(sizes)
            rows["Cells of a sample"] = f"{sizes.min():,} to {sizes.max():,}"
        scales = [record["input_scale"] for record in self._records.values() if "input_scale" in record]
        if scales and not isinstance(scales[-1], Mapping):
            rows["Values read as"] = scales[-1]
        for name, value in (("Coordinates", self._spatial), ("Layer", self._setting("layer", adata.layers))):
            if value is not None:
                rows[name] = value
        return _facts(rows)

    def graph(self) -> str:
        if self._graph is None:
            return ""
        from matplotlib import pyplot as plt
        from matplotlib.ticker import MaxNLocator

        graph = sparse.csr_matrix(get_graph(self._adata, self._graph))
        graph.eliminate_zeros()
        degree = np.diff(graph.indptr)
        rows: dict[str, Any] = {
            "Graph": self._graph,
            "Cells": graph.shape[0],
            "Edges": graph.nnz,
            "Neighbors of a cell": f"{degree.mean():.1f} on average, {degree.min():,} to {degree.max():,}",
            "Cells without neighbors": int((degree == 0).sum()),
            "Connected components": int(sparse.csgraph.connected_components(graph, directed=False)[0]),
        }
        if self._library is not None:
            library = pd.Categorical(get_obs(self._adata, [self._library])[self._library]).codes
            ends = graph.tocoo()
            rows["Edges between samples"] = int((library[ends.row] != library[ends.col]).sum())
        figure, ax = plt.subplots(figsize=(5, 2.4), layout="constrained")
        values, counts = np.unique(degree, return_counts=True)
        ax.bar(values, counts, width=0.9, color="#0072b2")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        ax.set_xlabel("Neighbors")
        ax.set_ylabel("Cells")
        ax.spines[["top", "right"]].set_visible(False)
        return _facts(rows) + _picture(figure, "Cells by their number of neighbors.")

    def training(self) -> str:
        from fimp_sc.tl import get_model

        try:
            model = get_model(self._data, self._modality)
        except (KeyError, ValueError):  # of another session, or of none
            return ""
        if not getattr(model, "history", None):
            return ""
        return _picture(history(model, return_fig=True), "Losses of the model that the last call used.")

    def embedding(self) -> str:
        n_samples = 1 if self._library is None else get_obs(self._adata, [self._library])[self._library].nunique()
        n_shown = 3 if n_samples <= _FEW else 1
        parts = []
        for key in self._of("tl.embed", self._adata.obsm):
            values = dense_entry(self._adata, key)
            parts.append(f"<p><code>.obsm[{escape(repr(key))}]</code>, {values.shape[1]:,} dimensions.</p>")
            there = np.isfinite(values).all(axis=1)
            if self._spatial is None or there.sum() < 2:
                continue
            scores, fractions = _principal_components(values[there], n_shown)
            light = AnnData(obs=self._adata.obs[[]].copy(), obsm={self._spatial: self._adata.obsm[self._spatial]})
            if self._library is not None:
                light.obs[self._library] = get_obs(self._adata, [self._library])[self._library]
            columns = [f"component {i + 1} ({fraction:.0%})" for i, fraction in enumerate(fractions)]
            for name, score in zip(columns, scores.T, strict=True):
                light.obs[name] = np.nan
                light.obs.loc[there, name] = score
            caption = f"Principal components of {key}, with their fraction of its variance; colors end at 1 and 99 %."
            parts.append(self._map(columns, caption, light, vmin="p1", vmax="p99"))
        return "\n".join(parts)

    def niches(self) -> str:
        parts = []
        for key in self._of("tl.niches", self._adata.obs):
            sizes = get_obs(self._adata, [key])[key].value_counts(sort=False)
            parts.append(f"<p><code>.obs[{escape(repr(key))}]</code>, {int((sizes > 0).sum()):,} niches.</p>")
            parts.append(self._map(key, f"Niches, {key}."))
            groupby = self._kinds(key)
            if groupby is not None:
                drawn = niche_composition(self._adata, key, groupby, return_fig=True)
                parts.append(_picture(drawn, f"Composition of niches by {groupby}."))
        return "\n".join(parts)

    def _kinds(self, niches: str) -> str | None:
        """Return a column of cell types: the one that was counted in niches, else one of a call, else the usual one."""
        of_calls = [
            record["params"].get(name) for record in self._records.values() for name in ("groupby", "labels_key")
        ]
        named = [self._records[niches]["params"].get("labels_key"), *of_calls, "cell_type"]
        for name in map(str, dict.fromkeys(name for name in named if name is not None)):
            if name in self._adata.obs and get_obs(self._adata, [niches, name]).notna().all(axis=1).any():
                return name
        return None

    def labels(self) -> str:
        parts = []
        for key in self._of("tl.annotate", self._adata.obs):
            truth = str(self._records[key]["params"].get("labels_key"))
            confidence = f"{key}_confidence"
            colors = [name for name in (truth, key, confidence) if name in self._adata.obs]
            columns = get_obs(self._adata, colors)
            table = pd.DataFrame({"predicted": columns[key].astype(str).value_counts()})
            if confidence in colors:
                table["mean confidence"] = columns.groupby(columns[key].astype(str), observed=True)[confidence].mean()
            if truth in colors:
                given = columns[truth].astype(str).value_counts()
                table[f"in {truth}"] = given.reindex(table.index, fill_value=0)
            caption = "Labels, those that were given first, and the confidence of those that were predicted."
            parts.append(self._map(colors, caption) + _table(table.rename_axis(key).reset_index()))
        return "\n".join(parts)

    def influence(self) -> str:
        keys = [key for key in self._of("tl.attention", self._adata.uns) if "groups" in self._records[key]]
        pictures = []
        for key in keys:
            caption = f"Mean influence between groups of {self._records[key]['params'].get('groupby')}."
            pictures.append(_picture(attention(self._adata, key, return_fig=True), caption))
        return "\n".join(pictures)

    def pairs(self) -> str:
        parts = []
        for key in self._of("tl.gene_pairs", self._adata.uns):
            table = pd.DataFrame(self._records[key]["pairs"])
            if table.empty or not table["fdr"].notna().any():
                parts.append("<p>No pair of genes was tested.</p>")
                continue
            n = int((table["fdr"] <= 0.05).sum())
            left = int(self._records[key].get("n_untested", 0))
            untested = f" {left:,} more were not tested, as too few neighbors express both genes." if left else ""
            parts.append(f"<p>{len(table):,} tests, {n:,} with a false discovery rate of at most 0.05.{untested}</p>")
            parts.append(_picture(gene_pairs(self._adata, key, return_fig=True), "The most significant pairs."))
            parts.append(_table(table.head(_ROWS).rename(columns=lambda name: str(name).replace("_", " "))))
        return "\n".join(parts)

    def genes(self) -> str:
        parts = []
        for key in self._of("pp.match_genes", self._adata.uns):
            record = self._records[key]
            rows: dict[str, Any] = {
                "Genes in the vocabulary": record["n_vocabulary"],
                "Genes with an id": f"{int(record['n_used']):,} of {self._adata.n_vars:,}",
                "Fraction of counts": f"{float(record['fraction_of_counts']):.1%}",
            }
            rows |= {f"Matched: {name}": n for name, n in dict(record["methods"]).items()}
            rows |= {"Ambiguous": record["n_ambiguous"], "Lost": record["n_lost"]}
            parts.append(_facts(rows))
        return "\n".join(parts)

    def calls(self) -> str:
        rows = []
        for key, record in self._records.items():
            settings = [f"{name} = {_brief(value)}" for name, value in _flat(record["params"])]
            settings += [f"{name} = {_brief(record[name])}" for name in ("random_state", "epochs") if name in record]
            rows.append(
                {"call": str(record.get("tool", "")), "key": key, "settings": ", ".join(dict.fromkeys(settings))}
            )
        return _table(pd.DataFrame(rows)) if rows else ""

    def versions(self) -> str:
        used: dict[str, dict[str, None]] = {}
        for record in self._records.values():
            for package, number in dict(record["versions"]).items():
                used.setdefault(str(package), {})[str(number)] = None
        here = {"python": sys.version.split()[0]} | {package: version(package) for package in _PACKAGES}
        rows = [
            {
                "package": package,
                "of the results": ", ".join(used.get(package, ())),
                "of this page": here.get(package, ""),
            }
            for package in dict.fromkeys([*here, *used])
        ]
        return _table(pd.DataFrame(rows))


def _principal_components(values: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Return scores ``(n_obs, n)`` on the first components, and their fractions of the variance."""
    centered = values - values.mean(axis=0)
    variances, directions = np.linalg.eigh(centered.T @ centered)
    chosen = np.argsort(variances)[::-1][:n]
    return centered @ directions[:, chosen], variances[chosen] / max(float(variances.sum()), 1e-300)


def _picture(figure: Any, caption: str) -> str:
    from matplotlib import pyplot as plt

    file = BytesIO()
    figure.savefig(file, format="png", dpi=_DPI, bbox_inches="tight")
    plt.close(figure)
    data = file.getvalue()
    width = int.from_bytes(data[16:20], "big") * _SCREEN // _DPI  # of the header of a PNG
    code = base64.b64encode(data).decode("ascii")
    text, kind = escape(caption), ' class="large"' if width > _LARGE else ""
    return (
        f'<figure><img{kind} width="{width}" alt="{text}" src="data:image/png;base64,{code}">'
        f"<figcaption>{text}</figcaption></figure>\n"
    )


def _facts(rows: Mapping[str, Any]) -> str:
    cells = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{escape(_brief(value))}</td></tr>' for name, value in rows.items()
    )
    return f'<div class="wide"><table>{cells}</table></div>\n'


def _table(table: pd.DataFrame) -> str:
    kinds = [' class="number"' if pd.api.types.is_numeric_dtype(kind) else "" for kind in table.dtypes]
    names = [str(name) for name in table.columns]
    head = "".join(f'<th scope="col"{kind}>{escape(name)}</th>' for name, kind in zip(names, kinds, strict=True))
    rows = "".join(
        "<tr>"
        + "".join(f"<td{kind}>{escape(_brief(value))}</td>" for value, kind in zip(row, kinds, strict=True))
        + "</tr>"
        for row in table.itertuples(index=False)
    )
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>\n'


def _flat(params: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for name, value in params.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + str(name), value


def _brief(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, np.ndarray | list | tuple):
        return shorten([str(item) for item in np.ravel(np.asarray(value, dtype=object))])
    if isinstance(value, bool | np.bool_):
        return str(bool(value))
    if isinstance(value, int | np.integer):
        return f"{int(value):,}"
    if isinstance(value, float | np.floating):
        return "" if np.isnan(value) else f"{float(value):.3g}"
    return str(value)


def _anchor(name: str) -> str:
    return name.lower().replace(" ", "-")
