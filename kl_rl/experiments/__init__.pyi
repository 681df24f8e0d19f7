from . import compare as compare
from .parallel import Board as Board
from .parallel import Cancelled as Cancelled
from .parallel import in_parallel as in_parallel
