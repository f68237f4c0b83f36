"""What a checkpoint says about its model: `config.json`, read strictly.

One flat dataclass under Hugging Face's field names, plus the two fields a folded
checkpoint adds: `layer_map` (which stored block runs at each position) and
`residual_scales` (how much each position writes into the residual stream).
"""

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mlx_cerebrum.errors import ConfigError
from mlx_cerebrum.json_file import read_object

FORMAT_VERSION = 1
MAX_BLOCKS = 10_000
MODEL_TYPES = ("mistral", "llama", "cerebrum")

# Defaults transformers applies to a key that config.json leaves out (its
# configuration_mistral.py and configuration_llama.py). `cerebrum` is ours and always
# writes its keys.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "mistral": {"rms_norm_eps": 1e-6, "sliding_window": 4096, "num_key_value_heads": 8},
    "llama": {"rms_norm_eps": 1e-6, "sliding_window": None},
    "cerebrum": {"rms_norm_eps": 1e-6, "sliding_window": None},
}

# Keys that change the arithmetic, with the values that mean "plain Mistral". Anything
# else would run and be wrong, so it is refused.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "partial_rotary_factor": (1, 1.0, None),
    "attention_sink": (None, False),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "logit_scale": (None, 1, 1.0),
    "residual_multiplier": (None, 1, 1.0),
    "num_local_experts": (None, 0, 1),
}


@dataclass(frozen=True)
class ModelConfig:
    """The geometry of one model. Field names are Hugging Face's.

    `num_hidden_layers` counts stored blocks; `len(layer_map)` counts executed positions.
    """

    hidden_size: int
    num_hidden_layers: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    vocab_size: int
    rope_theta: float
    max_position_embeddings: int
    sliding_window: int | None
    tie_word_embeddings: bool
    model_type: str = "mistral"
    dtype: str | None = None
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    layer_map: tuple[int, ...] = ()
    residual_scales: tuple[tuple[float, float], ...] | None = None
    quantization: dict[str, Any] | None = field(default=None, hash=False)

    def __post_init__(self) -> None:
        if not self.layer_map:
            object.__setattr__(self, "layer_map", tuple(range(self.num_hidden_layers)))

    @property
    def num_positions(self) -> int:
        return len(self.layer_map)

    @property
    def block_parameters(self) -> int:
        """Parameters of one decoder block."""
        qo = 2 * self.hidden_size * self.num_attention_heads * self.head_dim
        kv = 2 * self.hidden_size * self.num_key_value_heads * self.head_dim
        return qo + kv + 3 * self.hidden_size * self.intermediate_size + 2 * self.hidden_size

    @property
    def other_parameters(self) -> int:
        """Parameters outside the blocks: embedding, head (unless tied) and final norm."""
        tables = 1 if self.tie_word_embeddings else 2
        return tables * self.vocab_size * self.hidden_size + self.hidden_size

    @property
    def stored_parameters(self) -> int:
        return self.num_hidden_layers * self.block_parameters + self.other_parameters

    @property
    def executed_parameters(self) -> int:
        """Parameters an unrolled copy of the model would store."""
        return self.num_positions * self.block_parameters + self.other_parameters

    def kv_values_per_token(self) -> int:
        """Numbers (keys and values, all positions) that one token adds to the cache."""
        return 2 * self.num_positions * self.num_key_value_heads * self.head_dim

    def with_map(
        self,
        layer_map: tuple[int, ...],
        residual_scales: tuple[tuple[float, float], ...] | None = None,
    ) -> "ModelConfig":
        """The same blocks run in another order. Raises ConfigError if it names others."""
        blocks = range(self.num_hidden_layers)
        if not layer_map or any(block not in blocks for block in layer_map):
            raise ConfigError(f"a layer map over {len(blocks)} blocks can't be {layer_map}")
        if residual_scales is not None and len(residual_scales) != len(layer_map):
            raise ConfigError(f"{len(residual_scales)} scales for {len(layer_map)} positions")
        return replace(self, layer_map=layer_map, residual_scales=residual_scales)

    @classmethod
    def from_dict(cls, raw: dict[str, Any], where: str = "config.json") -> "ModelConfig":
        """Read a parsed `config.json`.

        Raises ConfigError naming the key for anything missing, of the wrong type,
        not finite, or that would change the arithmetic.
        """
        return _Reader(raw, where).config()

    @classmethod
    def from_file(cls, path: Path) -> "ModelConfig":
        return cls.from_dict(read_json(path), str(path))


def read_json(path: Path) -> dict[str, Any]:
    """Parse a JSON object. Raises ConfigError naming the file (and line) otherwise."""
    return read_object(path, ConfigError)


def _finite(value: float) -> bool:
    """Whether a float can hold it (JSON's whole numbers have no limit)."""
    return math.isfinite(value) if isinstance(value, float) else abs(value) < 1e300


class _Reader:
    """Typed access to a raw config, every complaint with its place."""

    def __init__(self, raw: dict[str, Any], where: str) -> None:
        self.raw = raw
        self.where = where
        self.model_type = raw.get("model_type")
        if self.model_type not in MODEL_TYPES:
            listed = raw.get("architectures")
            listed = listed[0] if isinstance(listed, list) and listed else "missing"
            named = self.model_type or listed
            raise self.error(f"architecture {named!r} is not supported; only Mistral and Llama are")
        self.defaults = _DEFAULTS[str(self.model_type)]

    def error(self, text: str) -> ConfigError:
        return ConfigError(f"{self.where}: {text}")

    def get(self, key: str, default: Any = None) -> Any:
        """The key's value; null counts as absent, except where null means something."""
        if key in self.raw and (self.raw[key] is not None or key == "sliding_window"):
            return self.raw[key]
        return self.defaults.get(key, default)

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.get(key, default)
        if value is None:
            raise self.error(f"{key} is missing")
        if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
            raise self.error(f"{key} must be a positive whole number, not {value!r}")
        return value

    def number(self, key: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.error(f"{key} must be a number, not {value!r}")
        if not _finite(value) or value <= 0:
            raise self.error(f"{key} must be finite and above zero, not {value!r:.40}")
        return float(value)

    def boolean(self, key: str) -> bool:
        value = self.get(key, False)
        if not isinstance(value, bool):
            raise self.error(f"{key} must be true or false, not {value!r}")
        return value

    def token_ids(self, key: str) -> tuple[int, ...]:
        value = self.raw.get(key)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in ids):
            raise self.error(f"{key} must be a token id or a list of them, not {value!r}")
        return tuple(ids)

    def rope_theta(self) -> float:
        """Both spellings: a top-level `rope_theta`, and transformers 5's `rope_parameters`."""
        for key in ("rope_scaling", "rope_parameters"):
            nested = self.raw.get(key)
            if nested is None:
                continue
            if not isinstance(nested, dict):
                raise self.error(f"{key} must be an object, not {nested!r}")
            kind = nested.get("rope_type", nested.get("type", "default"))
            if kind != "default":
                raise self.error(f"{key} of type {kind!r} is not supported; only plain RoPE is")
        nested = self.raw.get("rope_parameters") or {}
        theta = nested.get("rope_theta", self.raw.get("rope_theta", 10000.0))
        return self.number("rope_theta", theta)

    def window(self) -> int | None:
        listed = self.raw.get("layer_types") or []
        if not isinstance(listed, list) or not all(isinstance(kind, str) for kind in listed):
            raise self.error("layer_types must be a list of names")
        kinds = set(listed)
        if len(kinds) > 1:
            raise self.error("layer_types mixes sliding and full attention, which is not supported")
        if self.model_type == "llama" or kinds == {"full_attention"}:
            return None
        return None if self.get("sliding_window") is None else self.integer("sliding_window")

    def layer_map(self, blocks: int) -> tuple[int, ...]:
        value = self.raw.get("layer_map")
        if value is None:
            return tuple(range(blocks))
        if not isinstance(value, list) or not value:
            raise self.error("layer_map must be a list of block numbers")
        for position, block in enumerate(value):
            if isinstance(block, bool) or not isinstance(block, int) or not 0 <= block < blocks:
                raise self.error(
                    f"layer_map[{position}] is {block!r}; blocks are numbered 0 to {blocks - 1}"
                )
        return tuple(value)

    def residual_scales(self, positions: int) -> tuple[tuple[float, float], ...] | None:
        value = self.raw.get("residual_scales")
        if value is None:
            return None
        if not isinstance(value, list) or len(value) != positions:
            raise self.error(
                f"residual_scales must be a list of {positions} [attention, mlp] pairs"
            )
        for position, pair in enumerate(value):
            finite = (
                isinstance(pair, list)
                and len(pair) == 2
                and all(type(x) in (int, float) and _finite(x) for x in pair)
            )
            if not finite:
                raise self.error(f"residual_scales[{position}] is {pair!r}, not two finite numbers")
        return tuple((float(a), float(m)) for a, m in value)

    def quantization(self) -> dict[str, Any] | None:
        value = self.raw.get("quantization")
        if value is None and self.raw.get("quantization_config") is not None:
            value = self.raw["quantization_config"]
        if value is None:
            return None
        if not isinstance(value, dict) or not {"bits", "group_size"} <= set(value):
            raise self.error(
                "quantization is not MLX's (no bits and group_size); use the unquantized checkpoint"
            )
        return value

    def config(self) -> ModelConfig:
        for key, plain in _PLAIN.items():
            if key in self.raw and self.raw[key] not in plain:
                raise self.error(f"{key} = {self.raw[key]!r} is not supported")
        version = self.raw.get("format_version", FORMAT_VERSION)
        if version != FORMAT_VERSION:
            raise self.error(
                f"format_version {version!r} is not {FORMAT_VERSION}: upgrade mlx-cerebrum"
            )
        heads = self.integer("num_attention_heads")
        kv_heads = self.integer("num_key_value_heads", heads)
        hidden = self.integer("hidden_size")
        if heads % kv_heads:
            raise self.error(
                f"{heads} attention heads can't share {kv_heads} key/value heads evenly"
            )
        if self.get("head_dim") is None and hidden % heads:
            raise self.error(f"hidden_size ({hidden}) is not a multiple of {heads} heads")
        blocks = self.integer("num_hidden_layers")
        if blocks > MAX_BLOCKS:  # before anything of that length is made
            raise self.error(f"num_hidden_layers is {blocks}; at most {MAX_BLOCKS} are supported")
        layer_map = self.layer_map(blocks)
        bos = self.token_ids("bos_token_id")
        dtype = self.raw.get("dtype", self.raw.get("torch_dtype"))
        return ModelConfig(
            model_type=str(self.model_type),
            hidden_size=hidden,
            num_hidden_layers=blocks,
            intermediate_size=self.integer("intermediate_size"),
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=self.integer("head_dim", hidden // heads),
            rms_norm_eps=self.number("rms_norm_eps", self.get("rms_norm_eps")),
            vocab_size=self.integer("vocab_size"),
            rope_theta=self.rope_theta(),
            max_position_embeddings=self.integer("max_position_embeddings"),
            sliding_window=self.window(),
            tie_word_embeddings=self.boolean("tie_word_embeddings"),
            dtype=dtype if isinstance(dtype, str) else None,
            bos_token_id=bos[0] if bos else None,
            eos_token_ids=self.token_ids("eos_token_id"),
            layer_map=layer_map,
            residual_scales=self.residual_scales(len(layer_map)),
            quantization=self.quantization(),
        )
