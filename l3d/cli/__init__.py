"""Run the package from the command line `l3d`.

In come a command's options and its configuration file; out come run folders, printed figures and an exit status. Read
`main.py` first, then `parser.py` for what is accepted and `commands.py` for what is done.
"""
