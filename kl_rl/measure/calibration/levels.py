"""Cells of a calibration measurement: pairs (prompt, reward level); rewards grouped exactly or in bins."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from kl_rl.measure.samples import Samples

__all__ = ["Binning", "Cells", "build_cells", "distinct_levels", "quantile_bins"]


class Binning(NamedTuple):
    """How rewards became levels.

    Attributes:
        kind: "exact" (one level per distinct reward) or "quantile" (equal-mass bins of the pooled rewards).
        levels: number of levels in use.
        width: reward range inside each level, [levels]; zero for exact levels.
    """

    kind: str
    levels: int
    width: np.ndarray


class Cells(NamedTuple):
    """Pooled samples (tuned first, then base) with the cell each belongs to. N = n + m, X prompts, G cells.

    Attributes:
        reward, log_ratio: [N] (l = log q - log p0, nats).
        is_base: 0 for tuned, 1 for base samples, [N] (int8).
        prompt: prompt index, [N].  cell: cell index, [N].
        level_of_cell, prompt_of_cell: [G].
        n, m: tuned and base samples per prompt, [X].
        binning: how rewards became levels.
        dropped: samples left out, (tuned, base), because the other set has none on their prompt.
    """

    reward: np.ndarray
    log_ratio: np.ndarray
    is_base: np.ndarray
    prompt: np.ndarray
    cell: np.ndarray
    level_of_cell: np.ndarray
    prompt_of_cell: np.ndarray
    n: np.ndarray
    m: np.ndarray
    binning: Binning
    dropped: tuple[int, int] = (0, 0)

    @property
    def weight(self) -> np.ndarray:
        """Weight of each prompt: its share of the tuned samples, so that KL is the plain mean of l, [X]."""
        return self.n / self.n.sum()

    def per_cell(self, values: np.ndarray | None = None, base: bool | None = None) -> np.ndarray:
        """Sum of values (None: count) over the samples of each cell, of one set or (None) both, [G]."""
        return self._sums(self.cell, len(self.prompt_of_cell), values, base)

    def per_prompt(self, values: np.ndarray | None = None, base: bool | None = None) -> np.ndarray:
        """The same per prompt, [X]."""
        return self._sums(self.prompt, len(self.n), values, base)

    def _sums(self, index: np.ndarray, size: int, values: np.ndarray | None, base: bool | None) -> np.ndarray:
        n = int(self.n.sum())
        part = slice(None) if base is None else (slice(n, None) if base else slice(0, n))
        return np.bincount(index[part], None if values is None else values[part], minlength=size)


def distinct_levels(reward: np.ndarray) -> np.ndarray:
    """Level index of each reward, rewards closer than 1e-9 (relative) being one level.

    Args:
        reward: [N].

    Returns:
        Integer levels in increasing order of reward, [N].
    """
    values, inverse = np.unique(reward, return_inverse=True)
    size = np.abs(values)
    tolerance = 1e-9 * np.maximum(size[1:], size[:-1]) + 1e-13 * size.max()
    return np.concatenate([[0], np.cumsum(np.diff(values) > tolerance)])[inverse.ravel()]


def quantile_bins(reward: np.ndarray, count: int) -> np.ndarray:
    """Level index of each reward in about `count` bins of equal mass; ties stay in one bin.

    Args:
        reward: [N].
        count: wanted number of bins, >= 1.

    Returns:
        Integer levels in increasing order of reward, empty bins removed, [N].
    """
    edges = np.unique(np.quantile(reward, np.arange(1, count) / count, method="higher"))
    return np.unique(np.searchsorted(edges, reward, side="right"), return_inverse=True)[1].ravel()


def build_cells(tuned: Samples, base: Samples | None, bins: int | str = "auto") -> Cells:
    """Pool both sample sets and group them by prompt and reward level.

    "auto" takes the distinct rewards if there are at most 64 of them and ten samples for each on average,
    else `N/40` equal-mass bins, between 4 and 256.

    Args:
        tuned: samples of the fine-tuned policy.
        base: samples of the base policy, or None.
        bins: "auto", "exact" or the number of equal-mass bins.

    Returns:
        The cells.

    Raises:
        ValueError: for a bad `bins`, array lengths that differ, or prompts that do not match between the
            sets.
    """
    sets = [tuned] if base is None else [tuned, base]
    _check(sets)
    codes = _encode_prompts(sets)
    keep = [
        np.isin(c, codes[1 - i]) if len(sets) == 2 else np.ones(len(c), bool) for i, c in enumerate(codes)
    ]
    if not all(k.any() for k in keep):
        raise ValueError(
            "no prompt of the tuned samples occurs among the base samples; use the same identifiers"
        )
    reward = np.concatenate([np.asarray(s.reward, np.float64)[k] for s, k in zip(sets, keep, strict=True)])
    ratio = np.concatenate([s.log_ratio[k] for s, k in zip(sets, keep, strict=True)])
    prompt = np.unique(np.concatenate([c[k] for c, k in zip(codes, keep, strict=True)]), return_inverse=True)[
        1
    ]
    sizes = [int(k.sum()) for k in keep]
    dropped = (len(keep[0]) - sizes[0], len(keep[-1]) - sizes[-1])
    is_base = np.repeat(np.arange(len(sets), dtype=np.int8), sizes)
    level, kind = _levels(reward, bins)
    num_prompts, num_levels = int(prompt.max()) + 1, int(level.max()) + 1
    binning = Binning(kind, num_levels, _widths(reward, level, num_levels, kind))
    cell, prompt_of_cell, level_of_cell = _cell_index(prompt, level, num_prompts, num_levels)
    n, m = (np.bincount(prompt[is_base == s], minlength=num_prompts) for s in (0, 1))
    return Cells(reward, ratio, is_base, prompt, cell, level_of_cell, prompt_of_cell, n, m, binning, dropped)


def _widths(reward: np.ndarray, level: np.ndarray, count: int, kind: str) -> np.ndarray:
    """Reward range inside each level, [count]."""
    low, high = np.full(count, np.inf), np.full(count, -np.inf)
    np.minimum.at(low, level, reward)
    np.maximum.at(high, level, reward)
    return np.zeros(count) if kind == "exact" else high - low


def _cell_index(
    prompt: np.ndarray, level: np.ndarray, num_prompts: int, num_levels: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Dense index of the (prompt, level) pairs that occur, and the prompt and level of each."""
    code = prompt * num_levels + level
    if num_prompts * num_levels <= 4 * len(code) + 1024:
        used = np.flatnonzero(np.bincount(code, minlength=num_prompts * num_levels))
        lookup = np.zeros(num_prompts * num_levels, np.int64)
        lookup[used] = np.arange(len(used))
        return lookup[code], used // num_levels, used % num_levels
    pairs, cell = np.unique(code, return_inverse=True)
    return cell.ravel(), pairs // num_levels, pairs % num_levels


def _check(sets: list[Samples]) -> None:
    for name, s in zip(("tuned", "base"), sets, strict=False):
        lengths = {len(s.reward), len(s.logp_tuned), len(s.logp_base)}
        lengths |= set() if s.prompt is None else {len(s.prompt)}
        if len(lengths) > 1:
            raise ValueError(f"the arrays of the {name} samples have different lengths {sorted(lengths)}")
        if len(s.reward) < 2:
            raise ValueError(f"at least two {name} samples are needed, got {len(s.reward)}")
        if not (np.all(np.isfinite(s.reward)) and np.all(np.isfinite(s.log_ratio))):
            raise ValueError(f"rewards and log-probabilities of the {name} samples must be finite")


def _encode_prompts(sets: list[Samples]) -> list[np.ndarray]:
    """Prompt identifiers of each set as integers that both sets share."""
    if len({s.prompt is None for s in sets}) > 1:
        raise ValueError(
            "prompts are given for one of the two sample sets only; give them for both or for none"
        )
    codes: dict = {}
    encoded = []
    for s in sets:
        ids = [0] * len(s.reward) if s.prompt is None else np.asarray(s.prompt).tolist()
        encoded.append(np.array([codes.setdefault(p, len(codes)) for p in ids]))
    return encoded


def _levels(reward: np.ndarray, bins: int | str) -> tuple[np.ndarray, str]:
    if isinstance(bins, int) and not isinstance(bins, bool):
        if bins < 1:
            raise ValueError(f"the number of bins must be at least 1, got {bins}")
        return quantile_bins(reward, bins), "quantile"
    if bins not in ("auto", "exact"):
        raise ValueError(f'bins must be "auto", "exact" or a positive integer, got {bins!r}')
    level = distinct_levels(reward)
    count = int(level.max()) + 1
    if bins == "exact" or (count <= 64 and len(reward) >= 10 * count):
        return level, "exact"
    return quantile_bins(reward, int(np.clip(len(reward) / 40, 4, 256))), "quantile"
