"""Files of `FIMP.save`: what cannot be read is told."""

from __future__ import annotations

import zipfile

import numpy as np
import pytest
import torch

import fimp_sc
from fimp_sc.model import FIMP
from fimp_sc.pretrained import CheckpointError


@pytest.mark.parametrize("content", ["text", "nothing", "half", "another archive", "another tensor", "objects"])
def test_damaged_file_of_save_is_told(trained, tmp_path, content) -> None:
    trained.save(str(tmp_path / "model"))
    file = tmp_path / "model" / "model.pt"
    whole = file.read_bytes()
    if content == "another archive":
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("readme.txt", "no model")
    elif content == "another tensor":
        torch.save(torch.zeros(3), file)
    elif content == "objects":
        torch.save({"state_dict": {"weight": torch.zeros(3)}}, file)
    else:
        file.write_bytes({"text": b"no model", "nothing": b"", "half": whole[: len(whole) // 2]}[content])
    for call in (
        lambda: FIMP.load(str(tmp_path / "model"), adata=False, accelerator="cpu"),
        lambda: fimp_sc.tl.embed(trained.adata.copy(), model=tmp_path / "model", accelerator="cpu"),
    ):
        with pytest.raises(CheckpointError, match=r"model\.pt' is no saved model, or not all of it"):
            call()
    file.write_bytes(whole)
    loaded = FIMP.load(tmp_path / "model", trained.adata, accelerator="cpu")
    np.testing.assert_array_equal(loaded.get_latent_representation(), trained.get_latent_representation())
    np.testing.assert_array_equal(loaded.predict(), trained.predict())


def test_load_names_the_other_way_to_read(saved, trained, tmp_path) -> None:
    with pytest.raises(CheckpointError, match="from_pretrained"):
        FIMP.load(saved, adata=False)
    with pytest.raises(CheckpointError, match=r"here_model\.pt' does not exist"):
        FIMP.load(tmp_path, adata=False, prefix="here_")
    trained.save(str(tmp_path), prefix="here_", overwrite=True)
    loaded = FIMP.load(tmp_path, False, "cpu", "auto", "here_").module.state_dict()
    for name, value in trained.module.state_dict().items():
        assert torch.equal(loaded[name], value)
