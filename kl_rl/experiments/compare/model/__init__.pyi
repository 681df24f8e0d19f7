from .compared import Comparison as Comparison
from .compared import compare_on_model as compare_on_model
from .ground import ModelGround as ModelGround
from .ground import open_ground as open_ground
from .text import TEXT_SIZES as TEXT_SIZES
from .text import text_base as text_base
from .told import collect_model as collect_model
