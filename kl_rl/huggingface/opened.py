"""The base model of a run: opened from a Hugging Face folder, with room for return tokens where they are needed."""

from __future__ import annotations

import dataclasses
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from kl_rl.core.policy import Policy
from kl_rl.huggingface import Checkpoint, CheckpointError, load_checkpoint, read_config, resolve
from kl_rl.models import DecoderConfig, Execution, decoder_policy, decoder_twist, lora_policy
from kl_rl.sharding import weight_sharding
from kl_rl.storage.errors import TrainingError
from kl_rl.tokenizer import Tokenizer, check_vocabulary, load_tokenizer

__all__ = [
    "RETURN_TOKENS",
    "Model",
    "architecture",
    "begin_of",
    "fingerprint",
    "first_policy",
    "load_model",
    "model_folder",
    "twist_head",
    "with_returns",
]

RETURN_TOKENS = 8


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
      TrainingError: no checkpoint there.
    """
    path = Path(folder).expanduser()
    if not (path / "config.json").is_file() and (path / "model" / "config.json").is_file():
        return path / "model"
    if (path / "run.json").is_file() and not (path / "config.json").is_file():
        raise TrainingError(
            f"{path}: this run has not ended, its model is not written yet: go on with it, --resume"
        )
    try:
        return resolve(folder)
    except OSError as error:
        raise TrainingError(f"{error}; give a Hugging Face checkpoint or the output of a run") from error


def architecture(folder: str | Path) -> DecoderConfig:
    """What ``load_model`` will open, from its config.json alone.

    Raises:
      TrainingError: missing, damaged, not supported.
    """
    try:
        return read_config(model_folder(folder))[0]
    except (CheckpointError, OSError) as error:
        raise TrainingError(str(error)) from error


def load_model(folder: str | Path, execution: Execution | None = None, mesh: Mesh | None = None) -> Model:
    """Open a checkpoint and its tokenizer.

    Args:
      folder: of the checkpoint, or of the run that wrote it.
      execution: how it is run.
      mesh: devices, each of which reads its own part only; None: the default one.

    Returns:
      The model.

    Raises:
      TrainingError: missing, damaged, not supported, or a tokenizer that does not fit.
    """
    path = model_folder(folder)
    try:
        checkpoint = load_checkpoint(path, place=None if mesh is None else weight_sharding(mesh))
        tokenizer = load_tokenizer(path)
        check_vocabulary(tokenizer, checkpoint.config, path)
    except (CheckpointError, OSError, ValueError) as error:
        raise TrainingError(str(error)) from error
    weights = jax.tree.map(jnp.asarray, checkpoint.weights)
    base = decoder_policy(checkpoint.config, weights, execution)
    return Model(checkpoint.config, base, tokenizer, checkpoint)


def begin_of(tokenizer: Tokenizer) -> int | None:
    """The id that this tokenizer puts before a text; None: it puts none."""
    begin = tokenizer.begin_id
    if begin is None or begin not in tokenizer.encode("a", add_special_tokens=True)[:1]:
        return None
    return begin


def with_returns(model: Model, execution: Execution | None = None) -> Model:
    """A model with return tokens: input-only ids behind the begin mark that are still free, or new rows.

    New rows, and free ones, read like the begin mark (the mean token if there is none), so that p0 and the untrained
    conditional model agree.

    Args:
      model: the base.
      execution: how it is run.

    Returns:
      The model, with ``first_token`` set.
    """
    config, begin = model.config, begin_of(model.tokenizer)
    table = model.base.params["embed"]["table"]
    rows = config.vocab + config.extra
    like = jnp.mean(table[: config.vocab], axis=0) if begin is None else table[begin]
    free = 0 if begin is None or begin < config.vocab else rows - begin - 1
    if free < RETURN_TOKENS:
        config = dataclasses.replace(config, extra=config.extra + RETURN_TOKENS)
        table = jnp.pad(table, ((0, RETURN_TOKENS), (0, 0)))
    first = config.vocab + config.extra - RETURN_TOKENS
    table = table.at[first:].set(like)
    weights = model.base.params | {"embed": {"table": table}}
    return model._replace(config=config, base=decoder_policy(config, weights, execution), first_token=first)


def first_policy(base: Policy, key: jax.Array, rank: int, returns: int) -> Policy:
    """The policy that training starts from: p0 itself, or p0 under an adapter that does nothing yet.

    Args:
      base: p0 (an argument of the program).
      key: PRNG key.
      rank: of the adapter; 0: none.
      returns: number of return tokens, whose embeddings are trained too.

    Returns:
      The policy.
    """
    if not rank:
        return base
    return lora_policy(base, key, rank=rank, extra=returns)


def twist_head(config: DecoderConfig, base: Policy, *, train_trunk: bool) -> Policy:
    """A twist (critic, state flow, log Z) on the base's hidden states; see ``models.decoder_twist``."""
    execution = getattr(base.apply, "execution", None)
    return decoder_twist(config, base.params, execution, train_trunk=train_trunk)


def fingerprint(path: str | Path) -> dict[str, Any] | None:
    """Size and checksum of the ends of a file, or of each file of a checkpoint, to see changes; None: no such file."""
    path = Path(path).expanduser()
    if path.is_dir():
        files = sorted([*path.glob("*.safetensors"), *path.glob("config.json"), *path.glob("tokenizer.json")])
        return {file.name: fingerprint(file) for file in files}
    if not path.is_file():
        return None
    size = path.stat().st_size
    with open(path, "rb") as file:
        total = zlib.crc32(file.read(2**20))
        file.seek(max(0, size - 2**20))
        return {"bytes": size, "crc32": zlib.crc32(file.read(), total)}
