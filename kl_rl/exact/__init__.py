"""Truth: by enumerating every string of a small world, and by dynamic programming for hidden Markov bases.

With a weighted automaton as reward, hidden state z (S) times automaton state q (Q) is all the past that matters; the
law given a reward level is the same computation on an automaton that also counts down the score still owed. With an
end token a string stops right after its first occurrence, which still earns its weight. In games of luck chance draws
the tokens of the environment, and conditioning is not control.

Everything is in nats and in log space; temperatures are traced, so a new beta never recompiles and vmap sweeps it.
References: Levine 2018 (arXiv 1805.00909) for the backward messages; Eisner 2016 (W16-5901) for marginals as gradients.
"""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach_stub(__name__, __file__)
