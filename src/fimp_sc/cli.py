"""Command line: the functions of :mod:`fimp_sc.tl` for pipelines.

Options carry the names of the functions' parameters. An option that is not given is not passed on, so the defaults
live in one place, the functions.
"""

from __future__ import annotations

import argparse
import errno
import os
import re
import shutil
import sys
import tempfile
import warnings
from collections.abc import Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fimp_sc
from fimp_sc._option_rules import Choice, Flag, Integer, Real
from fimp_sc._options import rule_of
from fimp_sc.pretrained import foundation_names
from fimp_sc.pretrained._registry import foundation_reader

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from anndata import AnnData
    from mudata import MuData

# What says by itself what is wrong; anything else is a defect, whose traceback is worth reporting.
_TOLD = (ValueError, TypeError, LookupError, ArithmeticError, OSError, RuntimeError, MemoryError, ImportError)
# Of files in HDF5 beside the values in them.
_OVERHEAD, _OVERHEAD_FRACTION = 1 << 20, 0.05
_SLOTS = ("obs", "obsm", "obsp", "layers", "uns")
# A call in Python, whose arguments stay as they are, and an argument by itself with a plain value.
_CALL = r"[\w.]+\((?:[^()]|\([^()]*\))*\)"
_VALUE = r"True\b|\[[^\]]*\]|'[^']*'|\"[^\"]*\"|-?\d+(?:\.\d+)?|\.\.\."


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Parameters
    ----------
    argv
        Arguments without the program's name; by default those of the process.

    Returns
    -------
    Exit code: 0 on success; 2 if the input, an option, the disk or memory is at fault, with one line on the standard
    error stream; 130 if interrupted. Nothing is written to `--output` unless all went well. With `--debug` errors keep
    their traceback.
    """
    options = vars(_parser().parse_args(argv))
    command, debug = options.pop("command"), options.pop("debug", False)
    try:
        if command == "demo":
            from fimp_sc._demo import run_demo

            run_demo(**options)
        else:
            with _warnings_in_a_line(command):
                _run_tool(command, **options)
    except KeyboardInterrupt:
        if debug:
            raise
        print(f"fimp-sc {command}: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if debug or not _is_told(error):
            raise
        print(f"fimp-sc {command}: error: {in_options(_one_line(error), command)}", file=sys.stderr)
        return 2
    return 0


def in_options(message: str, command: str) -> str:
    """Return a message of the functions with their arguments written as options of a command.

    Parameters
    ----------
    message
        What a function says, such as ``"Pass library_key='sample'."``; calls in it are Python, and stay as they are.
    command
        Name of the command, of whose options alone others are meant.
    """
    tool = _commands(_parser())[command]
    flags = {action.dest: action.option_strings[-1] for action in tool._actions if action.option_strings}
    # Of a training: that of a foundation model is checked here.
    flags["checkpoint"] = flags.get("train_checkpoint", "")
    names = "|".join(map(re.escape, flags))
    argument = rf"(?<![\w.\"'])({names})=(?:({_VALUE})|(?=[\s.,;:)]|$))"

    def translated(found: re.Match[str]) -> str:
        first, name, value = found.groups()
        if first is None and name is None:
            return found[0]
        words = [] if value in (None, "True") else re.findall(r"'[^']*'|\"[^\"]*\"|[^][, ]+", value)
        return " ".join([flags[first or name], *(word if " " in word else word.strip("'\"") for word in words)])

    return re.sub(rf"{_CALL}|^({names})(?= must be )|{argument}", translated, message)


@contextmanager
def _warnings_in_a_line(command: str) -> Iterator[None]:
    """Write warnings of this package as errors are: in one line, in words of the command line."""
    with warnings.catch_warnings():
        others = warnings.showwarning

        def show(message: Any, category: Any, *where: Any, **how: Any) -> None:
            if category is UserWarning:
                print(f"fimp-sc {command}: warning: {in_options(_one_line(message), command)}", file=sys.stderr)
            else:
                others(message, category, *where, **how)

        warnings.showwarning = show
        yield


def _run_tool(
    command: str,
    *,
    source: Path | list[Path],
    output: Path,
    quiet: bool = False,
    save_model: Path | None = None,
    report: Path | None = None,
    **arguments: Any,
) -> None:
    """Read, call ``tl.<command>``, write."""
    sources = source if isinstance(source, list) else [source]
    outputs = _outputs(sources, output)
    if save_model is not None and save_model.exists():
        message = f"--save-model: {str(save_model)!r} exists already; name a new folder."
        raise ValueError(message)
    if report is not None:
        from fimp_sc.pl._figure._rules import ReportFile

        if len(sources) > 1:
            message = "--report is of one input: read the results with fimp_sc.pl.report in Python."
            raise ValueError(message)
        report = ReportFile().accept(report, "--report")
        _check_writable(report.parent, "--report")
    if save_model is not None:
        _check_writable(next(folder for folder in save_model.absolute().parents if folder.is_dir()), "--save-model")
    objects = {path.stem: _read(path) for path in sources}
    before = {name: _keys(data) for name, data in objects.items()}
    first = next(iter(objects.values()))
    genes = {name: arguments.pop(name) for name in ("species", "orthologs") if name in arguments}
    if genes and not {"foundation", "gene_embeddings"} & arguments.keys():
        message = f"--{max(genes)} is for --foundation or --gene-embeddings, and there is neither."
        raise ValueError(message)
    if "gene_embeddings" in arguments:
        vectors = arguments.pop("gene_embeddings")
        vectors = fimp_sc.pretrained.read_gene_vectors(vectors, **genes) if genes else vectors
        arguments["model_kwargs"] = {"gene_embeddings": vectors}
    if "train_checkpoint" in arguments:
        arguments["train_kwargs"] = {"checkpoint": arguments.pop("train_checkpoint")}
    if "foundation" in arguments:
        if "checkpoint" not in arguments:
            files = foundation_reader(arguments["foundation"]).files
            message = f"--foundation {arguments['foundation']} needs --checkpoint, the folder with {files}."
            raise ValueError(message)
        checkpoint = arguments.pop("checkpoint")
        arguments["foundation"] = fimp_sc.pretrained.load(arguments["foundation"], checkpoint, **genes)
    elif "checkpoint" in arguments:
        message = "--checkpoint holds the files of a foundation model: name it with --foundation."
        raise ValueError(message)
    arguments["verbose"] = not quiet
    getattr(fimp_sc.tl, command.replace("-", "_"))(first if len(objects) == 1 else objects, **arguments)
    if save_model is not None:
        fimp_sc.tl.get_model(first, arguments.get("modality")).save(str(save_model))
    for (name, data), path in zip(objects.items(), outputs, strict=True):
        _write(data, path)
        if not quiet:
            added = [key for key in _keys(data) if key not in before[name]]
            print(f"Wrote {path}; new in it: {', '.join(added) or 'nothing, existing keys were replaced'}")
    if report is not None:
        fimp_sc.pl.report(first, report, modality=arguments.get("modality"))
    if save_model is not None and not quiet:
        print(f"Saved the model to {save_model}")
    if report is not None and not quiet:
        print(f"Wrote the report {report}")


def _outputs(sources: list[Path], output: Path) -> list[Path]:
    """Return where each result goes, after checks of all places."""
    for source in sources:
        if source.is_dir():
            message = (
                f"input {str(source)!r} is a folder, and only .h5ad and .h5mu files are read: write one from it, for "
                "instance with anndata.read_zarr(folder).write_h5ad(file)."
            )
            raise IsADirectoryError(message)
        if not source.is_file():
            message = f"input file {str(source)!r} does not exist."
            raise FileNotFoundError(message)
    if len(sources) > 1:
        if not output.is_dir():
            message = f"--output: of several inputs results go to a folder, and {str(output)!r} is none; create it."
            raise FileNotFoundError(message)
        if any(source.suffix == ".h5mu" for source in sources):
            message = "several inputs must be .h5ad files: a .h5mu file is read by itself."
            raise ValueError(message)
        if len({source.stem for source in sources}) < len(sources):
            message = "inputs must have different file names, by which results are told apart."
            raise ValueError(message)
        outputs = [output / f"{source.stem}.h5ad" for source in sources]
        own = [path for path in outputs if any(path.resolve() == source.resolve() for source in sources)]
        if own:
            message = f"--output: {str(own[0])!r} is an input, which would be replaced; name another folder."
            raise ValueError(message)
        _check_writable(output, "--output")
        return outputs
    if not output.parent.is_dir():
        message = f"--output: folder {str(output.parent)!r} does not exist; create it first."
        raise FileNotFoundError(message)
    if output.is_dir():
        message = f"--output: {str(output)!r} is a folder; name a file."
        raise ValueError(message)
    suffix = ".h5mu" if sources[0].suffix == ".h5mu" else ".h5ad"
    if output.suffix != suffix:
        message = f"--output: {output.name!r} must end in {suffix}, which is what is written for {sources[0].name!r}."
        raise ValueError(message)
    _check_writable(output.parent, "--output")
    return [output]


def _check_writable(folder: Path, option: str) -> None:
    """Raise an OSError where a folder takes no files, before anything is computed for it."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        message = f"{option}: no file can be made in the folder {str(folder)!r} ({error.strerror}); name another one."
        raise OSError(message) from None


def _read(source: Path) -> AnnData | MuData:
    kind = "MuData" if source.suffix == ".h5mu" else "AnnData"
    try:
        if kind == "AnnData":
            import anndata

            return anndata.read_h5ad(source)
        import mudata

        from fimp_sc.data._modality import quiet_mudata

        with quiet_mudata():
            return mudata.read_h5mu(source)
    except (PermissionError, MemoryError, ImportError):
        raise  # which say nothing about what the file is
    except Exception as error:
        message = f"{source} is no {kind} file that can be read ({type(error).__name__}: {_one_line(error)})."
        if source.suffix == ".h5":
            message += " One of 10x Genomics is read by scanpy.read_10x_h5; write it with adata.write_h5ad."
        raise ValueError(message) from error


def _keys(data: AnnData | MuData) -> list[str]:
    """Return the entries of an object and its modalities, as one writes them."""
    holders = {"": data} | {f'["{name}"]': modality for name, modality in getattr(data, "mod", {}).items()}
    found = []
    for where, holder in holders.items():
        for slot in _SLOTS:
            entries = getattr(holder, slot, None)  # MuData has no layers
            found += [f'{where}.{slot}["{key}"]' for key in ([] if entries is None else entries.keys())]
    return found


def _write(data: Any, output: Path) -> None:
    """Write beside the target first, so that a failure leaves neither half a file nor a lost one."""
    from fimp_sc.data._modality import quiet_mudata

    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".fimp-sc-") as folder, quiet_mudata():
        beside = Path(folder) / output.name
        _reserve(beside, int(_size(data) * (1 + _OVERHEAD_FRACTION)) + _OVERHEAD, output)
        try:
            (data.write_h5mu if hasattr(data, "write_h5mu") else data.write_h5ad)(beside)
        except Exception as error:
            message = f"--output: {str(output)!r} cannot be written ({type(error).__name__}: {_one_line(error)})."
            raise OSError(message) from error
        beside.replace(output)


def _reserve(beside: Path, n_bytes: int, output: Path) -> None:
    """Raise an OSError unless a file of ``n_bytes`` fits: HDF5 does not survive a disk or a quota that is full."""
    try:
        if hasattr(os, "posix_fallocate"):
            with beside.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, n_bytes)
        elif n_bytes > shutil.disk_usage(beside.parent).free:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return  # not every file system can tell
        message = (
            f"--output: {str(output)!r} needs about {n_bytes / 1e6:,.1f} MB, which do not fit there "
            f"({error.strerror}): make room, or name a file on another disk."
        )
        raise OSError(message) from None


def _size(data: Any) -> int:
    """Return the bytes of all values of an object, as they are in memory."""
    if hasattr(data, "var_names"):
        return sum(_size(getattr(data, slot, None)) for slot in ("mod", "X", "raw", "var", "varm", "varp", *_SLOTS))
    import numpy as np
    import pandas as pd
    from scipy import sparse

    if isinstance(data, pd.DataFrame):
        return int(data.memory_usage(deep=True).sum())
    if sparse.issparse(data):
        return sum(int(array.nbytes) for array in vars(data).values() if isinstance(array, np.ndarray))
    if isinstance(data, Mapping):
        return sum(map(_size, data.values()))
    return len(data) if isinstance(data, str) else int(getattr(data, "nbytes", 8))


def _is_told(error: Exception) -> bool:
    """Tell whether an error is about what the user gave, so that its message is enough."""
    if isinstance(error, _TOLD):
        return True
    # Imported this late because it takes seconds: lightning refuses an accelerator that is not there.
    from lightning.pytorch.utilities.exceptions import MisconfigurationException

    return isinstance(error, MisconfigurationException)


def _one_line(error: BaseException) -> str:
    # `str` of a KeyError is the repr of its message.
    text = error.args[0] if isinstance(error, KeyError) and len(error.args) == 1 else error
    return " ".join(str(text).split()) or type(error).__name__


def _commands(parser: argparse.ArgumentParser) -> Mapping[str, argparse.ArgumentParser]:
    """Return the parser of each command."""
    return next(a.choices for a in parser._actions if isinstance(a, argparse._SubParsersAction))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fimp-sc", description="Gene-level message passing between cells for spatial transcriptomics."
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {fimp_sc.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    embed = _add_tool(commands, "embed", "train on a section and write an embedding of its cells")
    _add(embed, "zero_shot", help="use the foundation model without training")
    _add_common(embed)

    annotate = _add_tool(commands, "annotate", "predict the labels of unlabeled cells, with confidence")
    _add(annotate, "labels_key", required=True, metavar="KEY", help="column of .obs with the known labels")
    _add(annotate, "unlabeled_category", metavar="NAME", help="label that means 'not known'")
    _add_common(annotate)

    impute = _add_tool(commands, "impute", "write the expression expected from a cell and its neighbors")
    _add(impute, "genes", nargs="+", metavar="GENE", help="write these genes only, as .obsm (default: all)")
    _add(impute, "scale", help="scale of what is written")
    _add_common(impute)

    niches = _add_tool(commands, "niches", "divide an embedded section into niches")
    _add(niches, "n_niches", metavar="N", help="number of niches (default: suggest one)")
    _add(niches, "use_rep", metavar="KEY", help="key of .obsm with the embedding (default: X_fimp)")
    _add(niches, "method", owner="niches", help="how cells are clustered")
    _add(niches, "smooth", metavar="N", help="how many times cells are averaged over neighbors")
    _add(niches, "labels_key", metavar="KEY", help="column of .obs that is counted in every niche")
    _add_keys(niches)

    attention = _add_tool(
        commands, "attention", "write the influence of neighbors, per edge and per pair of groups", several=False
    )
    _add(attention, "groupby", required=True, metavar="KEY", help="column of .obs with groups of cells")
    _add(attention, "n_permutations", metavar="N", help="number of permutations")
    _add_common(attention)

    pairs = _add_tool(commands, "gene-pairs", "test pairs of genes between neighboring groups of cells")
    _add(pairs, "groupby", required=True, metavar="KEY", help="column of .obs with groups of cells")
    _add(pairs, "genes", nargs="+", metavar="GENE", help="genes to test (default: those that vary most)")
    _add(pairs, "n_genes", metavar="N", help="number of genes, if none are named")
    _add(pairs, "domain_key", metavar="KEY", help="column of .obs with known domains (default: compare near cells)")
    _add(pairs, "n_permutations", metavar="N", help="number of permutations")
    _add_values(pairs)
    _add_keys(pairs)

    demo = commands.add_parser(
        "demo",
        help="run everything on an offline toy tissue and report how well it did",
        argument_default=argparse.SUPPRESS,
    )
    demo.add_argument("--output-dir", type=Path, metavar="DIR", help="where to write (default: ./fimp-sc-demo)")
    _add(demo, "max_epochs", metavar="N", help="upper limit of passes over the data")
    _add(demo, "random_state", metavar="SEED", help="seed of the tissue and of the training")
    _add_debug(demo)
    return parser


def _add_tool(commands: Any, name: str, summary: str, *, several: bool = True) -> argparse.ArgumentParser:
    tool: argparse.ArgumentParser = commands.add_parser(
        name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.", argument_default=argparse.SUPPRESS
    )
    what = "cells with .obsm['spatial'], or a .h5mu file"
    if several:
        what += "; several .h5ad files are read together"
        tool.add_argument("source", type=Path, nargs="+", metavar="INPUT.h5ad", help=what)
    else:
        tool.add_argument("source", type=Path, metavar="INPUT.h5ad", help=what)
    where = "where to write the result" + ("; of several inputs a folder" if several else "")
    tool.add_argument("--output", type=Path, required=True, metavar="OUT.h5ad", help=where)
    return tool


def _add_values(tool: argparse.ArgumentParser) -> None:
    _add(tool, "modality", nargs="+", metavar="NAME", help="modality of a .h5mu file to read, or several")
    _add(tool, "layer", metavar="KEY", help="layer with the expression (default: .X)")
    _add(tool, "spatial_key", metavar="KEY", help="key of .obsm with the coordinates")
    _add(tool, "input_scale", help="what the values are")


def _add_common(tool: argparse.ArgumentParser) -> None:
    _add_values(tool)
    _add(tool, "batch_key", metavar="KEY", help="column of .obs with batches")
    _add(tool, "center", help="mean that is subtracted: of all training cells, or of each batch")
    _add(tool, "gene_embeddings", metavar="FILE", help="pretrained vectors of genes to start from")
    tool.add_argument("--foundation", choices=foundation_names(), help="foundation model that makes the messages")
    tool.add_argument("--checkpoint", metavar="DIR", help="folder of the foundation model")
    _add(tool, "species", help="species of the genes, for a foundation model or pretrained vectors")
    _add(tool, "orthologs", metavar="FILE", help="table of mouse and human genes, for --species mouse")
    _add(tool, "model", metavar="DIR", help="saved model to apply instead of training one")
    tool.add_argument("--save-model", type=Path, metavar="DIR", help="new folder to save the model to")
    _add(tool, "n_tokens", metavar="N", help="token budget of a cell")
    _add(tool, "n_layers", metavar="N", help="message-passing layers")
    _add(tool, "max_epochs", metavar="N", help="upper limit of passes over the data")
    tool.add_argument(
        "--train-checkpoint", metavar="DIR", help="folder that keeps the training, to go on from if it is stopped"
    )
    _add(tool, "accelerator", metavar="NAME", help="cpu, gpu, or auto")
    _add_keys(tool)


def _add_keys(tool: argparse.ArgumentParser) -> None:
    _add(tool, "library_key", metavar="KEY", help="column of .obs that tells samples apart")
    _add(
        tool, "connectivities_key", metavar="KEY", help="key of .obsp with the graph; built if missing, but for niches"
    )
    _add(tool, "key_added", metavar="KEY", help="name of what is written")
    _add(tool, "overwrite", help="replace what is under this name in the input")
    _add(tool, "random_state", metavar="SEED", help="seed of everything random")
    tool.add_argument("--report", type=Path, metavar="FILE.html", help="page with figures of all results to write")
    tool.add_argument("--quiet", action="store_true", help="no progress and no report")
    _add_debug(tool)


def _add_debug(tool: argparse.ArgumentParser) -> None:
    tool.add_argument("--debug", action="store_true", help="show the traceback of an error")


def _add(tool: argparse.ArgumentParser, name: str, *, owner: str = "", **described: Any) -> None:
    """Add an option of the tools; what it may be is in the table that the tools themselves are checked against."""
    rule = rule_of(owner, name)
    if isinstance(rule, Choice):
        described["choices"] = rule.choices
    elif isinstance(rule, Flag):
        described["action"] = "store_true"
    elif isinstance(rule, Integer | Real):
        described["type"] = _number(rule, f"--{name.replace('_', '-')}")
    tool.add_argument(f"--{name.replace('_', '-')}", **described)


def _number(rule: Integer | Real, name: str) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        value: Any = text
        with suppress(ValueError):  # which the rule explains
            value = int(text) if isinstance(rule, Integer) else float(text)
        try:
            return rule.accept(value, name)
        except (TypeError, ValueError) as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return read
