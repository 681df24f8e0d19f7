"""The base model of a run: opened from a Hugging Face folder, with room for return tokens where they are needed."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from kl_rl.core.policy import Policy
from kl_rl.huggingface.errors import CheckpointError
from kl_rl.huggingface.hub import resolve
from kl_rl.huggingface.load import Checkpoint, load_checkpoint, read_config
from kl_rl.models import DecoderConfig, Execution, decoder_policy
from kl_rl.sharding import weight_sharding
from kl_rl.storage.errors import RunError
from kl_rl.tokenizer import Tokenizer, check_vocabulary, load_tokenizer

__all__ = [
    "Model",
    "architecture",
    "begin_of",
    "load_model",
    "model_folder",
]


class Model(NamedTuple):
    """A base model and what belongs to it.

    Attributes:
      config: architecture.
      base: p0.
      tokenizer: of the folder.
      checkpoint: as it was read, for the export.
      first_token: id of return token 0; -1: there are none.
    """

    config: DecoderConfig
    base: Policy
    tokenizer: Tokenizer
    checkpoint: Checkpoint
    first_token: int = -1


def model_folder(folder: str | Path) -> Path:
    """The folder itself, ``model`` inside it if it is the output of a run, or what the hub has under this name.

    Raises:
      RunError: no checkpoint there.
    """
    path = Path(folder).expanduser()
    if not (path / "config.json").is_file() and (path / "model" / "config.json").is_file():
        return path / "model"
    if (path / "run.json").is_file() and not (path / "config.json").is_file():
        raise RunError(
            f"{path}: this run has not ended, its model is not written yet: go on with it, --resume"
        )
    try:
        return resolve(folder)
    except OSError as error:
        raise RunError(f"{error}; give a Hugging Face checkpoint or the output of a run") from error


def architecture(folder: str | Path) -> DecoderConfig:
    """What ``load_model`` will open, from its config.json alone.

    Raises:
      RunError: missing, damaged, not supported.
    """
    try:
        return read_config(model_folder(folder))[0]
    except (CheckpointError, OSError) as error:
        raise RunError(str(error)) from error


def load_model(folder: str | Path, execution: Execution | None = None, mesh: Mesh | None = None) -> Model:
    """Open a checkpoint and its tokenizer.

    Args:
      folder: of the checkpoint, or of the run that wrote it.
      execution: how it is run.
      mesh: devices, each of which reads its own part only; None: the default one.

    Returns:
      The model.

    Raises:
      RunError: missing, damaged, not supported, or a tokenizer that does not fit.
    """
    path = model_folder(folder)
    try:
        checkpoint = load_checkpoint(path, place=None if mesh is None else weight_sharding(mesh))
        tokenizer = load_tokenizer(path)
        check_vocabulary(tokenizer, checkpoint.config, path)
    except (CheckpointError, OSError, ValueError) as error:
        raise RunError(str(error)) from error
    weights = jax.tree.map(jnp.asarray, checkpoint.weights)
    base = decoder_policy(checkpoint.config, weights, execution)
    return Model(checkpoint.config, base, tokenizer, checkpoint)


def begin_of(tokenizer: Tokenizer) -> int | None:
    """The id that this tokenizer puts before a text; None: it puts none."""
    begin = tokenizer.begin_id
    if begin is None or begin not in tokenizer.encode("a", add_special_tokens=True)[:1]:
        return None
    return begin
