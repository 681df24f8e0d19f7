from .numpyro_bridge import as_numpyro as as_numpyro
