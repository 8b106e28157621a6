from __future__ import annotations

import warnings

import numpy as np
import pandas as pd
import pytest
from figure_contract import check_figure
from matplotlib.colors import to_hex, to_rgba, to_rgba_array

from fimp_sc import pl


def _points(ax) -> int:
    return sum(len(collection.get_offsets()) for collection in set(ax.collections))  # squidpy adds them twice


def test_one_panel_per_sample_and_color(toy) -> None:
    toy.obsm["X_fimp"] = np.random.default_rng(0).normal(size=(toy.n_obs, 3))
    axes = pl.spatial(toy, ["region", toy.var_names[0], ("X_fimp", 2)], library_key="section", show=False)
    assert axes.shape == (3, 2)
    for row in axes:
        assert _points(row[0]) + _points(row[1]) == toy.n_obs
    assert all(ax.get_aspect() == 1 for ax in axes.flat)
    assert axes[0, 0].get_title() == "region, section_1"
    assert axes[2, 1].get_title() == "X_fimp[2], section_2"
    axes[0, 0].figure.canvas.draw()


def test_one_panel_without_library(toy) -> None:
    axes = pl.spatial(toy, "cell_type", show=False)
    assert axes.shape == (1, 1)
    assert _points(axes[0, 0]) == toy.n_obs


def test_stored_palette_and_missing_labels(toy) -> None:
    colors = ["#ff0000", "#00ff00", "#0000ff", "#ffff00"]
    toy.uns["region_colors"] = colors
    toy.obs.loc[toy.obs_names[0], "region"] = np.nan
    (ax,) = pl.spatial(toy, "region", show=False)[0]
    drawn = ax.collections[0].get_facecolors()
    codes = toy.obs["region"].cat.codes.to_numpy()
    np.testing.assert_allclose(drawn[5], to_rgba(colors[codes[5]]))
    np.testing.assert_allclose(drawn[0], to_rgba("#d3d3d3"))
    assert [text.get_text() for text in ax.get_legend().get_texts()] == [*toy.obs["region"].cat.categories, "missing"]


def test_palette_that_does_not_fit_is_ignored(toy) -> None:
    toy.uns["region_colors"] = ["#ff0000"]
    (ax,) = pl.spatial(toy, "region", show=False)[0]
    assert len(np.unique(ax.collections[0].get_facecolors(), axis=0)) == 4


def test_layer_and_missing_numbers(toy) -> None:
    toy.layers["double"] = toy.X * 2
    toy.layers["dense"] = toy.X.toarray() * 2
    gene = toy.var_names[10]
    (ax,) = pl.spatial(toy, gene, layer="double", show=False)[0]
    np.testing.assert_allclose(ax.collections[0].get_array(), toy.X[:, 10].toarray().ravel() * 2)
    (dense,) = pl.spatial(toy, gene, layer="dense", show=False)[0]
    np.testing.assert_allclose(dense.collections[0].get_array(), ax.collections[0].get_array())
    toy.obs["score"] = np.r_[np.nan, np.arange(toy.n_obs - 1.0)]
    (ax,) = pl.spatial(toy, "score", show=False)[0]
    assert ax.collections[0].get_clim() == (0, toy.n_obs - 2)
    assert _points(ax) == toy.n_obs
    ax.figure.canvas.draw()


def test_constant_value_has_one_color(toy) -> None:
    toy.obs["score"] = 0.5
    axes = pl.spatial(toy, "score", library_key="section", show=False)
    axes[0, 0].figure.canvas.draw()
    left, right = (ax.collections[0].get_facecolors()[0] for ax in axes[0])
    np.testing.assert_array_equal(left, right)


def test_the_object_is_not_changed(toy) -> None:
    before = set(toy.uns)
    pl.spatial(toy, ["region", "cell_type"], show=False)
    assert set(toy.uns) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"color": "nothing"}, "'nothing' is neither a column of adata.obs"),
        ({"color": ("X_fimp", 0)}, "adata.obsm has no 'X_fimp'"),
        ({"color": ("spatial", 7)}, "no column 7"),
        ({"color": "region", "library_key": "slide"}, "library_key='slide'"),
        ({"color": "region", "spatial_key": "xy"}, "adata.obsm has no 'xy'"),
        ({"color": "HES4", "layer": "raw"}, "'raw' is not in adata.layers"),
    ],
)
def test_missing_keys_are_named(toy, arguments, message) -> None:
    with pytest.raises(KeyError, match=message):
        pl.spatial(toy, show=False, **arguments)


def test_unusable_input(toy) -> None:
    with pytest.raises(ValueError, match=r"color must be .* not empty"):
        pl.spatial(toy, [], show=False)
    toy.obsm["line"] = np.zeros((toy.n_obs, 1))
    with pytest.raises(ValueError, match="two columns"):
        pl.spatial(toy, "region", spatial_key="line", show=False)


def test_cells_without_label_are_gray_and_shift_no_color(toy) -> None:
    toy.obs["before"] = toy.obs["cell_type"].astype(str)
    toy.obs.loc[toy.obs_names[:10], "before"] = "Unknown"  # sorts between other names
    axes = pl.spatial(toy, ["cell_type", "before"], show=False)
    whole, part = (axes[i, 0].collections[0].get_facecolors() for i in range(2))
    np.testing.assert_array_equal(whole[10:], part[10:])
    assert {to_hex(color) for color in part[:10]} == {"#d3d3d3"}


def test_a_gene_that_is_there_twice_is_refused(toy) -> None:
    names = toy.var_names.to_numpy().copy()
    names[3] = names[90] = names[0]
    toy.var_names = names
    with pytest.raises(ValueError, match=r"'HES4' is the name of several genes.*var_names_make_unique"):
        pl.spatial(toy, "HES4", show=False)


def test_gene_without_expression(toy) -> None:
    toy.layers["counts"] = toy.X
    toy.X = None
    with pytest.raises(ValueError, match=r"adata\.X is None: pass layer= .*'counts'"):
        pl.spatial(toy, "HES4", show=False)


@pytest.mark.parametrize(
    "colors",
    [
        [(1, 0, 0), (0, 1, 0, 0.5), "blue", "#ffff00"],
        np.random.default_rng(0).random((4, 3)),
        np.random.default_rng(0).random((6, 4)),
        np.array(["red", "C1", "0.5", "#ffff00"], dtype=object),
    ],
)
def test_stored_colors_of_any_form(toy, colors) -> None:
    toy.uns["region_colors"] = colors
    (ax,) = pl.spatial(toy, "region", show=False)[0]
    expected = to_rgba_array(list(colors), alpha=1)[toy.obs["region"].cat.codes]
    np.testing.assert_allclose(ax.collections[0].get_facecolors(), expected, atol=1 / 255)


@pytest.mark.parametrize(
    "colors",
    [["red", "green", "no color", "blue"], dict.fromkeys("abcd", "red"), np.full((4, 3), 200), "blue", 4],
)
def test_colors_that_are_none_are_ignored(toy, colors) -> None:
    (plain,) = pl.spatial(toy, "region", show=False)[0]
    toy.uns["region_colors"] = colors
    (ax,) = pl.spatial(toy, "region", show=False)[0]
    np.testing.assert_array_equal(ax.collections[0].get_facecolors(), plain.collections[0].get_facecolors())


@pytest.mark.parametrize(("n", "flat"), [(15, True), (46, False), (46, True), (110, False)])
def test_legend_lies_inside_the_figure(toy, n, flat) -> None:
    toy.obs["cluster"] = pd.Categorical([f"Excitatory neurons {i % n}" for i in range(toy.n_obs)])
    if flat:
        toy.obsm["spatial"] = toy.obsm["spatial"] * [5, 1]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        axes = pl.spatial(toy, ["cluster", "HES4"], library_key="section", show=False)
        figure = axes[0, 0].figure
        for _ in range(2):
            outer, legend = figure.bbox, axes[0, 1].get_legend()
            assert len(legend.get_texts()) == n
            boxes = [legend.get_window_extent(), *(text.get_window_extent() for text in legend.get_texts())]
            assert all(box.x0 >= 0 and box.x1 <= outer.x1 and box.y0 >= 0 and box.y1 <= outer.y1 for box in boxes)
            for ax in axes.flat:
                assert ax.get_window_extent().width > 1.5 * figure.dpi
                assert ax.get_window_extent().x1 < legend.get_window_extent().x0
            figure.canvas.draw()


def test_objects_that_stay_out_of_memory(toy, stored) -> None:
    toy.obsm["X_fimp"] = np.random.default_rng(0).normal(size=(toy.n_obs, 3))
    toy.obs["score"] = np.arange(toy.n_obs)
    toy.uns["region_colors"] = ["#ff0000", "#00ff00", "#0000ff", "#ffff00"]
    colors = ["region", "score", toy.var_names[5], ("X_fimp", 1)]
    expected = pl.spatial(toy, colors, library_key="section", show=False)
    axes = pl.spatial(stored(toy), colors, library_key="section", show=False)
    assert axes.shape == expected.shape
    for ax, like in zip(axes.flat, expected.flat, strict=True):
        np.testing.assert_array_equal(ax.collections[0].get_offsets(), like.collections[0].get_offsets())
        np.testing.assert_array_equal(ax.collections[0].get_facecolors(), like.collections[0].get_facecolors())
        if like.collections[0].get_array() is not None:
            np.testing.assert_array_equal(ax.collections[0].get_array(), like.collections[0].get_array())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            lambda p: np.where(np.arange(len(p))[:, None] == 3, np.nan, p),
            ValueError,
            "NaN or infinite for 1 of .* cells",
        ),
        (lambda p: p + np.inf, ValueError, "NaN or infinite for"),
        (lambda p: np.full(p.shape, "a"), TypeError, r"adata\.obsm\['spatial'\] must hold numbers"),
    ],
)
def test_cells_without_a_place(toy, change, error, message) -> None:
    toy.obsm["spatial"] = change(toy.obsm["spatial"])
    with pytest.raises(error, match=message):
        pl.spatial(toy, "region", show=False)


def visium(toy) -> dict:
    """Return images of both sections as Space Ranger's, of 100 x 80 pixels, one for 10 units of the coordinates."""
    rng = np.random.default_rng(0)
    factors = {"tissue_hires_scalef": 0.1, "spot_diameter_fullres": 12.0}
    toy.obsm["spatial"] = rng.uniform(0, 800, (toy.n_obs, 2))
    names = ("section_1", "section_2")
    return {name: {"images": {"hires": rng.random((80, 100, 3))}, "scalefactors": dict(factors)} for name in names}


def test_images_lie_beneath_cells_of_their_size(toy) -> None:
    toy.uns["spatial"] = entries = visium(toy)
    axes = pl.spatial(toy, ["region", "HES4"], library_key="section", show=False)
    for row in axes:
        for ax, (name, entry) in zip(row, entries.items(), strict=True):
            np.testing.assert_array_equal(ax.images[0].get_array(), entry["images"]["hires"])
            assert ax.get_ylim()[0] > ax.get_ylim()[1], "as the image: downwards"
            (spots,) = set(ax.collections)
            boxes = [path.get_extents() for path in spots.get_paths()]
            own = toy.obsm["spatial"][toy.obs["section"] == name] * 0.1
            np.testing.assert_allclose([(box.x0 + box.x1) / 2 for box in boxes], own[:, 0], atol=1e-6)
            np.testing.assert_allclose([box.width for box in boxes], 1.2, rtol=1e-3)
    without = pl.spatial(toy, "region", library_key="section", img=False, show=False)[0]
    assert not any(ax.images or ax.yaxis_inverted() for ax in without)
    assert not pl.spatial(toy, "region", show=False)[0, 0].images, "which of the two is not known"
    toy.uns["spatial"] = {"section_1": entries["section_1"]}
    assert pl.spatial(toy, "region", show=False)[0, 0].images
    double = pl.spatial(toy, "region", size=2, show=False)[0, 0].collections[0].get_paths()[0].get_extents()
    np.testing.assert_allclose(double.width, 2.4, rtol=1e-3)


@pytest.mark.parametrize("entry", [{}, {"images": {}}, {"images": {"hires": np.ones((2, 2, 3))}}, "text"])
def test_what_is_no_image_is_not_drawn(toy, entry) -> None:
    toy.uns["spatial"] = {"section_1": entry}
    assert not pl.spatial(toy, "region", show=False)[0, 0].images


def test_the_range_of_numbers_is_that_of_the_color_bar(toy) -> None:
    toy.obs["score"] = np.linspace(0, 1, toy.n_obs)
    ax = pl.spatial(toy, "score", vmin=-1, vmax=3, show=False)[0, 0]
    assert ax.collections[0].get_clim() == (-1, 3)
    assert ax.child_axes[0].get_ylim() == (-1, 3)


def test_keywords_are_those_of_squidpy_and_matplotlib(toy) -> None:
    ax = pl.spatial(toy, "region", frameon=False, alpha=0.5, show=False)[0, 0]
    assert not ax.axison
    np.testing.assert_allclose(ax.collections[0].get_facecolors()[:, 3], 0.5, atol=1 / 255)
    with pytest.raises(TypeError, match=r"img_alpa=, .* Did you mean img_alpha="):
        pl.spatial(toy, "region", img_alpa=1, show=False)


def test_what_becomes_of_the_figure(toy) -> None:
    check_figure(pl.spatial, toy, ["region", "HES4"], shape=(2, 1))
