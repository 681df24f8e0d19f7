"""What is needed to write the files of a checkpoint again as they were."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from kl_rl.huggingface.errors import CheckpointError
from kl_rl.huggingface.safetensors_file import Stored, TensorFile, open_file

__all__ = ["INDEX", "SINGLE", "CheckpointFiles", "open_layout"]

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")


@dataclasses.dataclass(frozen=True)
class CheckpointFiles:
    """The files of a checkpoint.

    Attributes:
      folder: where they are.
      files: with headers, metadata and the order of tensors.
      index: text of the shard index; None: a single file.
      family: model type.
      prefix: what the names of all tensors but the head begin with ("model.", or "" in some files).
      buffers: constants in the files that are no parameters, by name.
    """

    folder: Path
    files: tuple[TensorFile, ...]
    index: str | None
    family: str = ""
    prefix: str = ""
    buffers: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)

    @property
    def stored(self) -> dict[str, Stored]:
        """All tensors by name."""
        return {tensor.name: tensor for file in self.files for tensor in file.tensors}

    def file_of(self, name: str) -> Path:
        """The file that holds a tensor."""
        return next(file.path for file in self.files if any(t.name == name for t in file.tensors))


def _shards(folder: Path) -> tuple[str, dict[str, str]]:
    """Text of the index and tensor name -> file name."""
    path = folder / INDEX
    text = path.read_text("utf-8")
    try:
        names: Any = json.loads(text)["weight_map"]
        if not isinstance(names, dict) or not all(isinstance(n, str) for n in names.values()):
            raise ValueError("weight_map must be an object of file names")
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: not a shard index: {error!r}") from error
    for tensor, name in names.items():
        if Path(name).name != name:
            raise CheckpointError(f"{path}: tensor {tensor}: {name!r} is no file name in this folder")
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name}: missing, but {INDEX} says that it holds {tensor}")
    return text, names


def open_layout(folder: Path) -> CheckpointFiles:
    """Find and check the weight files of a folder.

    Args:
      folder: with model.safetensors, or shards and their index.

    Returns:
      The files; no tensor is read yet.

    Raises:
      CheckpointError: a damaged file; a tensor that is not where the index says; pickled weights only.
      FileNotFoundError: no weights, or a shard is missing.
    """
    if (folder / SINGLE).is_file():
        return CheckpointFiles(folder, (open_file(folder / SINGLE),), None)
    if not (folder / INDEX).is_file():
        if any((folder / name).exists() for name in PICKLED):
            raise CheckpointError(
                f"{folder}: only pickled weights ({PICKLED[0]}), which are never opened; convert them where you trust "
                "them: transformers' AutoModelForCausalLM.from_pretrained(...).save_pretrained(...) writes safetensors"
            )
        raise FileNotFoundError(f"{folder}: no {SINGLE} and no {INDEX}")
    text, names = _shards(folder)
    files = tuple(open_file(folder / name) for name in sorted(set(names.values())))
    held = {tensor.name: file.path.name for file in files for tensor in file.tensors}
    for tensor, name in names.items():
        if held.get(tensor) != name:
            raise CheckpointError(
                f"{folder / name}: tensor {tensor} is missing, but {INDEX} says that it is there"
            )
    return CheckpointFiles(folder, files, text)
