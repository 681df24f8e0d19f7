"""A reward model's folder: a causal trunk and one linear output, ``<Family>ForSequenceClassification`` with one label.

``r(x, y) = w . h_last``, where ``h_last`` is the last token's hidden state after the final norm: as in transformers,
and what TRL's RewardTrainer trains (Bradley and Terry 1952; Ouyang et al. 2022, arXiv 2203.02155).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kl_rl.huggingface.config_in import ARCHITECTURES, config_from_dict, model_type
from kl_rl.huggingface.errors import CheckpointError
from kl_rl.huggingface.hub import resolve
from kl_rl.huggingface.layout import CheckpointFiles, open_layout
from kl_rl.huggingface.load import CONFIG, read_json
from kl_rl.huggingface.weights_in import read_weights, with_names
from kl_rl.models.config import DecoderConfig

__all__ = ["RewardModel", "is_reward_model", "load_reward_model"]

SCORE = "score.weight"
_ENDING = "ForSequenceClassification"


class RewardModel(NamedTuple):
    """A trunk and its output.

    Attributes:
      config: architecture of the trunk (its output matrix, which is not there, counts as tied).
      weights: nested dict of the trunk's parameters.
      score: [d].
    """

    config: DecoderConfig
    weights: dict[str, Any]
    score: jax.Array


def _architecture(spec: dict[str, Any]) -> str:
    named = spec.get("architectures")
    return str(named[0]) if isinstance(named, list) and named else ""


def is_reward_model(path: str | Path) -> bool:
    """Whether config.json names a sequence classifier.

    Raises:
      CheckpointError: config.json is no JSON.
    """
    file = resolve(path) / CONFIG
    return file.is_file() and _architecture(read_json(file)).endswith(_ENDING)


def _causal(spec: dict[str, Any], where: Path) -> dict[str, Any]:
    """config.json of the same trunk as a language model."""
    name = _architecture(spec)
    same = {
        causal.removesuffix("ForCausalLM").removesuffix("LMHeadModel"): causal for causal in ARCHITECTURES
    }
    causal = same.get(name.removesuffix("ForSequenceClassification").removesuffix("Text"))
    if causal is None:
        known = ", ".join(family + _ENDING for family in same)
        raise CheckpointError(f"{where}: architectures: unknown reward model {name!r}; known: {known}")
    return spec | {"architectures": [causal], "tie_word_embeddings": True}


def _score(layout: CheckpointFiles, views: dict[str, np.ndarray], width: int) -> jax.Array:
    """The output's row, taken out of the views."""
    if SCORE not in views:
        raise CheckpointError(f"{layout.files[0].path}: tensor {SCORE}: missing; a reward model has one")
    found = views.pop(SCORE)
    if found.shape != (1, width):
        raise CheckpointError(
            f"{layout.file_of(SCORE)}: tensor {SCORE}: has shape {list(found.shape)}; "
            f"a reward model has one label: {[1, width]}"
        )
    return jnp.asarray(np.array(found[0], np.float32))


def load_reward_model(path: str | Path, *, dtype: str = "float32") -> RewardModel:
    """Read a folder written by transformers' ``AutoModelForSequenceClassification`` with one label.

    Args:
      path: folder, or name on the Hugging Face hub.
      dtype: of the parameters.

    Returns:
      Trunk and output.

    Raises:
      CheckpointError: naming file and field or tensor: damaged, missing, more than one label, not supported.
      FileNotFoundError: a folder or file that is not there.
    """
    folder = resolve(path)
    spec = _causal(read_json(folder / CONFIG), folder / CONFIG)
    config = config_from_dict(spec, str(folder / CONFIG))
    layout = open_layout(folder)
    views = {name: view for file in layout.files for name, view in file.views().items()}
    score = _score(layout, views, config.width)
    layout = with_names(layout, config, model_type(spec), views)
    return RewardModel(config, read_weights(layout, config, views, dtype=dtype, place=None), score)
