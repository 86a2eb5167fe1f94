"""Recipes: what a user wrote, from files and command lines to one checked, frozen value.

`schema` states the keys; `keys` and `validate` check them, `renamed` and `requires` answer what other versions wrote.
`files` and `strict_yaml` read without Hydra; `compose` composes with it. `identity` tells two recipes apart.
"""
