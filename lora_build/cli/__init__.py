"""The command line: `main` is the way in and out, each verb of `verbs` is a module.

`arguments` is the parser of each, `hints` what is said of words that are none; `composed`, `work` and `sweep` are what
`build` and `plan` share. `text` and `inspection_text` are what people see, `json` what machines get, `progress` the
bar, `output` the way to stdout.
"""
