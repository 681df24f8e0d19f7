"""A whole Hugging Face folder -> architecture, parameters, and what is needed to write it again."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from kl_rl.huggingface.config_in import config_from_dict, model_type
from kl_rl.huggingface.errors import CheckpointError
from kl_rl.huggingface.hub import resolve
from kl_rl.huggingface.layout import CheckpointFiles, open_layout
from kl_rl.huggingface.weights_in import Place, read_weights, untie, with_names
from kl_rl.models.config import DecoderConfig

__all__ = ["CONFIG", "Checkpoint", "load_checkpoint", "read_config", "read_json"]

CONFIG = "config.json"


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What a folder holds.

    Attributes:
      config: the architecture.
      weights: nested dict of parameters, layers stacked.
      spec: config.json, parsed, as it is.
      layout: what is needed to write the same files again.
      folder: where it was read from.
      text: of config.json.
    """

    config: DecoderConfig
    weights: dict[str, Any]
    spec: dict[str, Any]
    layout: CheckpointFiles
    folder: Path
    text: str


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Args:
      path: of the file.

    Returns:
      The object.

    Raises:
      CheckpointError: not JSON, or no object.
    """
    try:
        spec = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path}: not JSON: {error}") from error
    if not isinstance(spec, dict):
        raise CheckpointError(f"{path}: must hold a JSON object")
    return spec


def read_config(path: str | Path) -> tuple[DecoderConfig, dict[str, Any]]:
    """The architecture of a folder, without its weights.

    Args:
      path: folder, or name on the Hugging Face hub.

    Returns:
      The architecture and config.json as it is.

    Raises:
      CheckpointError: config.json is damaged or describes something that is not supported.
      FileNotFoundError: no folder or no config.json.
    """
    file = resolve(path) / CONFIG
    if not file.is_file():
        raise FileNotFoundError(
            f"{file}: missing; a checkpoint is a folder with config.json and safetensors files"
        )
    spec = read_json(file)
    return config_from_dict(spec, str(file)), spec


def load_checkpoint(
    path: str | Path, *, dtype: str | None = "float32", place: Place | None = None
) -> Checkpoint:
    """Read a Hugging Face folder of GPT-2, Llama, Qwen2, Qwen3, Gemma 2 or Gemma 3 (text).

    Tensors are read one at a time, from mapped files; with ``place`` each device reads only its own slice.

    Args:
      path: folder, or name on the Hugging Face hub ("organization/model", needs the extra ``hf``).
      dtype: of the parameters; None: as stored.
      place: ``place(path, shape)`` is the sharding of the parameter with this path (a tuple of keys), or None.

    Returns:
      Architecture, parameters, and what is needed to write the same files again.

    Raises:
      CheckpointError: naming file and field or tensor: damaged, missing, of a wrong shape, not supported.
      FileNotFoundError: a folder or file that is not there.
    """
    folder = resolve(path)
    config, spec = read_config(folder)
    family = model_type(spec, str(folder / CONFIG))
    layout = open_layout(folder)
    views = {name: view for file in layout.files for name, view in file.views().items()}
    config = untie(config, views, family)
    layout = with_names(layout, config, family, views)
    weights = read_weights(layout, config, views, dtype=dtype, place=place)
    text = (folder / CONFIG).read_text("utf-8")
    return Checkpoint(config, weights, spec, layout, folder, text)
