"""Keys and names that are not there: the nearest is named."""

from __future__ import annotations

import pytest

from fimp_sc.data.storage._elements import nearest


@pytest.mark.parametrize(
    ("key", "names", "found"),
    [
        ("HLA-A", ["HLA-B", "HLA.A", "HLA-DRA"], "HLA.A"),
        ("A", ["B-1", "A-1", "C"], "A-1"),
        ("A.1", ["A", "B"], "A"),
        ("ARX", ["Arc", "Arx", "ARF"], "Arx"),
        ("cell_type", ["CellType", "cell_types_old"], "CellType"),
        ("IL1", ["IL-1", "IL-2"], "IL-1"),
        ("celltype_x", ["cell_type", "spatial"], "cell_type"),
        ("IL-3", ["GAPDH", "ACTB"], None),
        ("?", ["GAPDH", "-"], None),
    ],
)
def test_the_nearest_name(key, names, found) -> None:
    assert nearest(key, names) == (f" Did you mean {found!r}?" if found else "")
    assert nearest(key, set(names)) == nearest(key, names)
