"""What a compiled program says of itself: memory and communication."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax

__all__ = ["KINDS", "Compiled", "compile_program", "count_collectives"]

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_CALL = re.compile(r" (" + "|".join(KINDS) + r")(?:-start)?\(")
_FUSED = re.compile(
    r"^%?all-reduce-scatter[\w.-]* \(", re.MULTILINE
)  # how a TPU program writes reduce-scatter


class Compiled(NamedTuple):
    """One program on one device.

    Attributes:
      arguments: bytes.
      temporaries: bytes that exist at once besides arguments and outputs.
      outputs: bytes that are not written over donated arguments.
      whole: bytes that must be there for the program to run: all of these and its code.
      collectives: how often each kind of communication stands in the program (in a loop: once).
      seconds: of compilation.
      refusal: the compiler's words if the program does not fit into the device, else None.
    """

    arguments: int = 0
    temporaries: int = 0
    outputs: int = 0
    whole: int = 0
    collectives: Mapping[str, int] = MappingProxyType({})
    seconds: float = 0.0
    refusal: str | None = None


def count_collectives(text: str) -> dict[str, int]:
    """Communication in a compiled program's text, by kind.

    Args:
      text: from ``compiled.as_text()``.

    Returns:
      Kind -> number of places.
    """
    counts = Counter({kind: 0 for kind in KINDS})
    counts.update(_CALL.findall(text))
    fused = len(_FUSED.findall(text))
    counts["reduce-scatter"] += fused
    counts["all-reduce"] -= min(fused, counts["all-reduce"])
    return dict(counts)


def compile_program(lowered: Any) -> Compiled:
    """Compile and read off memory and communication.

    Args:
      lowered: from ``jit(...).lower(...)``.

    Returns:
      The figures; with ``refusal`` if the compiler finds that the program does not fit.
    """
    started = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return Compiled(seconds=time.perf_counter() - started, refusal=_reason(str(error)))
    seconds = time.perf_counter() - started
    stats = compiled.memory_analysis()
    outputs = stats.output_size_in_bytes - stats.alias_size_in_bytes
    whole = (
        stats.argument_size_in_bytes + outputs + stats.temp_size_in_bytes + stats.generated_code_size_in_bytes
    )
    return Compiled(
        stats.argument_size_in_bytes,
        stats.temp_size_in_bytes,
        outputs,
        whole,
        count_collectives(compiled.as_text()),
        seconds,
    )


def _reason(message: str) -> str:
    """The sentence with the numbers, out of a long message."""
    found = re.search(r"Used [^.]*\.[^.]*\.[^.]*\.[^.]*", message)
    return " ".join((found.group() if found else message.splitlines()[0]).split())
