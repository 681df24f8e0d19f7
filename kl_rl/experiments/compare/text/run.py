"""`kl-rl compare --text`: methods side by side on a text, with two-sided estimates instead of exact truth.

A character transformer is trained on the text and frozen; each method fine-tunes a copy for a reward on what is
written; samples of both, scored under both, give the calibration budget with its intervals.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kl_rl import models
from kl_rl.core.policy import Policy
from kl_rl.core.posterior import Posterior
from kl_rl.experiments.compare.catalogue import Context, Method, methods_named
from kl_rl.experiments.compare.text.knobs import sampled_knobs, tilt_to_mean
from kl_rl.experiments.compare.text.measure import base_row, budget_row, measure, previews
from kl_rl.experiments.compare.text.problem import TextPlan, TextProblem, make_problem
from kl_rl.experiments.compare.text.reference import control, posterior_row
from kl_rl.measure.calibration import sampled_budget
from kl_rl.methods import fit
from kl_rl.rewards.lexicon import default_reward, load_lexicon
from kl_rl.rewards.lexicon_text import words_in
from kl_rl.worlds.text import load_text
from kl_rl.worlds.text_base import RETURN_TOKENS

__all__ = ["DEFAULT_METHODS", "TextPlan", "TextResult", "run_text"]

DEFAULT_METHODS = (
    "rloo", "rloo-free", "ppo", "filter", "best-of-n", "rwr", "dt-tilted", "vargrad-replay", "tb-replay",
    "alpha-0.5", "dpo",
)  # fmt: skip
_CHUNKS = 6
_CLOSELY = 2  # steps between two looks at an early-stopped run

Row = dict[str, Any]
Progress = Callable[[float, str], None]
Done = frozenset[tuple[str, float, int]]


class TextResult(NamedTuple):
    """What a comparison on text found.

    Attributes:
      rows: one for each method, knob and seed, those in `done` left out.
      data: facts for the report: text, alphabet, base losses, reward, betas, bounds on log Z, the base's reward law.
    """

    rows: list[Row]
    data: dict[str, Any]


def _context(problem: TextProblem, scorer: Any, twist: Policy) -> Context:
    """What the methods of the catalogue may know; scorer and twist are traced, so nothing large is a constant."""
    plan = problem.plan
    return Context(
        prompt=problem.prompt,
        reward_fn=scorer,
        horizon=plan.horizon,
        end=None,
        num_samples=plan.per_prompt,
        edges=jnp.asarray(problem.edges, jnp.result_type(float)),
        first_token=problem.corpus.begin + 1,
        twist=twist,
        constant=models.constant_twist(),
        learning_rate=plan.learning_rate,
        steps=plan.steps,
        data_size=16 * plan.per_prompt,
    )


def _chunk_steps(method: Method, plan: TextPlan) -> int:
    return min(_CLOSELY, plan.steps) if method.knob == "steps" else max(1, plan.steps // _CHUNKS)


def _twist(problem: TextProblem) -> Policy:
    """A twist head of half the base's width."""
    plan = problem.plan
    context = problem.prompt.shape[1] + plan.horizon + 1
    options = {"extra": 1 + RETURN_TOKENS, "context": context, "width": max(8, plan.width // 2), "layers": 1}
    return models.small_twist(jax.random.key(7), problem.corpus.begin, **options)


class _Program(NamedTuple):
    """A method compiled once for all its knobs and seeds."""

    begin: Callable[..., Any]
    chunk: Callable[..., Any]
    seconds: float


def _compile(method: Method, problem: TextProblem, twist: Policy) -> _Program:
    """Two compiled functions of (base, scorer, twist, knob, ...): begin a run, advance it one chunk."""

    def setup(base, scorer, twist, knob):
        made = method.build(knob, _context(problem, scorer, twist))
        return made, Posterior(base, made.evidence)

    def begin(base, scorer, twist, knob, key):
        made, posterior = setup(base, scorer, twist, knob)
        return fit.start(made.algorithm, base, posterior, made.source, key)

    def chunk(base, scorer, twist, knob, run):
        made, posterior = setup(base, scorer, twist, knob)
        run, info = fit.advance(
            made.algorithm, run, posterior, made.source, num_steps=_chunk_steps(method, problem.plan)
        )
        policy = made.algorithm.deploy(run.state, posterior)
        return run, policy, (jnp.mean(info.ess), jnp.mean(info.reward))

    started = time.perf_counter()
    fixed = (problem.base.policy, problem.scorer, twist, jnp.asarray(1.0, jnp.result_type(float)))
    first = jax.jit(begin).lower(*fixed, jax.random.key(0)).compile()
    shape = jax.eval_shape(begin, *fixed, jax.random.key(0))
    later = jax.jit(chunk).lower(*fixed, shape).compile()
    return _Program(first, later, time.perf_counter() - started)


class _Lane(NamedTuple):
    """One training run."""

    knob: float
    seed: int


def _lanes(method: Method, problem: TextProblem, seeds: Sequence[int], done: Done) -> list[_Lane]:
    """The runs still to be made. Early stopping is one run for all its stops, at the strongest tilt."""
    plan, reward = problem.plan, problem.drawn.reward
    if method.knob == "steps":
        stops = {seed: sum(name == method.name and s == seed for name, _, s in done) for seed in seeds}
        knob = 1.0 / tilt_to_mean(reward, problem.targets[-1])
        return [_Lane(knob, seed) for seed in seeds if stops[seed] < len(problem.targets)]
    values = sampled_knobs(method, reward, problem.targets, num_samples=plan.per_prompt)
    lanes = [_Lane(value, seed) for value in values for seed in seeds]
    return [lane for lane in lanes if (method.name, lane.knob, lane.seed) not in done]


def _train(
    method: Method, problem: TextProblem, lanes: list[_Lane], words: list[frozenset[str]], progress: Progress
) -> Iterator[Row]:
    """Train every lane; measure it at the end, or, if it is stopped early, when it first reaches each target."""
    progress(0.0, f"{method.name}: compiling")
    twist = _twist(problem)
    program = _compile(method, problem, twist)
    per_chunk = _chunk_steps(method, problem.plan)
    chunks, stepped = max(1, problem.plan.steps // per_chunk), method.knob == "steps"
    for index, lane in enumerate(lanes):
        started, knob = time.perf_counter(), jnp.asarray(lane.knob, jnp.result_type(float))
        fixed = (problem.base.policy, problem.scorer, twist, knob)
        key = jax.random.key(lane.seed)
        run, ess, waiting = program.begin(*fixed, key), [], list(problem.targets)
        for chunk in range(1, chunks + 1):
            run, policy, (share, reward) = program.chunk(*fixed, run)
            ess.append(float(share))
            step = chunk * per_chunk
            said = f"{method.name} ({method.knob} {lane.knob:.3g}, seed {lane.seed}): step {step}"
            progress((index + chunk / chunks) / len(lanes), said)
            if chunk < chunks and not (stepped and float(reward) >= waiting[0]):
                continue
            trained = time.perf_counter() - started
            value = float(step) if stepped else lane.knob
            beta = value if method.knob == "beta" else None
            row = _named(method.name, method.family, method.knob, value, lane.seed)
            row |= measure(problem, policy, jax.random.fold_in(key, chunk), beta=beta, base_words=words)
            row |= {"steps": step, "ess": float(np.mean(ess))}
            row |= {"wall_s": trained, "measure_s": time.perf_counter() - started - trained}
            yield row | {"compile_s": program.seconds}
            started = time.perf_counter() - trained
            waiting = [target for target in waiting if target > float(reward)]
            if not waiting:
                break


def _named(method: str, family: str, knob: str, value: float, seed: int) -> Row:
    return {"method": method, "family": family, "knob": knob, "knob_value": value, "seed": seed}


def _references(problem: TextProblem, seed: int) -> Iterator[Row]:
    """Rows that need no training: the base, the posteriors, and a control whose C is known."""
    yield _named("base", "reference", "none", 0.0, seed) | base_row(problem)
    rng = np.random.default_rng(seed)
    for beta in _betas(problem):
        yield _named("p*", "reference", "beta", beta, seed) | posterior_row(problem, beta, rng)
    if problem.reward.words:
        made = control(problem, seed)
        row = _named("control", "reference", "none", 0.0, seed) | {"beta": None}
        row |= budget_row(sampled_budget(made.tuned, made.base))
        row |= {"known_C": made.known.value, "known_C_stderr": made.known.stderr}
        row |= {"reward": float(made.tuned.reward.mean()), "n_samples": made.tuned.reward.size}
        yield row | {"preview": previews(problem, made.tokens)}


def _betas(problem: TextProblem) -> list[float]:
    """The temperatures that the knobs of "beta" methods take."""
    method = methods_named(["rloo"])[0]
    return sampled_knobs(method, problem.drawn.reward, problem.targets, num_samples=2)


def _facts(problem: TextProblem, references: list[Row]) -> dict[str, Any]:
    corpus, drawn = problem.corpus, problem.drawn
    value, count = np.unique(drawn.reward, return_counts=True)
    log_z = ("beta", "log_z_lower", "log_z_lower_stderr", "log_z_upper", "log_z_upper_stderr", "particles")
    return {
        "name": corpus.name,
        "characters": len(corpus.train) + len(corpus.held_out),
        "alphabet": corpus.alphabet,
        "alphabet_size": len(corpus.alphabet),
        "replaced": corpus.replaced,
        "base_loss": problem.base.held_out_loss,
        "unigram_entropy": problem.base.unigram_entropy,
        "base_steps": problem.base.steps,
        "base_seconds": problem.base.seconds,
        "reward_name": problem.reward.name,
        "reward_entries": len(problem.reward.words) + len(problem.reward.patterns),
        "reward_skipped": problem.reward.skipped,
        "base_reward_mean": float(drawn.reward.mean()),
        "base_reward_sd": float(drawn.reward.std()),
        "targets": list(problem.targets),
        "betas": _betas(problem),
        "log_z": [{name: row[name] for name in log_z} for row in references if row["method"] == "p*"],
        "law": [[float(v), float(c) / drawn.reward.size] for v, c in zip(value, count, strict=True)],
        "prompts": [corpus.decode(row) for row in np.asarray(problem.prompt)],
        "plan": problem.plan._asdict(),
    }


def _silent(fraction: float, message: str) -> None:
    """No progress report."""


def _part(progress: Progress, start: float, end: float) -> Progress:
    return lambda fraction, message: progress(start + fraction * (end - start), message)


def run_text(
    *,
    text: str | Path | None = None,
    reward: str | Path | None = None,
    methods: Sequence[str] | None = None,
    seeds: Sequence[int] = (0,),
    out: Path | None = None,
    done: Done = frozenset(),
    plan: TextPlan | None = None,
    base_seed: int = 0,
    progress: Progress = _silent,
    on_rows: Callable[[list[Row]], None] = lambda rows: None,
    on_facts: Callable[[dict[str, Any]], None] = lambda facts: None,
) -> TextResult:
    """Train a base model on a text, fine-tune it with each method, and measure what each did to it.

    Everything follows from the seeds, so a run that was cut off goes on where it was: the base model is kept in
    `out`, and finished rows are named in `done`.

    Args:
      text: a text file; None: English that comes with Python.
      reward: a reward file (`load_lexicon`); None: a built-in word list.
      methods: names or families of the catalogue; None: one or more of every family.
      seeds: of fine-tuning.
      out: folder for `base.npz` and `base.json`; None: nothing is kept.
      done: (method, knob value, seed) of rows that exist already.
      plan: sizes.
      base_seed: of the base model, its samples and the reference rows.
      progress: called with a fraction of the work and a message.
      on_rows: called with new rows as soon as they exist.
      on_facts: called with the facts as soon as the base model and the reference rows exist.

    Returns:
      Rows and facts.

    Raises:
      BadText, BadReward: for input that cannot be used.
      ValueError: for an unknown method.
    """
    plan = plan or TextPlan()
    chosen = methods_named(list(methods or DEFAULT_METHODS))
    rewarded = default_reward() if reward is None else load_lexicon(reward)
    problem = make_problem(load_text(text), rewarded, plan, out, base_seed, _part(progress, 0.0, 0.3))
    rows: list[Row] = []

    def hand_over(row: Row) -> None:
        if (row["method"], row["knob_value"], row["seed"]) not in done:
            rows.append(row)
            on_rows([row])

    references = list(_references(problem, base_seed))
    facts = _facts(problem, references)
    on_facts(facts)
    for row in references:
        hand_over(row)
    words = [
        frozenset(words_in(problem.corpus.decode(y))) for y in problem.drawn.tokens.reshape(-1, plan.horizon)
    ]
    for index, method in enumerate(chosen):
        lanes = _lanes(method, problem, seeds, done)
        share = functools.partial(_part, progress)
        part = share(0.3 + 0.7 * index / len(chosen), 0.3 + 0.7 * (index + 1) / len(chosen))
        for row in _train(method, problem, lanes, words, part) if lanes else ():
            hand_over(row)
    progress(1.0, "done")
    return TextResult(rows, facts)
