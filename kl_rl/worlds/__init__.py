"""Worlds: base processes whose every conditional is known, rewards on their strings, and games of luck."""

from kl_rl.worlds.generate import default_world, full_world, generate_world
from kl_rl.worlds.schema import schema
from kl_rl.worlds.validation import BadWorld
from kl_rl.worlds.world import World, load_world, parse_world

__all__ = [
    "BadWorld",
    "World",
    "default_world",
    "full_world",
    "generate_world",
    "load_world",
    "parse_world",
    "schema",
]
