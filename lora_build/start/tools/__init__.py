"""What other tools' files merge, as a recipe says it. What no recipe can say is refused or named.

`reading.py` finds the tool, whose module has `is_of(data)`, which knows its files by their keys, and
`read(data, paths)`, which takes what it can (`taken.py`).
"""
