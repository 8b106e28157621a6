"""What does a table of pretrained gene vectors know of a section? The table is given with --vectors.

Prints the share of genes that have a vector, and how well the leading loadings of genes in the section's own principal
components are predicted from their vectors (ridge regression, genes in 5 folds), beside the same vectors dealt out to
other genes. Whether FIMP is better for them is what ``--methods vectors`` of the tasks shows.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import scipy.sparse as sp

from _common import load, log_normalize, parse, parser, totals


def told(section, vectors) -> float:
    """Correlate the 40 leading loadings of genes with those predicted from their vectors; genes in 5 folds."""
    from sklearn.decomposition import PCA
    from sklearn.linear_model import RidgeCV
    from sklearn.model_selection import KFold, cross_val_predict
    from sklearn.preprocessing import StandardScaler

    section = section[:, np.asarray(section.X.sum(axis=0)).ravel() > 0]
    x = log_normalize(section.X, float(np.median(totals(section.X))))
    mean = np.asarray(x.mean(axis=0)).ravel()
    scale = np.sqrt(np.sqrt(np.maximum(np.asarray(x.power(2).mean(axis=0)).ravel() - mean**2, 1e-12)))
    loading = PCA(40, svd_solver="arpack", random_state=0).fit(x @ sp.diags(1 / scale)).components_.T
    values, known = vectors.rows(pd.Index(vectors.names).get_indexer(section.var_names.astype(str)))
    given = StandardScaler().fit_transform(values[known])
    ridge = RidgeCV(alphas=10.0 ** np.arange(0, 7))
    predicted = cross_val_predict(ridge, given, loading[known], cv=KFold(5, shuffle=True, random_state=0))
    return float(np.corrcoef(predicted.ravel(), loading[known].ravel())[0, 1])


def main() -> None:
    """Print the correlations."""
    from fimp_sc.pretrained import GeneVectors, read_gene_vectors

    p = parser(__doc__)
    p.add_argument("--vectors", type=Path, required=True, help="file that read_gene_vectors reads")
    args = parse(p)
    vectors, section = read_gene_vectors(args.vectors), load("dlpfc", args.data)
    have = np.isin(section.var_names.astype(str), vectors.names)
    share = float(section.X[:, have].sum() / section.X.sum())
    print(f"{have.sum()} of {section.n_vars} genes, which hold {share:.0%} of counts, have a vector.")
    mine = np.flatnonzero(np.isin(vectors.names, section.var_names.astype(str)))
    values = vectors.values.copy()
    values[mine] = values[np.random.default_rng(0).permutation(mine)]
    for version, table in (("pretrained", vectors), ("permuted", GeneVectors(vectors.names, values))):
        print(f"What {version} vectors tell of the data's own loadings: correlation {told(section, table):.3f}")


if __name__ == "__main__":
    main()
