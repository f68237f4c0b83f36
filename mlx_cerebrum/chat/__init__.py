"""A conversation at the terminal.

`__main__` has the flags and the way in, `chat` the loop, `commands` what lines with a slash do
(`filing` those about files), `settings` what `/set` changes. `session` is the conversation with
its models and caches; `keeper` writes it to its file as it grows, `kept` knows what such a file
holds, `export` writes Markdown. `prompt` reads lines, with `quotes` around several. `screen` shows
answers as they come: `drawing` draws one over itself, `columns` two side by side, `render` is
their Markdown and mathematics, `palette` their colours, `wording` and `about` what is said beside
them. `signals` is what Ctrl-C, Ctrl-Z and a hang-up do.
"""
