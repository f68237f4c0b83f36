"""`python -m bench.data.make_arithmetic` writes arithmetic.jsonl, the questions of bench/tasks.

Six levels, from sums that a very small model knows to products that a 7B model gets wrong
more often than not. The levels take turns, so that the first N questions hold about as many
of each as any other N. Every number has a fixed count of digits in its level: prompts of one
level are about equally long.
"""

import json
import random
from collections.abc import Callable
from pathlib import Path

FILE = Path(__file__).with_name("arithmetic.jsonl")
SEED = 1
EACH = 10  # questions of a level
NAMES = ("Anna", "Tom", "Maria", "Peter")
THINGS = ("apples", "books", "cards", "coins")
SUM, PRODUCT = "What is {a} + {b}?", "What is {a} * {b}?"
BUYS = "{name} has {a} {thing} and buys {b} more. How many {thing} does {name} have now?"
BOXES = (
    "{name} has {a} boxes with {b} {thing} in each and gives away {c} {thing}. "
    "How many {thing} are left?"
)
# The question, how its answer begins, the least and most of each number, the answer.
LEVELS: tuple[tuple[str, str, tuple[tuple[int, int], ...], Callable[..., int]], ...] = (
    (SUM, "{a} + {b} =", ((2, 9), (2, 9)), lambda a, b: a + b),
    (PRODUCT, "{a} * {b} =", ((3, 9), (3, 9)), lambda a, b: a * b),
    (SUM, "{a} + {b} =", ((11, 49), (11, 49)), lambda a, b: a + b),
    (BUYS, "{name} now has", ((3, 9), (3, 9)), lambda a, b: a + b),
    (BOXES, "There are", ((4, 9), (5, 9), (2, 9)), lambda a, b, c: a * b - c),
    (PRODUCT, "{a} * {b} =", ((13, 49), (13, 49)), lambda a, b: a * b),
)


def text() -> str:
    """The file: a JSON object a line, no question twice."""
    generator = random.Random(SEED)

    def pick(low: int, high: int) -> int:
        """Between two, both included. Only random() is promised to stay the same."""
        return low + int(generator.random() * (high - low + 1))

    lines: dict[str, str] = {}  # by question
    while len(lines) < EACH * len(LEVELS):
        level = len(lines) % len(LEVELS)
        asked, start, ranges, result = LEVELS[level]
        words = {}
        if "{name}" in asked:
            words = {"name": NAMES[pick(0, 3)], "thing": THINGS[pick(0, 3)]}
        numbers = [pick(low, high) for low, high in ranges]
        blanks = words | dict(zip("abc", map(str, numbers), strict=False))
        question, answer = asked.format(**blanks), result(*numbers)
        if question in lines:
            continue
        # Near misses of as many digits: a shorter number would be likelier for that alone.
        near = [answer + slip for slip in (1, -1, 10, -10, 2, -2, 3, -3)]
        near = [n for n in near if n > 0 and len(str(n)) == len(str(answer))]
        wrong = [near.pop(pick(0, len(near) - 1)) for _ in range(3)]
        label = pick(0, 3)
        found = {
            "level": level + 1,
            "question": question,
            "start": start.format(**blanks),
            "answer": str(answer),
            "choices": [str(choice) for choice in (*wrong[:label], answer, *wrong[label:])],
            "label": label,
        }
        lines[question] = json.dumps(found) + "\n"
    return "".join(lines.values())


if __name__ == "__main__":
    FILE.write_text(text(), encoding="utf-8")
