from .byte import ByteTokenizer as ByteTokenizer
from .file import FileTokenizer as FileTokenizer
from .load import check_vocabulary as check_vocabulary
from .load import load_tokenizer as load_tokenizer
from .protocol import Tokenizer as Tokenizer
