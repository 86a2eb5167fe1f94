"""Models: what a base is, which parameters it has and where on disk they lie. No weights are read."""
