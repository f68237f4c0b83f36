"""Formulas and code as answers have them, for the terminal and the page by the same rules.

`tex`: what is a formula, as a tree of MathML; `plain`: that tree as a line of text; `code`: which
part of a program is what; `worker`: the process in which hostile ones end, not here.
"""
