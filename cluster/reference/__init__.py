"""The pages of docs/reference, made by `python -m cluster.reference` from the code.

`configuration` reads the settings' dataclasses, `commands` the parsers of the command line, `api`
the sources of the public modules. A test compares what is committed with what they make.
"""
