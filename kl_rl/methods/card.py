"""The card: all that is known about a method, once. Everything else reads cards."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import optax

from kl_rl.core.posterior import Evidence
from kl_rl.core.twist import Twist
from kl_rl.methods.algorithm import Algorithm
from kl_rl.methods.knobs import Knob
from kl_rl.methods.laws import Law
from kl_rl.methods.memory import Memory
from kl_rl.methods.needs import Head, Needs

__all__ = ["Given", "Method", "Paper", "bibtex", "options_of", "parsed_options"]


class Given(NamedTuple):
    """What only a run knows of a method that it builds.

    Attributes:
      optimizer: ``(factor=1.0, *, epochs=1) -> optax transformation``: the run's, at a multiple of its learning rate.
      head: ``Head -> Twist``: initial networks beside the policy.
      steps: gradient steps of the run.
      edges: ascending boundaries between return tokens; [R - 1].
      first_token: id of return token 0.
    """

    optimizer: Callable[..., optax.GradientTransformation]
    head: Callable[[Head], Twist]
    steps: int = 1
    edges: jax.Array | None = None
    first_token: int = -1


class Paper(NamedTuple):
    """Where a method comes from."""

    authors: str
    year: int
    title: str
    arxiv: str = ""
    venue: str = ""


class Method(NamedTuple):
    """A method.

    Attributes:
      name: its one name: in commands, tables, documentation.
      family: the row of the table of families.
      idea: one line.
      function: what it is made with; its docstring has the formula, its keywords are the options.
      build: ``(value, given, **options) -> Algorithm``, called inside ``jit`` with a traced value.
      evidence: ``value -> Evidence``.
      knob: the number that says how far it goes; None: it goes as far as it goes.
      needs: what a batch must be, as on the algorithm.
      memory: what is kept between steps.
      law: its fixed point with the card's options; None: there is none, ``assumes`` and the docstring say what happens
        instead.
      options: its settings of the function's keywords.
      assumes: in words, what the law rests on.
      theorems: ids of statements in theory_notes.
      paper: the source.
      conventions: further settings of the keywords, by the library that has them.
    """

    name: str
    family: str
    idea: str
    function: Callable[..., Algorithm]
    build: Callable[..., Algorithm]
    evidence: Callable[[Any], Evidence]
    knob: Knob | None
    needs: Needs
    memory: Memory = Memory()
    law: Law | None = None
    options: Mapping[str, Any] = MappingProxyType({})
    assumes: tuple[str, ...] = ()
    theorems: tuple[str, ...] = ()
    paper: Paper | None = None
    conventions: Mapping[str, Mapping[str, Any]] = MappingProxyType({})

    def __hash__(self) -> int:
        return hash((self.name, self.function, self.build, tuple(sorted(self.options.items()))))

    def made(self, value: Any, given: Given, options: Mapping[str, Any] = MappingProxyType({})) -> Algorithm:
        """The algorithm at one setting of the knob, with the card's options and further ones."""
        return self.build(value, given, **{**self.options, **options})


def options_of(method: Method) -> dict[str, Any]:
    """The numbers that can be set, and where they stand: keywords of the function that take a number.

    Args:
      method: the card.

    Returns:
      Name -> value, None where a run decides; not the knob, nor what a run gives.
    """
    found: dict[str, Any] = {}
    built_with = inspect.signature(method.build, eval_str=False).parameters
    for name, parameter in inspect.signature(method.function, eval_str=False).parameters.items():
        kind = str(parameter.annotation)
        if not any(number in kind for number in ("float", "int", "bool")) or name == "first_token":
            continue
        if method.knob is not None and name == method.knob.option:
            continue
        built = built_with.get(name)
        default = parameter.default if built is None else built.default
        if name in method.options or default is not inspect.Parameter.empty:
            found[name] = method.options.get(name, default)
    return found


def _read(method: Method, name: str, text: str) -> Any:
    kind = str(inspect.signature(method.function, eval_str=False).parameters[name].annotation)
    if "bool" in kind:
        if text.lower() not in ("true", "false"):
            raise ValueError(f"{name} is true or false; got {text!r}")
        return text.lower() == "true"
    whole = "float" not in kind
    try:
        return int(text) if whole else float(text)
    except ValueError:
        raise ValueError(f"{name} is {'a whole number' if whole else 'a number'}; got {text!r}") from None


def parsed_options(method: Method, texts: Sequence[str]) -> dict[str, Any]:
    """Options as people type them.

    Args:
      method: the card.
      texts: "NAME=VALUE".

    Returns:
      Name -> value, of the type of the option.

    Raises:
      ValueError: an unknown option or a value of another type; the message lists the method's options.
    """
    known = options_of(method)
    listed = ", ".join(f"{name}={value}" for name, value in known.items()) or "none"
    chosen: dict[str, Any] = {}
    for text in texts:
        name, sign, value = text.partition("=")
        if not sign or name not in known or name in chosen:
            wrong = "is given twice" if name in chosen else "is no option" if sign else "is not NAME=VALUE"
            raise ValueError(f"{text!r} {wrong}; options of {method.name}: {listed}")
        try:
            chosen[name] = _read(method, name, value)
        except ValueError as error:
            raise ValueError(f"{error}; options of {method.name}: {listed}") from None
    return chosen


def bibtex(method: Method) -> str:
    """The paper of a card as a BibTeX entry; empty if it has none."""
    paper = method.paper
    if paper is None:
        return ""
    first = paper.authors.split()[0].strip(",").lower()
    fields = {"author": paper.authors, "title": "{" + paper.title + "}", "year": str(paper.year)}
    if paper.arxiv:
        fields |= {"eprint": paper.arxiv, "archivePrefix": "arXiv"}
    if paper.venue:
        fields["note"] = paper.venue
    body = ",\n".join(f"  {name} = {{{value}}}" for name, value in fields.items())
    return f"@misc{{{first}{paper.year}{method.name.replace('-', '')},\n{body}\n}}"
