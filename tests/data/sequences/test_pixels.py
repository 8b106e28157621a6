"""Reading pixels: order, files in odd forms, and files that have changed."""

from __future__ import annotations

import contextlib

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from PIL import EpsImagePlugin, Image

from fimp_sc._errors import MissingKeyError
from fimp_sc.data import read_pixels
from fimp_sc.data.sequences._image_files import inspect_files


def of_files(paths, shape, **info):
    obs = pd.DataFrame({"path": [str(path) for path in paths]}, index=[str(i) for i in range(len(paths))])
    return ad.AnnData(obs=obs, uns={"fimp_modality": {"kind": "patch", "image_shape": list(shape), **info}})


def of_pixels(pixels, shape=None):
    uns = {"fimp_modality": {"kind": "patch", "image_shape": list(pixels.shape[1:] if shape is None else shape)}}
    obs = pd.DataFrame(index=[str(i) for i in range(len(pixels))])
    return ad.AnnData(obs=obs, obsm={"pixels": pixels.reshape(len(pixels), -1)}, uns=uns)


def random_pixels(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


def test_rows_come_in_the_order_asked_for():
    pixels = random_pixels(5, 4, 3, 2)
    adata = of_pixels(pixels)
    np.testing.assert_array_equal(read_pixels(adata, [3, 0, 3]), pixels[[3, 0, 3]])
    assert read_pixels(adata, []).shape == (0, 4, 3, 2)
    assert read_pixels(adata, 2).shape == (1, 4, 3, 2)
    read_pixels(adata, [0])[:] = 0
    np.testing.assert_array_equal(read_pixels(adata, [0]), pixels[[0]])


def test_pixels_of_a_backed_object(tmp_path):
    pixels = random_pixels(5, 4, 3, 1)
    of_pixels(pixels).write_h5ad(tmp_path / "pixels.h5ad")
    adata = ad.read_h5ad(tmp_path / "pixels.h5ad", backed="r")
    np.testing.assert_array_equal(read_pixels(adata, [4, 1, 4]), pixels[[4, 1, 4]])
    adata.file.close()


@pytest.mark.parametrize(("nodes", "error"), [([5], IndexError), ([-1], IndexError), ([0.5], TypeError)])
def test_positions_must_exist(nodes, error):
    with pytest.raises(error, match="nodes must be"):
        read_pixels(of_pixels(random_pixels(5, 4, 3, 1)), nodes)


def test_no_images_is_explained():
    adata = of_pixels(random_pixels(5, 4, 3, 1))
    adata.uns["fimp_modality"]["image_shape"] = [4, 4, 1]
    with pytest.raises(ValueError, match=r"\(5, 12\), but 5 images of 4 × 4 pixels × 1 channels need \(5, 16\)"):
        read_pixels(adata, [0])
    adata.uns["fimp_modality"]["image_shape"] = [4, 0, 1]
    with pytest.raises(ValueError, match=r"found \[4, 0, 1\]"):
        read_pixels(adata, [0])
    del adata.uns["fimp_modality"]["image_shape"]
    with pytest.raises(MissingKeyError, match="image_shape"):
        read_pixels(adata, [0])
    adata.uns["fimp_modality"]["image_shape"] = [4, 3, 1]
    adata.obsm["pixels"] = adata.obsm["pixels"].astype(float)
    with pytest.raises(TypeError, match="must be uint8, found float64"):
        read_pixels(adata, [0])
    del adata.obsm["pixels"]
    with pytest.raises(MissingKeyError, match="Store pixels there, or file names"):
        read_pixels(adata, [0])


@pytest.mark.parametrize("turn", range(1, 9))
def test_photographs_are_turned_as_the_camera_noted(tmp_path, turn):
    upright = random_pixels(4, 6, 3)
    # How a camera that is held in another way stores what is upright.
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright),
        7: np.rot90(upright, 2).transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[turn]
    tags = Image.Exif()
    tags[0x0112] = turn
    for name in ("photo.png", "photo.tiff"):
        Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / name, exif=tags)
        _, shape = inspect_files([tmp_path / name], None)
        assert shape == (4, 6, 3)
        np.testing.assert_array_equal(read_pixels(of_files([tmp_path / name], shape), [0])[0], upright)


def test_gray_color_palette_and_transparent_files(tmp_path):
    color, gray = random_pixels(4, 6, 3), random_pixels(4, 6)
    opaque = np.concatenate([color, np.full((4, 6, 1), 255, np.uint8)], axis=2)
    few = np.array([[255, 0, 0], [0, 0, 255]], np.uint8)[gray % 2]
    for name, pixels in (("color", color), ("gray", gray), ("alpha", opaque)):
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    palette = Image.fromarray(few).quantize(4)
    palette.save(tmp_path / "palette.png", transparency=bytes([255, 128, 255, 255]))
    paths = [tmp_path / f"{name}.png" for name in ("color", "gray", "alpha", "palette")]
    assert inspect_files(paths, None)[1] == (4, 6, 3)
    assert inspect_files(paths[1:2], None)[1] == (4, 6, 1)
    expected = np.stack([color, np.repeat(gray[..., None], 3, axis=2), color, few])
    np.testing.assert_array_equal(read_pixels(of_files(paths, (4, 6, 3)), np.arange(4)), expected)
    np.testing.assert_array_equal(read_pixels(of_files(paths, (4, 6, 1)), [1])[0, ..., 0], gray)


def test_more_than_eight_bits_are_not_cut_off(tmp_path):
    Image.fromarray(np.full((4, 6), 40000, np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(ValueError, match=r"deep.png' has more than 8 bits"):
        inspect_files([tmp_path / "deep.png"], None)
    with pytest.raises(ValueError, match=r"deep.png' has more than 8 bits"):
        read_pixels(of_files([tmp_path / "deep.png"], (4, 6, 1)), [0])


def test_files_that_have_changed_are_named(tmp_path):
    path = tmp_path / "photo.jpg"
    Image.fromarray(random_pixels(64, 64, 3)).save(path)
    adata = of_files([path], (64, 64, 3))
    assert read_pixels(adata, [0]).shape == (1, 64, 64, 3)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    assert inspect_files([path], None)[1] == (64, 64, 3), "a header that is fine"
    with pytest.raises(ValueError, match=r"photo\.jpg' cannot be read"):
        read_pixels(adata, [0])
    Image.fromarray(random_pixels(32, 64, 3)).save(path)
    with pytest.raises(ValueError, match=r"photo\.jpg' is 32 × 64 pixels .* 64 × 64 were expected"):
        read_pixels(adata, [0])
    assert read_pixels(of_files([path], (64, 64, 3), resize=True), [0]).shape == (1, 64, 64, 3)
    path.unlink()
    with pytest.raises(ValueError, match=r"photo\.jpg' is no longer there"):
        read_pixels(adata, [0])


@pytest.mark.parametrize("ending", ["png", "jpg", "tif", "webp"])
def test_formats_that_are_read(tmp_path, ending):
    path = tmp_path / f"photo.{ending}"
    Image.fromarray(random_pixels(8, 9, 3)).save(path)
    assert inspect_files([path], None)[1] == (8, 9, 3)
    assert read_pixels(of_files([path], (8, 9, 3)), [0]).shape == (1, 8, 9, 3)


@pytest.mark.parametrize("name", ["drawing.eps", "drawing.png"])
@pytest.mark.parametrize("kind", ["eps", "ps"])
def test_nothing_is_drawn_by_another_program(tmp_path, monkeypatch, name, kind):
    called = []

    def ghostscript(*args, **_):
        called.append(args)
        raise OSError

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", ghostscript)
    path = tmp_path / name
    if kind == "eps":
        Image.fromarray(random_pixels(8, 9, 3)).save(path, format="EPS")
        with Image.open(path) as image, contextlib.suppress(OSError):
            image.load()
        assert called, "Pillow itself asks for Ghostscript"
        called.clear()
    else:
        path.write_text("%!PS-Adobe-3.0\n%%BoundingBox: 0 0 9 8\n(x) run\n")
    with pytest.raises(ValueError, match=r"drawing\..*PNG, JPEG, TIFF and WEBP are read"):
        inspect_files([path], None)
    with pytest.raises(ValueError, match=r"drawing\..*PNG, JPEG, TIFF and WEBP are read"):
        read_pixels(of_files([path], (8, 9, 3), resize=True), [0])
    assert called == []


@pytest.mark.parametrize("kind", ["BMP", "GIF", "PPM", "ICO", "TGA"])
def test_other_formats_are_not_read(tmp_path, kind):
    path = tmp_path / "photo.png"
    Image.fromarray(random_pixels(16, 16, 3)).save(path, format=kind)
    with pytest.raises(ValueError, match="are read"):
        inspect_files([path], None)


def test_images_that_unpack_without_end_are_refused(tmp_path):
    path = tmp_path / "bomb.png"
    Image.new("1", (20_000, 20_000)).save(path)
    assert path.stat().st_size < 100_000
    for call in (
        lambda: inspect_files([path], (8, 8)),
        lambda: read_pixels(of_files([path], (8, 8, 1), resize=True), [0]),
    ):
        with pytest.raises(ValueError, match=r"bomb\.png.*400000000 pixels.*MAX_IMAGE_PIXELS"):
            call()
