from .sampled import sampled_budget as sampled_budget
from .types import Bounded as Bounded
from .types import SampledBudget as SampledBudget
