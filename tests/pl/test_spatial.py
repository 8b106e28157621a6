from __future__ import annotations

import warnings

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from figure_contract import check_figure
from matplotlib.colors import to_hex, to_rgba, to_rgba_array
from matplotlib_scalebar.scalebar import ScaleBar

from fimp_sc import pl, tl


def _points(ax) -> int:
    return sum(len(collection.get_offsets()) for collection in ax.collections)


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
        ({"color": "hes4"}, r"nor a gene of adata\.var_names\. Did you mean 'HES4'\?"),
        ({"color": "Region"}, r"Did you mean 'region'\?"),
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
            (spots,) = ax.collections
            boxes = [path.get_extents() for path in spots.get_paths()]
            own = toy.obsm["spatial"][toy.obs["section"] == name] * 0.1
            np.testing.assert_allclose([(box.x0 + box.x1) / 2 for box in boxes], own[:, 0], atol=1e-6)
            np.testing.assert_allclose([box.width for box in boxes], 1.2, rtol=1e-3)
    without = pl.spatial(toy, "region", library_key="section", img=False, show=False)[0]
    assert not any(ax.images for ax in without)
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


def test_many_samples_go_on_in_the_next_line(toy) -> None:
    for n, columns in ((8, 4), (30, 6)):
        toy.obs["sample"] = pd.Categorical([f"s{i % n:02d}" for i in range(toy.n_obs)])
        axes = pl.spatial(toy, ["region", "HES4"], library_key="sample", show=False)
        assert axes.shape == (2, n)
        figure = axes[0, 0].figure.figure
        width, height = figure.get_size_inches()
        assert width < 14, "a screen"
        assert height < 2 * (n / columns + 1) * 4
        for row in axes:
            boxes = [ax.get_window_extent() for ax in row]
            places = [ax.get_subplotspec().colspan.start for ax in row]
            assert places == [i % columns for i in range(n)]
            assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
        first, second = (row[0].figure for row in axes)
        (legend,) = first.legends
        assert not second.legends
        assert [text.get_text() for text in legend.get_texts()] == [*toy.obs["region"].cat.categories]
        assert max(ax.get_window_extent().x1 for ax in axes[0]) < legend.get_window_extent().x0
        assert legend.get_window_extent().x1 <= figure.bbox.x1
        assert sum(_points(ax) for ax in axes[0]) == toy.n_obs
    (row,) = pl.spatial(toy, "region", library_key="sample", ncols=10, show=False)
    assert [ax.get_subplotspec().rowspan.start for ax in row] == [i // 10 for i in range(30)]


def test_several_colors_of_one_sample_lie_side_by_side(toy) -> None:
    axes = pl.spatial(toy, ["region", "HES4", "cell_type"], show=False)
    assert axes.shape == (3, 1)
    first, second, third = (ax.get_window_extent() for ax in axes[:, 0])
    assert first.x1 < second.x0
    assert third.y1 < first.y0
    assert axes[0, 0].get_legend().get_window_extent().x1 < second.x0
    assert len(axes[0, 0].figure.axes) == 3, "no empty axes"
    below = pl.spatial(toy, ["region", "HES4"], ncols=1, show=False)
    assert below[1, 0].get_window_extent().y1 < below[0, 0].get_window_extent().y0


def test_the_second_coordinate_points_downwards_as_in_squidpy(toy) -> None:
    import squidpy as sq

    (ax,) = pl.spatial(toy, "region", show=False)[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of matplotlib, for squidpy
        like = sq.pl.spatial_scatter(toy, color="region", shape=None, return_ax=True)
    assert ax.yaxis_inverted()
    assert like.yaxis_inverted()
    np.testing.assert_array_equal(ax.collections[0].get_offsets(), like.collections[0].get_offsets())


def test_each_cell_is_drawn_once(toy) -> None:
    """Else translucent cells would be darker than asked for."""
    ax = pl.spatial(toy[:1].copy(), "region", alpha=0.5, size=4000, palette=["black"], show=False)[0, 0]
    assert len(ax.collections) == 1
    ax.figure.canvas.draw()
    box = ax.get_window_extent()
    pixels = np.asarray(ax.figure.canvas.buffer_rgba())[..., 0]
    middle = pixels[int(pixels.shape[0] - (box.y0 + box.y1) / 2), int((box.x0 + box.x1) / 2)]
    assert middle == pytest.approx(127, abs=2)


def test_percentiles_end_the_colors(toy) -> None:
    toy.obs["score"] = np.arange(toy.n_obs, dtype=float)
    ax = pl.spatial(toy, "score", vmin="p10", vmax="p99", show=False)[0, 0]
    np.testing.assert_allclose(ax.collections[0].get_clim(), np.percentile(toy.obs["score"], [10, 99]))
    whole = pl.spatial(toy, "score", show=False)[0, 0]
    bars = [len(panel.child_axes[0].collections) + len(panel.child_axes[0].patches) for panel in (ax, whole)]
    assert bars[0] > bars[1], "pointed where values lie beyond"
    for wrong in ("p101", "99", "pp", [1, 2]):
        with pytest.raises(
            (ValueError, TypeError), match="vmax must be a finite number, or a percentile such as 'p99'"
        ):
            pl.spatial(toy, "score", vmax=wrong, show=False)


def test_palettes(toy) -> None:
    names = list(toy.obs["region"].cat.categories)
    codes = toy.obs["region"].cat.codes.to_numpy()

    def drawn(palette):
        return pl.spatial(toy, "region", palette=palette, show=False)[0, 0].collections[0].get_facecolors()

    toy.uns["region_colors"] = ["#000001", "#000002", "#000003", "#000004"]
    given = ["red", "lime", "blue", "black"]
    np.testing.assert_allclose(drawn(given), to_rgba_array(given)[codes], atol=1 / 255)
    np.testing.assert_allclose(drawn("tab10")[codes == 2][0], to_rgba("C2"), atol=1 / 255)
    some = drawn({names[1]: "red"})
    np.testing.assert_allclose(some[codes == 1], [[1, 0, 0, 1]] * (codes == 1).sum())
    assert len(np.unique(some, axis=0)) == 4
    with pytest.raises(ValueError, match="palette has 2 colors, but 'region' has 4 categories"):
        drawn(["red", "blue"])
    with pytest.raises(ValueError, match="palette must be a list of colors"):
        drawn(["no color"] * 4)


@pytest.mark.parametrize("name", ["Unknown", "Unlabelled", "unassigned", "nan", ""])
def test_no_label_is_gray_whatever_it_is_called(toy, name) -> None:
    toy.obs["known"] = toy.obs["cell_type"].astype(str)
    toy.obs.loc[toy.obs_names[:10], "known"] = name
    axes = pl.spatial(toy, ["cell_type", "known"], show=False)
    whole, part = (axes[i, 0].collections[0].get_facecolors() for i in range(2))
    np.testing.assert_array_equal(whole[10:], part[10:])
    assert {to_hex(color) for color in part[:10]} == {"#d3d3d3"}
    assert axes[1, 0].get_legend().get_texts()[-1].get_text() == (name or "(empty)")
    toy.uns["known_colors"] = ["#ff0000"] * toy.obs["known"].nunique()
    stored = pl.spatial(toy, "known", show=False)[0, 0].collections[0].get_facecolors()
    assert {to_hex(color) for color in stored} == {"#ff0000"}, "colors of the user stay"


def test_the_unlabeled_category_of_a_call_is_gray_and_predictions_have_the_colors_of_their_labels(small_toy) -> None:
    toy = small_toy
    toy.obs["known"] = toy.obs["cell_type"].astype(str)
    toy.obs.loc[toy.obs_names[:60], "known"] = "later"
    tl.annotate(
        toy, "known", unlabeled_category="later", library_key="section", max_epochs=1, verbose=False,
        key_added="guess",
    )  # fmt: skip
    classes = toy.obs["guess"].cat.categories[::-1]
    toy.obs["guess"] = pd.Categorical(toy.obs["cell_type"].astype(str), categories=classes)
    assert set(classes) == set(toy.obs["known"]) - {"later"}
    palette = {name: f"#0000{i + 16:02x}" for i, name in enumerate(sorted(set(toy.obs["known"])))}
    for stored in (False, True):
        if stored:
            toy.uns["known_colors"] = list(palette.values())
        axes = pl.spatial(toy, ["known", "guess"], show=False)
        known, guess = (ax.collections[0].get_facecolors() for ax in axes[:, 0])
        assert {to_hex(color) for color in known[:60]} == {"#d3d3d3"}
        np.testing.assert_array_equal(known[60:], guess[60:])
        assert axes[1, 0].get_legend().get_texts()[0].get_text() == toy.obs["guess"].cat.categories[0]


def test_many_cells_are_pixels_in_vector_graphics(toy, tmp_path) -> None:
    rng = np.random.default_rng(0)
    many = ad.AnnData(
        obs={"value": rng.random(20_000)}, obsm={"spatial": rng.random((20_000, 2))}
    )  # fmt: skip
    sizes = []
    for how in ({}, {"rasterized": False}):
        file = tmp_path / "map.svg"
        axes = pl.spatial(many, "value", save=file, **how)
        assert axes[0, 0].collections[0].get_rasterized() is (not how)
        sizes.append(file.stat().st_size)
    assert sizes[0] < sizes[1] / 2
    assert not pl.spatial(toy, "region", show=False)[0, 0].collections[0].get_rasterized()


def test_titles(toy) -> None:
    axes = pl.spatial(toy, "region", library_key="section", title=["left", "right"], show=False)
    assert [ax.get_title() for ax in axes[0]] == ["left", "right"]
    with pytest.raises(ValueError, match="title has 1 titles, but the figure has 2 panels"):
        pl.spatial(toy, "region", library_key="section", title="both", show=False)
    toy.obs["a_column_with_a_name_that_nobody_would_write_by_hand, in sections"] = 1.0
    axes = pl.spatial(toy, toy.obs.columns[-1], library_key="section", show=False)
    figure = axes[0, 0].figure
    figure.canvas.draw()
    left, right = (ax.title.get_window_extent() for ax in axes[0])
    assert left.x1 < right.x0
    assert left.x0 >= 0


def test_scale_bars_where_the_unit_is_known(toy) -> None:
    def lengths(**how):
        bars = [
            [one for one in ax.artists if isinstance(one, ScaleBar)]
            for ax in pl.spatial(toy, "region", show=False, **how)[0]
        ]
        return [bar[0].dx if bar else None for bar in bars]

    assert lengths(library_key="section") == [None, None]
    assert lengths(library_key="section", scalebar_dx=2.0) == [2.0, 2.0]
    toy.uns["spatial"] = entries = visium(toy)
    assert lengths(library_key="section", scalebar_dx=2.0) == [20.0, 20.0], "of pixels that stand for 10 units"
    entries["section_1"]["scalefactors"]["microns_per_pixel"] = 0.5
    assert lengths(library_key="section") == [5.0, None]
    assert lengths(library_key="section", img=False) == [0.5, None]
