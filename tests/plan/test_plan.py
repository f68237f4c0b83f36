"""Layer plans: what is read, what is refused, and what each plan means."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import slow
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mlx_cerebrum.errors import PlanError
from mlx_cerebrum.model.config import MAX_POSITIONS
from mlx_cerebrum.plan.layer_plan import LayerPlan, interleave, named_plans, resolve
from mlx_cerebrum.plan.yaml_places import MAX_CHARACTERS

CARD_MAP = tuple(block for start in range(0, 25, 4) for block in range(start, start + 8))

# The card's YAML as its author wrote it: comments, and a path on someone else's machine.
CARD = """\
dtype: bfloat16
merge_method: passthrough
# Layer-Interleaving of AetherResearch/Cerebrum-1.0-7b
slices:
""" + "\n# Interleaved Layer\n".join(
    f"""\
- sources:
  - layer_range: [{start}, {start + 8}]
    model: /Users/someone/opt/Workspace/AetherResearch/Cerebrum-1.0-7b
"""
    for start in range(0, 25, 4)
)


def plan(body: str) -> LayerPlan:
    return LayerPlan.from_text("merge_method: passthrough\n" + body, "p.yml")


def sliced(*ranges: str, model: str = "m") -> str:
    lines = [f"- sources: [{{model: {model}, layer_range: {r}}}]" for r in ranges]
    return "slices:\n" + "\n".join(lines) + "\n"


def refusal(text: str) -> str:
    with pytest.raises(PlanError) as caught:
        LayerPlan.from_text(text, "p.yml").residual_scales(8)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    return message


# What is read


def test_the_card_and_its_formula_give_the_same_56_positions() -> None:
    card = LayerPlan.from_text(CARD, "card.yml")
    assert card.layer_map(32) == CARD_MAP
    assert len(CARD_MAP) == 56
    assert (card.dtype, card.out_dtype, card.name) == ("bfloat16", None, "card")
    assert card.source == "/Users/someone/opt/Workspace/AetherResearch/Cerebrum-1.0-7b"
    assert card.text == CARD
    assert card.residual_scales(32) is None
    assert [part.layer_range for part in card.slices][:2] == [(0, 8), (4, 12)]
    assert interleave(32, 8).layer_map(32) == CARD_MAP
    assert LayerPlan.named("cerebrum-12.25b").layer_map(32) == CARD_MAP


def test_named_plans() -> None:
    assert named_plans() == ("cerebrum-12.25b", "cerebrum-7b", "demo-interleaved")
    assert [resolve(name).name for name in named_plans()] == list(named_plans())
    assert resolve("cerebrum-7b").layer_map(32) == tuple(range(32))
    assert resolve("demo-interleaved").layer_map(30) == (*range(17), *range(13, 30))
    assert resolve("cerebrum-12.25b").dtype == "bfloat16"
    assert resolve("cerebrum-12.25b").source == "AetherResearch/Cerebrum-1.0-7b"


@pytest.mark.parametrize(
    ("body", "layer_map"),
    [
        (sliced("[0, 4]", "[2, 6]"), (0, 1, 2, 3, 2, 3, 4, 5)),
        (sliced("[0, 2]", "[6, 8]"), (0, 1, 6, 7)),
        (sliced("[4, 6]", "[0, 2]", "[4, 5]"), (4, 5, 0, 1, 4)),
        (sliced("[0, 2]", model="{model: {path: m}}"), (0, 1)),
        (sliced("[0, 2]", model="{model: {path: m, revision: main}}"), (0, 1)),
        (sliced("[0, 2]", model="{model: m}"), (0, 1)),
        ("slices:\n- sources:\n  - model: m\n    layer_range:\n    - 1\n    - 3\n", (1, 2)),
        ("models: [{model: m}]\n", tuple(range(8))),
        ("models:\n- model: {model: {path: m}}\n", tuple(range(8))),
        ("modules: {default: {slices: [{sources: [{model: m, layer_range: [3, 5]}]}]}}\n", (3, 4)),
        ("modules: {default: {models: [{model: m}]}}\n", tuple(range(8))),
        (sliced("[0, 2]") + "base_model: m\ntokenizer_source: base\n", (0, 1)),
        (sliced("[0, 2]") + "tokenizer_source: union\nchat_template: auto\n", (0, 1)),
        (sliced("[0, 2]") + "tokenizer_source: {model: m}\nparameters: ~\ndtype:\n", (0, 1)),
        ("slices: [{base_model: m, sources: [{model: m, layer_range: [0, 1]}]}]\n", (0,)),
        ("slices: [{sources: [{model: &m x, layer_range: [0, 1]}]}]\nbase_model: *m\n", (0,)),
        ('"slices": [{"sources": [{"model": "m", "layer_range": [7, 8]}]}]\n', (7,)),
    ],
)
def test_accepted_forms(body: str, layer_map: tuple[int, ...]) -> None:
    assert plan(body).layer_map(8) == layer_map


def test_json_crlf_and_byte_order_mark(tmp_path: Path) -> None:
    file = tmp_path / "deep.yaml"
    file.write_bytes(b"\xef\xbb\xbf" + CARD.replace("\n", "\r\n").encode())
    assert LayerPlan.from_file(file).layer_map(32) == CARD_MAP
    assert LayerPlan.from_file(str(file)).name == "deep"
    source = {"sources": [{"model": "m", "layer_range": [0, 2]}]}
    text = json.dumps({"merge_method": "passthrough", "slices": [source]})
    assert LayerPlan.from_text(text).layer_map(2) == (0, 1)


@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16", "torch.bfloat16"])
def test_dtypes(name: str) -> None:
    read = plan(f"dtype: {name}\nout_dtype: float16\n" + sliced("[0, 1]"))
    assert (read.dtype, read.out_dtype) == (name.removeprefix("torch."), "float16")


def test_a_file_is_found_where_no_plan_has_its_name(tmp_path: Path) -> None:
    file = tmp_path / "mine.yml"
    file.write_text(CARD)
    assert resolve(str(file)).name == "mine"


# What is refused: every message is one line, with its place


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (sliced("[0, 1]", "[4, 2]"), "4: slices[1].sources[0].layer_range: [4, 2] runs backwards"),
        (sliced("[3, 3]"), "3: slices[0].sources[0].layer_range: [3, 3] is empty"),
        (sliced("[-1, 3]"), "3: slices[0].sources[0].layer_range: [-1, 3] starts below block 0"),
        (sliced("[0, 8]", "[4, 9]"), "4: slices[1].sources[0].layer_range: [4, 9] ends past the"),
        (sliced("[0, 1, 2]"), "3: slices[0].sources[0].layer_range: must be two whole numbers"),
        (sliced("7"), "3: slices[0].sources[0].layer_range: must be a list, not 7"),
        (sliced("[0, 2.0]"), "3: slices[0].sources[0].layer_range[1]: must be a whole number, not"),
        (sliced("[0, true]"), "3: slices[0].sources[0].layer_range[1]: must be a whole number"),
        (sliced("[0, '2']"), "3: slices[0].sources[0].layer_range[1]: must be a whole number"),
        (sliced("[0, 010]"), "3: slices[0].sources[0].layer_range[1]: must be a whole number"),
        (sliced("[0, 1:30]"), "3: slices[0].sources[0].layer_range[1]: must be a whole number"),
        (sliced("[0, 0x4]"), "3: slices[0].sources[0].layer_range[1]: must be a whole number"),
        ("slice: []\n", "2: unknown key 'slice'; known here: merge_method, slices,"),
        (
            "slices:\n- sources: [{model: m, layer_range: [0, 1]}]\n  residual_weight: 1\n",
            "4: slices[0]: unknown key 'residual_weight'; known here: sources, parameters",
        ),
        (
            "slices: [{sources: [{model: m, layer_range: [0, 1], layers: 1}]}]\n",
            "2: slices[0].sources[0]: unknown key 'layers'; known here: model, parameters, layer",
        ),
        ("models: [{model: m, layer_range: [0, 1]}]\n", "2: models[0]: unknown key 'layer_range'"),
        ("modules: {vision: {models: []}}\n", "2: modules: unknown key 'vision'"),
        ("modules: {}\n", "2: modules: default is missing"),
        ("modules: {default: {slice: []}}\n", "2: modules.default: unknown key 'slice'"),
        ("modules: {default: {}}\n", "2: modules.default: no slices"),
        (sliced("[0, 1]") + "parameters: {weight: 1}\n", "4: parameters: unknown key 'weight'"),
        (sliced("[0, 1]") + "parameters: {}\n", "4: parameters: holds no scale"),
        (sliced("[0, 1]") + "<<: {slice: 1}\n", "4: unknown key 'slice'"),
        (sliced("[0, 1]") + "5: x\n", "4: unknown key 5"),
        (sliced("[0, 1]") + "? [a]\n: b\n", "4: unknown key a list"),
        (sliced("[0, 1]") + "slices: []\n", "4: slices: given twice, first on line 2"),
        (
            "slices:\n- sources:\n  - model: m\n    layer_range: [0, 1]\n    model: m\n",
            "6: slices[0].sources[0].model: given twice, first on line 4",
        ),
        ("dtype: float32\ndtype: float32\n" + sliced("[0, 1]"), "3: dtype: given twice"),
        ("merge_method: slerp\n", "2: merge_method: given twice, first on line 1"),
        (
            "slices:\n- sources: [{model: a, layer_range: [0, 1]}]\n"
            "- sources: [{model: b, layer_range: [0, 1]}]\n",
            "4: slices[1].sources[0].model: 'b' is a second model beside 'a'; a plan has one",
        ),
        (sliced("[0, 1]") + "base_model: b\n", "4: base_model: 'b' is a second model beside 'm'"),
        (sliced("[0, 1]") + "base_model: []\n", "4: base_model: must be text, not a list"),
        (sliced("[0, 1]") + "tokenizer_source: b\n", "4: tokenizer_source: 'b' is a second model"),
        (sliced("[0, 1]") + "chat_template: chatml\n", "4: chat_template: only 'auto'"),
        ("models: [{model: a}, {model: b}]\n", "2: models[1]: a second model; a layer plan has"),
        ("models: [{model: a+lora}]\n", "2: models[0].model: names an adapter after '+'"),
        ("models: [{model: {model: {path: a}, lora: b}}]\n", "2: models[0].model.lora: names an"),
        ("models: [{model: 7}]\n", "2: models[0].model: must be text, not 7"),
        ('models: [{model: ""}]\n', "2: models[0].model: must be text, not ''"),
        ('models: [{model: "a\\nb"}]\n', "2: models[0].model: must not hold control characters"),
        ("models: [{}]\n", "2: models[0]: model is missing"),
        ("models: [{model: m}]\n" + sliced("[0, 1]"), "3: slices: stands beside models; only one"),
        ("modules: {default: {}}\nmodels: [{model: m}]\n", "3: models: stands beside modules"),
        ("", "1: no slices; a plan lists the layer ranges to run under slices"),
        ("slices:\n", "1: no slices"),
        ("slices: []\n", "2: slices: must not be an empty list"),
        ("slices: 3\n", "2: slices: must be a list, not 3"),
        ("slices: [{}]\n", "2: slices[0]: sources is missing"),
        ("slices:\n- sources:\n", "3: slices[0]: sources is empty; check the indentation"),
        ("slices: [{sources: [m]}]\n", "2: slices[0].sources[0]: must be a mapping, not 'm'"),
        ("slices: [~]\n", "2: slices[0]: must be a mapping, not nothing"),
        ("slices: [{sources: [{model: m}]}]\n", "2: slices[0].sources[0]: layer_range is missing"),
        (
            "slices: [{sources: [{model: m, layer_range: [0, 1]}, {model: m}]}]\n",
            "2: slices[0].sources[1]: a second source in one slice; passthrough copies exactly",
        ),
        ("dtype: fp16\n" + sliced("[0, 1]"), "2: dtype: 'fp16' is not one of float32, float16,"),
        ("out_dtype: float64\n" + sliced("[0, 1]"), "2: out_dtype: 'float64' is not one of"),
        ("dtype: 16\n" + sliced("[0, 1]"), "2: dtype: must be text, not 16"),
        ("slices: !!set {a}\n", "2: slices: must be a list, not one tagged"),
        ("slices: !!python/object:os.system [a]\n", "2: slices: must be a list, not one tagged"),
    ],
)
def test_refused(body: str, message: str) -> None:
    assert refusal("merge_method: passthrough\n" + body).startswith("p.yml:" + message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "p.yml: empty; a plan needs merge_method and slices"),
        ("# only a comment\n", "p.yml: empty"),
        ("~\n", "p.yml:1: must be a mapping, not nothing"),
        ("hello", "p.yml:1: must be a mapping, not 'hello'"),
        ("- a\n- b\n", "p.yml:1: must be a mapping, not a list"),
        (sliced("[0, 1]"), "p.yml:1: merge_method is missing"),
        ("merge_method: slerp\n", "p.yml:1: merge_method: 'slerp' is not supported"),
        ("a: 1\n---\nb: 2\n", "p.yml: holds 2 documents (they begin on lines 1, 3); name"),
        ("a: [1\nb: 2\n", "p.yml:2: not valid YAML: expected ',' or ']', but got ':'"),
        ("a:\n\t- b\n", "p.yml:2: not valid YAML: found character"),
        ("a: *x\n", "p.yml:1: not valid YAML: found undefined alias 'x'"),
        ("a: b\nc: \x00\n", "p.yml:2: not text: control character"),
        ('a: "\\U00110000"\n', "p.yml: not valid YAML: "),
        ("[" * 5000, "p.yml: nested too deeply"),
        ("a: &a [*a]\n", "p.yml:1: YAML aliases expand without bound"),
        ("x" * (MAX_CHARACTERS + 1), f"p.yml: longer than {MAX_CHARACTERS} characters"),
    ],
)
@slow
def test_not_a_plan(text: str, message: str) -> None:
    assert refusal(text).startswith(message)


def test_text_that_lost_its_indentation_names_the_line() -> None:
    flat = "\n".join(line.strip() for line in CARD.splitlines())
    lines = flat.splitlines()
    second = [number for number, line in enumerate(lines, 1) if line == "- sources:"][1]
    message = refusal(flat)
    assert message.startswith(f"p.yml:{second}: not valid YAML: ")
    assert "check the indentation" in message


def test_aliases_that_multiply_are_refused_at_once() -> None:
    rows = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    for depth in range(1, 20):
        rows.append(f"a{depth}: &a{depth} [{', '.join([f'*a{depth - 1}'] * 10)}]")
    assert "aliases expand" in refusal("\n".join(rows))


@pytest.mark.parametrize(
    "value",
    ["nan", ".nan", ".inf", "-.inf", "1e400", "1e39", "true", "'0.5'", "half", "~", "[]", "010"],
)
def test_a_scale_must_be_a_finite_number(value: str) -> None:
    body = f"parameters:\n  scale:\n  - filter: o_proj\n    value: {value}\n"
    text = "merge_method: passthrough\n" + sliced("[0, 1]") + body
    assert re.match(r"p\.yml:[67]: parameters\.scale\[0\]", refusal(text))


@pytest.mark.parametrize("value", ["[]", "[0.5, {value: 1}]", "[[1]]", "x", "[0.5, nan]"])
def test_a_malformed_scale_is_refused(value: str) -> None:
    text = "merge_method: passthrough\n" + sliced("[0, 1]") + f"parameters: {{scale: {value}}}\n"
    assert refusal(text).startswith("p.yml:4: parameters.scale")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    binary = tmp_path / "model.safetensors"
    binary.write_bytes(bytes(range(256)) * 8)
    with pytest.raises(PlanError, match=r"model\.safetensors: not UTF-8 text"):
        LayerPlan.from_file(binary)
    with pytest.raises(PlanError, match="Is a directory"):
        LayerPlan.from_file(tmp_path)
    with pytest.raises(PlanError, match="No such file"):
        LayerPlan.from_file(tmp_path / "none.yml")
    if os.geteuid() != 0:
        binary.chmod(0)
        with pytest.raises(PlanError, match="Permission denied"):
            LayerPlan.from_file(binary)
    endless = Path("/dev/zero")
    if endless.exists():
        with pytest.raises(PlanError, match="longer than"):
            LayerPlan.from_file(endless)


@pytest.mark.parametrize("name", ["nope", "a\x00b", "x" * 5000, "two\nlines", ""])
def test_an_unknown_name_lists_the_plans(name: str) -> None:
    with pytest.raises(PlanError, match="named plans: cerebrum-1") as caught:
        resolve(name)
    assert len(str(caught.value).splitlines()) == 1
    with pytest.raises(PlanError, match="named plans: cerebrum-1"):
        LayerPlan.named(name)


def test_a_range_past_the_model_names_the_model() -> None:
    with pytest.raises(PlanError, match=r"^cerebrum-12\.25b\.yml:29: .*\[24, 32\] ends past .* 30"):
        resolve("cerebrum-12.25b").layer_map(30)


def test_positions_are_bounded() -> None:
    with pytest.raises(PlanError, match=f"at most {MAX_POSITIONS}"):
        plan(sliced("[0, 99999999]")).layer_map(99999999)
    with pytest.raises(PlanError, match=f"at most {MAX_POSITIONS}"):
        interleave(10**9, 2)


@pytest.mark.parametrize(("layers", "row"), [(32, 7), (32, 0), (32, 34), (33, 8), (8, -2)])
def test_the_formula_refuses_what_does_not_fit(layers: int, row: int) -> None:
    with pytest.raises(PlanError, match=f"{layers} layers do not interleave in rows of {row}"):
        interleave(layers, row)


# Scales: expectations recorded from mergekit 0.1.5's own planner

MIXED = """\
merge_method: passthrough
parameters: {scale: [{filter: mlp, value: 3.0}, {filter: lm_head, value: 5.0}]}
slices:
- sources:
  - model: m
    layer_range: [0, 3]
    parameters: {scale: {filter: o_proj, value: [1.0, 0.5, 0.25]}}
  parameters: {scale: {filter: down_proj, value: [2, 4]}}
- sources:
  - model: m
    layer_range: [2, 3]
    parameters: {scale: [0.25, 0.75]}
- sources:
  - model: m
    layer_range: [1, 3]
  parameters:
    scale:
    - {filter: layers.1., value: 7}
    - {filter: norm, value: [10, 20]}
"""


@pytest.mark.parametrize(
    ("position", "name", "scale"),
    [
        (None, "model.embed_tokens.weight", None),
        (0, "model.layers.0.input_layernorm.weight", None),
        (0, "model.layers.0.self_attn.o_proj.weight", 1.0),
        (0, "model.layers.0.mlp.down_proj.weight", 2.0),
        (1, "model.layers.1.self_attn.q_proj.weight", None),
        (1, "model.layers.1.self_attn.o_proj.weight", 0.5),
        (1, "model.layers.1.mlp.up_proj.weight", 3.0),
        (1, "model.layers.1.mlp.down_proj.weight", 3.0),
        (2, "model.layers.2.self_attn.o_proj.weight", 0.25),
        (2, "model.layers.2.mlp.down_proj.weight", 4.0),
        (3, "model.layers.2.input_layernorm.weight", 0.75),
        (3, "model.layers.2.mlp.down_proj.weight", 0.75),
        (4, "model.layers.1.input_layernorm.weight", 7.0),
        (4, "model.layers.1.mlp.down_proj.weight", 7.0),
        (5, "model.layers.2.input_layernorm.weight", 20.0),
        (5, "model.layers.2.self_attn.o_proj.weight", None),
        (5, "model.layers.2.mlp.down_proj.weight", 3.0),
        (None, "model.norm.weight", 10.0),
        (None, "lm_head.weight", 5.0),
    ],
)
def test_tensor_scales_are_mergekits(position: int | None, name: str, scale: float | None) -> None:
    assert LayerPlan.from_text(MIXED).tensor_scale(position, name, 3) == scale


def scaled(scale: str) -> LayerPlan:
    return plan(
        "slices:\n"
        "- sources: [{model: m, layer_range: [0, 3]}]\n"
        "- sources:\n"
        "  - model: m\n"
        "    layer_range: [1, 4]\n"
        f"    parameters: {{scale: {scale}}}\n"
    )


def test_depth_up_scaling_becomes_residual_scales() -> None:
    root = 0.7071067811865476
    duplicated = scaled(f"[{{filter: o_proj, value: {root}}}, {{filter: down_proj, value: 1e-1}}]")
    assert duplicated.residual_scales(4) == ((1.0, 1.0),) * 3 + ((root, 0.1),) * 3
    gradient = scaled("[{filter: down_proj, value: [0, 1]}, {value: 1.0}]")
    assert gradient.residual_scales(4) == ((1.0, 1.0),) * 3 + ((1.0, 0.0), (1.0, 0.5), (1.0, 1.0))
    one_block = scaled("{filter: layers.2.mlp.down_proj, value: 0.5}").residual_scales(4)
    assert one_block == ((1.0, 1.0),) * 4 + ((1.0, 0.5), (1.0, 1.0))
    module = "modules: {default: {parameters: {scale: {filter: o_proj, value: -2}}, models: [{"
    assert plan(module + "model: m}]}}\n").residual_scales(2) == ((-2.0, 1.0), (-2.0, 1.0))


def test_scales_of_one_scale_nothing() -> None:
    assert scaled("1.0").residual_scales(4) is None
    assert scaled("{filter: zzz, value: 3}").residual_scales(4) is None
    assert scaled("1.0").tensor_scale(3, "model.layers.1.mlp.up_proj.weight", 4) == 1.0


@pytest.mark.parametrize(
    ("scale", "tensor"),
    [
        ("0.5", "model.norm.weight"),
        ("{filter: '*', value: 0.5}", "model.norm.weight"),
        ("{filter: layernorm, value: 0.5}", "model.layers.1.input_layernorm.weight"),
        ("{filter: mlp, value: 0.5}", "model.layers.1.mlp.gate_proj.weight"),
        ("{filter: layers.2.self_attn.q, value: 3}", "model.layers.2.self_attn.q_proj.weight"),
        ("{filter: lm_head, value: 0.5}", "lm_head.weight"),
        ("[{filter: k_proj, value: [1, 0.5]}]", "model.layers.2.self_attn.k_proj.weight"),
    ],
)
def test_a_scale_of_another_tensor_needs_the_unrolled_layout(scale: str, tensor: str) -> None:
    with pytest.raises(PlanError) as caught:
        scaled(scale).residual_scales(4)
    message = str(caught.value)
    assert message.startswith(f"p.yml:7: slices[1].sources[0].parameters.scale: scales {tensor} by")
    assert message.endswith("only `convert --layout unrolled` can")


def test_embedding_scales_follow_the_first_slice() -> None:
    first = plan(
        "slices:\n- sources: [{model: m, layer_range: [0, 1]}]\n"
        "  parameters: {scale: {filter: embed, value: 2}}\n"
        "- sources: [{model: m, layer_range: [1, 2]}]\n"
    )
    assert first.tensor_scale(None, "model.embed_tokens.weight", 2) == 2.0
    with pytest.raises(PlanError, match=r"p\.yml:4: .*model\.embed_tokens\.weight by 2"):
        first.residual_scales(2)


# Random input

RANGES = st.lists(
    st.tuples(st.integers(0, 39), st.integers(1, 40)).filter(lambda r: r[0] < r[1]),
    min_size=1,
    max_size=12,
)


@settings(deadline=None, max_examples=60)
@given(ranges=RANGES, flow=st.booleans(), module=st.booleans())
def test_any_valid_plan_expands_as_a_loop_would(
    ranges: list[tuple[int, int]], flow: bool, module: bool
) -> None:
    body: dict[str, object] = {
        "slices": [{"sources": [{"model": "m", "layer_range": list(r)}]} for r in ranges]
    }
    if module:
        body = {"modules": {"default": body}}
    text = json.dumps({"merge_method": "passthrough", **body}, indent=None if flow else 1)
    expected = []
    for start, end in ranges:
        block = start
        while block < end:
            expected.append(block)
            block += 1
    read = LayerPlan.from_text(text)
    assert read.layer_map(40) == tuple(expected)
    assert read.blocks_needed == max(expected) + 1
    assert LayerPlan.from_text(read.text) == read


@settings(deadline=None, max_examples=60)
@given(half=st.integers(1, 20), steps=st.integers(0, 20))
def test_the_formula_doubles_all_but_the_outer_half_rows(half: int, steps: int) -> None:
    layers = half * (2 + steps)
    formula = interleave(layers, 2 * half)
    runs = formula.layer_map(layers)
    assert f": {len(runs)} positions\n" in formula.text
    for block in range(layers):
        outer = block < half or block >= layers - half
        assert runs.count(block) == (1 if outer else 2)


def only_plan_errors(text: str) -> None:
    message = ""
    try:
        read = LayerPlan.from_text(text)
        read.layer_map(8)
        read.residual_scales(8)
    except PlanError as error:
        message = str(error)
    assert len(message.splitlines()) <= 1


@settings(deadline=None, max_examples=150)
@given(
    text=st.one_of(
        st.text(max_size=80),
        st.text(alphabet="[]{}:,-&*!|>%@\"'#?~ \n\taxslice01.\\\x85\u2028", max_size=80),
        st.text(max_size=30).map(lambda t: f"merge_method: passthrough\nslices: {t}\n"),
    )
)
@example("%YAML 1." + "9" * 5000 + "\n---\na")
@example("\ud800")
@example("? \n")
def test_garbage_raises_only_plan_errors(text: str) -> None:
    only_plan_errors(text)


@settings(deadline=None, max_examples=150)
@given(data=st.data())
@slow
def test_a_damaged_plan_raises_only_plan_errors(data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(MIXED)))
    end = data.draw(st.integers(start, min(len(MIXED), start + 30)))
    filling = data.draw(st.sampled_from(["", " ", "\n", "- ", "{", "]", "~", ": ", "'", "nan"]))
    only_plan_errors(MIXED[:start] + filling + MIXED[end:])


@settings(deadline=None, max_examples=60)
@given(raw=st.binary(max_size=200))
def test_binary_files_raise_only_plan_errors(
    raw: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = tmp_path_factory.getbasetemp() / "binary.yml"
    file.write_bytes(raw)
    with pytest.raises(PlanError):
        LayerPlan.from_file(file)


@pytest.mark.timeout(60)
@slow
def test_thousands_of_filters_over_thousands_of_positions() -> None:
    """Each is looked for once for a tensor's name; once for each position took a minute."""
    entries = ",".join(f"{{filter: a{i}, value: 1}}" for i in range(7000))
    slices = "- sources: [{model: a, layer_range: [0, 32]}]\n" * 312
    text = f"merge_method: passthrough\nparameters: {{scale: [{entries}]}}\nslices:\n{slices}"
    started = time.process_time()
    assert LayerPlan.from_text(text).residual_scales(32) is None
    assert time.process_time() - started < 30


def test_planning_imports_no_mlx() -> None:
    code = (
        "import sys, mlx_cerebrum.plan.layer_plan, mlx_cerebrum.plan.show as show;"
        "show.main(['cerebrum-12.25b']);"
        "heavy = {'mlx', 'numpy', 'transformers', 'tokenizers', 'huggingface_hub'};"
        "print(sorted(heavy & {name.split('.')[0] for name in sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
