"""Chat templates: Jinja source that came with a checkpoint, rendered in a sandbox."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

__all__ = ["render_chat"]


class _Generation(Extension):
    """The tag ``{% generation %}`` marks what the assistant said; here it changes nothing."""

    tags = {"generation"}

    def parse(self, parser: Any) -> list[Any]:
        """The body of the tag."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Namespace(jinja2.utils.Namespace):
    """Jinja's namespace without names that begin with an underscore."""

    def __init__(*args: Any, **attrs: Any) -> None:
        given = dict(*args[1:], **attrs)
        for name in given:
            _refuse_hidden(name)
        jinja2.utils.Namespace.__init__(args[0], given)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_hidden(name)
        jinja2.utils.Namespace.__setitem__(self, name, value)


def _refuse_hidden(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a template may not set {name!r}")


def _raise(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)


def _tojson(
    x: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Without the escapes for HTML that Jinja's own filter makes."""
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@lru_cache(maxsize=8)
def _compile(template: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda layout: datetime.now().strftime(layout)
    environment.globals["namespace"] = _Namespace
    return environment.from_string(template)


def render_chat(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    where: str,
    add_generation_prompt: bool = True,
    **variables: Any,
) -> str:
    """A conversation as the text that a model was trained on.

    Args:
      template: Jinja source, as transformers understands it; run in a sandbox.
      messages: objects with ``role`` and ``content``; plain JSON.
      where: file name for messages.
      add_generation_prompt: end with the beginning of the assistant's turn.
      **variables: names of special tokens (``bos_token``, ...) and whatever else the template reads.

    Returns:
      The text, special tokens included.

    Raises:
      ValueError: messages that are not plain JSON objects with a role, or that the template refuses.
    """
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ValueError(f"message {i}: must be an object with a role and a content; got {message!r}")
    try:
        plain = json.loads(json.dumps([dict(message) for message in messages]))
    except TypeError as error:
        raise ValueError(f"messages must be plain JSON: {error}") from error
    given = {"tools": None, "documents": None, "add_generation_prompt": add_generation_prompt, **variables}
    try:
        return _compile(template).render(messages=plain, **given)
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(
            f"{where}: line {error.lineno}: the chat template is no valid Jinja: {error}"
        ) from error
    except jinja2.TemplateError as error:
        raise ValueError(f"{where}: the chat template refuses these messages: {error}") from error
    except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError) as error:
        raise ValueError(f"{where}: the chat template failed: {type(error).__name__}: {error}") from error
