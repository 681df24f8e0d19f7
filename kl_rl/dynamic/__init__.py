"""Truth by dynamic programming: exact twists, log Z, reward laws and samplers for hidden Markov bases.

The reward is a weighted automaton, so hidden state z (S) times automaton state q (Q) is all the past that
matters. The law given a reward level is the same computation on an automaton that also counts down the score
still owed. With an end token a string stops right after its first occurrence, which still earns its weight.

Everything is in nats and in log space; temperatures are traced, so a new beta never recompiles and vmap
sweeps it.
Reference: Levine 2018 (arXiv 1805.00909) for the backward messages; Eisner 2016 (W16-5901) for marginals as
gradients.
"""

from kl_rl.dynamic.lattice import Lattice, NoLattice, score_lattice
from kl_rl.dynamic.laws import (
    Moments,
    is_unifilar,
    log_partition,
    log_twists,
    path_entropy,
    posterior_moments,
    reward_distribution,
    token_marginals,
    token_marginals_given_reward,
)
from kl_rl.dynamic.policies import TwistedProcess, posterior_policy, reward_conditioned_policy
from kl_rl.dynamic.sampling import sample_given_reward, sample_posterior, sampled_entropies

__all__ = [
    "Lattice",
    "Moments",
    "NoLattice",
    "TwistedProcess",
    "is_unifilar",
    "log_partition",
    "log_twists",
    "path_entropy",
    "posterior_moments",
    "posterior_policy",
    "reward_conditioned_policy",
    "reward_distribution",
    "sample_given_reward",
    "sample_posterior",
    "sampled_entropies",
    "score_lattice",
    "token_marginals",
    "token_marginals_given_reward",
]
