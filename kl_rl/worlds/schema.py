"""The file format of a world as a JSON schema (draft 2020-12); the parser takes its keys from here."""

from __future__ import annotations

import copy
from typing import Any

__all__ = ["BASE_KINDS", "MAX_HORIZON", "REWARD_KINDS", "kinds", "schema"]

MAX_HORIZON = 10**6  # V**T is written out as an integer, and a step of the recursions is kept for every token

_PROBABILITIES = {"type": "array", "minItems": 1, "items": {"type": "number", "minimum": 0}}
_MATRIX = {"type": "array", "minItems": 1, "items": _PROBABILITIES}
_TOKENS = {"type": "array", "items": {"type": "integer", "minimum": 0}}
_MOTIF = {**_TOKENS, "minItems": 1}


def _kind(
    name: str, description: str, properties: dict[str, Any], optional: tuple[str, ...] = ()
) -> dict[str, Any]:
    """One object of the format: all keys are required except `optional`."""
    required = ["kind", *(key for key in properties if key not in optional)]
    return {
        "description": description,
        "type": "object",
        "properties": {"kind": {"const": name}, **properties},
        "required": [key for key in required if key not in optional],
        "additionalProperties": False,
    }


BASE_KINDS: dict[str, dict[str, Any]] = {
    "markov": _kind(
        "markov",
        "Markov chain over tokens: y_1 ~ initial, y_{t+1} ~ transition[y_t]. Every row sums to one.",
        {
            "initial": {**_PROBABILITIES, "description": "[V]"},
            "transition": {**_MATRIX, "description": "[V][V]"},
        },
    ),
    "hmm": _kind(
        "hmm",
        "Hidden Markov process: z_1 ~ initial, y_t ~ emission[z_t], z_{t+1} ~ transition[z_t].",
        {
            "initial": {**_PROBABILITIES, "description": "[S]"},
            "transition": {**_MATRIX, "description": "[S][S]"},
            "emission": {**_MATRIX, "description": "[S][V]"},
        },
    ),
    "ngram": _kind(
        "ngram",
        "Markov chain of order n - 1: tables[k][y_1]...[y_k] is the law of the token after y_1 ... y_k, used "
        "with k = 0 for the first token, k = 1 for the second, ..., and k = order - 1 ever after.",
        {
            "order": {"type": "integer", "minimum": 1, "description": "n; 2 is a Markov chain"},
            "tables": {
                "type": "array",
                "minItems": 1,
                "description": "n tables of shapes [V], [V][V], [V][V][V], ...",
            },
        },
    ),
}

REWARD_KINDS: dict[str, dict[str, Any]] = {
    "automaton": _kind(
        "automaton",
        "Deterministic automaton: reading token y in state q collects weight[q][y] and moves to next[q][y]. "
        "The prompt moves the state without collecting.",
        {
            "start": {"type": "integer", "minimum": 0, "description": "start state"},
            "next": {"type": "array", "minItems": 1, "items": _TOKENS, "description": "[Q][V] states"},
            "weight": {
                "type": "array",
                "minItems": 1,
                "items": {"type": "array", "items": {"type": "number"}},
                "description": "[Q][V] finite reward units",
            },
        },
        optional=("kind",),
    ),
    "motif_count": _kind(
        "motif_count",
        "`weight` for every occurrence of a motif, overlapping ones included.",
        {"motif": _MOTIF, "weight": {"type": "number", "default": 1.0}},
        optional=("weight",),
    ),
    "pair_match": _kind(
        "pair_match",
        "`weight` whenever a token equals the one `distance` places before it.",
        {"distance": {"type": "integer", "minimum": 1}, "weight": {"type": "number", "default": 1.0}},
        optional=("weight",),
    ),
    "sentiment": _kind(
        "sentiment",
        "+1 for every positive and -1 for every negative token; once the `wedding` motif has occurred, every "
        "further token earns `bonus` instead (the end token nothing).",
        {
            "positive": _TOKENS,
            "negative": _TOKENS,
            "wedding": _MOTIF,
            "bonus": {"type": "number", "default": 1.0},
        },
        optional=("wedding", "bonus"),
    ),
    "length": _kind("length", "1 for every token before the end token.", {}),
    "constant": _kind("constant", "0 for every string: the posterior is the base process.", {}),
    "sum": _kind(
        "sum",
        "The sum of several rewards.",
        {"terms": {"type": "array", "minItems": 1, "items": {"$ref": "#/$defs/reward"}}},
    ),
}

_DESCRIPTION = (
    "A base process, a reward, a horizon. Tokens are 0 ... V-1; V is read off the base process. Rewards are "
    "in reward units, the temperature beta in reward units per nat, every log-quantity in nats. A string has "
    "`horizon` tokens or stops right after its first `end` token, which still counts and earns its weight."
)

_WORLD: dict[str, Any] = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "title": "kl_rl world",
    "description": _DESCRIPTION,
    "type": "object",
    "properties": {
        "name": {"type": "string", "description": "label for reports; default: the file's name"},
        "base": {"$ref": "#/$defs/base"},
        "reward": {"$ref": "#/$defs/reward"},
        "horizon": {
            "type": "integer",
            "minimum": 1,
            "maximum": MAX_HORIZON,
            "description": "tokens T of a completion, at most",
        },
        "end": {"type": ["integer", "null"], "minimum": 0, "description": "end token; null or absent: none"},
        "prompts": {
            "type": "array",
            "minItems": 1,
            "items": _TOKENS,
            "description": "token lists before the completion, possibly empty; default: one empty prompt",
        },
    },
    "required": ["base", "reward", "horizon"],
    "additionalProperties": False,
    "$defs": {
        "base": {"oneOf": list(BASE_KINDS.values())},
        "reward": {"anyOf": list(REWARD_KINDS.values())},
    },
}


def schema() -> dict[str, Any]:
    """The JSON schema of a world file, as a fresh dict that may be changed or printed."""
    return copy.deepcopy(_WORLD)


def kinds(part: str) -> dict[str, dict[str, Any]]:
    """The schemas of one part of a world by kind: part is "base" or "reward"."""
    return {"base": BASE_KINDS, "reward": REWARD_KINDS}[part]
