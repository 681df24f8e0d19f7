"""Small random worlds whose calibration budget is known by exact sums; shared by the calibration tests."""

import dataclasses

import numpy as np

from kl_rl.measure.samples import Samples

__all__ = ["NAMES", "World", "concatenate", "entries", "gaussian_tilt", "world"]

NAMES = ("kl", "P", "S", "C", "C_fwd", "C_JS")


def divergence(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.sum(a * np.log(a / b)))


@dataclasses.dataclass(frozen=True)
class World:
    """A finite set of strings with two laws and a reward; everything about it is a sum."""

    p: np.ndarray
    q: np.ndarray
    reward: np.ndarray

    @property
    def log_ratio(self) -> np.ndarray:
        return np.log(self.q / self.p)

    def truth(self) -> dict[str, float]:
        levels = np.unique(self.reward)
        inside = self.reward[None, :] == levels[:, None]
        p_level, q_level = inside @ self.p, inside @ self.q
        kl, marginal = divergence(self.q, self.p), divergence(q_level, p_level)
        symmetric = 0.0
        for here, a, b in zip(inside, q_level, p_level, strict=True):
            x, y = self.q[here] / a, self.p[here] / b
            middle = (x + y) / 2
            symmetric += (a + b) / 2 * (divergence(x, middle) + divergence(y, middle)) / 2
        paid = self.price(levels, p_level)
        forward = divergence(self.p, self.q) - divergence(p_level, q_level)
        shape = max(marginal - paid, 0.0)
        return dict(
            kl=kl, P=paid, S=shape, C=max(kl - marginal, 0.0), C_fwd=max(forward, 0.0), C_JS=symmetric
        )

    def price(self, levels: np.ndarray, p_level: np.ndarray) -> float:
        """sup {lambda mu - Lambda} by bisection on the tilted mean."""
        mean, low, high = float(self.q @ self.reward), -300.0, 300.0
        for _ in range(200):
            tilt = (low + high) / 2
            log_weight = np.log(p_level) + tilt * levels
            top = log_weight.max()
            weight = np.exp(log_weight - top)
            low, high = (tilt, high) if weight @ levels / weight.sum() < mean else (low, tilt)
        return tilt * mean - float(top + np.log(weight.sum()))

    def draw(self, rng: np.random.Generator, n: int, m: int) -> tuple[Samples, Samples]:
        picks = rng.choice(len(self.p), n, p=self.q), rng.choice(len(self.p), m, p=self.p)
        return tuple(Samples.from_log_ratio(self.reward[i], self.log_ratio[i]) for i in picks)


def world(
    seed: int, size=300, levels=5, tilt=0.5, noise=0.5, drop=0.0, sharp=0.0, heavy=False, rare=False
) -> World:
    """p0 Dirichlet; q = p0^(1+sharp) e^{tilt r + noise e}, a share `drop` of it made e^6 times rarer."""
    rng = np.random.default_rng(seed)
    p = np.maximum(rng.dirichlet(np.ones(size)), 1e-9)
    p /= p.sum()
    reward = (rng.binomial(levels - 1, 0.3, size) if rare else rng.integers(0, levels, size)).astype(float)
    e = rng.standard_t(3, size) if heavy else rng.normal(size=size)
    log_q = (1 + sharp) * np.log(p) + tilt * reward + noise * e - 6.0 * (rng.random(size) < drop)
    q = np.exp(log_q - log_q.max())
    return World(p, q / q.sum(), reward)


def concatenate(parts: list[Samples]) -> Samples:
    prompt = np.repeat(np.arange(len(parts)), [len(s.reward) for s in parts])
    return Samples(*(np.concatenate([s[j] for s in parts]) for j in range(3)), prompt)


def entries(budget):
    return {name: getattr(budget, name) for name in NAMES}


def gaussian_tilt(rng: np.random.Generator, n: int, beta: float) -> tuple[Samples, Samples]:
    """p0 standard normal rewards, q its exact tilt (mean 1/beta); l is a function of the reward."""
    rewards = rng.normal(1 / beta, 1, n), rng.normal(0, 1, n)
    return tuple(Samples.from_log_ratio(r, r / beta - 0.5 / beta**2) for r in rewards)
