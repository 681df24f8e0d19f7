from .importance import LogZ as LogZ
from .importance import log_normalizer as log_normalizer
from .importance import tilted_expectation as tilted_expectation
