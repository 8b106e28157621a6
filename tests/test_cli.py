from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from types import ModuleType, SimpleNamespace

import anndata as ad
import h5py
import mudata
import numpy as np
import pandas as pd
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

import fimp_sc
from fimp_sc import cli
from fimp_sc.data._modality import quiet_mudata


@pytest.fixture
def section(small_toy, tmp_path):
    path = tmp_path / "section.h5ad"
    small_toy.write_h5ad(path)
    return path


@pytest.fixture
def calls(monkeypatch) -> list[tuple[str, dict]]:
    """Replace the tools by recorders, to test how arguments are handed over."""
    recorded: list[tuple[str, dict]] = []

    def recorder(name):
        def record(adata, **arguments) -> None:
            recorded.append((name, arguments))
            adata.obs["added"] = 1

        return record

    tools = ModuleType("fimp_sc.tl")
    for name in ("embed", "annotate", "impute", "niches", "attention", "gene_pairs"):
        setattr(tools, name, recorder(name))
    tools.get_model = lambda adata, modality: SimpleNamespace(
        save=lambda path: recorded.append(("save", {"path": path}))
    )
    monkeypatch.setitem(sys.modules, "fimp_sc.tl", tools)
    # Once loaded for real, the submodule is an attribute too.
    monkeypatch.setattr(fimp_sc, "tl", tools, raising=False)
    return recorded


def test_options_that_are_not_given_are_not_passed_on(section, tmp_path, calls, capsys) -> None:
    output = tmp_path / "out.h5ad"
    assert cli.main(["embed", str(section), "--output", str(output)]) == 0
    assert calls == [("embed", {"verbose": True})]
    assert "added" in ad.read_h5ad(output).obs
    assert 'new in it: .obs["added"]' in capsys.readouterr().out


def test_options_carry_the_names_of_the_parameters(section, tmp_path, calls, capsys) -> None:
    arguments = ["--output", str(tmp_path / "out.h5ad"), "--labels-key", "region", "--unlabeled-category", "none"]
    arguments += ["--layer", "counts", "--library-key", "section", "--batch-key", "donor", "--spatial-key", "xy"]
    arguments += ["--connectivities-key", "graph", "--input-scale", "counts", "--key-added", "new", "--model", "folder"]
    arguments += [
        "--n-tokens",
        "8",
        "--n-layers",
        "1",
        "--max-epochs",
        "3",
        "--accelerator",
        "cpu",
        "--random-state",
        "7",
        "--quiet",
    ]
    assert cli.main(["annotate", str(section), *arguments]) == 0
    expected = {
        "labels_key": "region",
        "unlabeled_category": "none",
        "layer": "counts",
        "library_key": "section",
        "batch_key": "donor",
        "spatial_key": "xy",
        "connectivities_key": "graph",
        "input_scale": "counts",
        "key_added": "new",
        "model": "folder",
        "n_tokens": 8,
        "n_layers": 1,
        "max_epochs": 3,
        "accelerator": "cpu",
        "random_state": 7,
        "verbose": False,
    }
    assert calls == [("annotate", expected)]
    assert capsys.readouterr().out == ""


def test_impute_takes_genes_and_scale(section, tmp_path, calls) -> None:
    arguments = ["--output", str(tmp_path / "out.h5ad"), "--genes", "CD74", "LYZ", "--scale", "counts", "--quiet"]
    assert cli.main(["impute", str(section), *arguments]) == 0
    assert calls == [("impute", {"genes": ["CD74", "LYZ"], "scale": "counts", "verbose": False})]


def test_niches_train_nothing(section, tmp_path, calls, capsys) -> None:
    arguments = ["--output", str(tmp_path / "out.h5ad"), "--n-niches", "5", "--use-rep", "X_pca", "--method", "leiden"]
    arguments += ["--smooth", "0", "--labels-key", "cell_type", "--library-key", "section", "--random-state", "3"]
    assert cli.main(["niches", str(section), *arguments]) == 0
    expected = {"n_niches": 5, "use_rep": "X_pca", "method": "leiden", "smooth": 0, "labels_key": "cell_type"}
    assert calls == [("niches", {**expected, "library_key": "section", "random_state": 3, "verbose": True})]
    assert "Wrote" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        cli.main(["niches", str(section), "--output", str(tmp_path / "out.h5ad"), "--max-epochs", "3"])


def test_gene_pairs_takes_groups_and_genes(section, tmp_path, calls) -> None:
    arguments = ["--output", str(tmp_path / "out.h5ad"), "--groupby", "cell_type", "--genes", "CD74", "LYZ", "--quiet"]
    arguments += ["--domain-key", "region", "--n-permutations", "20", "--layer", "counts"]
    assert cli.main(["gene-pairs", str(section), *arguments]) == 0
    expected = {"groupby": "cell_type", "genes": ["CD74", "LYZ"], "domain_key": "region", "n_permutations": 20}
    assert calls == [("gene_pairs", {**expected, "layer": "counts", "verbose": False})]
    with pytest.raises(SystemExit):
        cli.main(["gene-pairs", str(section), *arguments, "--model", "folder"])


def test_vectors_of_genes_are_an_argument_of_the_model(section, tmp_path, calls) -> None:
    arguments = ["--output", str(tmp_path / "out.h5ad"), "--gene-embeddings", "vectors.npz", "--quiet"]
    assert cli.main(["embed", str(section), *arguments]) == 0
    assert calls == [("embed", {"model_kwargs": {"gene_embeddings": "vectors.npz"}, "verbose": False})]


def test_model_is_saved_to_a_new_folder_only(section, tmp_path, calls, capsys) -> None:
    arguments = ["embed", str(section), "--output", str(tmp_path / "out.h5ad"), "--save-model", str(tmp_path / "model")]
    assert cli.main(arguments) == 0
    assert calls[-1] == ("save", {"path": str(tmp_path / "model")})
    (tmp_path / "model").mkdir()
    assert cli.main(arguments) == 2
    assert "exists already" in capsys.readouterr().err


def test_a_training_is_kept_in_a_folder(section, tmp_path, calls) -> None:
    arguments = ["embed", str(section), "--output", str(tmp_path / "out.h5ad"), "--train-checkpoint", "kept", "--quiet"]
    assert cli.main(arguments) == 0
    assert calls == [("embed", {"train_kwargs": {"checkpoint": "kept"}, "verbose": False})]


def test_genes_of_a_foundation_model_have_a_species(section, tmp_path, calls, scgpt_checkpoint, capsys) -> None:
    pd.DataFrame({"mouse_symbol": ["Aqp4"], "human_symbol": ["AQP4"]}).to_csv(tmp_path / "table.csv", index=False)
    np.savez(tmp_path / "vectors.npz", genes=np.array(["AQP4", "GFAP"]), values=np.eye(2))
    arguments = ["embed", str(section), "--output", str(tmp_path / "out.h5ad"), "--quiet", "--species", "mouse"]
    table = ["--orthologs", str(tmp_path / "table.csv")]
    folder = scgpt_checkpoint(["AQP4", "GFAP"])
    assert cli.main([*arguments, *table, "--foundation", "scgpt", "--checkpoint", str(folder)]) == 0
    foundation = calls[-1][1]["foundation"]
    assert (foundation.name, foundation.species, foundation.orthologs) == ("scgpt", "mouse", table[1])
    assert cli.main([*arguments, *table, "--gene-embeddings", str(tmp_path / "vectors.npz")]) == 0
    vectors = calls[-1][1]["model_kwargs"]["gene_embeddings"]
    assert (list(vectors.names), vectors.species, vectors.orthologs) == (["AQP4", "GFAP"], "mouse", table[1])
    assert cli.main(arguments) == 2
    assert "--species is for --foundation or --gene-embeddings" in capsys.readouterr().err
    assert cli.main([*arguments, "--foundation", "scgpt"]) == 2
    assert "--foundation scgpt needs --checkpoint, the folder with args.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("Pass library_key= for another one.", "Pass --library-key for another one."),
        ("layer='X' reads X (n_tokens=3).", "--layer X reads X (--n-tokens 3)."),
        ('labels_key="cell type", labels_key=...', '--labels-key "cell type", --labels-key ...'),
        ("overwrite=True replaces it.", "--overwrite replaces it."),
        ("modality=['rna', 'image'] reads both.", "--modality rna image reads both."),
        ("n_tokens must be a number: n_tokens must be.", "--n-tokens must be a number: n_tokens must be."),
        ("Name another folder with checkpoint=.", "Name another folder with --train-checkpoint."),
        # Python stays Python: calls, options of other commands, attributes, and values that have no option.
        ("fimp_sc.pp.spatial_graph(adata, library_key='a')", "fimp_sc.pp.spatial_graph(adata, library_key='a')"),
        ("Pass groupby=, fdr=, layer=None or model_kwargs={'n_tokens': 3}.",) * 2,
        ("adata.layer=3, input_scale={'a': 'log'}",) * 2,
    ],
)
def test_messages_name_options_of_the_command(section, tmp_path, calls, monkeypatch, capsys, message, expected) -> None:
    def fail(adata, **arguments) -> None:
        warnings.warn(message, UserWarning, stacklevel=2)
        raise ValueError(message)

    monkeypatch.setattr(fimp_sc.tl, "annotate", fail)
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        arguments = ["annotate", str(section), "--output", str(tmp_path / "out.h5ad"), "--labels-key", "a"]
        assert cli.main(arguments) == 2
    lines = [f"fimp-sc annotate: {kind}: {expected}\n" for kind in ("warning", "error")]
    assert capsys.readouterr().err == "".join(lines)


def test_an_interrupt_ends_in_one_line(section, tmp_path, calls, monkeypatch, capsys) -> None:
    def interrupted(adata, **arguments) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(fimp_sc.tl, "embed", interrupted)
    assert cli.main(["embed", str(section), "--output", str(tmp_path / "out.h5ad")]) == 130
    assert capsys.readouterr().err == "fimp-sc embed: interrupted\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["section.h5ad"]


@pytest.mark.parametrize(
    "error",
    [
        ValueError("bad\nthing"),
        KeyError("bad thing"),
        FileNotFoundError("bad thing"),
        FloatingPointError("bad thing"),
        ImportError("bad thing"),
        MisconfigurationException("bad\nthing"),
        TypeError("bad thing"),
        IndexError("bad thing"),
        RuntimeError("bad\nthing"),
        MemoryError("bad thing"),
    ],
)
def test_user_errors_are_one_line_and_leave_no_output(section, tmp_path, calls, monkeypatch, capsys, error) -> None:
    def fail(adata, **arguments) -> None:
        raise error

    monkeypatch.setattr(fimp_sc.tl, "embed", fail)
    output = tmp_path / "out.h5ad"
    assert cli.main(["embed", str(section), "--output", str(output)]) == 2
    captured = capsys.readouterr()
    assert captured.err == "fimp-sc embed: error: bad thing\n"
    assert captured.out == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["section.h5ad"]


def test_other_errors_keep_their_traceback(section, tmp_path, calls, monkeypatch) -> None:
    def fail(adata, **arguments) -> None:
        raise error

    monkeypatch.setattr(fimp_sc.tl, "embed", fail)
    arguments = ["embed", str(section), "--output", str(tmp_path / "out.h5ad")]
    error: BaseException = AttributeError("a defect")
    with pytest.raises(AttributeError, match="a defect"):
        cli.main(arguments)
    for error in (ValueError("bad thing"), KeyboardInterrupt()):
        with pytest.raises(type(error)):
            cli.main([*arguments, "--debug"])


def test_interrupted(section, tmp_path, calls, monkeypatch, capsys) -> None:
    def fail(adata, **arguments) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(fimp_sc.tl, "embed", fail)
    assert cli.main(["embed", str(section), "--output", str(tmp_path / "out.h5ad")]) == 130
    assert capsys.readouterr().err == "fimp-sc embed: interrupted\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["section.h5ad"]


@pytest.mark.parametrize("limit", ["disk", "quota", "disk without fallocate"])
def test_full_disk_is_told_before_anything_is_written(section, tmp_path, calls, monkeypatch, capsys, limit) -> None:
    """HDF5 itself ends with a segmentation fault there."""
    output = tmp_path / "out.h5ad"
    output.write_text("precious")
    number = errno.EDQUOT if limit == "quota" else errno.ENOSPC

    def refuse(descriptor, start, length) -> None:
        raise OSError(number, os.strerror(number))

    if limit == "disk without fallocate":
        monkeypatch.delattr(os, "posix_fallocate", raising=False)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1 << 20))
    else:
        monkeypatch.setattr(os, "posix_fallocate", refuse, raising=False)
    assert cli.main(["embed", str(section), "--output", str(output)]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"fimp-sc embed: error: --output: {str(output)!r} needs about 1.")
    assert os.strerror(number) in captured.err
    assert captured.err.count("\n") == 1
    assert output.read_text() == "precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.h5ad", "section.h5ad"]


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="limits are asked for with posix_fallocate")
def test_largest_file_of_a_process(section, tmp_path) -> None:
    """A real limit, in a process of its own."""
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 18, 1 << 18)); "
        "from fimp_sc.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    arguments = ["niches", str(section), "--output", str(tmp_path / "out.h5ad"), "--use-rep", "spatial", "--smooth"]
    arguments += ["0", "--n-niches", "2", "--quiet"]
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code, *arguments], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "do not fit there (File too large)" in done.stderr
    assert done.stderr.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["section.h5ad"]


@pytest.mark.parametrize("kind", ["AnnData", "MuData"])
def test_size_is_about_that_of_the_file(small_toy, recordings, tmp_path, kind) -> None:
    small_toy.raw = small_toy
    small_toy.layers["dense"] = small_toy.X.toarray()
    small_toy.obsp["graph"] = small_toy.X @ small_toy.X.T
    data = small_toy if kind == "AnnData" else recordings
    path = tmp_path / "file"
    with quiet_mudata():
        (data.write_h5ad if kind == "AnnData" else data.write_h5mu)(path)
    assert cli._size(data) <= path.stat().st_size <= cli._size(data) * (1 + cli._OVERHEAD_FRACTION) + cli._OVERHEAD


def test_failed_write_keeps_the_old_output(section, tmp_path, calls, monkeypatch, capsys) -> None:
    output = tmp_path / "out.h5ad"
    output.write_text("precious")

    def add_unwritable(adata, **arguments) -> None:
        adata.uns["object"] = object()

    monkeypatch.setattr(fimp_sc.tl, "embed", add_unwritable)
    assert cli.main(["embed", str(section), "--output", str(output)]) == 2
    message = capsys.readouterr().err
    assert "cannot be written" in message
    assert message.count("\n") == 1
    assert output.read_text() == "precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.h5ad", "section.h5ad"]


def test_faulty_paths(section, tmp_path, calls, capsys) -> None:
    missing, nowhere = str(tmp_path / "missing.h5ad"), str(tmp_path / "no" / "out.h5ad")
    assert cli.main(["embed", missing, "--output", str(tmp_path / "out.h5ad")]) == 2
    assert "missing.h5ad' does not exist" in capsys.readouterr().err
    assert cli.main(["embed", str(section), "--output", nowhere]) == 2
    assert "does not exist; create it first" in capsys.readouterr().err
    assert cli.main(["embed", str(section), "--output", str(tmp_path)]) == 2
    assert "is a folder" in capsys.readouterr().err
    (tmp_path / "text.h5ad").write_text("not HDF5")
    assert cli.main(["embed", str(tmp_path / "text.h5ad"), "--output", str(tmp_path / "out.h5ad")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert calls == []


@pytest.mark.filterwarnings("ignore:.*was written without encoding metadata")
@pytest.mark.parametrize("name", ["text.h5ad", "tenx.h5", "text.h5mu"])
def test_files_of_another_kind(tmp_path, calls, capsys, name) -> None:
    source, kind = tmp_path / name, "MuData" if name.endswith(".h5mu") else "AnnData"
    if name == "tenx.h5":
        with h5py.File(source, "w") as file:
            file["matrix/barcodes"] = [b"AAAC-1"]
    else:
        source.write_text("not HDF5")
    output = (tmp_path / "out").with_suffix(".h5mu" if kind == "MuData" else ".h5ad")
    assert cli.main(["embed", str(source), "--output", str(output)]) == 2
    message = capsys.readouterr().err
    assert f"{name} is no {kind} file" in message
    assert ("scanpy.read_10x_h5" in message) == (name == "tenx.h5")
    assert message.count("\n") == 1
    assert calls == []


def test_only_h5ad_and_h5mu_are_read_and_written(section, tmp_path, calls, capsys) -> None:
    for name in ("out.zarr", "out.h5mu", "out"):
        assert cli.main(["embed", str(section), "--output", str(tmp_path / name)]) == 2
        assert f"--output: '{name}' must end in .h5ad" in capsys.readouterr().err
    (tmp_path / "section.zarr").mkdir()
    assert cli.main(["embed", str(tmp_path / "section.zarr"), "--output", str(tmp_path / "out.h5ad")]) == 2
    assert "section.zarr' is a folder, and only .h5ad and .h5mu files are read" in capsys.readouterr().err
    assert calls == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["section.h5ad", "section.zarr"]


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["annotate", "in.h5ad", "--output", "out.h5ad"],
        ["embed", "in.h5ad"],
        ["embed", "in.h5ad", "--output", "out.h5ad", "--max-epochs", "0"],
        ["embed", "in.h5ad", "--output", "out.h5ad", "--input-scale", "cpm"],
        ["embed", "in.h5ad", "--output", "out.h5ad", "--n-layers", "two"],
        ["embed", "in.h5ad", "--output", "out.h5ad", "--random-state", "-1"],
        ["niches", "in.h5ad", "--output", "out.h5ad", "--n-niches", "1"],
    ],
)
def test_faulty_options_end_with_two(arguments, capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    assert "usage: fimp-sc" in capsys.readouterr().err


def test_python_m() -> None:
    done = subprocess.run([sys.executable, "-m", "fimp_sc", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"fimp-sc {fimp_sc.__version__}"


def test_annotate_for_real(small_toy, tmp_path, capsys) -> None:
    """Train on one section, save the model, apply it to the other section with other genes."""
    one = small_toy[small_toy.obs["section"] == "section_1", :50].copy()
    two = small_toy[small_toy.obs["section"] == "section_2", 10:].copy()
    two.obs["region"] = np.nan
    two.obs["region"] = two.obs["region"].astype("category")
    one.write_h5ad(tmp_path / "one.h5ad")
    two.write_h5ad(tmp_path / "two.h5ad")
    common = ["--labels-key", "region", "--accelerator", "cpu", "--quiet"]
    train = ["annotate", str(tmp_path / "one.h5ad"), "--output", str(tmp_path / "one_out.h5ad"), *common]
    assert cli.main([*train, "--max-epochs", "1", "--save-model", str(tmp_path / "model")]) == 0
    apply = ["annotate", str(tmp_path / "two.h5ad"), "--output", str(tmp_path / "two_out.h5ad"), *common]
    assert cli.main([*apply, "--model", str(tmp_path / "model")]) == 0
    done = ad.read_h5ad(tmp_path / "two_out.h5ad")
    assert done.obs["fimp_region"].notna().all()
    assert done.obsm["fimp_region_probabilities"].shape == (two.n_obs, one.obs["region"].nunique())
    assert capsys.readouterr().err == ""


def test_niches_and_attention_for_real(section, tmp_path, capsys) -> None:
    quick = ["--library-key", "section", "--quiet"]
    steps = (
        ("embed", ["--max-epochs", "1"]),
        ("niches", ["--n-niches", "3"]),
        ("attention", ["--groupby", "region", "--n-permutations", "10", "--max-epochs", "1"]),
        ("gene-pairs", ["--groupby", "region", "--n-genes", "5", "--n-permutations", "10"]),
    )
    source = section
    for command, options in steps:
        output = tmp_path / f"{command}.h5ad"
        assert cli.main([command, str(source), "--output", str(output), *options, *quick]) == 0
        source = output
    done = ad.read_h5ad(source)
    assert set(done.obs["fimp_niche"]) == {"0", "1", "2"}
    assert done.obsp["fimp_attention"].nnz > 0
    assert len(done.uns["fimp_gene_pairs"]["genes"]) == 5
    assert capsys.readouterr().err == ""
    assert cli.main(["niches", str(section), "--output", str(tmp_path / "out.h5ad"), *quick]) == 2
    assert "X_fimp" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("fault", "options"),
    [
        ("real labels", ["--labels-key", "real"]),
        ("text coordinates", ["--labels-key", "niche"]),
        ("dense graph", ["--labels-key", "niche"]),
        ("no GPU", ["--labels-key", "niche", "--accelerator", "tpu"]),
    ],
)
def test_faulty_objects_are_one_line(small_toy, tmp_path, capsys, fault, options) -> None:
    small_toy.obs["real"] = np.linspace(0, 1, small_toy.n_obs)
    if fault == "text coordinates":
        places = pd.DataFrame(small_toy.obsm["spatial"], columns=["x", "y"], index=small_toy.obs_names)
        small_toy.obsm["spatial"] = places.assign(x="left")
    if fault == "dense graph":
        small_toy.obsp["spatial_connectivities"] = np.eye(small_toy.n_obs)[::-1]
    small_toy.write_h5ad(tmp_path / "in.h5ad")
    arguments = ["annotate", str(tmp_path / "in.h5ad"), "--output", str(tmp_path / "out.h5ad"), "--quiet", *options]
    assert cli.main(arguments) == 2
    message = capsys.readouterr().err
    assert message.startswith("fimp-sc annotate: error: ")
    assert message.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.h5ad"]


def test_missing_key_for_real(section, tmp_path, capsys) -> None:
    arguments = ["annotate", str(section), "--output", str(tmp_path / "out.h5ad"), "--labels-key", "nothing"]
    assert cli.main([*arguments, "--max-epochs", "1", "--quiet"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("fimp-sc annotate: error: ")
    assert "nothing" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out.h5ad").exists()


@pytest.mark.skipif(torch.cuda.is_available() or torch.backends.mps.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("options", [["--max-epochs", "1"], ["--foundation", "scgpt", "--zero-shot"]])
def test_missing_gpu_for_real(section, small_toy, scgpt_checkpoint, tmp_path, capsys, options) -> None:
    if "--zero-shot" in options:
        options = [*options, "--checkpoint", str(scgpt_checkpoint(list(small_toy.var_names)))]
    arguments = ["embed", str(section), "--output", str(tmp_path / "out.h5ad"), "--accelerator", "gpu", "--quiet"]
    assert cli.main([*arguments, *options]) == 2
    message = capsys.readouterr().err
    assert "gpu" in message
    assert message.count("\n") == 1
    assert not (tmp_path / "out.h5ad").exists()


def test_demo_for_real(tmp_path, capsys) -> None:
    folder = tmp_path / "demo"
    assert cli.main(["demo", "--output-dir", str(folder), "--max-epochs", "1"]) == 0
    report = capsys.readouterr().out
    for piece in ("X_fimp", "fimp_region", "layers", "accuracy", "R2", "toy_tissue.png", "toy_tissue.h5ad"):
        assert piece in report
    done = ad.read_h5ad(folder / "toy_tissue.h5ad")
    assert {"region", "region_truth", "fimp_region", "fimp_region_confidence"} <= set(done.obs)
    assert done.layers["fimp"].shape == done.shape
    assert (folder / "toy_tissue.png").stat().st_size > 10_000


def test_foundation_options_reach_the_tool(tmp_path, section, small_toy, scgpt_checkpoint) -> None:
    checkpoint, output = scgpt_checkpoint(list(small_toy.var_names)), tmp_path / "out.h5ad"
    options = [
        "--foundation",
        "scgpt",
        "--checkpoint",
        str(checkpoint),
        "--zero-shot",
        "--library-key",
        "section",
        "--accelerator",
        "cpu",
        "--quiet",
    ]
    assert cli.main(["embed", str(section), "--output", str(output), *options]) == 0
    written = ad.read_h5ad(output)
    assert written.uns["X_fimp"]["model"]["foundation"]["name"] == "scgpt"
    np.testing.assert_allclose(np.linalg.norm(written.obsm["X_fimp"], axis=1), 1.0, rtol=1e-5)


def test_broken_checkpoint_is_one_line(tmp_path, section, capsys) -> None:
    output, folder = tmp_path / "out.h5ad", tmp_path / "without_files"
    folder.mkdir()
    options = [
        "--foundation",
        "scgpt",
        "--checkpoint",
        str(folder),
        "--zero-shot",
        "--library-key",
        "section",
        "--quiet",
    ]
    assert cli.main(["embed", str(section), "--output", str(output), *options]) == 2
    message = capsys.readouterr().err
    assert "without_files" in message
    assert message.count("\n") == 1
    assert not output.exists()


@pytest.mark.filterwarnings("ignore:.*are left out")
def test_modalities_of_a_file(tmp_path, recordings) -> None:
    source, output = tmp_path / "brain.h5mu", tmp_path / "out.h5mu"
    with quiet_mudata():
        recordings.write_h5mu(source)
    assert cli.main(["embed", str(source), "--output", str(output), "--modality", "fmri", "--max-epochs", "1"]) == 0
    with quiet_mudata():
        assert mudata.read_h5mu(output)["fmri"].obsm["X_fimp"].shape == (recordings["fmri"].n_obs, 128)
    assert cli.main(["embed", str(source), "--output", str(tmp_path / "out.h5ad"), "--modality", "fmri"]) == 2
    assert cli.main(["embed", str(source), "--output", str(output), "--modality", "no"]) == 2


def test_several_files_are_read_together_and_written_each(small_toy, tmp_path, capsys) -> None:
    for name in ("section_1", "section_2"):
        small_toy[small_toy.obs["section"] == name].copy().write_h5ad(tmp_path / f"{name}.h5ad")
    sources = [str(tmp_path / f"section_{i}.h5ad") for i in (1, 2)]
    how = ["--max-epochs", "1", "--accelerator", "cpu"]
    (tmp_path / "out").mkdir()
    assert cli.main(["embed", *sources, "--output", str(tmp_path / "out"), *how, "--quiet"]) == 0
    expected = [ad.read_h5ad(source) for source in sources]
    fimp_sc.tl.embed(dict(zip(("section_1", "section_2"), expected, strict=True)), max_epochs=1, accelerator="cpu")
    for i, adata in enumerate(expected, 1):
        found = ad.read_h5ad(tmp_path / "out" / f"section_{i}.h5ad")
        np.testing.assert_array_equal(found.obsm["X_fimp"], adata.obsm["X_fimp"])
    capsys.readouterr()
    for arguments, message in (
        ([*sources, "--output", str(tmp_path / "out.h5ad")], "results go to a folder"),
        ([sources[0], sources[0], "--output", str(tmp_path / "out")], "different file names"),
        ([sources[0], str(tmp_path / "none.h5ad"), "--output", str(tmp_path / "out")], "does not exist"),
    ):
        assert cli.main(["embed", *arguments]) == 2
        assert message in capsys.readouterr().err


def test_a_report_is_written_beside_the_output(section, tmp_path, calls, capsys) -> None:
    page = tmp_path / "report.html"
    assert cli.main(["embed", str(section), "--output", str(tmp_path / "out.h5ad"), "--report", str(page)]) == 0
    assert "<h2>Data</h2>" in page.read_text(encoding="utf-8")
    assert f"Wrote the report {page}" in capsys.readouterr().out
    assert calls == [("embed", {"verbose": True})]
    assert cli.main(["embed", str(section), "--output", str(tmp_path / "out.h5ad"), "--report", "report.txt"]) == 2
    assert "--report must end in .html" in capsys.readouterr().err
    assert len(calls) == 1, "refused before anything is computed"


def test_inputs_are_not_replaced_by_results_of_several(section, tmp_path, calls, capsys) -> None:
    other = shutil.copy(section, tmp_path / "other.h5ad")
    before = section.read_bytes()
    assert cli.main(["embed", str(section), str(other), "--output", str(tmp_path / "." / "")]) == 2
    assert "section.h5ad' is an input, which would be replaced" in capsys.readouterr().err
    assert section.read_bytes() == before
    assert not calls


@pytest.mark.parametrize("option", ["--output", "--report", "--save-model"])
def test_folders_that_take_no_files_are_told_before_anything_is_computed(
    section, tmp_path, calls, capsys, monkeypatch, option
) -> None:
    closed = tmp_path / "closed"
    closed.mkdir()
    make = tempfile.TemporaryFile

    def refuse(**how):
        if how["dir"] == closed:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return make(**how)

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    places = {"--output": tmp_path / "out.h5ad", "--report": tmp_path / "r.html", "--save-model": tmp_path / "m"}
    places[option] = closed / places[option].name
    arguments = [str(word) for pair in places.items() for word in pair]
    assert cli.main(["embed", str(section), *arguments]) == 2
    error = capsys.readouterr().err
    assert f"{option}: no file can be made in the folder {str(closed)!r} (Permission denied)" in error
    assert not calls
    assert not any(path.is_file() and path != section for path in tmp_path.rglob("*"))
