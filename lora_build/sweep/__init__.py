"""Sweeps: one recipe or several, built at many points.

`points` runs one point, wherever Hydra's launcher put it, and gathers what came of all.
"""
