"""Which method a run trains, where its knob stands, and whether the run can give it what it needs."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import optax

from kl_rl.core.twist import Twist
from kl_rl.methods.card import Given, Method, parsed_options
from kl_rl.methods.catalogue import METHODS, method_named
from kl_rl.methods.memory import given
from kl_rl.methods.needs import PERMISSIONS, Feed, Needs, base_policy, frozen_policy, own_policy
from kl_rl.runs.settings import Learning, Sizes, Task
from kl_rl.storage.errors import RunError

__all__ = ["Choice", "check_choice", "choose"]


class Choice(NamedTuple):
    """A method ready to be built.

    Attributes:
      method: its card, with the options and the memory of this run.
      value: of its knob.
    """

    method: Method
    value: float

    @property
    def drawn_by(self) -> str:
        """Whose completions the batches hold, at least in part: "policy", "p0", "frozen policy", or "data"."""
        if self.method.memory == given():
            return "data"
        behaviour = self.method.needs.behaviour if self.method.memory.samples else base_policy
        if behaviour is own_policy:
            return "policy"
        return "p0" if behaviour is base_policy else "frozen policy"


def _those(permission: str) -> str:
    return ", ".join(method.name for method in METHODS if getattr(method.needs, permission))


def _value(method: Method, task: Task, said: str | None) -> float:
    """Where the knob stands: by its own option, or among those of ``--set``, as a card of one's own may have it."""
    knob = method.knob
    for other in ("beta", "n", "threshold", "fraction"):
        if getattr(task, other) is not None and (knob is None or other != knob.option):
            has = "has no knob" if knob is None else f"is set by --{knob.option}"
            raise RunError(f"--{other} is not for {method.name}, which {has}")
    if knob is None:
        return 0.0
    value = getattr(task, knob.option, None)
    if said is not None:
        if value is not None:
            raise RunError(f"--{knob.option} is given twice: {value:g}, and by --set")
        try:
            value = float(said)
        except ValueError:
            raise RunError(f"--set {knob.option} must be a number; got {said!r}") from None
    value = knob.default if value is None else value
    if value is None:
        raise RunError(f"{method.name} needs --{knob.option}, the {knob.unit}")
    if not knob.admits(value):
        raise RunError(f"--{knob.option} must be {knob.range}; got {value:g}")
    return float(value)


def _needs(choice: Choice, sizes: Sizes) -> Needs:
    """Those of the card, without what the algorithm with these options does not permit."""
    optimizer, head = (
        lambda *_, **__: optax.identity(),
        lambda _: Twist((), lambda *ids: ids[0]),
    )  # never called
    dry: Any = Given(optimizer, head, sizes.steps, np.zeros(1), 0)  # type: ignore[arg-type]
    try:
        made = choice.method.made(choice.value, dry).needs
    except ValueError as error:
        raise RunError(f"{choice.method.name}: {error}") from error
    both = {name: getattr(made, name) and getattr(choice.method.needs, name) for name in PERMISSIONS}
    return choice.method.needs._replace(**both)


def check_choice(choice: Choice, sizes: Sizes, learning: Learning) -> None:
    """Hold what a method needs against what a run gives it.

    Raises:
      RunError: naming the option.
    """
    method, samples = choice.method, sizes.num_samples
    needs = _needs(choice, sizes)
    if choice.drawn_by == "data" and not needs.foreign:
        who = "an earlier policy of its own" if needs.behaviour is frozen_policy else "its own policy"
        raise RunError(
            f"{method.name} learns from samples of {who} and cannot use --data; these can: {_those('foreign')}"
        )
    if method.memory.filling and not needs.foreign:
        raise RunError(
            f"{method.name} keeps samples, but learns from fresh ones only (Needs.foreign is False)"
        )
    if samples < max(2, needs.samples):
        raise RunError(f"--num-samples must be at least {max(2, needs.samples)}; got {samples}")
    if (
        method.knob is not None
        and method.knob.option == "n"
        and choice.drawn_by != "data"
        and choice.value > samples
    ):
        raise RunError(f"--n must be at most --num-samples = {samples}; got {choice.value:g}")
    if needs.feed is Feed.PAIRS and samples % 2:
        raise RunError(f"{method.name} compares pairs: --num-samples must be even; got {samples}")
    if learning.twist is not None and not needs.heads:
        raise RunError(f"--twist {learning.twist}: {method.name} has no values, which it would be for")
    if learning.temperature != 1.0 and not needs.tempered:
        raise RunError(
            f"{method.name} takes its samples as they are drawn: another --temperature than 1 would move what it "
            f"learns; these correct for it: {_those('tempered')}"
        )
    if sizes.gradient_accumulation > 1 and not needs.parts:
        raise RunError(
            f"{method.name} normalizes its weights over the whole batch: it cannot have --gradient-accumulation"
        )


def choose(task: Task, sizes: Sizes, learning: Learning) -> Choice:
    """Find the method and its knob, and hold them against what is asked.

    Args:
      task: method, knob, options, data.
      sizes: K and the parts of a batch.
      learning: temperature of the sampler, heads.

    Returns:
      The choice.

    Raises:
      RunError: an unknown method or option, a knob out of range, or a need that the run cannot meet.
    """
    try:
        method = method_named(task.method)
        knob = None if method.knob is None else f"{method.knob.option}="
        said = [text for text in task.options if knob and text.startswith(knob)]
        options = parsed_options(method, [text for text in task.options if text not in said])
    except ValueError as error:
        raise RunError(str(error)) from error
    memory = method.memory if task.data is None else given()
    law = None if options else method.law  # a card's law is that of its options
    method = method._replace(options={**method.options, **options}, memory=memory, law=law)
    choice = Choice(method, _value(method, task, said[-1].partition("=")[2] if said else None))
    check_choice(choice, sizes, learning)
    return choice
