"""The documentation's code runs, on toy objects under the names that it uses."""

from __future__ import annotations

import re
from pathlib import Path

import anndata as ad
import matplotlib.pyplot as plt
import numpy as np
import pytest
from PIL import Image
from scipy import sparse

import fimp_sc
from fimp_sc.data import _kinds
from fimp_sc.data._modality import quiet_mudata
from fimp_sc.datasets import toy_tissue
from fimp_sc.model import FIMP

PAGE = Path(__file__).parents[1] / "docs" / "modalities.md"
RING = np.roll(np.eye(12), 1, axis=1) + np.roll(np.eye(12), -1, axis=1)


def toy_objects(folder: Path) -> dict:
    rng = np.random.default_rng(0)
    files = [folder / f"{i}.png" for i in range(12)]
    for file in files:
        Image.fromarray(rng.integers(0, 256, (30, 40, 3)).astype(np.uint8)).save(file)
    adata = toy_tissue(n_obs=60, random_state=0)
    adata = adata[:, np.asarray(adata.X.sum(0)).ravel() > 0].copy()
    adata.obs["layer"] = adata.obs["niche"]
    herd = ad.AnnData(
        obs={"weight": rng.random(12)}, obsm={"track": rng.normal(size=(12, 50)).cumsum(1)},
        obsp={"spatial_connectivities": sparse.csr_matrix(RING)},
    )  # fmt: skip
    return {
        "adata": adata,
        "adjacency": RING,
        "bold": rng.normal(size=(2, 10, 200)).cumsum(-1),
        "centres": rng.normal(size=(10, 3)),
        "country": list("xyz") * 4,
        "files": files,
        "fimp": fimp_sc,
        "herd": herd,
        "names": ["Precentral_L", "Insula_R", *(f"r{i}" for i in range(8))],
        "networks": list("ab") * 5,
        "own": toy_tissue(n_obs=60),
        "pixels": rng.integers(0, 256, (60, 16, 16, 3)).astype(np.uint8),
        "places": [55, 13] + 0.01 * rng.normal(size=(12, 2)),
        "role": list("ab") * 6,
        "structural": np.roll(np.eye(10), 1, axis=1),
        "table": rng.normal(size=(12, 5)),
    }


def test_code_of_the_page_on_modalities_runs(tmp_path, monkeypatch) -> None:
    torch_geometric_data = pytest.importorskip("torch_geometric.data")
    import torch

    train = FIMP.train
    monkeypatch.setattr(
        FIMP, "train", lambda self, *args, **kwargs: train(self, 1, **{**kwargs, "enable_progress_bar": False})
    )
    monkeypatch.setattr(plt, "show", lambda *args, **kwargs: None)
    monkeypatch.setattr(_kinds, "_kinds", dict(_kinds.sequence_kinds()))
    edges = torch.tensor([[0, 1, 2, 3, 4, 5], [1, 2, 3, 4, 5, 0]])
    names = toy_objects(tmp_path)
    names["data"] = torch_geometric_data.Data(x=torch.randn(6, 3), edge_index=edges, y=torch.tensor([0, 1] * 3))
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    run = [block for block in blocks if "checkpoint=" not in block]
    assert len(run) == 6
    with quiet_mudata():  # as readers of the page make their own objects
        for block in run:
            exec(compile(block, str(PAGE), "exec"), names)
    plt.close("all")
    assert names["herd"].obsm["X_fimp"].shape == (12, 128)
    made = names["herd"].obsm["fimp"]
    assert np.isfinite(made[:, :40]).all()
    assert np.isnan(made[:, 40:]).all(), "steps that fill no token"
    assert np.isfinite(names["mdata"].obsm["X_fimp"]).all()
