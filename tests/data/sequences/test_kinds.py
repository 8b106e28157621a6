"""Kinds of sequences: which there are, what replaces them, and how those of the package read masks and values."""

from __future__ import annotations

import subprocess
import sys

import anndata as ad
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import fimp_sc
from fimp_sc.data import SequenceKind, describe_modality, register_kind
from fimp_sc.data.sequences import _kinds
from fimp_sc.data.sequences._image import PatchKind
from fimp_sc.data.sequences._kinds import sequence_kind, sequence_kinds
from fimp_sc.data.sequences._signal import SignalKind
from fimp_sc.data.sequences._text import TextKind
from fimp_sc.model import FIMP

SIGNAL, PATCH = SignalKind(), PatchKind()


@pytest.fixture(autouse=True)
def _own_registry(monkeypatch):
    known = dict(sequence_kinds())
    monkeypatch.setattr(_kinds, "_kinds", dict(known))
    yield
    monkeypatch.undo()
    assert dict(sequence_kinds()) == known


class Halves(SignalKind):
    """Signals of which each token is a half."""

    def default_token_size(self, size):
        return size[0] // 2


class Walk(SequenceKind):
    """As little as a kind must say."""

    name, size_names = "walk", ("steps",)

    def size(self, adata, where="adata"):
        return [adata.n_vars]

    def default_token_size(self, size):
        return 2

    def tokens(self, size, token_size):
        return size[0] // token_size, token_size

    def read(self, adata, nodes, token_size, start=0):
        values = np.asarray(adata.X, dtype=np.float32)[nodes]
        return values.reshape(len(nodes), -1, token_size)

    def restore(self, tokens, size, token_size):
        return tokens.reshape(len(tokens), -1)


# Which there are ------------------------------------------------------------------------------------------------------


def test_kinds_of_the_package() -> None:
    assert set(sequence_kinds()) == {"signal", "patch", "text"}
    assert isinstance(sequence_kind("signal"), SignalKind)
    assert isinstance(sequence_kind("patch"), PatchKind)
    assert isinstance(sequence_kind("text"), TextKind)


def test_a_kind_that_is_registered_is_known(recordings) -> None:
    register_kind(Walk())
    adata = recordings["fmri"]
    adata.uns["fimp_modality"] |= {"kind": "walk"}
    found = describe_modality(recordings)
    assert found["kind"] == "walk"
    assert found["size"] == [47]


def test_a_kind_of_the_package_can_be_replaced(recordings) -> None:
    register_kind(Halves())
    assert isinstance(sequence_kind("signal"), Halves)
    FIMP.setup_mudata(recordings)
    with pytest.warns(UserWarning, match="the last 1 of 47 time points"):
        model = FIMP(recordings, n_latent=12, n_heads=2)
    assert model.token_sizes == {"fmri": 23}


def test_a_kind_is_replaced_before_the_package_looks_at_its_own() -> None:
    """In a process of its own, as this one has looked already."""
    code = """
from fimp_sc.data import register_kind
from fimp_sc.data.sequences import _kinds
class Other(_kinds.SequenceKind):
    name, size_names = "signal", ("steps",)
    size = default_token_size = tokens = read = restore = lambda self, *args: None
register_kind(Other())
print(*(type(kind).__name__ for _, kind in sorted(_kinds.sequence_kinds().items())))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["PatchKind", "Other", "TextKind"]


@pytest.mark.parametrize("name", ["expression", "feature"])
def test_names_of_tables_are_refused(name: str) -> None:
    table = type("Table", (Walk,), {"name": name})()
    with pytest.raises(ValueError, match=f"{name!r} is the name of a kind of tables: choose another"):
        register_kind(table)
    assert name not in sequence_kinds()


@pytest.mark.parametrize("kind", [Walk, "walk", None])
def test_a_class_is_not_a_kind(kind) -> None:
    with pytest.raises(TypeError, match="takes an instance of a SequenceKind, found"):
        register_kind(kind)
    assert "walk" not in sequence_kinds()


def test_a_kind_must_say_how_it_is_read() -> None:
    half = type("Half", (SequenceKind,), {"name": "half", "size_names": ("steps",)})
    with pytest.raises(TypeError, match="abstract"):
        half()


ENTRIES = {
    "describe_modality": lambda mdata: describe_modality(mdata),
    "describe_modality of AnnData": lambda mdata: describe_modality(mdata["fmri"]),
    "setup_mudata": lambda mdata: FIMP.setup_mudata(mdata),
    "setup_mudata by name": lambda mdata: FIMP.setup_mudata(mdata, modality="fmri"),
    "setup_anndata": lambda mdata: FIMP.setup_anndata(mdata["fmri"]),
    "embed": lambda mdata: fimp_sc.tl.embed(mdata),
    "embed of AnnData": lambda mdata: fimp_sc.tl.embed(mdata["fmri"]),
    "annotate": lambda mdata: fimp_sc.tl.annotate(mdata, "lobe"),
    "impute": lambda mdata: fimp_sc.tl.impute(mdata),
}


@pytest.mark.parametrize("entry", ENTRIES)
def test_unknown_kinds_are_refused_wherever_an_object_enters(entry: str, recordings) -> None:
    register_kind(Walk())
    recordings["fmri"].uns["fimp_modality"] |= {"kind": "sound"}
    before = sorted(recordings["fmri"].obsm)
    with pytest.raises(ValueError, match=r"\['kind'\] is 'sound': it must be one of .*'walk'.*'feature'") as caught:
        ENTRIES[entry](recordings)
    assert "'signal'" in str(caught.value)
    assert "'patch'" in str(caught.value)
    assert sorted(recordings["fmri"].obsm) == before


def test_what_a_kind_need_not_say() -> None:
    kind, adata = Walk(), ad.AnnData(np.ones((3, 4), np.float32))
    assert kind.left_over([5], 2) is None
    assert kind.mask(np.ones((3, 4), bool), [4], 2) is None
    assert kind.parts(adata) == {"X": {"": adata.X}}
    assert kind.fits([4], [4]) is None
    assert kind.fits((4,), [4]) is None
    assert kind.fits([3], [4]) == "it reads nodes of size [4], found [3]"
    assert (kind.by_node, kind.located, kind.results) == (False, False, "layers")


# Masks ----------------------------------------------------------------------------------------------------------------


@given(n=st.integers(1, 4), n_times=st.integers(1, 12), size=st.integers(1, 5), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_a_segment_with_a_hidden_time_point_is_hidden(n, n_times, size, seed) -> None:
    size = min(size, n_times)
    hidden = np.random.default_rng(seed).random((n, n_times)) < 0.2
    found = SIGNAL.mask(hidden, [n_times], size)
    assert found.shape == (n, SIGNAL.tokens([n_times], size)[0])
    assert found.dtype == bool
    for i in range(n):
        for t in range(n_times // size):
            assert found[i, t] == any(hidden[i, t * size + k] for k in range(size))


@pytest.mark.parametrize("shape", [(3, 6), (3, 8), (3,), (3, 7, 1)])
def test_masks_of_signals_of_another_shape(shape) -> None:
    assert SIGNAL.mask(np.ones(shape, bool), [7], 2) is None


@given(
    n=st.integers(1, 3), height=st.integers(2, 7), width=st.integers(2, 7), channels=st.integers(1, 3),
    side=st.integers(1, 4), seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_a_patch_with_a_hidden_pixel_is_hidden(n, height, width, channels, side, seed) -> None:
    size, side = [height, width, channels], min(side, height, width)
    rng = np.random.default_rng(seed)
    pixels = rng.random((n, height, width)) < 0.1
    of_channels = rng.random((n, *size)) < 0.05
    rows, columns = height // side, width // side

    def naive(hidden: np.ndarray) -> np.ndarray:
        out = np.zeros((n, rows * columns), bool)
        for i in range(n):
            for y in range(rows * side):
                for x in range(columns * side):
                    out[i, y // side * columns + x // side] |= bool(hidden[i, y, x].any())
        return out

    for hidden in (pixels, pixels[..., None], pixels.reshape(n, -1)):
        np.testing.assert_array_equal(PATCH.mask(hidden, size, side), naive(pixels))
    for hidden in (of_channels, of_channels.reshape(n, -1)):
        found = PATCH.mask(hidden, size, side)
        np.testing.assert_array_equal(found, naive(of_channels))
        assert found.dtype == bool
        assert found.shape == (n, PATCH.tokens(size, side)[0])


@pytest.mark.parametrize("shape", [(4, 5), (4, 5, 6), (4, 6, 5, 2), (4, 59), (4, 61), (4,), (4, 6, 5, 3, 1)])
def test_masks_of_images_of_another_shape(shape) -> None:
    assert PATCH.mask(np.ones(shape, bool), [6, 5, 3], 2) is None


# What is read, and put back -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("token_size", [5, 47])
def test_signals_come_back(recordings, token_size: int) -> None:
    adata, nodes = recordings["fmri"], np.array([7, 0, 3, 3])
    size = SIGNAL.size(adata)
    assert size == [47]
    tokens = SIGNAL.read(adata, nodes, token_size)
    assert tokens.shape == (4, *SIGNAL.tokens(size, token_size))
    back, whole = SIGNAL.restore(tokens, size, token_size), 47 // token_size * token_size
    np.testing.assert_array_equal(back[:, :whole], adata.X[nodes, :whole])
    assert back.shape == (4, 47)
    assert np.isnan(back[:, whole:]).all()
    assert (SIGNAL.left_over(size, token_size) is None) == (whole == 47)


@pytest.mark.parametrize("stored", ["pixels", "files"])
@pytest.mark.parametrize("token_size", [2, 3, 8])
def test_images_come_back(stored: str, token_size: int, tmp_path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 9, 3)).astype(np.uint8)
    images = pixels
    if stored == "files":
        images = [tmp_path / f"{i}.png" for i in range(6)]
        for path, image in zip(images, pixels, strict=True):
            Image.fromarray(image).save(path)
    mdata = fimp_sc.pp.images(images, adjacency=np.roll(np.eye(6), 1, 1), lazy=stored == "files")
    adata, nodes = mdata["image"], np.array([5, 1, 1])
    size = PATCH.size(adata)
    assert size == [8, 9, 3]
    tokens = PATCH.read(adata, nodes, token_size)
    assert tokens.shape == (3, *PATCH.tokens(size, token_size))
    back = PATCH.restore(tokens, size, token_size)
    height, width = 8 // token_size * token_size, 9 // token_size * token_size
    assert back.shape == (3, 8, 9, 3)
    np.testing.assert_array_equal(back[:, :height, :width], pixels[nodes, :height, :width])
    assert np.isnan(back[:, height:]).all()
    assert np.isnan(back[:, :, width:]).all()
    assert (PATCH.left_over(size, token_size) is None) == ((height, width) == (8, 9))
    attribute, key = ("obsm", "pixels") if stored == "pixels" else ("obs", "path")
    (found,) = PATCH.parts(adata).items()
    assert found[0] == attribute
    assert list(found[1]) == [key]
    assert found[1][key] is getattr(adata, attribute)[key] or (found[1][key] == adata.obs[key]).all()


def test_signals_are_in_x(recordings) -> None:
    adata = recordings["fmri"]
    assert list(SIGNAL.parts(adata)) == ["X"]
    np.testing.assert_array_equal(SIGNAL.parts(adata)["X"][""], adata.X)


def test_what_a_model_can_read() -> None:
    assert SIGNAL.fits([47], [47]) is None
    assert SIGNAL.fits([20], [47]) is None
    assert "reads up to 1,047 time points, found 1,048: cut the recordings" in SIGNAL.fits([1048], [1047])
    assert PATCH.fits([8, 9, 3], (8, 9, 3)) is None
    for other in ([9, 8, 3], [8, 9, 1], [7, 9, 3]):
        message = PATCH.fits(other, [8, 9, 3])
        assert f"reads images of [8, 9, 3] (height, width, channels), found {other}" in message
        assert "image_size=" in message
