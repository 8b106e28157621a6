"""Keys under which results are written: what a function writes, how its record tells it, and what may be replaced."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np

import fimp_sc
from fimp_sc.data._modality import get_modality
from fimp_sc.data._study import as_modalities, is_mudata
from fimp_sc.data.validate._checks import check_key_added, check_object

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from anndata import AnnData
    from mudata import MuData

# Where a function writes, beside its record in `uns[key]`.
WRITTEN = {
    "tl.embed": (("obsm", "{}"),),
    "tl.annotate": (("obs", "{}"), ("obs", "{}_confidence"), ("obsm", "{}_probabilities")),
    "tl.impute": (("layers", "{}"), ("obsm", "{}")),
    "tl.niches": (("obs", "{}"), ("obs", "{}_fit"), ("obsm", "{}_probabilities"), ("uns", "{}_colors")),
    "tl.attention": (("obsp", "{}"),),
    "tl.gene_pairs": (),
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


def choose_target(
    data: AnnData | MuData, modality: str | Sequence[str] | None
) -> tuple[AnnData | MuData, list[str] | None]:
    """Return the object that a call reads and writes, and the names of modalities if it reads several together.

    Without ``modality`` these are the one, or the several, that earlier results are of.
    """
    names = as_modalities(modality)
    if not is_mudata(data):
        check_object(data)
        if names is not None:
            raise ValueError(f"modality={modality!r} is for MuData objects, found an AnnData object: leave it out.")
        return data, None
    if names is None:
        together = joined_modalities(data)
        found = [] if together is None else [together]
        found += [[name] for name, part in data.mod.items() if last_record(part, several=False) is not None]
        names = found[0] if len(found) == 1 else None
    if names is None or len(names) == 1:
        return get_modality(data, names[0] if names else None)[1], None
    return data, names


def joined_modalities(data: MuData) -> list[str] | None:
    """Return the modalities that the latest result of several modalities read together is of, if there is one."""
    together = last_record(data, several=True)
    return None if together is None else as_modalities(np.asarray(together[1]["params"]["modality"]).tolist())


def find_results(
    data: AnnData | MuData, modality: str | Sequence[str] | None, holds: Callable[[Any, list[str] | None], bool]
) -> tuple[AnnData | MuData, list[str] | None]:
    """Return what :func:`choose_target` does; without ``modality``, of a MuData object what holds the results.

    That is the whole object, with the modalities that it has results of, or else the only modality that does.

    Parameters
    ----------
    holds
        Whether an object, of which these modalities are read together, holds what is looked for.

    Raises
    ------
    ValueError
        Several modalities hold it, and earlier results are not of one alone.
    """
    if not is_mudata(data) and modality is None:
        return data, None
    if modality is not None:
        return choose_target(data, modality)
    names = joined_modalities(data)
    if holds(data, names):
        return data, names
    found = [part for part in data.mod.values() if holds(part, None)]
    if len(found) == 1:
        return found[0], None
    if not found and (names is not None or len(data.mod) > 1):
        return data, names
    return choose_target(data, None)


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
        places += [(table, slot, name.format(key)) for slot, name in WRITTEN[tool]]
    for table, slot, name in places:
        where = f"adata.{slot}[{name!r}]"
        if (slot, name) in reads:
            raise ValueError(
                f"key_added={key!r} would replace {where}, which this call reads ({reads[slot, name]}): choose another "
                "name."
            )
        if overwrite or name not in getattr(table, slot):
            continue
        record = next((found for found in (table.uns.get(key), data.uns.get(key)) if _is_record(found)), None)
        made_by = None if record is None else _tool(record)
        if made_by != tool:
            whose = f"which fimp_sc.{tool} did not write" if made_by is None else f"a result of fimp_sc.{made_by}"
            raise ValueError(
                f"key_added={key!r} would replace {where}, {whose}: choose another name, or pass overwrite=True."
            )


def _is_record(found: Any) -> bool:
    return isinstance(found, Mapping) and "params" in found and "fimp-sc" in found.get("versions", ())


def _tool(record: Mapping[str, Any]) -> str:
    if "tool" in record:
        return str(record["tool"])
    return next((tool for mark, tool in _MARKS.items() if mark in record), "tl.embed")


def _order(record: Mapping[str, Any]) -> int:
    return int(record.get("order", 0))
