"""Plans: the programs of a fine-tune compiled ahead of time for devices that are not there, and what they need."""

from kl_rl.plan.flops import Flops, step_flops
from kl_rl.plan.methods import METHODS
from kl_rl.plan.model import PRESETS, read_model
from kl_rl.plan.plan import Plan, make_plan
from kl_rl.plan.report import as_json, as_text
from kl_rl.plan.setting import Setting
from kl_rl.plan.topology import CHIPS, Topology, find_topology, parse_mesh

__all__ = [
    "CHIPS",
    "METHODS",
    "PRESETS",
    "Flops",
    "Plan",
    "Setting",
    "Topology",
    "as_json",
    "as_text",
    "find_topology",
    "make_plan",
    "parse_mesh",
    "read_model",
    "step_flops",
]
