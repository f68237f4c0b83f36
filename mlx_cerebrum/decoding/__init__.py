"""From a prompt to the tokens and the text that follow."""
