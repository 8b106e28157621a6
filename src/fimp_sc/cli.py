"""Command line: the functions of :mod:`fimp_sc.tl` for pipelines.

Options carry the names of the functions' parameters. An option that is not given is not passed on, so the defaults
live in one place, the functions.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fimp_sc

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData
    from mudata import MuData

_USER_ERRORS = (ValueError, KeyError, OSError, FloatingPointError, ImportError)
_INTERRUPTED = 130  # as shells say it
_SLOTS = ("obs", "obsm", "obsp", "layers", "uns")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Parameters
    ----------
    argv
        Arguments without the program's name; by default those of the process.

    Returns
    -------
    Exit code: 0 on success; 2 if the input or an option is at fault, with one line on the standard error stream; 130
    where the user interrupts it.
    Nothing is written to `--output` unless all went well.
    """
    options = vars(_parser().parse_args(argv))
    command = options.pop("command")
    try:
        if command == "demo":
            from fimp_sc._demo import run_demo

            run_demo(**options)
        else:
            _run_tool(command, **options)
    except Exception as error:
        if not _is_told(error):
            raise
        print(f"fimp-sc {command}: error: {_one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"fimp-sc {command}: interrupted", file=sys.stderr)
        return _INTERRUPTED
    return 0


def _run_tool(
    command: str, *, source: Path, output: Path, quiet: bool = False, save_model: Path | None = None, **arguments: Any
) -> None:
    """Read, call ``tl.<command>``, write."""
    if source.is_dir():
        message = (
            f"input {str(source)!r} is a folder, and only .h5ad and .h5mu files are read: write one from it, for "
            "instance with anndata.read_zarr(folder).write_h5ad(file)."
        )
        raise IsADirectoryError(message)
    if not source.is_file():
        message = f"input file {str(source)!r} does not exist."
        raise FileNotFoundError(message)
    if not output.parent.is_dir():
        message = f"--output: folder {str(output.parent)!r} does not exist; create it first."
        raise FileNotFoundError(message)
    if output.is_dir():
        message = f"--output: {str(output)!r} is a folder; name a file."
        raise ValueError(message)
    if save_model is not None and save_model.exists():
        message = f"--save-model: {str(save_model)!r} exists already; name a new folder."
        raise ValueError(message)

    suffix = ".h5mu" if source.suffix == ".h5mu" else ".h5ad"
    if output.suffix != suffix:
        message = f"--output: {output.name!r} must end in {suffix}, which is what is written for {source.name!r}."
        raise ValueError(message)
    if arguments.get("zero_shot") and "accelerator" in arguments:
        # Without training there is no trainer that would refuse a device that is not there.
        from scvi.model._utils import parse_device_args

        parse_device_args(arguments["accelerator"], "auto", return_device="torch")

    data = _read(source)
    before = _keys(data)
    if "train_checkpoint" in arguments:
        arguments["train_kwargs"] = {"checkpoint": arguments.pop("train_checkpoint")}
    arguments["verbose"] = not quiet
    getattr(fimp_sc.tl, command)(data, **arguments)
    if save_model is not None:
        fimp_sc.tl.get_model(data, arguments.get("modality")).save(str(save_model))
    _write(data, output)
    if not quiet:
        added = [key for key in _keys(data) if key not in before]
        print(f"Wrote {output}; new in it: {', '.join(added) or 'nothing, existing keys were replaced'}")
        if save_model is not None:
            print(f"Saved the model to {save_model}")


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
    parts = {"": data} | {f'["{name}"]': part for name, part in getattr(data, "mod", {}).items()}
    found = []
    for where, part in parts.items():
        for slot in _SLOTS:
            entries = getattr(part, slot, None)  # MuData has no layers
            found += [f'{where}.{slot}["{key}"]' for key in ([] if entries is None else entries.keys())]
    return found


def _write(data: Any, output: Path) -> None:
    """Write beside the target first, so that a failure leaves neither half a file nor a lost one."""
    from fimp_sc.data._modality import quiet_mudata

    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".fimp-sc-") as folder, quiet_mudata():
        part = Path(folder) / output.name
        (data.write_h5mu if hasattr(data, "write_h5mu") else data.write_h5ad)(part)
        part.replace(output)


def _is_told(error: Exception) -> bool:
    """Tell whether an error is about what the user gave, so that its message is enough."""
    if isinstance(error, _USER_ERRORS):
        return True
    # Imported this late because it takes seconds: lightning refuses an accelerator that is not there.
    from lightning.pytorch.utilities.exceptions import MisconfigurationException

    return isinstance(error, MisconfigurationException)


def _one_line(error: BaseException) -> str:
    # `str` of a KeyError is the repr of its message.
    text = error.args[0] if isinstance(error, KeyError) and len(error.args) == 1 else error
    return " ".join(str(text).split()) or type(error).__name__


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fimp-sc", description="Gene-level message passing between cells for spatial transcriptomics."
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {fimp_sc.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    embed = _add_tool(commands, "embed", "train on a section and write an embedding of its cells")
    embed.add_argument("--zero-shot", action="store_true", help="use the foundation model without training")
    _add_common(embed)

    annotate = _add_tool(commands, "annotate", "predict the labels of unlabelled cells, with confidence")
    annotate.add_argument("--labels-key", required=True, metavar="KEY", help="column of .obs with the known labels")
    annotate.add_argument("--unlabeled-category", metavar="NAME", help="label that means 'not known'")
    _add_common(annotate)

    impute = _add_tool(commands, "impute", "write the expression expected from a cell and its neighbours")
    impute.add_argument("--genes", nargs="+", metavar="GENE", help="write these genes only, as .obsm (default: all)")
    impute.add_argument("--scale", choices=("log", "counts"), help="scale of what is written")
    _add_common(impute)

    niches = _add_tool(commands, "niches", "divide an embedded section into niches")
    niches.add_argument("--n-niches", type=_positive, metavar="N", help="number of niches (default: suggest one)")
    niches.add_argument("--use-rep", metavar="KEY", help="key of .obsm with the embedding (default: X_fimp)")
    niches.add_argument("--method", choices=("mixture", "leiden"), help="how cells are clustered")
    niches.add_argument("--smooth", type=int, metavar="N", help="how many times cells are averaged over neighbours")
    niches.add_argument("--labels-key", metavar="KEY", help="column of .obs that is counted in every niche")
    _add_keys(niches)

    attention = _add_tool(commands, "attention", "write what neighbours contribute, and pairs of genes between groups")
    attention.add_argument("--groupby", required=True, metavar="KEY", help="column of .obs with groups of cells")
    attention.add_argument("--genes", nargs="+", metavar="GENE", help="genes to test (default: those that vary most)")
    attention.add_argument("--n-genes", type=_positive, metavar="N", help="how many, where genes are not named")
    attention.add_argument("--null", choices=("neighbours", "labels"), help="what is permuted")
    attention.add_argument("--n-permutations", type=_positive, metavar="N", help="how often")
    _add_common(attention)

    demo = commands.add_parser(
        "demo",
        help="run everything on an offline toy tissue and report how well it did",
        argument_default=argparse.SUPPRESS,
    )
    demo.add_argument("--output-dir", type=Path, metavar="DIR", help="where to write (default: ./fimp-sc-demo)")
    demo.add_argument("--max-epochs", type=_positive, metavar="N", help="upper limit of passes over the data")
    demo.add_argument("--random-state", type=int, metavar="SEED", help="seed of the tissue and of the training")
    return parser


def _add_tool(commands: Any, name: str, summary: str) -> argparse.ArgumentParser:
    tool: argparse.ArgumentParser = commands.add_parser(
        name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.", argument_default=argparse.SUPPRESS
    )
    tool.add_argument("source", type=Path, metavar="INPUT.h5ad", help="cells with .obsm['spatial'], or a .h5mu file")
    tool.add_argument("--output", type=Path, required=True, metavar="OUT.h5ad", help="where to write the result")
    return tool


def _add_common(tool: argparse.ArgumentParser) -> None:
    tool.add_argument("--modality", nargs="+", metavar="NAME", help="modality of a .h5mu file to read, or several")
    tool.add_argument("--layer", metavar="KEY", help="layer with the expression (default: .X)")
    tool.add_argument("--batch-key", metavar="KEY", help="column of .obs with batches")
    tool.add_argument("--spatial-key", metavar="KEY", help="key of .obsm with the coordinates")
    tool.add_argument(
        "--input-scale", choices=("auto", "counts", "normalized", "log", "real"), help="what the values are"
    )
    tool.add_argument("--gene-embeddings", metavar="FILE", help="pretrained vectors of genes to start from")
    tool.add_argument(
        "--foundation", choices=("scgpt", "vit", "brainlm"), help="foundation model that makes the messages"
    )
    tool.add_argument("--checkpoint", metavar="DIR", help="folder of the foundation model")
    tool.add_argument("--model", metavar="DIR", help="saved model to apply instead of training one")
    tool.add_argument("--save-model", type=Path, metavar="DIR", help="new folder to save the model to")
    tool.add_argument("--max-epochs", type=_positive, metavar="N", help="upper limit of passes over the data")
    tool.add_argument(
        "--train-checkpoint", metavar="DIR", help="folder that keeps the training, to go on from if it is stopped"
    )
    tool.add_argument("--accelerator", metavar="NAME", help="cpu, gpu, or auto")
    _add_keys(tool)


def _add_keys(tool: argparse.ArgumentParser) -> None:
    tool.add_argument("--library-key", metavar="KEY", help="column of .obs that tells samples apart")
    tool.add_argument(
        "--connectivities-key", metavar="KEY", help="key of .obsp with the graph; built if missing, but for niches"
    )
    tool.add_argument("--key-added", metavar="KEY", help="name of what is written")
    tool.add_argument("--overwrite", action="store_true", help="replace what is under this name in the input")
    tool.add_argument("--random-state", type=int, metavar="SEED", help="seed of everything random")
    tool.add_argument("--quiet", action="store_true", help="no progress and no report")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        message = f"{text} is not a positive number"
        raise argparse.ArgumentTypeError(message)
    return value
