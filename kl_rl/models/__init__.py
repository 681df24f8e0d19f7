"""Small networks, leaves of the library: anything with ``apply(params, prompt, tokens)`` may stand in their place."""

from kl_rl.models.tables import constant_twist, table_from_law, table_policy, table_twist
from kl_rl.models.transformer import Transformer, tie_extra_tokens, transformer_policy, transformer_twist

__all__ = [
    "Transformer",
    "constant_twist",
    "table_from_law",
    "table_policy",
    "table_twist",
    "tie_extra_tokens",
    "transformer_policy",
    "transformer_twist",
]
