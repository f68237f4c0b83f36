"""How the plan command writes tables, sizes and runs of numbers."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table


def table(*headings: str) -> "Table":
    """A table of right-aligned columns that are never wrapped."""
    from rich import box
    from rich.table import Table

    made = Table(box=box.SIMPLE)
    for heading in headings:
        made.add_column(heading, justify="right", no_wrap=True, overflow="crop")
    return made


def spans(numbers: Iterable[int]) -> str:
    """Sorted numbers as `0-3, 7, 28-31`."""
    found: list[tuple[int, int]] = []
    for number in numbers:
        if found and found[-1][1] == number - 1:
            found[-1] = (found[-1][0], number)
        else:
            found.append((number, number))
    return ", ".join(span(low, high) for low, high in found)


def span(low: int, high: int) -> str:
    return str(low) if low == high else f"{low}-{high}"


def gb(count: int | None) -> str:
    return "-" if count is None else f"{count / 1e9:.2f} GB"
