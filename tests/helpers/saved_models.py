"""Folders of models: read, changed, forged, and as the first version of the format was."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file, save_file

from fimp_sc.model.io import _folder

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

FILES = ["README.md", "config.json", "model.safetensors"]


def read_config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def write_config(folder: Path, config: dict[str, Any]) -> None:
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def set_entry(config: dict[str, Any], path: str, value: Any) -> None:
    """Set an entry of a configuration by its path, ``"init_params.n_latent"``."""
    *outer, last = path.split(".")
    for name in outer:
        config = config[name]
    config[last] = value


def forge(
    folder: Path,
    change: Callable[[dict[str, Any]], Any] | None = None,
    change_tensors: Callable[[dict[str, Any]], Any] | None = None,
) -> None:
    """Change a model and let its checksums fit, as one does on purpose."""
    config, tensors = read_config(folder), load_file(folder / "model.safetensors")
    for edit, content in ((change, config), (change_tensors, tensors)):
        if edit is not None:
            edit(content)
    config["sha256"] = {"config": _folder._digest_config(config), "weights": _folder._digest_weights(tensors)}
    save_file(tensors, folder / "model.safetensors", metadata={"config": json.dumps(config)})
    write_config(folder, config)


def to_first_version(folder: Path) -> None:
    """Write a folder as the first version of the format was: names of genes apart, weights without a configuration."""
    config = read_config(folder) | {"format_version": 1}
    names = "".join(f"{gene}\n" for gene in config.pop("genes"))
    (folder / "genes.txt").write_text(names, encoding="utf-8", newline="\n")
    save_file(load_file(folder / "model.safetensors"), folder / "model.safetensors", metadata={"format": "pt"})
    digests = {}
    for name in ("genes.txt", "model.safetensors"):
        digests[name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    write_config(folder, config | {"sha256": digests})
