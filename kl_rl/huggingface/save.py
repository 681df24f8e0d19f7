"""Architecture and parameters -> a Hugging Face folder that other programs open, whole or not at all."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax.numpy as jnp

from kl_rl.huggingface.config_in import model_type
from kl_rl.huggingface.config_out import config_to_dict
from kl_rl.huggingface.layout import INDEX, CheckpointFiles
from kl_rl.huggingface.load import CONFIG, Checkpoint, read_json
from kl_rl.huggingface.weights_out import (
    CODES,
    OutFile,
    Sources,
    check_shapes,
    fresh_files,
    index_text,
    same_files,
    tensor_sources,
    tensors_of,
    write_file,
)
from kl_rl.models.config import DecoderConfig
from kl_rl.sharding.processes import is_first
from kl_rl.storage.disk import check_space, replaced

__all__ = ["save_checkpoint"]

GENERATION = "generation_config.json"
TOKENIZER_FILES = (
    GENERATION,
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
PATTERN_FIELDS = {"kl_rl_extra", "layer_types", "_sliding_window_pattern", "sliding_window_pattern"}
END_FIELDS = ("bos_token_id", "eos_token_id", "pad_token_id")


class Savable(Protocol):
    """Writes its files into a folder: a tokenizer."""

    def save(self, folder: Path) -> None:
        """Write all files."""


class _Plan(NamedTuple):
    """What is written: files, what their tensors are made of, and the layout if it is used again."""

    files: list[OutFile]
    sources: Sources
    layout: CheckpointFiles | None


def _plan(
    config: DecoderConfig, weights: dict[str, Any], like: Checkpoint | None, dtype: str | None, limit: float
) -> _Plan:
    code = None if dtype is None else CODES[jnp.dtype(dtype)]
    kept = like is not None and config == like.config
    family = like.layout.family if like is not None and kept else model_type(config_to_dict(config))
    check_shapes(config, family, weights)
    if like is not None and family == like.layout.family:
        sources = tensor_sources(config, family, like.layout.prefix)
        files = same_files(like.layout, sources, dtype=code)
        if files is not None:
            return _Plan(files, sources, like.layout)
    sources = tensor_sources(config, family)
    return _Plan(fresh_files(sources, weights, dtype=code, max_shard_bytes=limit), sources, None)


def _new_spec(config: DecoderConfig, like: Checkpoint | None) -> dict[str, Any]:
    """A config.json for the architecture, with the other fields of the old one if it is of the same family."""
    if like is not None and config == like.config:
        return dict(like.spec)
    spec = config_to_dict(config)
    if like is None or like.layout.family != spec["model_type"]:
        return spec
    ends = {name: like.spec[name] for name in END_FIELDS if name in like.spec}
    return {k: v for k, v in like.spec.items() if k not in PATTERN_FIELDS} | spec | ends


def _config_text(config: DecoderConfig, like: Checkpoint | None, plan: _Plan, stage: Path) -> str:
    """The old config.json byte for byte where it still holds, else a new one."""
    dtypes = [tensor.dtype for file in plan.files for tensor in file.tensors]
    if like is not None and config == like.config and plan.layout is not None:
        if dtypes == [tensor.dtype for file in plan.layout.files for tensor in file.tensors]:
            return like.text
    spec = _new_spec(config, like)
    if like is None and (stage / GENERATION).is_file():
        ends = read_json(stage / GENERATION)
        spec |= {name: ends[name] for name in END_FIELDS if name in ends}
    spec.pop("dtype", None)
    constant = () if plan.layout is None else plan.layout.buffers
    first = next(t.dtype for file in plan.files for t in file.tensors if t.name not in constant)
    spec["torch_dtype"] = {code: dtype.name for dtype, code in CODES.items()}[first]
    return json.dumps(spec, indent=2) + "\n"


def _copy_files(source: Path, stage: Path) -> None:
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, stage / name)


def _put_tokenizer(source: str | Path | Savable | None, like: Checkpoint | None, stage: Path) -> None:
    """Tokenizer, chat template and generation_config.json."""
    if source is None:
        if like is not None:
            _copy_files(like.folder, stage)
    elif not isinstance(source, str | Path):
        source.save(stage)
    else:
        _copy_files(Path(source), stage)


def _suppress_extra(config: DecoderConfig, stage: Path) -> None:
    """Tell other programs never to emit the input-only ids."""
    if config.extra:
        spec = read_json(stage / GENERATION) if (stage / GENERATION).is_file() else {}
        spec["suppress_tokens"] = list(range(config.vocab, config.vocab + config.extra))
        (stage / GENERATION).write_text(json.dumps(spec, indent=2) + "\n", "utf-8")


def _write_weights(plan: _Plan, weights: dict[str, Any], stage: Path) -> None:
    buffers = {} if plan.layout is None else plan.layout.buffers
    for file in plan.files:
        write_file(stage / file.name, file.header, tensors_of(file, plan.sources, weights, buffers))
    if (index := index_text(plan.files, plan.layout)) is not None:
        (stage / INDEX).write_text(index, "utf-8")


def _take_part(plan: _Plan, weights: dict[str, Any]) -> None:
    """Another process writes; give it this one's share of each tensor."""
    for file in plan.files:
        for _ in tensors_of(file, plan.sources, weights, {} if plan.layout is None else plan.layout.buffers):
            pass


def save_checkpoint(
    folder: str | Path,
    config: DecoderConfig,
    weights: dict[str, Any],
    *,
    like: Checkpoint | None = None,
    tokenizer_from: str | Path | Savable | None = None,
    dtype: str | None = None,
    max_shard_bytes: float = 5e9,
) -> None:
    """Write a folder that transformers opens, whole or not at all.

    With ``like`` the same files are written in the same order with the same types: where the weights have not changed
    they are the same bytes. Without it, or if the architecture has other tensors, files are laid out as transformers
    does. Input-only ids (``config.extra``) become the last rows of the embedding, with zero rows in an untied head;
    ``kl_rl_extra`` in config.json and ``suppress_tokens`` in generation_config.json say so. With several processes all
    must call this; the first one writes.

    Args:
      folder: made, or replaced as a whole; other files in it stay.
      config: the architecture.
      weights: nested dict of parameters, layers stacked.
      like: the checkpoint that was read; its weights are not looked at.
      tokenizer_from: folder whose tokenizer files and chat template are copied, or a tokenizer; default: ``like``'s.
      dtype: of all parameters in the files; None: as in ``like``, or as they are.
      max_shard_bytes: larger models are written in several files (not with ``like``, whose files are kept).

    Raises:
      CheckpointError: no known family has this architecture; weights that do not fit it.
      OSError: the disk is full or cannot be written; the old folder is as it was.
    """
    if isinstance(tokenizer_from, str | Path) and not Path(tokenizer_from).is_dir():
        raise FileNotFoundError(f"{tokenizer_from}: no such folder to copy the tokenizer from")
    plan = _plan(config, weights, like, dtype, max_shard_bytes)
    if not is_first():
        return _take_part(plan, weights)
    stale = frozenset({INDEX}) | frozenset(TOKENIZER_FILES if tokenizer_from is not None else ())
    with replaced(Path(folder).expanduser(), stale=stale) as stage:
        check_space(stage, sum(file.size for file in plan.files))
        _put_tokenizer(tokenizer_from, like, stage)
        _suppress_extra(config, stage)
        (stage / CONFIG).write_text(_config_text(config, like, plan, stage), "utf-8")
        _write_weights(plan, weights, stage)
    return None
