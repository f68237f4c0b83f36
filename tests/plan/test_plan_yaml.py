"""Plans as people have them: anchors, several documents, pasted from a page, other tools' keys."""

import json
import random
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from conftest import slow

from mlx_cerebrum.errors import PlanError
from mlx_cerebrum.plan.layer_plan import LayerPlan, resolve

HEAD = "merge_method: passthrough\n"


def refusal(text: str) -> str:
    with pytest.raises(PlanError) as caught:
        LayerPlan.from_text(text, "p.yml").layer_map(32)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    return message


# Anchors and merge keys.

ANCHORED = {
    "a source merged into others": """\
slices:
- sources:
  - &source {model: m, layer_range: [0, 4]}
- sources:
  - <<: *source
    layer_range: [2, 6]
""",
    "kept under a key of its own": """\
defaults: &defaults
  model: m
  parameters: {scale: {filter: o_proj, value: 0.5}}
slices:
- sources:
  - <<: *defaults
    layer_range: [0, 2]
- sources:
  - {<<: *defaults, layer_range: [1, 3], parameters: ~}
""",
    "two levels, and a list of them": """\
x-parts:
- &name {model: m}
- &range {layer_range: [4, 6]}
- &both {<<: [*name, *range]}
slices:
- sources: [*both]
- sources: [{<<: [*range, *name], layer_range: [1, 2]}]
- sources: [{<<: *range, <<: *name}]
""",
    "whole values": """\
base_model: &m m
slices:
- sources: [{model: *m, layer_range: &r [3, 5]}]
- sources: [{model: *m, layer_range: *r}]
""",
    "merged at the top": """\
common: &common {dtype: float16, models: [{model: m}]}
<<: *common
""",
}


@pytest.mark.parametrize("body", ANCHORED.values(), ids=ANCHORED)
def test_anchors_mean_what_pyyaml_makes_of_them(body: str) -> None:
    raw = yaml.safe_load(HEAD + body)
    known = ("merge_method", "slices", "models", "dtype", "base_model")
    written_out = json.dumps({key: value for key, value in raw.items() if key in known})
    plain, read = LayerPlan.from_text(written_out), LayerPlan.from_text(HEAD + body)
    assert read.layer_map(12) == plain.layer_map(12)
    assert read.residual_scales(12) == plain.residual_scales(12)
    assert (read.source, read.dtype) == (plain.source, plain.dtype) == ("m", raw.get("dtype"))


@slow
def test_any_merge_keys_mean_what_pyyaml_makes_of_them() -> None:
    draw = random.Random(5)
    seen = set()
    for _ in range(100):
        lines = []
        for number in range(5):
            own = ["model: m", f"layer_range: [{number}, {number + 1}]"]
            own += [
                f"parameters: {{scale: {{filter: o_proj, value: {draw.choice([2, 3])}}}}}",
                "parameters: ~",
            ]
            own = draw.sample(
                own[:3] if draw.random() < 0.5 else own[:2] + own[3:], draw.randint(0, 3)
            )
            merged = ", ".join(
                f"*a{draw.randrange(number)}" for _ in range(draw.randint(0, 3)) if number
            )
            if merged:
                own.insert(draw.randint(0, len(own)), f"<<: [{merged}]")
            lines.append(f"- &a{number} {{{', '.join(own)}}}")
        whole = "&z {model: m, layer_range: [7, 8]}"
        slices = ", ".join(f"{{sources: [{{<<: [*a{i}, *z]}}]}}" for i in range(5))
        body = "\n".join([f"anchors: [{whole}, *z]", "more:", *lines, f"slices: [{slices}]"]) + "\n"
        raw = yaml.safe_load(HEAD + body)
        plain = LayerPlan.from_text(json.dumps({k: raw[k] for k in ("merge_method", "slices")}))
        read = LayerPlan.from_text(HEAD + body)
        assert read.layer_map(8) == plain.layer_map(8)
        assert read.residual_scales(8) == plain.residual_scales(8)
        seen.add((read.layer_map(8), read.residual_scales(8)))
    assert len(seen) > 30


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("a: &a {model: m, layer_range: [4, 2]}\nslices: [{sources: [{<<: *a}]}]\n",
         "2: slices[0].sources[0].layer_range: [4, 2] runs backwards"),
        ("a: &a {model: m, layers: 3}\nslices:\n- sources:\n  - <<: *a\n",
         "2: slices[0].sources[0]: unknown key 'layers'"),
        ("a: &a 7\nslices:\n- sources:\n  - <<: *a\n",
         "2: not valid YAML: expected a mapping or list of mappings for merging, but found scalar"),
        ("a: &a\n- 7\nslices:\n- sources:\n  - <<: *a\n",
         "3: not valid YAML: expected a mapping for merging, but found scalar"),
        ("a: &a {x: 1}\nb: {<<: *a, x: 2, x: 3}\n", "3: b.x: given twice, first on line 3"),
        ("unused: &a [7]\nmodels: [{model: m}]\n", "2: unknown key 'unused'"),
        ("parameter: {scale: [&a 0.5, *a]}\nmodels: [{model: m}]\n", "2: unknown key 'parameter'"),
        ("models: [{model: m, x: &a 1}]\ny: *a\n", "2: models[0]: unknown key 'x'"),
        ('models: [{model: m}]\n"<<": {dtype: float16}\n', "3: unknown key '<<'"),
        ("a: &a {<<: *a}\n<<: *a\n", "1: YAML aliases expand without bound"),
    ],
)  # fmt: skip
def test_what_anchors_do_not_make_right(body: str, message: str) -> None:
    assert refusal(HEAD + body).startswith("p.yml:" + message)


@pytest.mark.parametrize("merge", ["<<: [{}]", "k: [{}]"], ids=["merged", "plain"])
def test_aliases_that_multiply_end_at_once(merge: str) -> None:
    rows = ["x: [&a0 {k: 1}]"]
    for depth in range(1, 30):
        body = merge.format(", ".join([f"*a{depth - 1}"] * 10))
        rows.append(f"x{depth}: &a{depth} {{{body}}}")
    started = time.perf_counter()
    assert "aliases expand" in refusal(HEAD + "\n".join(rows) + "\nmodels: [*a29]\n")
    assert time.perf_counter() - started < 5


@slow
def test_many_keys_that_hold_anchors_take_no_square() -> None:
    shared = "models: &s\n- &m {model: m}\n" + "- *m\n" * 5_000
    rows = "".join(f"k{i}: *s\n" for i in range(9))
    chained = "".join(f"c{i}: [*m, {i}]\n" for i in range(5_000))
    started = time.perf_counter()
    assert "a second model" in refusal(HEAD + shared + chained)
    assert "aliases expand" in refusal(HEAD + shared + rows)
    assert time.perf_counter() - started < 20


# Several documents.


def test_several_documents_are_listed_and_one_can_be_named(tmp_path: Path) -> None:
    one = "# mine\n" + HEAD + "models: [{model: a}]\n"
    two = "name: second\n" + HEAD + "slices: [{sources: [{model: b, layer_range: [1, 3]}]}]\n"
    file = tmp_path / "plans.yml"
    file.write_text(
        one + "---\n" + two + "---\n# nothing\n---\n" + HEAD + "models: [{model: c, x: 1}]\n"
    )
    with pytest.raises(
        PlanError, match=r"plans\.yml: holds 3 documents \(.* lines 2, 5, 11\).*#1 to"
    ):
        resolve(str(file))
    assert resolve(f"{file}#1").source == "a"
    read = resolve(f"{file}#2")
    assert (read.source, read.layer_map(4)) == ("b", (1, 2))
    assert read.name == "plans"
    assert LayerPlan.from_text(read.text) == LayerPlan.from_text("---\n" + two, "plan")
    for number, says in (
        (3, r"plans\.yml:12: models\[0\]: unknown key 'x'"),
        (4, "no document 4"),
        (0, "no doc"),
    ):
        with pytest.raises(PlanError, match=says):
            resolve(f"{file}#{number}")
    named = tmp_path / "odd#2"
    named.write_text(one)
    assert resolve(str(named)).source == "a"


@pytest.mark.parametrize(
    "text", ["---\n{}", "{}...\n", "---\n# c\n---\n{}---\n", "%YAML 1.1\n---\n{}"]
)
def test_one_document_among_empty_ones_is_the_plan(text: str) -> None:
    read = LayerPlan.from_text(text.format(HEAD + "models: [{model: m}]\n").replace("{}", ""))
    assert read.layer_map(2) == (0, 1)
    assert LayerPlan.from_text(read.text) == read


# Text that lost its indentation.

INDENTED = {
    "card": """\
slices:
- sources:
  - layer_range: [0, 8]
    model: /opt/Cerebrum-1.0-7b

# Interleaved Layer
- sources:
  - layer_range: [4, 12]
    model: /opt/Cerebrum-1.0-7b
""",
    "one slice": """\
slices:
  - sources:
      - model: m
        layer_range: [0, 8]
""",
    "the range first": """\
slices:
  - sources:
    - layer_range:
      - 0
      - 8
      model: m
""",
    "models": """\
models:
  - model: m
    parameters:
      scale:
        - filter: o_proj
          value: 2
""",
    "modules": """\
modules:
  default:
    slices:
      - sources:
          - model: m
            layer_range: [0, 8]
""",
    "tokenizer": """\
models:
  - model: m
tokenizer:
    source: union
""",
    "scale": """\
models:
  - model: m
parameters:
    scale: 1.0
""",
    "a deep name": """\
slices:
  - sources:
      - model:
          model:
            path: m
        layer_range: [0, 8]
""",
}
LOSSES = {
    "all of it": lambda spaces: "",
    "half": lambda spaces: " " * (len(spaces) // 2),
    "all but two": lambda spaces: "  ",
    "two": lambda spaces: spaces[2:],
    "tabs": lambda spaces: "\t" * (len(spaces) // 2),
    "no-break spaces": lambda spaces: "\xa0" * len(spaces),
    "ideographic spaces": lambda spaces: "\u3000" * len(spaces),
}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("body", INDENTED.values(), ids=INDENTED)
def test_lost_indentation_is_said(body: str, loss: Callable[[str], str]) -> None:
    damaged = HEAD + re.sub("(?m)^ +", lambda spaces: loss(spaces[0]), body)
    said, read = "", None
    try:
        read = LayerPlan.from_text(damaged)
    except PlanError as error:
        said = str(error)
    if read is None:
        assert "indent" in said
    else:  # enough of it was left
        assert loss("    ").strip(" ") == ""
        assert read.layer_map(32) == LayerPlan.from_text(HEAD + body).layer_map(32)


@pytest.mark.parametrize("body", INDENTED.values(), ids=INDENTED)
def test_lost_line_breaks_are_said(body: str) -> None:
    joined = " ".join((HEAD + body).split())
    for text in (joined, "# " + joined):
        assert "check the indentation and line breaks" in refusal(text)


def test_what_copying_brings_along_is_named() -> None:
    body = HEAD + "models:\n- model: m\n  parameters: {scale: 1}\n"
    assert "U+00A0 on line 3 is no space" in refusal(body.replace("model: ", "model:\u00a0"))
    assert "U+200B on line 3 is no space" in refusal(body.replace("- m", "\u200b- m"))
    assert "between the lines '```yaml' and '```'" in refusal(f"```yaml\n{body}```\n")
    assert "no space" not in refusal(f"# a\u00a0b\n{HEAD}models: []\n")  # which it is right in


def test_a_fault_that_has_nothing_to_do_with_indentation_has_no_hint() -> None:
    for body in (
        "slices: [{sources: [{model: m, layer_range: [4, 2]}]}]\n",
        "slices:\n- sources:\n  - model: m\n    layers: [4, 2]\n",
        "models: [{model: m}\n",
        "models: []\n",
        "dtype: int4\nmodels: [{model: m}]\n",
    ):
        assert "indent" not in refusal(HEAD + body), body


# mergekit's other keys.


@pytest.mark.parametrize(
    "body",
    [
        "tokenizer: {source: union}\n",
        "tokenizer: {source: base, tokens: {}, pad_to_multiple_of: ~}\n",
        "tokenizer: {source: m}\nbase_model: m\n",
        "tokenizer:\n  source: {model: {path: m}}\n  pad_to_multiple_of: 1\n",
        "tokenizer: {}\n",
        "tokenizer: {tokens: ~}\nname: mine\n",
    ],
)
def test_a_tokenizer_over_one_model_is_its_own(body: str) -> None:
    read = LayerPlan.from_text(HEAD + "models: [{model: m}]\n" + body)
    assert read.layer_map(3) == (0, 1, 2)
    assert read.tokenizer_source  # as mergekit: rows that no token has are cut


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("tokenizer: {source: other}\n", "3: tokenizer.source: 'other' is a second model"),
        ("tokenizer: union\n", "3: tokenizer: must be a mapping, not 'union'"),
        ("tokenizer: {source: 3}\n", "3: tokenizer.source: must be text"),
        ("tokenizer: {kind: union}\n", "3: tokenizer: unknown key 'kind'"),
        ("tokenizer: {tokens: {<x>: {source: m}}}\n", "3: tokenizer.tokens: adds or replaces"),
        ("tokenizer: {pad_to_multiple_of: 64}\n", "3: tokenizer.pad_to_multiple_of: adds rows"),
        ("tokenizer: {}\ntokenizer_source: base\n", "3: tokenizer: stands beside tokenizer_source"),
        ("base_model: {model: m, lora: x}\n", "3: base_model.lora: names an adapter"),
        ("base_model: {model: m, override_architecture: X}\n", "3: base_model.override"),
    ],
)  # fmt: skip
def test_what_a_plan_can_not_do_to_a_tokenizer(body: str, message: str) -> None:
    assert refusal(HEAD + "models: [{model: m}]\n" + body).startswith("p.yml:" + message)
