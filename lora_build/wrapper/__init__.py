"""The wrapper: adapters on a live model, applied unmerged, merged, and taken off again.

`model.LoraModel` is its face, with the names of `peft.PeftModel`. `adapters` are those that are loaded; `planning` says
what they do to the model, which `live_model` shows as the checkpoint that it would be saved as. `applying` finds out
how calls take them into account, in the modules that `hooks` are on; `merging` puts them into the weights, and takes
them out. `loading` makes a live model of a checkpoint's files.
"""
