"""The way in: a recipe made of adapters or of another tool's file, and a merge without one.

`init` writes a recipe, `merge` builds one that no file holds; `tools/` reads the files of mergekit, LLaMA-Factory and
axolotl.
"""
