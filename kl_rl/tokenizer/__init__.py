"""Text to ids and back: bytes, or the tokenizer.json of a checkpoint with its chat template."""

from kl_rl.tokenizer.byte import ByteTokenizer
from kl_rl.tokenizer.file import FileTokenizer
from kl_rl.tokenizer.load import check_vocabulary, load_tokenizer
from kl_rl.tokenizer.protocol import Tokenizer

__all__ = ["ByteTokenizer", "FileTokenizer", "Tokenizer", "check_vocabulary", "load_tokenizer"]
