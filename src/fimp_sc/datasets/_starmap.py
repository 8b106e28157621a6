"""A section of mouse visual cortex, measured with STARmap."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from anndata import AnnData

_ADDRESS = (
    "https://raw.githubusercontent.com/prabhakarlab/Banksy_py/43e2d692db6705c0195039764194473912e4cfc2/data/starmap/"
)
_COUNTS = "starmap_BY3_1k.h5ad"
_ANNOTATION = "Starmap_BY3_1k_meta_annotated_18oct22.csv"
_CHECKSUMS = {
    _COUNTS: "sha256:05b7619677b4d65324ae7594d80a703996b97ec5c20e7f81cd9fc93be8be933b",
    _ANNOTATION: "sha256:e82e8a1b43437c6f15be1821bcc43537f4216806d6e9c5a32abbb55f3a394c5f",
}
# Both in one file, as the benchmarks read it.
_JOINED = "starmap_visual_cortex_1020.h5ad"
_COLUMNS = {"cluster_name": "cell_type", "smoothed_manual": "region"}
_UNLABELED = "Unknown"


def starmap() -> AnnData:
    """Read a section through mouse visual cortex (STARmap; Wang et al. 2018), with cell types and layers.

    The section goes from the pia through the layers of the cortex to the corpus callosum and the hippocampus. Counts
    come from Wang et al. (2018, doi:10.1126/science.aat5691, sample BY3), layers from the authors of BANKSY (Singhal et
    al. 2024, doi:10.1038/s41588-024-01664-3), in whose repository ``prabhakarlab/Banksy_py`` both files lie.

    Two files of 3 MB together are downloaded at the first call, checked, and kept in the user's cache
    (``pooch.os_cache("fimp_sc")``). Files that lie in the folder named by the environment variable ``FIMP_SC_DATA``
    are read from there, and nothing is downloaded.

    Returns
    -------
    Object with 1,549 cells × 1,020 genes:

    - ``.X``: CSR matrix of float32, molecule counts;
    - ``.obs["cell_type"]``: categorical, 16 types; ``"Unknown"`` for 342 cells without one. ``eL2/3`` to ``eL6`` are
      excitatory neurons of these layers, ``HPC`` those of the hippocampus; ``PVALB``, ``SST``, ``VIP`` and ``Reln`` are
      inhibitory neurons;
    - ``.obs["region"]``: categorical, 7 regions; ``"Unknown"`` for the same cells. ``cc`` is the corpus callosum;
    - ``.obsm["spatial"]``: float64 array ``(n_obs, 2)``, pixels of the original image;
    - ``.uns["provenance"]``: where everything comes from.

    Raises
    ------
    OSError
        A file cannot be downloaded, or is not the one that is expected.

    Examples
    --------
    >>> import fimp_sc as fimp
    >>> adata = fimp.datasets.starmap()  # doctest: +SKIP
    >>> fimp.pl.spatial(adata, ["cell_type", "region"])  # doctest: +SKIP
    """
    import anndata as ad
    import pandas as pd
    from scipy import sparse

    own = os.environ.get("FIMP_SC_DATA")
    if own and (Path(own) / _JOINED).is_file():
        raw = ad.read_h5ad(Path(own) / _JOINED)
        labels, spatial = raw.obs, raw.obsm["spatial"]
    else:
        raw, annotation = ad.read_h5ad(_file(_COUNTS, own)), pd.read_csv(_file(_ANNOTATION, own), index_col=0)
        annotation.index = annotation.index.astype(str)
        labels = annotation.rename(columns=_COLUMNS).reindex(raw.obs_names)
        spatial = raw.obs[["x", "y"]].to_numpy(float)
    obs = pd.DataFrame(index=raw.obs_names)
    for name in _COLUMNS.values():
        column = labels[name].astype(object)
        obs[name] = column.mask(column.isna() | (column == "Unlabelled"), _UNLABELED).astype("category")
    adata = ad.AnnData(sparse.csr_matrix(raw.X, dtype="float32"), obs, raw.var[[]], obsm={"spatial": spatial})
    adata.uns["provenance"] = (
        "Wang et al. 2018 (doi:10.1126/science.aat5691), STARmap, mouse visual cortex, sample BY3; regions and files "
        f"of prabhakarlab/Banksy_py: {_ADDRESS}"
    )
    return adata


def _file(name: str, folder: str | None) -> str:
    """Return the path of a file of the user's folder, or else of the cache, after a download if need be."""
    import pooch

    if folder and (Path(folder) / name).is_file():
        return str(Path(folder) / name)
    try:
        return str(pooch.retrieve(_ADDRESS + name, _CHECKSUMS[name], fname=name, path=pooch.os_cache("fimp_sc")))
    except (OSError, ValueError) as error:  # errors of requests are of the first kind, wrong checksums of the second
        raise OSError(
            f"{_ADDRESS + name} could not be downloaded: {error} Try again, or download it yourself and name its "
            "folder in the environment variable FIMP_SC_DATA."
        ) from error
