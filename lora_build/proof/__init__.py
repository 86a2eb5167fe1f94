"""Proof: the manifest beside a build, and what holds the build to it."""
