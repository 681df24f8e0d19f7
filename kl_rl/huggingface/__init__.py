"""Hugging Face folders: GPT-2, Llama, Qwen2, Qwen3, Gemma 2 and Gemma 3 checkpoints, in and out."""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach_stub(__name__, __file__)
