"""A conversation at the terminal.

`__main__` has the flags and the way in, `chat` the loop and its /commands, `session` the
conversation with its models and caches. `prompt` reads lines, `screen` shows answers as they come,
`render` is their Markdown and mathematics, `signals` what Ctrl-C, Ctrl-Z and a hang-up do.
"""
