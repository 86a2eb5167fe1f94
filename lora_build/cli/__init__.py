"""The command line: `main` is the way in and out, each verb is a module.

`text` and `inspection_text` are what people see, `json` what machines get, `progress` the bar, `output` the way to
stdout, `words` the reading of a command line.
"""
