"""How good a build is: one file a scorer, the cache of what they said, gates and the objective.

`planning` looks at a recipe's scores before anything is built, `running` scores a build for the pipeline, `scoring` one
that is there already (`lora_build.score`). `interface` says what a scorer is; `data` reads their files, `tokens` and
`models` are the tokenizer and the model of a build.
"""
