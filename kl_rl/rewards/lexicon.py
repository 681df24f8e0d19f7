"""Files of rewards on text: words or patterns in JSON, or a tab-separated word list (VADER's format)."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kl_rl.rewards.lexicon_text import FINEST, BadReward, TextReward, in_word, normalized

__all__ = ["BadReward", "TextReward", "default_reward", "load_lexicon"]

_KEYS = ("lexicon", "patterns", "case", "scale", "clip", "round_to")


def load_lexicon(path: str | Path, *, round_to: float | None = None) -> TextReward:
    """Read a reward file.

    Formats: JSON ``{"lexicon": {"word": weight, ...}}`` or ``{"patterns": [{"pattern": "...", "weight": w},
    ...]}``, each with optional ``"case"`` (false: case is ignored), ``"scale"`` (1), ``"clip"`` (null) and
    ``"round_to"`` (null); or lines of tab-separated values, a token and its valence, further columns ignored
    (the format of VADER; Hutto and Gilbert 2014).

    Args:
      path: the file, UTF-8.
      round_to: weights are rounded to multiples of this, so that the reward has few levels. None: what the
        file says; 0.5 for tab-separated lists; not at all for JSON without ``round_to``.

    Returns:
      The reward.

    Raises:
      BadReward: for anything unusable, naming file, line or field.
    """
    name = str(path)
    text = _read(path, name)
    first = text.lstrip().split("\n", 1)[0]
    if not first:
        raise BadReward(
            f"{name}: is empty; give words with weights (JSON, or a token, a tab and a number on each line)"
        )
    if name.endswith(".json") or (first.startswith("{") and "\t" not in first):
        return _from_json(text, name, round_to)
    return _from_lines(text, name, 0.5 if round_to is None else round_to)


def _read(path: str | Path, name: str) -> str:
    data = b""
    try:
        data = Path(path).read_bytes()
        return data.decode("utf-8-sig")
    except FileNotFoundError:
        raise BadReward(
            f"{name}: no such file; give a word list or patterns (JSON or tab-separated)"
        ) from None
    except IsADirectoryError:
        raise BadReward(f"{name}: is a directory; give a file") from None
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise BadReward(f"{name}: line {line}: not UTF-8 text; save the file as UTF-8") from None
    except (OSError, ValueError) as error:
        raise BadReward(f"{name}: cannot be read ({getattr(error, 'strerror', None) or error})") from None


def _number(value: object, place: str, *, positive: bool = False) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadReward(f"{place} must be a number, got {value!r:.60}")
    try:
        result = float(value)
    except OverflowError:
        result = math.inf
    if not math.isfinite(result) or abs(result) > 1e6:
        raise BadReward(f"{place} must be finite and at most a million in size, got {value!r:.60}")
    if positive and result <= 0:
        raise BadReward(f"{place} must be positive, got {value!r:.60}")
    return result


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    seen: dict[str, Any] = {}
    for key, value in pairs:
        if key in seen:
            raise KeyError(key)
        seen[key] = value
    return seen


def _from_json(text: str, name: str, round_to: float | None) -> TextReward:
    try:
        spec = json.loads(text, object_pairs_hook=_without_duplicates)
    except json.JSONDecodeError as error:
        raise BadReward(
            f"{name}: line {error.lineno}, column {error.colno}: not valid JSON: {error.msg}"
        ) from None
    except KeyError as error:
        raise BadReward(
            f"{name}: the key {json.dumps(error.args[0])} appears twice; remove one of the two"
        ) from None
    except (ValueError, RecursionError) as error:
        raise BadReward(f"{name}: not valid JSON: {error}") from None
    if not isinstance(spec, dict) or ("lexicon" in spec) == ("patterns" in spec):
        raise BadReward(f'{name}: must be an object in braces with either "lexicon" or "patterns"')
    for key in spec:
        if key not in _KEYS:
            raise BadReward(f'{name}: unknown key "{key}"; known keys: {", ".join(_KEYS)}')
    case = spec.get("case", False)
    if not isinstance(case, bool):
        raise BadReward(f'{name}: "case" must be true or false, got {case!r:.60}')
    scale = _number(spec.get("scale", 1.0), f'{name}: "scale"')
    clip = spec.get("clip")
    clip = None if clip is None else _number(clip, f'{name}: "clip"', positive=True)
    step = spec.get("round_to") if round_to is None else round_to
    step = None if step is None else _number(step, f'{name}: "round_to"', positive=True)
    if "patterns" in spec:
        patterns = _patterns(spec["patterns"], name)
        kept = tuple((p, v) for p, w in patterns if (v := _rounded(w * scale, step)))
        return _checked(TextReward(name, (), kept, case, clip, step or FINEST, len(patterns) - len(kept)))
    return _from_words(_lexicon(spec["lexicon"], name), name, case, scale, clip, step, strict=True)


def _lexicon(value: object, name: str) -> dict[str, tuple[float, str]]:
    if not isinstance(value, dict) or not value:
        raise BadReward(f'{name}: "lexicon" must be an object with at least one word and its weight')
    places = {word: f'{name}: lexicon word "{word}"' for word in value}
    return {word: (_number(w, f"{places[word]}: weight"), places[word]) for word, w in value.items()}


def _patterns(value: object, name: str) -> list[tuple[str, float]]:
    if not isinstance(value, list) or not value:
        raise BadReward(f'{name}: "patterns" must be a list with at least one pattern and its weight')
    result = []
    for i, item in enumerate(value):
        place = f"{name}: patterns[{i}]"
        if (
            not isinstance(item, dict)
            or set(item) != {"pattern", "weight"}
            or not isinstance(item["pattern"], str)
        ):
            raise BadReward(f'{place} must be {{"pattern": "a regular expression", "weight": a number}}')
        try:
            re.compile(item["pattern"])
        except re.error as error:
            raise BadReward(f"{place}.pattern is not a regular expression: {error}") from None
        result.append((item["pattern"], _number(item["weight"], f"{place}.weight")))
    return result


def _from_lines(text: str, name: str, round_to: float) -> TextReward:
    """Token, tab, valence on each line; what is not a word (emoticons, phrases) is skipped and counted."""
    entries: dict[str, tuple[float, str]] = {}
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        place, columns = f"{name}: line {number}", line.rstrip("\r").split("\t")
        if len(columns) < 2 or not columns[0]:
            raise BadReward(f"{place}: needs a token, a tab and a number, got {line!r:.60}")
        try:
            weight = float(columns[1])
        except ValueError:
            raise BadReward(
                f"{place}: the valence (column 2) must be a number, got {columns[1]!r:.40}"
            ) from None
        entries.setdefault(columns[0], (_number(weight, f"{place}: the valence (column 2)"), place))
    return _from_words(entries, name, False, 1.0, None, round_to, strict=False)


def _rounded(weight: float, step: float | None) -> float:
    return weight if step is None else step * round(weight / step)


def _from_words(
    entries: Mapping[str, tuple[float, str]],
    name: str,
    case: bool,
    scale: float,
    clip: float | None,
    round_to: float | None,
    *,
    strict: bool,
) -> TextReward:
    """Normalize words, scale and round weights; `strict`: an entry that is not one word is an error."""
    words: dict[str, float] = {}
    for entry, (weight, place) in entries.items():
        word = normalized(entry, case)
        if not word or not all(map(in_word, entry)):
            if strict:
                raise BadReward(
                    f'{place} is not one word of letters and apostrophes; use "patterns" for anything else'
                )
            continue
        value = _rounded(weight * scale, round_to)
        if strict and words.get(word, value) != value:
            raise BadReward(
                f"{place}: the same word has two weights once case is ignored; remove one of the two"
            )
        words.setdefault(word, value)
    kept = tuple((word, value) for word, value in words.items() if value)
    return _checked(TextReward(name, kept, (), case, clip, round_to or FINEST, len(entries) - len(kept)))


def _checked(reward: TextReward) -> TextReward:
    if reward.words or reward.patterns:
        return reward
    raise BadReward(
        f"{reward.name}: has no entry with a weight that is not 0 after rounding; add words, or round less"
    )


_PLEASANT = """
support supported supports useful clear like important efficient well true help free original special certain
allow allowed allows create created saved success succeed best better rich accept accepted recommended
resolved simple new
"""
_UNPLEASANT = """
error errors fail fails failed missing stop bad negative ignored ignore illegal warning destroyed empty
invalid deprecated avoid problem prevent discarded wrong not never cannot no
"""


def default_reward() -> TextReward:
    """A small built-in word list for technical English: +1 for pleasant words, -1 for unpleasant ones."""
    words = [(w, 1.0) for w in _PLEASANT.split()] + [(w, -1.0) for w in _UNPLEASANT.split()]
    return TextReward("built-in word list", tuple(words), unit=1.0)
