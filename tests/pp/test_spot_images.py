"""Patches around spots against slices of the image, whatever it comes as."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from PIL import Image
from scipy import sparse

import fimp_sc
from fimp_sc.data import describe_modality, read_pixels
from fimp_sc.pp import spot_images

HEIGHT, WIDTH = 90, 120


@pytest.fixture(scope="module")
def slide():
    return np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3)).astype(np.uint8)


@pytest.fixture
def spots():
    rng = np.random.default_rng(1)
    adata = AnnData(sparse.csr_matrix(rng.poisson(1.0, (12, 5)).astype(np.float32)))
    adata.obs["region"] = list("abc") * 4
    adata.obsm["spatial"] = rng.integers([20, 20], [WIDTH - 20, HEIGHT - 20], (12, 2)).astype(float)
    fimp_sc.pp.spatial_graph(adata, n_neighbors=3)
    return adata


def cut(slide, places, side):
    """Squares of even width around whole places."""
    half = side // 2
    return np.stack([slide[int(y) - half : int(y) + half, int(x) - half : int(x) + half] for x, y in places])


def visium(slide, *, scale=1.0, diameter=32.5):
    """An entry of Visium, by default with 2 micrometers per pixel: its diameters are those of 65 micrometers."""
    factors = {"tissue_hires_scalef": scale, "spot_diameter_fullres": diameter}
    return {"s1": {"images": {"hires": slide}, "scalefactors": factors}}


def test_patches_are_the_pixels_around_spots(spots, slide) -> None:
    before = spots.copy()
    mdata = spot_images(spots, slide, width_px=16, image_size=16)
    found = read_pixels(mdata["he"], np.arange(12))
    np.testing.assert_array_equal(found, cut(slide, spots.obsm["spatial"], 16))
    description = describe_modality(mdata, "he", need_coordinates=True)
    assert description["image_shape"] == (16, 16, 3)
    assert list(mdata["he"].obs_names) == list(spots.obs_names)
    assert list(mdata["he"].obs["region"]) == list(spots.obs["region"])
    assert (mdata["he"].obsp["spatial_connectivities"] != spots.obsp["spatial_connectivities"]).nnz == 0
    assert mdata["rna"] is spots
    assert (spots.X != before.X).nnz == 0
    assert set(spots.obsm) == set(before.obsm)


@pytest.mark.parametrize("kind", ["tiff", "tiled", "channels first", "png", "zarr", "dask", "float", "rgba", "xarray"])
def test_images_of_every_origin_are_read_alike(spots, slide, tmp_path, kind: str) -> None:
    image = slide
    if kind in ("tiff", "tiled", "channels first"):
        tifffile = pytest.importorskip("tifffile")
        pytest.importorskip("zarr")
        image = tmp_path / "slide.tif"
        if kind == "channels first":
            tifffile.imwrite(image, slide.transpose(2, 0, 1), photometric="rgb", planarconfig="separate")
        else:
            tifffile.imwrite(image, slide, photometric="rgb", tile=(32, 32) if kind == "tiled" else None)
    elif kind == "png":
        image = str(tmp_path / "slide.png")
        Image.fromarray(slide).save(image)
    elif kind == "zarr":
        image = pytest.importorskip("zarr").array(slide)
    elif kind == "dask":
        image = pytest.importorskip("dask.array").from_array(slide, chunks=(32, 32, 3))
    elif kind == "float":
        image = slide / np.float32(255)
    elif kind == "rgba":
        image = np.concatenate([slide, np.full((HEIGHT, WIDTH, 1), 255, np.uint8)], 2)
    elif kind == "xarray":
        image = pytest.importorskip("xarray").DataArray(slide.transpose(2, 0, 1), dims=("c", "y", "x"))
    mdata = spot_images(spots, image, width_px=16, image_size=16)
    np.testing.assert_array_equal(read_pixels(mdata["he"], np.arange(12)), cut(slide, spots.obsm["spatial"], 16))


def test_images_of_spatialdata_are_read(spots, slide) -> None:
    models = pytest.importorskip("spatialdata.models")
    parsed = models.Image2DModel.parse(slide.transpose(2, 0, 1), dims=("c", "y", "x"), scale_factors=[2])
    mdata = spot_images(spots, parsed, width_px=16, image_size=16)
    np.testing.assert_array_equal(read_pixels(mdata["he"], np.arange(12)), cut(slide, spots.obsm["spatial"], 16))


def test_micrometers_of_visium_follow_from_the_diameter_of_a_spot(spots, slide) -> None:
    """Half a pixel a micrometer in full resolution; the image that is kept has a quarter of it."""
    expected = cut(slide, spots.obsm["spatial"], 16)
    spots.obsm["spatial"] = 4 * spots.obsm["spatial"]
    spots.uns["spatial"] = visium(slide, scale=0.25)
    mdata = spot_images(spots, width_um=128, image_size=16)
    np.testing.assert_array_equal(read_pixels(mdata["he"], np.arange(12)), expected)
    assert mdata["he"].uns["fimp_modality"]["patch_width_px"] == pytest.approx(16)
    assert mdata["he"].uns["fimp_modality"]["microns_per_pixel"] == pytest.approx(8)
    # Visium HD says it.
    spots.uns["spatial"]["s1"]["scalefactors"]["microns_per_pixel"] = 1.0
    assert spot_images(spots, width_um=64, image_size=16)["he"].uns["fimp_modality"]["patch_width_px"] == 16
    # Xenium: coordinates are micrometers.
    del spots.uns["spatial"]
    how = {"microns_per_pixel": 4.0, "scale": 0.25}
    mdata = spot_images(spots, slide, width_um=64, image_size=16, **how)
    np.testing.assert_array_equal(read_pixels(mdata["he"], np.arange(12)), expected)


def test_borders_are_continued_and_patches_resized(spots, slide) -> None:
    spots.obsm["spatial"][0] = [3, 88]
    mdata = spot_images(spots, slide, width_px=16, image_size=16)
    padded = np.pad(slide, [(20, 20), (20, 20), (0, 0)], mode="edge")
    expected = cut(padded, spots.obsm["spatial"][:1] + 20, 16)[0]
    np.testing.assert_array_equal(read_pixels(mdata["he"], [0])[0], expected)
    flat = np.full((HEIGHT, WIDTH), 77, np.uint8)
    found = read_pixels(spot_images(spots, flat, width_px=31.7, image_size=20)["he"], np.arange(12))
    assert found.shape == (12, 20, 20, 1)
    assert (found == 77).all()


def test_samples_have_images_of_their_own(spots, slide) -> None:
    spots.obs["section"] = pd.Categorical(["one"] * 6 + ["two"] * 6)
    fimp_sc.pp.spatial_graph(spots, n_neighbors=3, library_key="section", overwrite=True)
    other = 255 - slide
    mdata = spot_images(spots, {"one": slide, "two": other}, width_px=16, image_size=16, library_key="section")
    expected = np.concatenate([cut(slide, spots.obsm["spatial"][:6], 16), cut(other, spots.obsm["spatial"][6:], 16)])
    np.testing.assert_array_equal(read_pixels(mdata["he"], np.arange(12)), expected)
    assert mdata["he"].uns["fimp_modality"]["library_key"] == "section"
    spots.uns["spatial"] = {"one": visium(slide)["s1"], "two": visium(other)["s1"]}
    again = spot_images(spots, width_px=16, image_size=16, library_key="section")
    np.testing.assert_array_equal(read_pixels(again["he"], np.arange(12)), expected)
    with pytest.raises(ValueError, match="has images of 2 samples, 'one', 'two': name the column"):
        spot_images(spots, width_px=16)
    with pytest.raises(ValueError, match="one image for several samples"):
        spot_images(spots, slide, width_px=16, library_key="section")
    with pytest.raises(KeyError, match="'two' is not in image"):
        spot_images(spots, {"one": slide}, width_px=16, library_key="section")
    with pytest.raises(ValueError, match="name the column of samples with library_key="):
        spot_images(spots, {"one": slide}, width_px=16)


def test_what_is_wrong_is_told(spots, slide) -> None:
    with pytest.raises(ValueError, match="either width_um= in micrometers or width_px= in pixels"):
        spot_images(spots, slide)
    with pytest.raises(ValueError, match="width_um= needs microns_per_pixel="):
        spot_images(spots, slide, width_um=100)
    with pytest.raises(KeyError, match=r"'spatial' is not in adata.uns .* pass image="):
        spot_images(spots, width_px=16)
    with pytest.raises(ValueError, match=r"12 of 12 nodes are outside of the image of 9 × 12 pixels .* pass scale="):
        spot_images(spots, slide[:9, :12], width_px=4)
    with pytest.raises(ValueError, match=r"shape \(90, 120, 7\), in which 7 are channels"):
        spot_images(spots, np.zeros((90, 120, 7), np.uint8), width_px=16)
    with pytest.raises(TypeError, match="must be an array of numbers, a file or an image of SpatialData, found set"):
        spot_images(spots, {1, 2}, width_px=16)
    with pytest.raises(ValueError, match=r"There is no image file 'slide.tif'"):
        spot_images(spots, "slide.tif", width_px=16)
    with pytest.warns(UserWarning, match="A patch covers 16 pixels of the image and is enlarged to 224"):
        spot_images(spots, slide, width_px=16)
    spots.uns["spatial"] = {"s1": {"images": {}, "scalefactors": {}}}
    with pytest.raises(KeyError, match=r"uns\['spatial'\] has no image 'hires' or 'lowres' with its factor"):
        spot_images(spots, width_px=16)
    del spots.obsp["spatial_connectivities"]
    with pytest.raises(KeyError, match=r"'spatial_connectivities' is not in adata.obsp"):
        spot_images(spots, slide, width_px=16)


def test_a_foundation_model_reads_them(spots, slide, tmp_path) -> None:
    transformers = pytest.importorskip("transformers")
    config = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}
    transformers.Dinov2Model(transformers.Dinov2Config(**config)).save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.5] * 3}))
    mdata = spot_images(spots, slide, width_px=24, image_size=24)
    foundation = fimp_sc.pretrained.load("vit", tmp_path)
    fimp_sc.tl.embed(mdata, modality="he", foundation=foundation, zero_shot=True, verbose=False, accelerator="cpu")
    assert mdata["he"].obsm["X_fimp"].shape == (12, 16)


@pytest.mark.parametrize("value", [0, -1.0, float("nan"), "wide", None])
@pytest.mark.parametrize("name", ["tissue_hires_scalef", "spot_diameter_fullres", "microns_per_pixel"])
def test_scale_factors_must_be_numbers(spots, slide, name, value) -> None:
    factors = {"tissue_hires_scalef": 1.0, "spot_diameter_fullres": 8.0, "microns_per_pixel": 8.0, name: value}
    if name == "spot_diameter_fullres":
        del factors["microns_per_pixel"]
    spots.uns["spatial"] = {"one": {"images": {"hires": slide}, "scalefactors": factors}}
    with pytest.raises(ValueError, match=rf"'{name}' in the scale factors of adata.uns\['spatial'\] is {value!r}"):
        spot_images(spots, width_um=128, image_size=16)
    # What is passed is not asked of the object.
    assert spot_images(spots, width_um=128, image_size=16, scale=1.0, microns_per_pixel=8.0)["he"].n_obs == 12


def test_an_image_without_a_factor_and_entries_without_images(spots, slide) -> None:
    spots.uns["spatial"] = {"one": {"images": {"hires": slide}, "scalefactors": {"spot_diameter_fullres": 8.0}}}
    with pytest.raises(KeyError, match=r"no image 'hires' or 'lowres' with its factor .*images: 'hires'"):
        spot_images(spots, width_px=16)
    spots.uns["spatial"] = {}
    with pytest.raises(KeyError, match="has no images: pass image="):
        spot_images(spots, width_px=16)


@pytest.mark.parametrize(
    "width",
    [{"width_px": 121.0}, {"width_um": 1.0, "microns_per_pixel": 1e-9}, {"width_um": 1, "microns_per_pixel": 2}],
)
def test_a_patch_is_a_part_of_the_image(spots, slide, width) -> None:
    with pytest.raises(ValueError, match=r"makes patches of .* pixels, and the image has 90 × 120"):
        spot_images(spots, slide, image_size=16, **width)


def test_places_in_one_spot_of_the_image_are_told(spots, slide) -> None:
    wide = np.pad(slide, [(0, 6000), (0, 6000), (0, 0)])
    with pytest.warns(UserWarning, match=r"All 12 nodes lie within .*another unit"):
        spot_images(spots, wide, width_px=16, image_size=16)


def test_a_damaged_file_is_named(spots, slide, tmp_path) -> None:
    tifffile = pytest.importorskip("tifffile")
    pytest.importorskip("zarr")
    tifffile.imwrite(tmp_path / "slide.tif", slide, tile=(16, 16))
    content = (tmp_path / "slide.tif").read_bytes()
    (tmp_path / "slide.tif").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"cannot be read at rows .*damaged or incomplete"):
        spot_images(spots, tmp_path / "slide.tif", width_px=16, image_size=16)
