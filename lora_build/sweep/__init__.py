"""Sweeps: one recipe or several, built at many points."""
