"""Foundation models that are known, and the handle that says which checkpoint is used, and how."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from fimp_sc._options import checked

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from fimp_sc.pretrained._backbone import Backbone

# Models that come with the package; each module registers its own when it is first asked for.
_OWN = {
    "scgpt": "_scgpt",
    "geneformer": "_geneformer",
    "nicheformer": "_nicheformer",
    "vit": "_vit",
    "brainlm": "_brainlm",
    "bert": "_bert",
}

_readers: dict[str, FoundationReader] = {}


class FoundationReader(ABC):
    """Reader of the checkpoints of one foundation model.

    Registered with :func:`register`, the model can be loaded by :attr:`name`, and used by all tools, the command line
    and saved models as any other.

    Attributes
    ----------
    name
        By which :func:`load` knows it.
    reads
        ``"expression"``, or the kind of signals or images that it reads, see :class:`fimp_sc.data.SequenceKind`.
    nodes
        A word for them in messages, such as ``"images"``.
    files
        What a folder with a checkpoint holds, for messages.
    needed
        Names of files without which :func:`load` refuses a folder; of each tuple one must be there.
    """

    name: ClassVar[str]
    reads: ClassVar[str]
    nodes: ClassVar[str]
    files: ClassVar[str]
    needed: ClassVar[tuple[tuple[str, ...], ...]] = ()

    @abstractmethod
    def read(self, folder: Path, rows: Any = None, **stack: Any) -> Backbone:
        """Read a checkpoint.

        Parameters
        ----------
        folder
            Its folder, or one file of weights.
        rows
            Of a model of expression alone: ``(n_genes,)`` int64, the row of each gene of the model in
            :meth:`vocabulary`, -1 for genes that it lacks. ``None`` takes the whole vocabulary, by row.
        **stack
            ``neighbor_states``, ``aggregate``, ``self_loops`` and ``dropout`` of :class:`fimp_sc.nn.TransformerStack`.
            Keywords that the method names itself are settings of the model, which :func:`load` takes.

        Raises
        ------
        CheckpointError
            A file is missing or damaged, or has what the model here does not have. The message names file and key.
        """

    @abstractmethod
    def build(self, config: Mapping[str, Any], **stack: Any) -> Backbone:
        """Build the modules with random weights, as for a saved model whose weights are loaded next.

        Parameters
        ----------
        config
            :attr:`Backbone.config` of what :meth:`read` returned.
        **stack
            As in :meth:`read`.
        """

    def vocabulary(self, folder: Path) -> dict[str, int]:
        """Return the row of each gene that a checkpoint knows; by default what ``vocab.json`` says."""
        from fimp_sc.pretrained.genes._vocabulary import read_vocabulary

        return read_vocabulary(folder)

    def gene_vectors(self, folder: Path) -> tuple[list[str], NDArray[Any]] | None:
        """Return names and vectors of the genes of a checkpoint, ``None`` if the folder holds no such table."""
        return None

    @property
    def settings(self) -> tuple[str, ...]:
        """Names of the settings that :meth:`read` takes."""
        parameters = inspect.signature(self.read).parameters.values()
        return tuple(p.name for p in parameters if p.kind is p.KEYWORD_ONLY)


def register(reader: FoundationReader) -> None:
    """Make a foundation model known.

    Parameters
    ----------
    reader
        An instance; replaces one of the same name.

    Raises
    ------
    TypeError
        When it is not an instance of a :class:`FoundationReader`.
    """
    if not isinstance(reader, FoundationReader):
        raise TypeError(f"register takes an instance of a FoundationReader, found {reader!r}.")
    _readers[reader.name] = reader


def foundation_names() -> tuple[str, ...]:
    """Return the names of all foundation models that are known."""
    return tuple(dict.fromkeys([*_OWN, *_readers]))


def foundation_reader(name: str) -> FoundationReader:
    """Return what reads the checkpoints of a foundation model.

    Raises
    ------
    ValueError
        When none is known by this name.
    """
    if name in _OWN and name not in _readers:
        import_module(f"fimp_sc.pretrained.{_OWN[name]}")
    if name not in _readers:
        raise ValueError(
            f"name must be that of a foundation model, {', '.join(map(repr, foundation_names()))}: found {name!r}. "
            "fimp_sc.pretrained.register makes others known."
        )
    return _readers[name]


@dataclass(frozen=True, eq=False)
class Foundation:
    """A foundation model as it is to be used: made by :func:`load`, taken by ``foundation=`` of tools and models.

    Weights are read when a model is built, of which only the genes of the data are kept.

    Attributes
    ----------
    name, checkpoint, train, neighbor_states, aggregate, species, orthologs, vocabulary_key, settings
        See :func:`load`.
    folder
        Where the files are; ``None`` for that of a saved model, which needs them no more.
    """

    name: str
    checkpoint: str | None = None
    train: str = "frozen"
    neighbor_states: Literal["evolving", "static"] = "evolving"
    aggregate: Literal["layer", "final"] = "layer"
    species: Literal["human", "mouse"] = "human"
    orthologs: Any = field(default=None, repr=False)
    vocabulary_key: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    folder: Path | None = field(default=None, repr=False)

    @property
    def reader(self) -> FoundationReader:
        """Reader of its checkpoints."""
        return foundation_reader(self.name)

    def read(self, rows: NDArray[Any] | None = None, **stack: Any) -> Backbone:
        """Read the checkpoint.

        Parameters
        ----------
        rows, **stack
            See :meth:`FoundationReader.read`.

        Raises
        ------
        CheckpointError
            When a file is missing, damaged or does not fit the others.
        ValueError
            When it is the foundation model of a saved model.
        """
        how: dict[str, Any] = {"rows": rows} if rows is not None else {}
        if "species" in self.reader.settings:
            how["species"] = self.species
        return self.reader.read(self._located(), **how, **self.settings, **self._messages(), **stack)

    def build(self, config: Mapping[str, Any], **stack: Any) -> Backbone:
        """Build the modules without the checkpoint, see :meth:`FoundationReader.build`."""
        return self.reader.build(config, **self._messages(), **stack)

    def vocabulary(self) -> dict[str, int]:
        """Return the row of each gene that the checkpoint knows."""
        return self.reader.vocabulary(self._located())

    def record(self) -> dict[str, Any]:
        """Return what a saved model keeps of it, as plain values; files are names alone."""
        kept = {name: getattr(self, name) for name in _RECORDED}
        orthologs = self.orthologs
        if orthologs is not None:
            plain = isinstance(orthologs, str | Path)
            kept["orthologs"] = str(orthologs) if plain else type(orthologs).__name__
        return kept | ({"settings": dict(self.settings)} if self.settings else {})

    def _messages(self) -> dict[str, Any]:
        return {"neighbor_states": self.neighbor_states, "aggregate": self.aggregate}

    def _located(self) -> Path:
        if self.folder is None:
            raise ValueError(
                f"This {self.name!r} is that of a saved model, which keeps no checkpoint: name its folder in "
                f"fimp_sc.pretrained.load({self.name!r}, folder)."
            )
        return self.folder


_RECORDED = (
    "name", "checkpoint", "train", "neighbor_states", "aggregate", "species", "orthologs", "vocabulary_key",
)  # fmt: skip


@checked
def load(
    name: str,
    checkpoint: str | Path | None = None,
    *,
    train: str = "frozen",
    neighbor_states: Literal["evolving", "static"] = "evolving",
    aggregate: Literal["layer", "final"] = "layer",
    species: Literal["human", "mouse"] = "human",
    orthologs: Any = None,
    vocabulary_key: str | None = None,
    **settings: Any,
) -> Foundation:
    """Choose a foundation model whose self-attention makes the messages, for ``foundation=`` of tools and models.

    Parameters
    ----------
    name
        ``"scgpt"``, ``"geneformer"`` or ``"nicheformer"`` (expression), ``"vit"`` (images; also DINOv2 and models of
        pathology built on it), ``"brainlm"`` (signals of brain regions), ``"bert"`` (texts), or one that
        :func:`register` made known.
    checkpoint
        Folder with the files of the model, or the name of a repository on the Hugging Face hub, which is downloaded.
    train
        What training changes of the foundation model: ``"frozen"`` (nothing, only heads are trained), ``"full"``,
        ``"last:N"`` (its last N layers) or ``"lora"`` (``"lora:RANK"``, a low-rank change of queries and values).
    neighbor_states
        Hidden states that neighbors send to a layer: those that they have there (``"evolving"``), or their first ones
        (``"static"``), see :class:`fimp_sc.nn.TransformerStack`.
    aggregate
        Messages are averaged after every layer (``"layer"``), or every edge runs the whole stack (``"final"``, dearer
        by the number of neighbors).
    species
        Of the genes of the data, ``"human"`` or ``"mouse"``; mouse genes are matched with a human vocabulary by
        ``orthologs``.
    orthologs
        Table of mouse and human genes, see :func:`fimp_sc.pp.match_genes`.
    vocabulary_key
        Column of ``var`` with ids from :func:`fimp_sc.pp.match_genes`; by default genes are matched by name.
    **settings
        Of this model. scGPT: ``cls_value`` (value of its first token, by default that of padding). Geneformer:
        ``layer`` that is read (by default -2, the last but one) and ``pooling`` (``"cls"`` or ``"mean"`` of the genes,
        by default the first where there is such a token). Nicheformer: ``assay``, such as ``"xenium"``, which it needs,
        and ``layer`` (by default -1, the last). BERT: ``pooling`` (``"mean"`` or ``"cls"``, by default what the files
        say) and ``layer``. ViT: ``pooling``, the embedding of an image, ``"cls"`` (class token) or ``"cls+mean"``
        (followed by the mean of its patches); ``mean`` and ``std``, three numbers each from 0 to 1, by which colors are
        normalized where no file says so (by default one half, of models with layer scale, such as DINOv2,
        ImageNet's); ``n_heads`` without a configuration.

    Returns
    -------
    :class:`Foundation`.

    Raises
    ------
    CheckpointError
        There is no such folder, and nothing can be downloaded under that name; or it lacks a file. A
        :class:`ValueError`.
    TypeError
        An argument is unknown or of another type.
    ValueError
        The name is not known, or an argument is out of its range.

    Examples
    --------
    >>> fm = fimp.pretrained.load("scgpt", "scGPT_human/", train="lora")
    >>> fimp.tl.embed(adata, foundation=fm)
    >>> model = fimp.model.FIMP(adata, foundation=fm)
    """
    reader = foundation_reader(name)
    unknown = [setting for setting in settings if setting not in reader.settings]
    if unknown:
        takes = ["train", "neighbor_states", "aggregate", "species", "orthologs", "vocabulary_key", *reader.settings]
        raise TypeError(f"load({name!r}) got {unknown[0]}=, and takes {', '.join(dict.fromkeys(takes))}.")
    if reader.reads != "expression" and (species != "human" or orthologs is not None or vocabulary_key is not None):
        raise ValueError(f"species, orthologs and vocabulary_key are for genes, and {name!r} reads {reader.nodes}.")
    if checkpoint is None:
        raise ValueError(f"load({name!r}) needs checkpoint, the folder with {reader.files}.")
    from fimp_sc.pretrained.files._files import check_files, checkpoint_folder

    path = Path(checkpoint).expanduser()
    folder = path if path.is_file() else checkpoint_folder(checkpoint)
    if folder.is_dir():
        check_files(folder, reader.needed)
    return Foundation(
        name, str(checkpoint), train, neighbor_states, aggregate, species, orthologs, vocabulary_key, settings, folder
    )
