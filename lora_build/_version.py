"""The version, which the package's metadata takes from here and a recipe's `requires` is held to."""

VERSION = "0.3.0"
