"""Keys under which results are written: what a function writes, how its record tells it, and what may be replaced."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import fimp_sc
from fimp_sc.data._checks import check_key_added

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

# Where a function writes, beside its record in `uns[key]`.
_WRITTEN = {
    "tl.embed": (("obsm", "{}"),),
    "tl.annotate": (("obs", "{}"), ("obs", "{}_confidence"), ("obsm", "{}_probabilities")),
    "tl.impute": (("layers", "{}"), ("obsm", "{}")),
    "tl.niches": (("obs", "{}"), ("uns", "{}_colors")),
    "tl.attention": (("obsp", "{}"),),
    "pp.match_genes": (("var", "{}"),),
}
# Of records that do not name their function: those of version 0.1.
_MARKS = {"classes": "tl.annotate", "genes": "tl.impute"}


def new_record(data: Any, tool: str, *packages: str) -> dict[str, Any]:
    """Return what every record in ``uns`` holds: what made it, with which versions, and after which others.

    Parameters
    ----------
    data
        Object that the results are written to.
    tool
        Name of the function, ``"tl.embed"``.
    *packages
        Those whose versions matter beside this one's.
    """
    return {
        "tool": tool,
        "order": 1 + max((_order(record) for _, record in records(data)), default=0),
        "versions": {"fimp-sc": fimp_sc.__version__, **{package: version(package) for package in packages}},
    }


def records(data: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the records of this package in ``uns``, with their keys."""
    for key, found in data.uns.items():
        if _is_record(found):
            yield str(key), found


def last_record(data: Any, *, several: bool) -> tuple[str, Mapping[str, Any]] | None:
    """Return key and record of the latest result that a model made, of any that still are in the object.

    Parameters
    ----------
    several
        Of several modalities read together, rather than of the object alone.
    """
    found = [(key, r) for key, r in records(data) if "input_scale" in r["params"]]
    found = [(key, r) for key, r in found if ("modality" in r["params"]) == several]
    return max(found, key=lambda item: _order(item[1]), default=None)


def check_key(
    key: str, tool: str, data: Any, reads: Mapping[tuple[str, Any], str], *, overwrite: bool, tables: Iterable[Any] = ()
) -> None:
    """Refuse a name under which results would replace what is read, or what is no earlier result of the same function.

    Parameters
    ----------
    key
        Name of the results.
    tool
        Name of the function, ``"tl.embed"``.
    data
        Object that the record is written to, and the results unless ``tables`` are given.
    reads
        Names of arguments by the entries that they name: ``{("obs", "section"): "library_key"}``.
    overwrite
        Whether what is there may be replaced, unless it is read.
    tables
        Objects that the results are written to.

    Raises
    ------
    ValueError
        The name cannot be used; the message says why.
    """
    check_key_added(key)
    places = [(data, "uns", key)]
    for table in tables or (data,):
        places += [(table, slot, name.format(key)) for slot, name in _WRITTEN[tool]]
    for table, slot, name in places:
        where = f"adata.{slot}[{name!r}]"
        if (slot, name) in reads:
            raise ValueError(
                f"Results under {key!r} would replace {where}, which this call reads ({reads[slot, name]}): pass "
                "another name with key_added=. The object is unchanged."
            )
        if overwrite or name not in getattr(table, slot):
            continue
        record = next((found for found in (table.uns.get(key), data.uns.get(key)) if _is_record(found)), None)
        if record is None:
            raise ValueError(
                f"{where} exists, and adata.uns[{key!r}] has no record that fimp_sc.{tool} made it: pass another name "
                "with key_added=, or overwrite=True to replace it. The object is unchanged."
            )
        if (made_by := _tool(record)) != tool:
            raise ValueError(
                f"{where} holds results of fimp_sc.{made_by}, which would be replaced: pass another name with "
                "key_added=, or overwrite=True to replace them. The object is unchanged."
            )


def _is_record(found: Any) -> bool:
    return isinstance(found, Mapping) and "params" in found and "fimp-sc" in found.get("versions", ())


def _tool(record: Mapping[str, Any]) -> str:
    if "tool" in record:
        return str(record["tool"])
    return next((tool for mark, tool in _MARKS.items() if mark in record), "tl.embed")


def _order(record: Mapping[str, Any]) -> int:
    return int(record.get("order", 0))
