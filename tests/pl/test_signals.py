from __future__ import annotations

import numpy as np
import pytest
from matplotlib import pyplot as plt
from mudata import MuData
from scipy import sparse

from fimp_sc import pl, pp
from fimp_sc.data._modality import quiet_mudata


def shaded(ax):
    """Return the first and last time of every shaded stretch."""
    boxes = [patch.get_extents().transformed(ax.transData.inverted()) for patch in ax.patches]
    return [(box.x0, box.x1) for box in boxes]


def test_one_panel_per_node_with_both_lines_in_seconds(brain) -> None:
    adata = brain["fmri"]
    axes = pl.signals(brain, ["second:C", "A"], recording="second", show=False)
    assert axes.shape == (2,)
    for ax, row in zip(axes, [7, 5], strict=True):
        measured, made = ax.lines
        np.testing.assert_array_equal(measured.get_xdata(), np.arange(0, 60, 2))
        np.testing.assert_array_equal(measured.get_ydata(), adata.X[row])
        np.testing.assert_array_equal(made.get_ydata(), adata.layers["fimp"][row])
        assert measured.get_color() != made.get_color()
        assert not ax.patches
    assert [ax.get_title(loc="left") for ax in axes] == ["C, second", "A, second"]
    assert axes[-1].get_xlabel() == "Time (s)"
    assert [text.get_text() for text in axes[0].get_legend().get_texts()] == ["measured", "reconstruction"]
    axes[0].figure.canvas.draw()


@pytest.mark.parametrize("nodes", [3, np.int64(3), [3], "first:D", np.arange(10) == 3])
def test_ways_to_name_a_node(brain, nodes) -> None:
    (ax,) = pl.signals(brain, nodes, show=False)
    np.testing.assert_array_equal(ax.lines[0].get_ydata(), brain["fmri"].X[3])


def test_one_recording_needs_no_name_and_no_interval_means_time_points() -> None:
    bold = np.random.default_rng(0).normal(size=(3, 12))
    mdata = pp.fmri(bold, connectivity=np.ones((3, 3)), region_names=list("ABC"))
    (ax,) = pl.signals(mdata, "B", key=None, show=False)
    (line,) = ax.lines
    np.testing.assert_array_equal(line.get_xdata(), np.arange(12))
    assert (ax.get_title(loc="left"), ax.get_xlabel()) == ("B", "Time point")


def test_part_of_the_time(brain) -> None:
    (ax,) = pl.signals(brain, 0, times=(10, 21), show=False)
    np.testing.assert_array_equal(ax.lines[0].get_xdata(), [10, 12, 14, 16, 18, 20])
    np.testing.assert_array_equal(ax.lines[0].get_ydata(), brain["fmri"].X[0, 5:11])


def test_part_of_a_recording_keeps_its_time(brain) -> None:
    (ax,) = pl.signals(brain["fmri"][:, 10:15].copy(), 0, show=False)
    np.testing.assert_array_equal(ax.lines[0].get_xdata(), [20, 22, 24, 26, 28])


@pytest.mark.parametrize("form", ["array", "numbers", "sparse", "layer"])
def test_hidden_stretches_are_shaded(brain, form) -> None:
    hidden = np.zeros((10, 30), dtype=bool)
    hidden[0, [0, 1, 2, 10, 11, 29]] = True
    hidden[1] = True
    given = {"array": hidden, "numbers": hidden.astype(int), "sparse": sparse.csr_matrix(hidden), "layer": "seen_not"}
    if form == "layer":
        brain["fmri"].layers["seen_not"] = hidden
    first, second, third = pl.signals(brain, [0, 1, 2], hidden=given[form], show=False)
    np.testing.assert_allclose(shaded(first), [(-1, 5), (19, 23), (57, 59)])
    np.testing.assert_allclose(shaded(second), [(-1, 59)])
    assert shaded(third) == []
    assert [text.get_text() for text in first.get_legend().get_texts()] == ["hidden", "measured", "reconstruction"]


def test_shading_stays_within_the_part_drawn(brain) -> None:
    hidden = np.zeros((10, 30), dtype=bool)
    hidden[0, :8] = True
    (ax,) = pl.signals(brain, 0, hidden=hidden, times=(10, 20), show=False)
    np.testing.assert_allclose(shaded(ax), [(9, 15)])


def test_the_only_modality_of_signals_is_found(brain, photos) -> None:
    with quiet_mudata():
        both = MuData({"image": photos["image"], "fmri": brain["fmri"]})
    assert pl.signals(both, 0, show=False).shape == (1,)
    with pytest.raises(ValueError, match="'image' is of kind 'patch', and this figure is of kind 'signal'"):
        pl.signals(both, 0, modality="image")


def test_style_of_the_reconstruction_is_passed_on(brain) -> None:
    (ax,) = pl.signals(brain, 0, show=False, color="blue", linewidth=3)
    assert (ax.lines[1].get_color(), ax.lines[1].get_linewidth()) == ("blue", 3)


def test_what_is_returned_and_written(brain, monkeypatch, tmp_path) -> None:
    shown = []
    monkeypatch.setattr(plt, "show", lambda: shown.append(1))
    assert pl.signals(brain, 0) is None
    assert shown == [1]
    _, own = plt.subplots(2)
    axes = pl.signals(brain, [0, 1], axes=own)
    assert list(axes) == list(own)
    file = tmp_path / "signals.png"
    assert pl.signals(brain, 0, axes=own[0], save=file)[0] is own[0]
    assert pl.signals(brain, 0, save=file) is not None
    assert shown == [1]
    assert plt.imread(file).shape[1] > plt.imread(file).shape[0] > 10


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"nodes": "F", "recording": "first"}, r"'F' is not in obs_names and obs\['region'\]"),
        ({"nodes": "A", "recording": "third"}, r"'third' is not in obs\['recording'\] .*'first', 'second'"),
        (
            {"nodes": 0, "key": "other"},
            r"'other' is not in mdata\['fmri'\].layers .*fimp_sc.tl.impute\(mdata, modality='fmri'\)",
        ),
        ({"nodes": 0, "hidden": "mask"}, r"'mask' is not in mdata\['fmri'\].layers"),
        ({"nodes": 0, "modality": "eeg"}, "'eeg' is not in mdata.mod"),
    ],
)
def test_missing_keys_are_named(brain, arguments, message) -> None:
    with pytest.raises(KeyError, match=message):
        pl.signals(brain, **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"nodes": "A"}, "'A' stands for 2 nodes, 'first:A', 'second:A': choose one with recording="),
        ({"nodes": []}, "nodes is empty"),
        ({"nodes": [True, False]}, "nodes are 2 bools, but there are 10 nodes"),
        ({"nodes": [0] * 51}, "51 nodes make a figure that nobody can read"),
        ({"nodes": 0, "times": (70, 90)}, r"no time points: give first and last between 0 and 58 \(time \(s\)\)"),
        ({"nodes": 0, "hidden": np.zeros((10, 3), bool)}, r"\(10, 3\), but 10 signals of 30 .* repeat what is said"),
        ({"nodes": 0, "hidden": np.full((10, 30), 0.5)}, "hidden must hold True and False"),
        ({"nodes": [0, 1], "axes": plt.Figure().subplots()}, "axes are 1, but 2 nodes"),
    ],
)
def test_unusable_input(brain, arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        pl.signals(brain, **arguments)


@pytest.mark.parametrize("position", [-1, 10])
def test_positions_out_of_range(brain, position) -> None:
    with pytest.raises(IndexError, match=f"nodes has the position {position}, and positions go from 0 to 9"):
        pl.signals(brain, position)


def test_recordings_must_be_known() -> None:
    mdata = pp.features(np.eye(3), np.ones((3, 3)))
    mdata["feature"].uns["fimp_modality"] = {"kind": "signal"}
    with pytest.raises(ValueError, match="names no column of recordings"):
        pl.signals(mdata, 0, recording="first")
    mdata["feature"].X = None
    with pytest.raises(ValueError, match=r"mdata\[.feature.\]\.X is None"):
        pl.signals(mdata, 0)


def test_other_objects(toy) -> None:
    with pytest.raises(TypeError, match="found dict"):
        pl.signals({}, 0)
    with pytest.raises(ValueError, match="does not say what it holds"):
        pl.signals(toy, 0)


def test_the_object_is_not_changed(brain) -> None:
    before = brain["fmri"].copy()
    pl.signals(brain, [0, 1], hidden=np.zeros((10, 30), bool), show=False)
    after = brain["fmri"]
    np.testing.assert_array_equal(after.X, before.X)
    assert set(after.layers) == set(before.layers)
    assert set(after.uns) == set(before.uns)
