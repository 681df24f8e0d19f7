"""A plan as JSON and as text."""

from __future__ import annotations

from typing import Any

from kl_rl.runs.plan.compiled import Compiled
from kl_rl.runs.plan.plan import Plan

__all__ = ["as_json", "as_text"]


def _program(compiled: Compiled) -> dict[str, Any]:
    return {
        "arguments_bytes": compiled.arguments,
        "temporary_bytes": compiled.temporaries,
        "output_bytes": compiled.outputs,
        "whole_bytes": compiled.whole,
        "collectives": dict(compiled.collectives),
        "compile_seconds": round(compiled.seconds, 2),
        "refusal": compiled.refusal,
    }


def as_json(plan: Plan) -> dict[str, Any]:
    """The plan as plain numbers; bytes are per device, operations of one step on all devices.

    Args:
      plan: from ``make_plan``.

    Returns:
      A JSON object.
    """
    flops = plan.flops._asdict() | {"update": plan.flops.update}
    return {
        "parameters": plan.parameters,
        "mesh": plan.mesh,
        "resident_bytes": plan.resident,
        "cache_bytes": plan.cache,
        "sampling": _program(plan.sampling),
        "update": _program(plan.update),
        "peak_bytes": plan.peak,
        "memory_bytes": plan.memory,
        "fits": plan.fits,
        "model_flops": flops,
    }


def _size(count: int) -> str:
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= factor:
            return f"{count / factor:.2f} {unit}"
    return f"{count} B"


def _row(name: str, value: str) -> str:
    return f"  {name:<34}{value:>12}"


def _moved(name: str, compiled: Compiled) -> list[str]:
    if compiled.refusal:
        return [f"  {name}: the compiler refuses it: {compiled.refusal}"]
    counts = ", ".join(f"{number} {kind}" for kind, number in compiled.collectives.items() if number)
    return [f"  {name}: {counts or 'none'} (compiled in {compiled.seconds:.0f} s)"]


def as_text(plan: Plan) -> str:
    """The plan as a table.

    Args:
      plan: from ``make_plan``.

    Returns:
      Lines of plain text.
    """
    shape = ", ".join(f"{name}={size}" for name, size in plan.mesh.items())
    lines = [f"{plan.parameters / 1e9:.3g} billion parameters on a mesh {shape}", "", "memory per device"]
    lines += [_row(name, _size(count)) for name, count in plan.resident.items()]
    for name, compiled in (("sampling", plan.sampling), ("update", plan.update)):
        if not compiled.refusal:
            lines.append(_row(f"temporaries of {name}", _size(compiled.temporaries)))
    lines.append(_row("  of it keys and values (sampling)", _size(plan.cache)))
    verdict = {True: "fits", False: "DOES NOT FIT", None: "no limit is known"}[plan.fits]
    of = "" if plan.memory is None else f" of {_size(plan.memory)}"
    lines += [_row("needed at once", _size(plan.peak)) + f"{of}: {verdict}", ""]
    lines += ["communication in the program (inside a loop counted once)"]
    lines += _moved("sampling", plan.sampling) + _moved("update", plan.update)
    lines += ["", "model operations of one step, all devices (recomputation not counted)"]
    flops = plan.flops
    parts = {"sampling": flops.sampling, "policy, forward and backward": flops.policy, "base": flops.base}
    parts |= {"twist": flops.twist} if flops.twist else {}
    lines += [_row(name, f"{count:.3g}") for name, count in parts.items()]
    return "\n".join(lines)
