"""Networks, leaves of the library: anything with ``apply(params, prompt, tokens)`` may stand in their place."""

from kl_rl.models.config import Attention, DecoderConfig, Execution, FeedForward, Norm, Rotary
from kl_rl.models.decoder import decoder_policy, forward, last_hidden, packed_log_probs
from kl_rl.models.lora import lora_policy, merge_lora
from kl_rl.models.small import small_config, small_policy, small_twist, tie_extra_rows
from kl_rl.models.tables import constant_twist, table_from_law, table_policy, table_twist
from kl_rl.models.transformer import Transformer, tie_extra_tokens, transformer_policy, transformer_twist
from kl_rl.models.twist import decoder_twist
from kl_rl.models.weights import Decoder, count_parameters, init_weights, weight_shapes

__all__ = [
    "Attention",
    "Decoder",
    "DecoderConfig",
    "Execution",
    "FeedForward",
    "Norm",
    "Rotary",
    "Transformer",
    "constant_twist",
    "count_parameters",
    "decoder_policy",
    "decoder_twist",
    "forward",
    "init_weights",
    "last_hidden",
    "lora_policy",
    "merge_lora",
    "packed_log_probs",
    "small_config",
    "small_policy",
    "small_twist",
    "table_from_law",
    "table_policy",
    "table_twist",
    "tie_extra_rows",
    "tie_extra_tokens",
    "transformer_policy",
    "transformer_twist",
    "weight_shapes",
]
