"""`python -m bench.data.make_arithmetic` writes arithmetic.jsonl, the questions of bench/tasks.

Six levels, from sums that a very small model knows to products that a 7B model gets wrong
more often than not. The levels take turns, so that the first N questions hold about as many
of each as any other N. Every number has a fixed count of digits in its level: prompts of one
level are about equally long, and a batch can answer them together.
"""

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path

FILE = Path(__file__).with_name("arithmetic.jsonl")
SEED = 1
EACH = 10  # questions of a level
NAMES = ("Anna", "Tom", "Maria", "Peter")
THINGS = ("apples", "books", "cards", "coins")

Pick = Callable[[int, int], int]  # gives a number between two, both included
Question = tuple[str, str, int]  # the question, how its answer begins, the answer


def one_digit_sum(pick: Pick) -> Question:
    a, b = pick(2, 9), pick(2, 9)
    return f"What is {a} + {b}?", f"{a} + {b} =", a + b


def one_digit_product(pick: Pick) -> Question:
    a, b = pick(3, 9), pick(3, 9)
    return f"What is {a} * {b}?", f"{a} * {b} =", a * b


def two_digit_sum(pick: Pick) -> Question:
    a, b = pick(11, 49), pick(11, 49)
    return f"What is {a} + {b}?", f"{a} + {b} =", a + b


def one_step(pick: Pick) -> Question:
    name, thing, a, b = NAMES[pick(0, 3)], THINGS[pick(0, 3)], pick(3, 9), pick(3, 9)
    text = f"{name} has {a} {thing} and buys {b} more. How many {thing} does {name} have now?"
    return text, f"{name} now has", a + b


def two_steps(pick: Pick) -> Question:
    name, thing = NAMES[pick(0, 3)], THINGS[pick(0, 3)]
    boxes, each, given = pick(4, 9), pick(5, 9), pick(2, 9)
    text = (
        f"{name} has {boxes} boxes with {each} {thing} in each and gives away {given} {thing}. "
        f"How many {thing} are left?"
    )
    return text, "There are", boxes * each - given


def two_digit_product(pick: Pick) -> Question:
    a, b = pick(13, 49), pick(13, 49)
    return f"What is {a} * {b}?", f"{a} * {b} =", a * b


LEVELS = (
    one_digit_sum,
    one_digit_product,
    two_digit_sum,
    one_step,
    two_steps,
    two_digit_product,
)


def questions() -> Iterator[dict[str, object]]:
    """One after the other, none twice."""
    generator = random.Random(SEED)

    # Only random() is promised to stay the same in every version of Python.
    def pick(low: int, high: int) -> int:
        return low + int(generator.random() * (high - low + 1))

    seen = set()
    for number in range(EACH * len(LEVELS)):
        level = number % len(LEVELS)
        while (asked := LEVELS[level](pick))[0] in seen:
            pass
        text, start, answer = asked
        seen.add(text)
        # Near misses of as many digits: a shorter number would be likelier for that alone.
        near = [answer + slip for slip in (1, -1, 10, -10, 2, -2, 3, -3)]
        near = [n for n in near if n > 0 and len(str(n)) == len(str(answer))]
        wrong = [near.pop(pick(0, len(near) - 1)) for _ in range(3)]
        label = pick(0, 3)
        choices = [*wrong[:label], answer, *wrong[label:]]
        yield {
            "level": level + 1,
            "question": text,
            "start": start,
            "answer": str(answer),
            "choices": [str(choice) for choice in choices],
            "label": label,
        }


def text() -> str:
    """The file: a JSON object a line."""
    return "".join(json.dumps(question) + "\n" for question in questions())


if __name__ == "__main__":
    FILE.write_text(text(), encoding="utf-8")
