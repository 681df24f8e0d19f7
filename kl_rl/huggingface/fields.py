"""Typed access to the fields of a config.json; every complaint names the file and the field."""

from __future__ import annotations

import dataclasses
from typing import Any

from kl_rl.huggingface.errors import CheckpointError

__all__ = ["Fields"]

ACTIVATIONS = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu": "gelu",
    "silu": "silu",
    "swish": "silu",
}


@dataclasses.dataclass(frozen=True)
class Fields:
    """A parsed JSON object and where it came from.

    Attributes:
      spec: the object.
      where: file name for messages.
    """

    spec: dict[str, Any]
    where: str

    def error(self, name: str, problem: str) -> CheckpointError:
        """An error that names the field."""
        return CheckpointError(f"{self.where}: {name}: {problem}")

    def unsupported(self, name: str, known: str) -> CheckpointError:
        """An error for a value that is well formed but that this library does not implement."""
        return self.error(name, f"{self.spec.get(name)!r} is not supported; {known}")

    def integer(self, name: str, default: int | None = None) -> int:
        """A whole number of at least 1; missing or null: the default, and an error if there is none."""
        value = self.spec.get(name)
        value = default if value is None else value
        if value is None:
            raise self.error(name, "missing; it must be a whole number")
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.error(name, f"must be a whole number of at least 1; got {value!r}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A finite positive number; missing or null: the default, and an error if there is none."""
        value = self.spec.get(name)
        value = default if value is None else value
        if value is None:
            raise self.error(name, "missing; it must be a positive number")
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            raise self.error(name, f"must be a positive number; got {value!r}")
        return float(value)

    def optional_number(self, name: str, default: float | None) -> float | None:
        """As ``number``, but null means none; missing: the default."""
        if name in self.spec and self.spec[name] is None:
            return None
        return None if name not in self.spec and default is None else self.number(name, default)

    def flag(self, name: str, default: bool) -> bool:
        """True or false; missing or null: the default."""
        value = self.spec.get(name)
        value = default if value is None else value
        if not isinstance(value, bool):
            raise self.error(name, f"must be true or false; got {value!r}")
        return value

    def table(self, name: str) -> dict[str, Any]:
        """A JSON object; missing or null: empty."""
        value = self.spec.get(name)
        if value is not None and not isinstance(value, dict):
            raise self.error(name, f"must be a JSON object; got {value!r}")
        return dict(value or {})

    def activation(self, name: str, default: str) -> str:
        """The library's name of an activation."""
        value = self.spec.get(name)
        value = default if value is None else value
        if value not in ACTIVATIONS:
            raise self.error(name, f"{value!r} is not supported; known: {', '.join(ACTIVATIONS)}")
        return ACTIVATIONS[value]
