"""The card of a converted directory: true, and read by the hub's own parser."""

import ast
import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import MakeCheckpoint, plan_yaml, slow
from huggingface_hub import ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_config

from convert.__main__ import main as convert
from convert.card import card, source_card
from mlx_cerebrum.model.config import ModelConfig
from mlx_cerebrum.weights.safetensors_file import read_header

SEVEN = "AetherResearch/Cerebrum-1.0-7b"
TWELVE = "Joseph717171/Cerebrum-1.0-12.25B"
PLAN = plan_yaml("0-4,2-6,4-8")
PACKED = {"group_size": 64, "bits": 4, "mode": "affine"}


def config_of(*, folded: bool = False, provenance: Any = (), **changes: Any) -> dict[str, Any]:
    """What a conversion of an 8-block model writes as its config.json."""
    layers: dict[str, Any] = {"num_hidden_layers": 8}
    if folded:
        layers |= {"model_type": "cerebrum", "layer_map": [0, 1, 2, 3, 2, 3, 4, 5, 4, 5, 6, 7]}
    said = {"tool": "mlx-cerebrum 1.0", "source": SEVEN, "revision": "a" * 40, "plan": None}
    config = tiny_config(**(layers | changes))
    return config | {"provenance": said | {"from": None} | dict(provenance)}


def front(text: str) -> dict[str, Any]:
    """The front matter as huggingface_hub reads it."""
    data: dict[str, Any] = ModelCard(text).data.to_dict()
    return data


def blocks(text: str) -> dict[str, list[str]]:
    """The card's code blocks by language."""
    found: dict[str, list[str]] = {}
    for _, language, body in re.findall(r"^(`{3,})(\w+)\n(.*?)\n\1$", text, re.M | re.S):
        found.setdefault(language, []).append(body)
    return found


def test_front_matter_of_the_merge() -> None:
    assert front(card(config_of(folded=True, provenance={"plan": PLAN}), "x")) == {
        "base_model": SEVEN,
        "base_model_relation": "merge",
        "license": "apache-2.0",
        "language": ["en"],
        "library_name": "mlx",
        "pipeline_tag": "text-generation",
        "tags": ["mlx", "mlx-cerebrum", "merge"],
    }


@pytest.mark.parametrize(
    ("config", "relation", "tags"),
    [
        (config_of(), None, []),
        (config_of(quantization=PACKED), "quantized", []),
        (config_of(folded=True, quantization=PACKED), "merge", ["merge"]),
        (config_of(provenance={"plan": PLAN}, num_hidden_layers=12), "merge", ["merge"]),
        (config_of(provenance={"plan": plan_yaml("0-8")}), None, []),  # its own order
        (config_of(provenance={"plan": plan_yaml("0-8", "{scale: 0.5}")}), "merge", ["merge"]),
        (config_of(residual_scales=[[0.5, 0.5]] * 8), "merge", ["merge"]),
        (config_of(provenance={"source": TWELVE}), None, ["merge", "mergekit"]),
        (
            config_of(
                folded=True,
                provenance={"source": TWELVE, "plan": PLAN, "plan_recovered": True},
                quantization=PACKED,
            ),
            "quantized",
            ["merge", "mergekit"],
        ),
    ],
)
def test_relation_and_tags_are_true(
    config: dict[str, Any], relation: str | None, tags: list[str]
) -> None:
    data = front(card(config, "x"))
    assert data.get("base_model_relation") == relation
    assert data["tags"] == ["mlx", "mlx-cerebrum", *tags]


def test_nothing_is_said_of_a_source_that_says_nothing() -> None:
    for source in ("owner/other", "local", "", "a/b/c", "owner/evil\n---\nlicense: mit"):
        data = front(card(config_of(provenance={"source": source}), "x"))
        assert data.get("base_model") == ("owner/other" if source == "owner/other" else None)
        assert "license" not in data
        assert "language" not in data


def test_a_conversion_of_a_conversion_names_the_first_source() -> None:
    middle = {"source": "local", "from": {"source": SEVEN, "from": None}}
    assert front(card(config_of(provenance=middle), "x"))["base_model"] == SEVEN
    assert "Made from a local checkpoint" in card(config_of(provenance={"source": "local"}), "x")


def test_license_and_language_come_from_the_sources_card(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    assert source_card(tmp_path) == {}
    readme.write_text(
        "---\nlicense: other\nlicense_name: mine\nlicense_link: https://x.org/l\n"
        "language:\n- de\n- en\ntags:\n- mergekit\n- other\nmodel-index: []\n---\n# Hello\n"
    )
    inherited = source_card(tmp_path)
    data = front(card(config_of(provenance={"source": "a/b", "source_card": inherited}), "x"))
    assert data["license"] == "other"
    assert data["license_name"] == "mine"
    assert data["license_link"] == "https://x.org/l"
    assert data["language"] == ["de", "en"]
    assert data["tags"] == ["mlx", "mlx-cerebrum", "mergekit"]
    assert data.get("model-index") is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "# no front matter",
        "---\n---\n",
        "---\n- list\n---\n",
        "---\n{\n---\n",
        "---\nlicense: {a: b}\nlanguage: [1, 2]\ntags: mergekit\n---\n",
        '---\nlicense: "two\\nlines"\n---\n',
        "---\n!!python/object/apply:os.system ['echo']\n---\n",
        "---\n" + "[" * 3_000 + "\n---\n",
    ],
)
@slow
def test_a_source_card_that_is_not_one(tmp_path: Path, text: str) -> None:
    (tmp_path / "README.md").write_text(text)
    assert source_card(tmp_path) == {}


@settings(max_examples=60, deadline=None)
@given(name=st.text(max_size=30), plan=st.text(max_size=60), tool=st.text(max_size=10))
def test_no_name_or_plan_breaks_out(name: str, plan: str, tool: str) -> None:
    config = config_of(provenance={"plan": f"```\n{plan}\n---\n````", "tool": tool})
    text = card(config, f"{name}\n---\nlicense: mit")
    assert front(text)["license"] == "apache-2.0"
    assert blocks(text)["yaml"] == [f"```\n{plan}\n---\n````".strip()]
    assert text.splitlines()[0] == "---"


@pytest.mark.parametrize("name", ["model", "owner/model", "with space", "it's", 'a"b', "$(x)", "é"])
def test_commands_name_the_directory_whatever_it_is_called(name: str) -> None:
    found = blocks(card(config_of(), name))
    for command in found["sh"]:
        words = shlex.split(command)
        assert words[words.index("--model") + 1] == name
    tree = ast.parse(found["python"][0])
    values = [node.value for node in ast.walk(tree) if isinstance(node, ast.Assign)]
    assert ast.literal_eval(values[0]) == name


def test_commands_are_ones_the_tools_take() -> None:
    from mlx_lm.generate import setup_arg_parser

    from mlx_cerebrum.generate import parser

    text = card(config_of(folded=True, model_file="mlx_lm_model.py"), "there")
    ours, theirs = (shlex.split(command) for command in blocks(text)["sh"])
    assert ours[:2] == ["mlx-cerebrum", "generate"]
    assert parser().parse_args(ours[2:]).model == "there"
    assert theirs[0] == "mlx_lm.generate"
    args = setup_arg_parser().parse_args(theirs[1:])
    assert args.model == "there"
    assert args.trust_remote_code


def test_each_tool_is_offered_only_what_it_can_run() -> None:
    folded = card(config_of(folded=True), "x")
    shim = card(config_of(folded=True, model_file="mlx_lm_model.py"), "x")
    dense = card(config_of(), "x")
    packed = card(config_of(quantization=PACKED), "x")
    sliding = card(config_of(layer_types=["sliding_attention"] * 8), "x")
    assert ["mlx_lm.generate" in t for t in (folded, shim, dense, packed, sliding)] == [
        *(False, True, True, True, False)
    ]
    assert ["--trust-remote-code" in t for t in (shim, dense, packed)] == [True, False, False]
    assert ["AutoModelForCausalLM" in t for t in (folded, shim, dense, packed)] == [
        *(False, False, True, False)
    ]


def test_what_becomes_of_the_window() -> None:
    kept = "mlx-lm with the model file of this directory: kept"
    assert "mlx-lm: ignored" in card(config_of(), "x")
    assert "transformers: kept" in card(config_of(), "x")
    assert "transformers: kept" not in card(config_of(quantization=PACKED), "x")
    assert kept in card(config_of(folded=True, model_file="f.py"), "x")
    assert kept not in card(config_of(folded=True), "x")
    assert "sees itself and the 11 before it" in card(config_of(), "x")
    none = card(config_of(sliding_window=None), "x")
    assert "None: every token" in none
    assert "ignored" not in none


def test_the_prompt_format_is_cerebrums_only_for_cerebrum() -> None:
    assert "User: Why is the sky blue?\nAI:\n```" in card(config_of(), "x")
    assert "AI:" not in card(config_of(provenance={"source": "owner/other"}), "x")


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--dtype", "bfloat16"],
        ["-q", "--q-group-size", "32"],
        ["-q", "--q-bits", "8", "--dtype", "float16"],
        ["-q", "--q-group-size", "128"],  # only down_proj divides
        ["-q", "--q-mode", "mxfp4"],
        ["--layout", "unrolled"],
    ],
)
def test_sizes_are_those_on_disk(
    checkpoint: MakeCheckpoint, plan_file: Callable[..., Path], tmp_path: Path, flags: list[str]
) -> None:
    out = tmp_path / "o"
    common = ["--hf-path", str(checkpoint()), "--plan", str(plan_file()), "--quiet"]
    assert convert([*common, "--mlx-path", str(out), *flags]) == 0
    headers = (read_header(file) for file in out.glob("*.safetensors"))
    actual = sum(tensor.nbytes for header in headers for tensor in header.values())
    model = ModelConfig.from_dict(json.loads((out / "config.json").read_text()))
    text = (out / "README.md").read_text()
    assert f"{8 * actual / model.stored_parameters:.2f} bits a weight" in text
    assert front(text)["tags"] == ["mlx", "mlx-cerebrum", "merge"]
    assert blocks(text)["yaml"] == [plan_file().read_text().strip()]


def test_figures_of_the_real_models() -> None:
    real: dict[str, Any] = {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "vocab_size": 32000,
        "head_dim": 128,
    }
    real |= {"num_attention_heads": 32, "num_key_value_heads": 8, "sliding_window": 4096}
    real |= {"num_hidden_layers": 32, "torch_dtype": "float16", "quantization": PACKED}
    rows = [range(i, i + 8) for i in range(0, 28, 4)]
    order = [block for row in rows for block in row]
    text = card(config_of(**real, model_type="cerebrum", layer_map=order), "x", 4_073_000_000)
    assert "7.24 B stored, 12.48 B as run" in text
    assert "4.07 GB, 4.50 bits a weight" in text
    assert "32 blocks, stored once, run in 56 positions" in text
    assert np.bincount(order).tolist() == [1] * 4 + [2] * 24 + [1] * 4
