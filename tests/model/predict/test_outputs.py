"""What a model's outputs are with and without messages."""

from __future__ import annotations

import numpy as np

import fimp_sc


def test_without_messages_each_cell_is_embedded_as_if_alone(trained, tissue, make) -> None:
    alone = tissue.copy()
    fimp_sc.pp.spatial_graph(alone, n_neighbors=0, overwrite=True)
    for model in (trained, make(tissue)):
        with_messages = model.get_latent_representation(tissue)
        without = model.get_latent_representation(tissue, messages=False)
        np.testing.assert_allclose(without, model.get_latent_representation(alone), rtol=1e-4, atol=1e-5)
        assert np.abs(without - with_messages).max() > 1e-3
