"""What tests of preparation share."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest


@pytest.fixture(scope="session")
def assert_unchanged():
    """Compare an object with a copy made before."""

    def compare(adata, copy) -> None:
        assert list(adata.obsm) == list(copy.obsm)
        assert list(adata.obsp) == list(copy.obsp)
        assert list(adata.uns) == list(copy.uns)
        pd.testing.assert_frame_equal(adata.obs, copy.obs)
        for key in copy.obsm:
            np.testing.assert_array_equal(np.asarray(adata.obsm[key]), np.asarray(copy.obsm[key]))
        for key in copy.obsp:
            assert (adata.obsp[key] != copy.obsp[key]).nnz == 0
        assert (adata.X != copy.X).nnz == 0

    return compare
