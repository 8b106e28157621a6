from __future__ import annotations

import logging

import numpy as np
import pytest
from figure_contract import check_figure
from matplotlib import pyplot as plt
from matplotlib.collections import LineCollection, PathCollection
from matplotlib.colors import to_rgba

from fimp_sc import pl, pp
from fimp_sc.pl._figure._thumbnails import far_apart

COLORS = ["#ff0000", "#00ff00", "#0000ff"]


def points(ax):
    (collection,) = [c for c in ax.collections if isinstance(c, PathCollection)]
    return np.asarray(collection.get_offsets())


def lines(ax):
    drawn = [collection for collection in ax.collections if isinstance(collection, LineCollection)]
    return {tuple(map(tuple, line)) for collection in drawn for line in collection.get_segments()}


def centers(ax):
    return np.array([np.reshape(image.get_extent(), (2, 2)).mean(1) for image in ax.images])


def flat_map(n, places, side=6):
    """Return gray squares at places without unit, joined in a ring."""
    ring = np.roll(np.eye(n), 1, axis=1)
    mdata = pp.images(np.full((n, side, side), 7, np.uint8), adjacency=ring)
    mdata["image"].obsm["spatial"] = np.asarray(places, dtype=float)
    return mdata


def test_images_at_their_places_with_edges_beneath(photos) -> None:
    ax = pl.image_graph(photos, show=False)
    pixels = photos["image"].obsm["pixels"].reshape(4, 4, 8, 3)
    expected = np.array([[10, 59.5], [10, 60.5], [11, 60.5], [11, 59.5]])  # longitude to the right
    np.testing.assert_allclose(points(ax), expected)
    np.testing.assert_allclose(centers(ax), expected)
    for image, original in zip(ax.images, pixels, strict=True):
        np.testing.assert_array_equal(image.get_array(), original)
    assert ax.get_aspect() == pytest.approx(2)  # a degree of longitude is half as long at 60 degrees north
    pairs = {tuple(map(tuple, expected[[i, i + 1]])) for i in range(3)}
    assert lines(ax) == pairs
    assert ax.get_xlabel() == ""
    ax.figure.canvas.draw()
    box = ax.images[0].get_window_extent()
    assert box.width / box.height == pytest.approx(2, rel=0.01)  # 8 × 4 pixels, also on the screen
    inside = ax.get_window_extent()
    for image in ax.images:
        box = image.get_window_extent()
        assert inside.x0 <= box.x0 < box.x1 <= inside.x1
        assert inside.y0 <= box.y0 < box.y1 <= inside.y1


def test_north_is_above(photos) -> None:
    ax = pl.image_graph(photos, show=False)
    assert ax.get_ylim()[0] < ax.get_ylim()[1]
    assert all(image.origin == "upper" for image in ax.images)
    assert all(bottom < top for _, _, bottom, top in (image.get_extent() for image in ax.images))


def test_both_sides_of_the_date_line_are_near() -> None:
    mdata = pp.images(np.zeros((3, 4, 4), np.uint8), coordinates=[[0, 179], [0, -179], [1, -178]], n_neighbors=1)
    np.testing.assert_allclose(points(pl.image_graph(mdata, show=False))[:, 0], [179, 181, 182])


def test_places_without_unit_are_drawn_as_they_are() -> None:
    ax = pl.image_graph(flat_map(3, [[0, 60, 5], [1, 61, 5], [2, 60, 5]]), show=False)
    assert ax.get_aspect() == 1
    np.testing.assert_allclose(points(ax), [[0, 60], [1, 61], [2, 60]])


def test_places_without_unit_point_downwards_and_images_stay_upright() -> None:
    mdata = flat_map(3, [[0, 0], [9, 0], [0, 9]])
    mdata["image"].obsm["pixels"][:, :18] = 200  # the upper half
    ax = pl.image_graph(mdata, image_size=0.3, show=False)
    assert ax.yaxis_inverted()
    ax.figure.canvas.draw()
    shot = np.asarray(ax.figure.canvas.buffer_rgba())[..., 0]
    for image, (x, y) in zip(ax.images, points(ax), strict=True):
        height = abs(np.diff(image.get_extent()[2:])[0])
        for part, value in ((-0.25, 200), (0.25, 7)):
            column, row = ax.transData.transform((x, y + part * height))
            assert shot[int(shot.shape[0] - row), int(column)] == value


def test_frames_have_the_colors_of_categories(photos) -> None:
    photos["image"].uns["country_colors"] = COLORS
    ax = pl.image_graph(photos, color="country", show=False)
    frames = [patch.get_edgecolor() for patch in ax.patches]
    np.testing.assert_allclose(frames, [to_rgba(COLORS[i]) for i in (0, 0, 1, 2)])
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["x", "y", "z"]
    assert ax.get_title() == "country"


def test_frames_have_the_colors_of_numbers(photos) -> None:
    ax = pl.image_graph(photos, color="height", cmap="gray", show=False)
    frames = np.array([patch.get_edgecolor() for patch in ax.patches])
    np.testing.assert_allclose(frames[0], [0, 0, 0, 1])
    np.testing.assert_allclose(frames[1, :3], 0.25, atol=0.01)
    np.testing.assert_allclose(frames[2], to_rgba("#d3d3d3"))
    np.testing.assert_allclose(frames[3], [1, 1, 1, 1])
    photos["image"].obsm["X_fimp"] = np.arange(8.0).reshape(4, 2)
    assert pl.image_graph(photos, color=("X_fimp", 1), show=False).get_title() == "X_fimp[1]"


@pytest.mark.parametrize("nodes", [[2, 1], ["image_1", 2], np.array([False, True, True, False])])
def test_some_nodes(photos, nodes) -> None:
    ax = pl.image_graph(photos, nodes=nodes, color="country", show=False)
    np.testing.assert_allclose(centers(ax), [[10, 60.5], [11, 60.5]])
    assert len(lines(ax)) == 1
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["x", "y"]


def test_points_alone_and_no_edges(photos) -> None:
    ax = pl.image_graph(photos, images=False, edges=False, show=False, s=50)
    assert len(points(ax)) == 4
    assert not ax.images
    assert not lines(ax)
    assert ax.collections[0].get_sizes() == [50]


def test_more_images_than_wanted_are_points(photos, caplog) -> None:
    with caplog.at_level(logging.INFO, "fimp_sc"):
        ax = pl.image_graph(photos, max_images=3, show=False)
    assert (len(ax.images), len(points(ax))) == (3, 4)
    assert ax.get_xlabel().startswith("3 of 4 images are drawn")
    assert "max_images=3" in caplog.text
    drawn = {tuple(center) for center in centers(ax)}
    (left_out,) = (i for i, place in enumerate(points(ax)) if tuple(place) not in drawn)
    assert ax.get_xlabel().endswith(f": image_{left_out}")
    assert f": image_{left_out}." in caplog.text


def test_images_do_not_cover_each_other() -> None:
    places = np.random.default_rng(0).random((300, 2))
    ax = pl.image_graph(flat_map(300, places), image_size=0.1, show=False)
    middle = centers(ax)
    distance = np.abs(middle[:, None] - middle[None]).max(-1)
    np.fill_diagonal(distance, np.inf)
    side = 0.1 * np.ptp(places, axis=0).max()
    assert distance.min() >= side * (1 - 1e-9)
    # Nor is there room left: every point is within reach of some image.
    assert np.abs(places[:, None] - middle[None]).max(-1).min(1).max() < side
    assert len(middle) < 100


def test_images_at_one_place() -> None:
    ax = pl.image_graph(flat_map(3, np.ones((3, 2))), show=False)
    np.testing.assert_allclose(centers(ax), [[1, 1]])
    ax.figure.canvas.draw()


def test_limited_images_are_spread() -> None:
    line = np.stack([np.arange(101.0), np.zeros(101)], axis=1)
    assert far_apart(line, np.ones(2), 3).tolist() == [0, 50, 100]


def test_reconstructions_of_either_scale(photos) -> None:
    adata = photos["image"]
    truth = adata.obsm["pixels"].reshape(4, 4, 8, 3)
    shares = adata.obsm["pixels"].astype(np.float32) / 255
    shares[0, :3] = [-0.5, 1.4, np.nan]  # beyond both ends, and unknown
    adata.obsm["fimp"], adata.obsm["wide"], adata.obsm["whole"] = shares, shares * 255, adata.obsm["pixels"].astype(int)
    for key in ("fimp", "wide"):
        ax = pl.image_graph(photos, images=key, show=False)
        assert ax.images[0].get_array()[0, 0].tolist() == [0, 255, 211]
        np.testing.assert_array_equal(ax.images[2].get_array(), truth[2])
    np.testing.assert_array_equal(pl.image_graph(photos, images="whole", show=False).images[3].get_array(), truth[3])


@pytest.mark.parametrize(("channels", "gray"), [(1, True), (2, True), (4, False)])
def test_other_numbers_of_channels(channels, gray) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 5, 5, channels)).astype(np.uint8)
    mdata = pp.images(pixels[..., :1], coordinates=[[0, 0], [0, 1], [1, 1]], n_neighbors=1)
    mdata["image"].obsm["pixels"] = pixels.reshape(3, -1)
    mdata["image"].uns["fimp_modality"]["image_shape"] = [5, 5, channels]
    drawn = np.asarray(pl.image_graph(mdata, show=False).images[1].get_array())
    expected = np.rint(pixels[1].mean(-1, keepdims=True)).repeat(3, -1) if gray else pixels[1, ..., :3]
    np.testing.assert_array_equal(drawn, expected)


def test_large_images_are_reduced_by_averaging() -> None:
    image = np.zeros((1, 400, 200), np.uint8)
    image[:, 200:] = 90
    image[:, ::3] += 30  # stripes that leaving out rows would keep or lose as a whole
    mdata = pp.images(np.repeat(image, 2, axis=0), coordinates=[[0, 0], [0, 1]], n_neighbors=1)
    drawn = np.asarray(pl.image_graph(mdata, show=False).images[0].get_array())
    assert drawn.shape == (133, 66, 3)
    np.testing.assert_array_equal(drawn[:66], 10)
    np.testing.assert_array_equal(drawn[67:], 100)


def test_images_in_files(tmp_path) -> None:
    image = pytest.importorskip("PIL.Image")
    pixels = np.random.default_rng(0).integers(0, 256, (3, 5, 5, 3)).astype(np.uint8)
    for i, one in enumerate(pixels):
        image.fromarray(one).save(tmp_path / f"{i}.png")
    mdata = pp.images(sorted(tmp_path.glob("*.png")), coordinates=[[0, 0], [0, 1], [1, 1]], n_neighbors=1)
    drawn = pl.image_graph(mdata, show=False).images
    np.testing.assert_array_equal([np.asarray(one.get_array()) for one in drawn], pixels)


def test_axes_of_a_figure_within_a_figure(photos, tmp_path) -> None:
    figure = plt.figure()
    inner = figure.subfigures(1, 2)[0].subplots()
    file = tmp_path / "map.png"
    assert pl.image_graph(photos, ax=inner, save=file) is inner
    assert plt.imread(file).ndim == 3
    assert pl.image_graph(photos, ax=inner, return_fig=True) is figure


def test_missing_keys_are_named(photos) -> None:
    for arguments, message in (
        ({"color": "nothing"}, "'nothing' is neither a column"),
        ({"images": "fimp"}, r"'fimp' is not in adata.obsm .*fimp_sc.tl.impute"),
        ({"spatial_key": "xy"}, "'xy' is not in adata.obsm .*coordinates= to fimp_sc.pp.images"),
        ({"connectivities_key": "mesh"}, r"'mesh' is not in mdata\['image'\].obsp .*edges=False"),
        ({"nodes": ["photo"]}, "'photo' is not in obs_names"),
        ({"modality": "photo"}, "'photo' is not in mdata.mod"),
    ):
        with pytest.raises(KeyError, match=message):
            pl.image_graph(photos, **arguments)


def test_unusable_input(photos, brain) -> None:
    photos["image"].obsm["fimp"] = np.zeros((4, 95))
    for arguments, message in (
        ({"image_size": 0}, "image_size must be .* above 0 and at most 1"),
        ({"max_images": 0}, "max_images must be .* at least 1.*images=False"),
        ({"images": "fimp"}, r"\(4, 95\), but images of 4 × 8 pixels × 3 channels need \(4, 96\)"),
    ):
        with pytest.raises(ValueError, match=message):
            pl.image_graph(photos, **arguments)
    with pytest.raises(ValueError, match="'fmri' is of kind 'signal'"):
        pl.image_graph(brain)
    photos["image"].obsm["spatial"][1] = np.nan
    with pytest.raises(ValueError, match="NaN or infinite for 1"):
        pl.image_graph(photos)


def test_the_object_is_not_changed(photos) -> None:
    before = photos["image"].copy()
    pl.image_graph(photos, color="country", show=False)
    after = photos["image"]
    assert set(after.uns) == set(before.uns)
    assert (after.obsp["spatial_connectivities"] != before.obsp["spatial_connectivities"]).nnz == 0


def test_real_street_images(shared_data) -> None:
    data = np.load(shared_data / "street_images_opensfm_224.npz")
    places = np.stack([data["lat"], data["lon"]], axis=1)
    mdata = pp.images(data["images"], coordinates=places, labels={"site": data["site"]})
    here = data["site"] == "lund"
    ax = pl.image_graph(mdata, nodes=here, color="site", show=False)
    assert len(points(ax)) == here.sum()
    assert 1 < len(ax.images) < here.sum()
    ax.figure.canvas.draw()
    # Equal distances in meters are equal on the screen.
    start = np.array([data["lon"][0], data["lat"][0]])
    east, north = np.array([1e-4 / np.cos(np.radians(start[1])), 0]), np.array([0, 1e-4])
    corner, right, up = ax.transData.transform([start, start + east, start + north])
    assert np.hypot(*(right - corner)) == pytest.approx(np.hypot(*(up - corner)), rel=1e-3)


def test_what_becomes_of_the_figure(photos) -> None:
    check_figure(pl.image_graph, photos)
