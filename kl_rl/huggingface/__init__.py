"""Hugging Face folders: GPT-2, Llama, Qwen2, Qwen3, Gemma 2 and Gemma 3 checkpoints, in and out."""

from kl_rl.huggingface.errors import CheckpointError
from kl_rl.huggingface.hub import resolve
from kl_rl.huggingface.load import Checkpoint, load_checkpoint, read_config
from kl_rl.huggingface.read_config import ARCHITECTURES, config_from_dict
from kl_rl.huggingface.reward_model import RewardModel, is_reward_model, load_reward_model
from kl_rl.huggingface.save import save_checkpoint
from kl_rl.huggingface.write_config import config_to_dict

__all__ = [
    "ARCHITECTURES",
    "Checkpoint",
    "CheckpointError",
    "RewardModel",
    "config_from_dict",
    "config_to_dict",
    "is_reward_model",
    "load_checkpoint",
    "load_reward_model",
    "read_config",
    "resolve",
    "save_checkpoint",
]
