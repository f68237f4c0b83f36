"""Ten questions for benches of decoding: five whose answers quote what is asked, five open ones."""

_CODE = """def total(prices, tax):
    result = 0
    for price in prices:
        result = result + price
    result = result + result * tax
    return result
"""
_NOTES = """Meeting of 3 May. Present: Anna, Bert, Carla. Anna reports that the new bridge will be \
opened in June. Bert asks for two more engineers, and Carla agrees. The budget of the bridge is \
four million euros, of which three million have been spent. The next meeting is on 17 May."""
_LIST = "apples, pears, plums, cherries, oranges, lemons, grapes, peaches, apricots, figs"
_VERSE = """Shall I compare thee to a summer's day? Thou art more lovely and more temperate. Rough \
winds do shake the darling buds of May, and summer's lease hath all too short a date."""

GROUNDED = {
    "repeat": f"Repeat the following text word for word.\n\n{_VERSE}",
    "edit": f"Here is a function. Write it again with `result` renamed to `amount`.\n\n{_CODE}",
    "summarise": f"Summarise these notes in three sentences.\n\n{_NOTES}",
    "quote": f"Quote the sentences of these notes that speak of money or people.\n\n{_NOTES}",
    "list": f"Write each of these fruits on a line of its own, numbered: {_LIST}.",
}
OPEN = {
    "sky": "Explain in simple words why the sky is blue.",
    "story": "Write a short story about a cat who learns to swim.",
    "uses": "List five unusual uses of a paperclip.",
    "virus": "What is the difference between a virus and a bacterium?",
    "trip": "Plan a day in Rome for a family with two children.",
}
