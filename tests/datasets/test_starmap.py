from __future__ import annotations

import hashlib
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import TYPE_CHECKING

import anndata as ad
import numpy as np
import pandas as pd
import pooch
import pytest
from scipy import sparse

from fimp_sc.datasets import _starmap, starmap

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

COUNTS = np.array([[0, 1, 2], [3, 0, 0], [0, 0, 4], [5, 6, 0]], dtype=np.float32)


class _Server:
    """A server of a folder on this machine, which counts requests and may break off in the middle of a file."""

    def __init__(self, folder: Path) -> None:
        self.requests: list[str] = []
        self.breaks_off = False
        server = self

        class Handler(SimpleHTTPRequestHandler):
            def do_GET(self) -> None:
                server.requests.append(self.path.strip("/"))
                super().do_GET()

            def copyfile(self, source, outputfile) -> None:
                content = source.read()
                outputfile.write(content[: len(content) // 2] if server.breaks_off else content)

            def log_message(self, *args) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
        self.address = f"http://127.0.0.1:{self.http.server_address[1]}/"


@pytest.fixture
def public(tmp_path: Path, monkeypatch) -> Iterator[_Server]:
    """Files in the format of the public ones, on a server of this machine, and an empty cache."""
    folder = tmp_path / "public"
    folder.mkdir()
    obs = pd.DataFrame({"x": [1.0, 2, 3, 4], "y": [5.0, 6, 7, 8]}, index=["0", "1", "2", "3"])
    var = pd.DataFrame(index=["A", "B", "C"])
    ad.AnnData(sparse.csc_matrix(COUNTS), obs, var).write_h5ad(folder / _starmap._COUNTS)
    labels = {"cluster_name": ["eL4", "Oligo", "eL4"], "smoothed_manual": ["L4", "cc", "L5"]}
    pd.DataFrame(labels, index=[3, 0, 2]).to_csv(folder / _starmap._ANNOTATION)
    sums = {path.name: f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}" for path in folder.iterdir()}

    server = _Server(folder)
    thread = Thread(target=server.http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setattr(_starmap, "_ADDRESS", server.address)
    monkeypatch.setattr(_starmap, "_CHECKSUMS", sums)
    monkeypatch.setattr(pooch, "os_cache", lambda name: tmp_path / "cache" / name)
    monkeypatch.delenv("FIMP_SC_DATA", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield server
    server.http.shutdown()
    server.http.server_close()
    thread.join()


def _cached(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "cache" / "fimp_sc").glob("*"))


def test_download_is_read_and_kept(public, tmp_path) -> None:
    adata = starmap()
    assert sparse.isspmatrix_csr(adata.X)
    assert adata.X.dtype == np.float32
    np.testing.assert_array_equal(adata.X.toarray(), COUNTS)
    assert adata.var_names.tolist() == ["A", "B", "C"]
    assert adata.obs["cell_type"].tolist() == ["Oligo", "Unknown", "eL4", "eL4"]
    assert adata.obs["region"].tolist() == ["cc", "Unknown", "L5", "L4"]
    np.testing.assert_array_equal(adata.obsm["spatial"], [[1, 5], [2, 6], [3, 7], [4, 8]])
    assert _cached(tmp_path) == sorted([_starmap._COUNTS, _starmap._ANNOTATION])
    assert len(public.requests) == 2

    starmap()
    assert len(public.requests) == 2, "downloaded again"


def test_another_file_at_the_address_is_refused(public, tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(_starmap._CHECKSUMS, _starmap._ANNOTATION, "sha256:" + "0" * 64)
    with pytest.raises(OSError, match=r"22\.csv could not be downloaded: .*hash.* FIMP_SC_DATA"):
        starmap()
    assert _cached(tmp_path) == [_starmap._COUNTS]


def test_a_download_that_breaks_off_leaves_nothing_and_can_be_repeated(public, tmp_path) -> None:
    public.breaks_off = True
    with pytest.raises(OSError, match=r"could not be downloaded: .*Try again"):
        starmap()
    assert _cached(tmp_path) == []
    public.breaks_off = False
    assert starmap().n_obs == 4


def test_a_file_that_is_not_there(public) -> None:
    public.http.RequestHandlerClass.keywords["directory"] += "/nothing"
    with pytest.raises(OSError, match=r"could not be downloaded: 404"):
        starmap()


def test_files_of_ones_own_are_read_first(public, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("FIMP_SC_DATA", str(tmp_path / "public"))
    assert starmap().n_obs == 4
    assert public.requests == []


def test_the_real_section(shared_data, monkeypatch) -> None:
    monkeypatch.setenv("FIMP_SC_DATA", str(shared_data))
    adata = starmap()
    assert adata.shape == (1549, 1020)
    np.testing.assert_array_equal(adata.X.data, np.rint(adata.X.data))
    types, regions = adata.obs["cell_type"], adata.obs["region"]
    assert (types.nunique(), regions.nunique()) == (17, 8)
    np.testing.assert_array_equal(types == "Unknown", regions == "Unknown")
    assert (types == "Unknown").sum() == 342
    # Neurons of a layer lie there, and so does the myelin.
    assert (regions[types == "eL4"] == "L4").mean() > 0.5
    mbp = adata[:, "Mbp"].X.toarray().ravel()
    assert mbp[regions == "cc"].mean() > 2 * mbp[regions == "L4"].mean()
