"""Rotary positions: ``rope_parameters`` of newer files, ``rope_theta`` and ``rope_scaling`` of older ones."""

from __future__ import annotations

from typing import Any

from kl_rl.huggingface.fields import Fields
from kl_rl.models.config import DecoderConfig, Rotary

__all__ = ["read_local_rotary", "read_rotary", "rope_fields"]

KINDS = "known rope types: default, linear, llama3"


def _rotary(f: Fields, field: str, parameters: dict[str, Any], theta: float) -> Rotary:
    """One set of parameters; ``theta`` stands in if they have none."""
    inner = Fields(parameters, f"{f.where}: {field}")
    theta = inner.number("rope_theta", theta)
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    partial = parameters.get("partial_rotary_factor", f.spec.get("partial_rotary_factor"))
    if partial not in (None, 1.0):
        raise f.error("partial_rotary_factor", f"{partial!r} is not supported; only whole heads are rotated")
    if kind == "default":
        return Rotary(theta)
    if kind == "linear":
        return Rotary(theta, factor=inner.number("factor"))
    if kind != "llama3":
        raise f.error(f"{field}.rope_type", f"{kind!r} is not supported; {KINDS}")
    original = inner.integer("original_max_position_embeddings", f.integer("max_position_embeddings"))
    shape = (inner.number("factor"), inner.number("low_freq_factor"), inner.number("high_freq_factor"))
    return Rotary(theta, llama3=(*shape, original))


def read_rotary(f: Fields) -> Rotary:
    """Rotary positions that are the same in all layers.

    Args:
      f: the fields of config.json.

    Returns:
      The positions; base 10000 if the file names none.

    Raises:
      CheckpointError: a kind of scaling that is not supported.
    """
    theta = f.number("rope_theta", 10_000.0)
    field = "rope_scaling" if f.spec.get("rope_scaling") else "rope_parameters"
    parameters = f.table(field)
    if any(isinstance(value, dict) for value in parameters.values()):
        raise f.error(field, "positions that differ between layers are supported for Gemma 3 only")
    return _rotary(f, field, parameters, theta)


def read_local_rotary(f: Fields) -> tuple[Rotary, Rotary]:
    """Rotary positions of Gemma 3: layers that see everything, layers with a window.

    Args:
      f: the fields of config.json.

    Returns:
      Positions of the full and of the sliding layers.

    Raises:
      CheckpointError: a kind of scaling that is not supported.
    """
    nested = Fields(f.table("rope_parameters"), f"{f.where}: rope_parameters")
    full = nested.table("full_attention") | f.table("rope_scaling")
    sliding = nested.table("sliding_attention")
    return (
        _rotary(f, "rope_parameters.full_attention", full, f.number("rope_theta", 1_000_000.0)),
        _rotary(f, "rope_parameters.sliding_attention", sliding, f.number("rope_local_base_freq", 10_000.0)),
    )


def _parameters(rotary: Rotary) -> dict[str, Any]:
    if rotary.llama3 is not None:
        factor, low, high, original = rotary.llama3
        scaling = {"rope_type": "llama3", "factor": factor, "low_freq_factor": low, "high_freq_factor": high}
        return scaling | {"original_max_position_embeddings": original, "rope_theta": rotary.theta}
    if rotary.factor != 1.0:
        return {"rope_type": "linear", "factor": rotary.factor, "rope_theta": rotary.theta}
    return {"rope_type": "default", "rope_theta": rotary.theta}


def rope_fields(config: DecoderConfig, *, nested: bool = False) -> dict[str, Any]:
    """The fields of config.json for rotary positions, under the newer and the older names.

    Args:
      config: an architecture with rotary positions.
      nested: per kind of layer, as Gemma 3 has them.

    Returns:
      A part of config.json.
    """
    assert config.rotary is not None
    full = _parameters(config.rotary)
    scaling = {key: value for key, value in full.items() if key != "rope_theta"}
    older: dict[str, Any] = {"rope_theta": config.rotary.theta}
    older |= {"rope_scaling": None if scaling["rope_type"] == "default" else scaling}
    if not nested:
        return {"rope_parameters": full, **older}
    local = config.attention.local_rotary or config.rotary
    both = {"full_attention": full, "sliding_attention": _parameters(local)}
    return {"rope_parameters": both, "rope_local_base_freq": local.theta, **older}
