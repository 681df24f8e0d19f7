"""`kl-rl compare --text`: a small base is pretrained on a text, and compared on like any other."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from kl_rl.experiments.compare.model.ground import Comparison, Question
from kl_rl.rewards.host import HostReward, lexicon_reward
from kl_rl.rewards.lexicon import default_reward
from kl_rl.runs.pretrain import pretrain, read_text
from kl_rl.runs.settings import Learning, Pretraining, Sizes
from kl_rl.storage.errors import RunError
from kl_rl.storage.folder import write_atomically
from kl_rl.storage.preemption import Preemption

__all__ = ["TEXT_SIZES", "TextBase", "on_text", "text_base"]

TEXT_SIZES = Sizes(steps=150, batch=8, num_samples=8, horizon=40, held_out=16, eval_samples=128)
_PROMPT = 16  # bytes of a prompt
_PROMPTS = 64
_RATE = 3e-4


class TextBase(NamedTuple):
    """A base made from a text.

    Attributes:
      folder: of the run that made it.
      prompts: file of held-out text, from which prompts are cut.
      checks: how good it is, in words.
    """

    folder: Path
    prompts: Path
    checks: tuple[str, ...]


def _standard_text(folder: Path) -> str:
    """English prose that comes with Python, as a file."""
    try:
        topics = importlib.import_module("pydoc_data.topics").topics
    except ImportError:
        raise RunError(
            "this Python comes without pydoc_data.topics, the default text; name a text file instead"
        ) from None
    path = folder / "text.txt"
    if not path.exists():
        write_atomically(path, "\n".join(topics.values()))
    return str(path)


def text_base(
    text: str,
    minutes: float | None,
    folder: Path,
    preemption: Preemption,
    progress: Callable[[float, str], None],
) -> TextBase:
    """Pretrain a byte model, or find it in the folder.

    Args:
      text: name of the file; empty: prose that comes with Python.
      minutes: of pretraining; None: 4.
      folder: of the comparison.
      preemption: hears signals.
      progress: called with a fraction and a message.

    Returns:
      The base.

    Raises:
      RunError: the text cannot be used.
      Stopped: asked for; it goes on from its checkpoint.
    """
    plan = Pretraining(minutes=4.0 if minutes is None else minutes, layers=2)
    name = text or _standard_text(folder)
    data, out = read_text(name, plan.context), folder / "pretrained"
    out.mkdir(exist_ok=True)
    found = pretrain(plan, data, out, progress=progress, preemption=preemption)
    prompts = folder / "prompts.txt"
    write_atomically(prompts, data.held_out.tobytes().decode("utf-8", errors="ignore"))
    shown = name if text else "pydoc_data.topics, Python " + ".".join(map(str, sys.version_info[:2]))
    check = (
        f"Base model: pretrained on {shown}, {found['held_out_loss']:.3f} nats per byte on held-out text (a memoryless "
        f"model: {found['unigram_entropy']:.3f}), {found['steps']} steps."
    )
    return TextBase(out, prompts, (check,))


def on_text(base: TextBase, reward: str | None, **changes: Any) -> tuple[Comparison, HostReward | None]:
    """The comparison that is made from a text, and its reward if none is named.

    Args:
      base: from ``text_base``.
      reward: as for `kl-rl train`; None: a built-in word list.
      changes: of ``Sizes`` and of the number of seeds.

    Returns:
      The comparison and the built-in reward, or None.
    """
    built_in = lexicon_reward("built-in word list", default_reward()) if reward is None else None
    question = Question(
        str(base.folder), str(base.prompts), reward or "", prompt_length=_PROMPT, num_prompts=_PROMPTS
    )
    return Comparison(question, learning=Learning(learning_rate=_RATE), **changes), built_in
