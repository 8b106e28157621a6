"""Images: pixels against what was put in, distances and graphs against formulas of another kind."""

from __future__ import annotations

import logging

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from fimp_sc.data import describe_modality, read_pixels
from fimp_sc.data._modality import quiet_mudata
from fimp_sc.pp import images

KM_PER_RADIAN = 6371.0088


def toy_places(n=20, seed=0):
    """Return places within some km in Sweden."""
    return np.array([55.7, 13.2]) + np.random.default_rng(seed).normal(scale=0.02, size=(n, 2))


def toy_images(n=20, seed=0, shape=(6, 8, 3)):
    return np.random.default_rng(seed).integers(0, 256, (n, *shape)).astype(np.uint8)


def distances_km(places):
    """Return angles between vectors from the center of the Earth, which is not how the package does it."""
    latitude, longitude = np.radians(places).T
    vectors = np.stack(
        [np.cos(latitude) * np.cos(longitude), np.cos(latitude) * np.sin(longitude), np.sin(latitude)], axis=1
    )
    crossed = np.linalg.norm(np.cross(vectors[:, None], vectors[None]), axis=-1)
    return KM_PER_RADIAN * np.arctan2(crossed, vectors @ vectors.T)


@pytest.fixture
def files(tmp_path):
    """Write twenty PNG images, and return their paths and pixels."""
    pixels = toy_images()
    paths = []
    for i, image in enumerate(pixels):
        paths.append(tmp_path / f"image{i:02d}.png")
        Image.fromarray(image).save(paths[-1])
    return paths, pixels


def test_array_of_colors():
    pixels, places = toy_images(), toy_places()
    mdata = images(pixels, coordinates=places, labels=["a", "b"] * 10, image_size=None)
    adata = mdata["image"]
    assert list(mdata.mod) == ["image"]
    assert adata.shape == (20, 0)
    np.testing.assert_array_equal(adata.obsm["pixels"], pixels.reshape(20, -1))
    np.testing.assert_array_equal(adata.obsm["spatial"], places)
    assert adata.obs["label"].tolist() == ["a", "b"] * 10
    assert adata.obs_names[3] == "image_3"
    assert dict(adata.uns["fimp_modality"]) == {
        "kind": "patch",
        "connectivities_key": "spatial_connectivities",
        "weighted": False,
        "image_shape": [6, 8, 3],
        "resize": False,
        "graph": "knn",
        "coordinate_unit": "degrees: latitude, longitude",
        "distance_unit": "km",
    }
    np.testing.assert_array_equal(read_pixels(adata, [4, 0, 4]), pixels[[4, 0, 4]])


def test_layouts_and_number_types_give_the_same_pixels():
    pixels, places = toy_images(), toy_places()
    expected = pixels.reshape(20, -1)
    for given, channels in (
        (pixels.astype(np.int64), "last"),
        (pixels / 255, "last"),
        (np.moveaxis(pixels, 3, 1), "first"),
    ):
        adata = images(given, coordinates=places, channels=channels)["image"]
        np.testing.assert_array_equal(adata.obsm["pixels"], expected)
        assert adata.obsm["pixels"].dtype == np.uint8
    nearly_white = images(np.full((20, 6, 8), 0.999), coordinates=places)["image"]  # 254.7 of 255
    assert (nearly_white.obsm["pixels"] == 255).all()
    gray = images(pixels[..., 0], coordinates=places)["image"]
    np.testing.assert_array_equal(read_pixels(gray, np.arange(20))[..., 0], pixels[..., 0])
    black_and_white = images(pixels[..., 0] > 100, coordinates=places)["image"]
    np.testing.assert_array_equal(black_and_white.obsm["pixels"].reshape(20, 6, 8), (pixels[..., 0] > 100) * 255)


def test_nearest_places_and_their_distances():
    places = toy_places()
    adata = images(toy_images(), coordinates=places, n_neighbors=4)["image"]
    lengths = distances_km(places)
    expected = np.zeros((20, 20))
    for row, order in enumerate(np.argsort(lengths + np.diag(np.full(20, np.inf)), axis=1)):
        expected[row, order[:4]] = 1
    np.testing.assert_array_equal(adata.obsp["spatial_connectivities"].toarray(), expected)
    np.testing.assert_allclose(adata.obsp["spatial_distances"].toarray(), expected * lengths, rtol=1e-9)


@pytest.mark.parametrize("radius_km", [1.0, 2.5])
def test_places_within_a_radius(radius_km):
    places = toy_places(40)
    adata = images(toy_images(40), coordinates=places, method="radius", radius_km=radius_km)["image"]
    lengths = distances_km(places)
    within = (lengths <= radius_km) & ~np.eye(40, dtype=bool)
    np.testing.assert_array_equal(adata.obsp["spatial_connectivities"].toarray(), within)
    np.testing.assert_allclose(adata.obsp["spatial_distances"].toarray(), within * lengths, rtol=1e-9)


def test_nearest_places_no_farther_than_a_radius():
    places = toy_places(40)
    both = images(toy_images(40), coordinates=places, n_neighbors=3, radius_km=1.0)["image"]
    nearest = images(toy_images(40), coordinates=places, n_neighbors=3)["image"]
    expected = nearest.obsp["spatial_connectivities"].toarray() * (distances_km(places) <= 1.0)
    np.testing.assert_array_equal(both.obsp["spatial_connectivities"].toarray(), expected)
    assert 0 < expected.sum() < 120


def test_neighbors_across_the_date_line_and_at_the_pole():
    places = np.array([[0.0, 179.9], [0.0, -179.9], [0.0, 170.0], [89.9, 0.0], [89.9, 180.0], [80.0, 0.0]])
    graph = images(toy_images(6), coordinates=places, n_neighbors=1)["image"].obsp
    assert graph["spatial_connectivities"].indices[[0, 1, 3, 4]].tolist() == [1, 0, 4, 3]
    np.testing.assert_allclose(graph["spatial_distances"].data[[0, 3]], np.radians(0.2) * KM_PER_RADIAN, rtol=1e-6)


def test_images_at_one_place():
    places = toy_places()
    places[:3] = places[0]
    graph = images(toy_images(), coordinates=places, n_neighbors=2)["image"].obsp
    assert graph["spatial_connectivities"][[0]].indices.tolist() == [1, 2]
    assert graph["spatial_distances"].nnz == 40
    assert (graph["spatial_distances"][[0]].data == 0).all()


def test_any_adjacency():
    weights = np.random.default_rng(0).random((20, 20)) * (np.random.default_rng(1).random((20, 20)) < 0.2)
    np.fill_diagonal(weights, 3)
    expected = (weights - np.diag(np.diag(weights))).astype(np.float32)
    alone = images(toy_images(), adjacency=weights)["image"]
    np.testing.assert_array_equal(alone.obsp["spatial_connectivities"].toarray(), expected)
    assert set(alone.obsp) == {"spatial_connectivities"}
    assert "spatial" not in alone.obsm
    placed = images(toy_images(), adjacency=weights, coordinates=toy_places())["image"]
    np.testing.assert_allclose(placed.obsp["spatial_distances"].toarray(), distances_km(toy_places()) * (expected > 0))
    assert placed.uns["fimp_modality"]["weighted"]


def test_files_are_decoded_only_when_asked_for(files):
    paths, pixels = files
    adata = images(paths, coordinates=toy_places())["image"]
    assert "pixels" not in adata.obsm
    assert adata.obs_names[2] == "image02.png"
    assert adata.obs["path"].iloc[2] == str(paths[2])
    np.testing.assert_array_equal(read_pixels(adata, [7, 2, 7]), pixels[[7, 2, 7]])
    now = images([str(path) for path in paths], coordinates=toy_places(), lazy=False)["image"]
    np.testing.assert_array_equal(now.obsm["pixels"], pixels.reshape(20, -1))
    assert describe_modality(images(pd.Series(paths), coordinates=toy_places()), "image")["stored"] == "files"


def test_relative_paths_are_found_from_anywhere(files, monkeypatch, tmp_path):
    paths, pixels = files
    monkeypatch.chdir(tmp_path)
    adata = images([path.name for path in paths], coordinates=toy_places())["image"]
    monkeypatch.chdir("/")
    np.testing.assert_array_equal(read_pixels(adata, [1]), pixels[[1]])


def test_files_of_one_name_are_named_by_their_paths(files):
    paths, pixels = files
    folder = paths[0].parent / "other"
    folder.mkdir()
    Image.fromarray(pixels[0]).save(folder / paths[0].name)
    adata = images([*paths, folder / paths[0].name], coordinates=toy_places(21))["image"]
    assert adata.obs_names[20] == str(folder / paths[0].name)


def test_sizes_must_agree_or_be_changed(files):
    paths, _ = files
    Image.fromarray(toy_images(1, shape=(12, 16, 3))[0]).save(paths[5])
    with pytest.raises(ValueError, match=r"most are 6 × 8 .*image05.png' is 12 × 16.*image_size=\(6, 8\)"):
        images(paths, coordinates=toy_places())
    adata = images(paths, coordinates=toy_places(), image_size=(3, 4))["image"]
    assert read_pixels(adata, [0, 5]).shape == (2, 3, 4, 3)
    flat = images(np.full((20, 8, 8, 3), 77, np.uint8), coordinates=toy_places(), image_size=5)["image"]
    np.testing.assert_array_equal(read_pixels(flat, np.arange(20)), np.full((20, 5, 5, 3), 77))
    halves = np.zeros((20, 8, 8), np.uint8)
    halves[:, :, 4:] = 200  # a shrunken image keeps its left and right halves
    small = read_pixels(images(halves, coordinates=toy_places(), image_size=(4, 4))["image"], [3])[0, ..., 0]
    assert (small[:, 0] < 30).all()
    assert (small[:, 3] > 170).all()


def test_missing_and_broken_files_are_named_before_anything_is_decoded(files):
    paths, _ = files
    paths[3].write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"image03\.png' cannot be read"):
        images(paths, coordinates=toy_places())
    content = paths[4].read_bytes()
    paths[3].write_bytes(content[:-30])  # a header that is fine, and pixels that are not
    with pytest.raises(ValueError, match=r"image03\.png' cannot be read"):
        images(paths, coordinates=toy_places())
    paths[3].unlink()
    with pytest.raises(ValueError, match=r"1 of 20 image files do not exist: .*image03\.png'"):
        images(paths, coordinates=toy_places())


WRONG = [
    ({"coordinates": toy_places(19)}, ValueError, r"shape \(19, 2\), but 20 images"),
    ({"coordinates": [[100.0, 30.0]] * 20}, ValueError, "seem to be swapped"),
    ({"coordinates": [[300.0, 30.0]] * 20}, ValueError, r"Pass degrees\..* pixels of a slide.*adjacency="),
    ({"coordinates": [[np.nan, 30.0]] * 20}, ValueError, "NaN or infinite for 20 of 20"),
    ({"coordinates": [["a", "b"]] * 20}, TypeError, "numbers"),
    ({"coordinates": None}, ValueError, "needs coordinates="),
    ({"method": "radius"}, ValueError, "needs radius_km="),
    ({"method": "radius", "radius_km": 1e-6}, ValueError, "no edges: an image is .* km from its nearest one"),
    ({"method": "radius", "radius_km": 2, "n_neighbors": 3}, ValueError, "only applies"),
    ({"radius_km": -1.0}, ValueError, "radius_km must be .* above 0"),
    ({"radius_km": "2"}, TypeError, "number"),
    ({"n_neighbors": 20}, ValueError, "less than the 20 images"),
    ({"n_neighbors": 1.5}, TypeError, "whole number"),
    ({"method": "near"}, ValueError, "method must be one of .* found 'near'"),
    ({"adjacency": np.ones((19, 19))}, ValueError, r"shape \(19, 19\), but 20 images"),
    ({"adjacency": np.ones((20, 20)), "n_neighbors": 3}, ValueError, "do not apply"),
    ({"adjacency": np.eye(20)}, ValueError, "no edges"),
    ({"adjacency": -np.ones((20, 20))}, ValueError, "negative"),
    ({"images": toy_images().astype(float)}, ValueError, "between 0 and 1, found 0 to 255"),
    ({"images": np.full((20, 4, 4), np.nan)}, ValueError, "found nan"),
    ({"images": np.full((20, 4, 4), 300)}, ValueError, "between 0 and 255"),
    ({"images": toy_images().transpose(0, 3, 1, 2)}, ValueError, 'pass channels="first"'),
    ({"images": toy_images(), "channels": "first"}, ValueError, 'pass channels="last"'),
    ({"images": toy_images()[0, 0]}, ValueError, r"shape \(8, 3\)"),
    ({"images": []}, ValueError, "empty"),
    ({"images": [np.ones((4, 4)), np.ones((4, 5))]}, ValueError, "must all have one shape"),
    ({"images": np.array([["a"]])}, TypeError, "dtype"),
    ({"channels": "middle"}, ValueError, "channels must be one of .* found 'middle'"),
    ({"image_size": 0}, ValueError, "at least 1"),
    ({"image_size": (3.5, 4)}, TypeError, "whole number"),
    ({"labels": np.arange(3)}, ValueError, r"shape \(3,\), but 20 images"),
    ({"labels": {"path": np.arange(20)}}, ValueError, "used for something else"),
    ({"names": ["x"] * 20}, ValueError, "repeats 'x'"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), WRONG)
def test_wrong_input_is_explained(arguments, error, message):
    with pytest.raises(error, match=message):
        images(**{"images": toy_images(), "coordinates": toy_places()} | arguments)


def test_isolated_images_are_logged(caplog):
    places = toy_places()
    places[7] = [10.0, 10.0]
    with caplog.at_level(logging.WARNING, logger="fimp_sc"):
        images(toy_images(), coordinates=places, method="radius", radius_km=50)
    assert "1 of 20 images have no neighbors" in caplog.text
    assert "'image_7'" in caplog.text


@pytest.mark.parametrize("stored", ["pixels", "files"])
def test_survives_a_file(files, tmp_path, stored):
    import mudata

    paths, pixels = files
    mdata = images(paths if stored == "files" else pixels, coordinates=toy_places(), labels=np.arange(20) % 3)
    with quiet_mudata():
        mudata.write_h5mu(tmp_path / "streets.h5mu", mdata)
        back = mudata.read_h5mu(tmp_path / "streets.h5mu")
    assert describe_modality(back, "image") == describe_modality(mdata, "image")
    np.testing.assert_array_equal(read_pixels(back["image"], [3, 1]), pixels[[3, 1]])
    assert (back["image"].obsp["spatial_distances"] != mdata["image"].obsp["spatial_distances"]).nnz == 0
    assert back["image"].obs["label"].tolist() == mdata["image"].obs["label"].tolist()


def test_real_streets(shared_data):
    with np.load(shared_data / "street_images_opensfm_224.npz") as stored:
        data = dict(stored)
    places = np.stack([data["lat"], data["lon"]], axis=1)
    mdata = images(
        data["images"],
        coordinates=places,
        names=[f"{site}/{name}" for site, name in zip(data["site"], data["filename"], strict=True)],
        labels={"site": data["site"]},
        method="radius",
        radius_km=1,
    )
    adata = mdata["image"]
    graph = adata.obsp["spatial_connectivities"].tocoo()
    site = adata.obs["site"].to_numpy()
    assert (site[graph.row] == site[graph.col]).all()  # Lund and Berlin are far apart
    np.testing.assert_allclose(
        adata.obsp["spatial_distances"].toarray(), distances_km(places) * graph.toarray(), rtol=1e-5, atol=1e-7
    )
    np.testing.assert_array_equal(read_pixels(adata, np.arange(32)), data["images"])
    with pytest.raises(ValueError, match="swapped"):
        images(data["images"], coordinates=np.stack([data["lon"] + 90, data["lat"]], axis=1))
