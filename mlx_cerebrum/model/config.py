"""What a checkpoint says about its model: `config.json`, read strictly.

One flat dataclass under Hugging Face's field names, plus the two fields a folded
checkpoint adds: `layer_map` (which stored block runs at each position) and
`residual_scales` (how much each position writes into the residual stream).
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mlx_cerebrum.errors import ConfigError, shown
from mlx_cerebrum.files.json_file import read_object

FORMAT_VERSION = 1
MAX_BLOCKS = MAX_POSITIONS = 10_000
MODEL_TYPES = ("mistral", "llama", "cerebrum")
# Where a config names no model type.
_ARCHITECTURES = {"MistralForCausalLM": "mistral", "LlamaForCausalLM": "llama"}
FLOAT32_MAX = 3.4028234663852886e38
_FLOAT32_LEAST = 2.0**-126  # above zero, at full precision
MOST = 2**31 - 1  # MLX counts tokens, rows and columns in 32 bits

# Keys that change the arithmetic, or which files are read, with the values that mean "plain
# Mistral". Anything else would run and be wrong, so it is refused.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "is_causal": (True,),  # transformers takes null for false
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "partial_rotary_factor": (1, 1.0, None),
    "attention_sink": (None, False),
    "attention_chunk_size": (None,),
    "attention_multiplier": (None,),
    "query_pre_attn_scalar": (None,),
    "use_qk_norm": (None, False),
    "clip_qkv": (None,),
    "no_rope_layers": (None,),
    "use_bidirectional_attention": (None, False),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "logit_scale": (None, 1, 1.0),
    "logits_scaling": (None, 1, 1.0),
    "embedding_multiplier": (None, 1, 1.0),
    "residual_multiplier": (None, 1, 1.0),
    "num_local_experts": (None, 0, 1),
    "mlp_layer_types": (None,),
    "pruned_heads": (None, {}),
    "per_layer_config": (None, {}),
    "attribute_map": (None, {}),
    "text_config": (None,),
    "transformers_weights": (None,),
    "configuration_files": (None,),
}
_LAYER_TYPES = {
    "full_attention": "full_attention",
    "sliding_attention": "sliding_attention",
    "attention": "full_attention",  # as it was called
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
    blocks_only: bool = False  # a machine's share of a model: another has embedding, norm and head

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


def model_type(raw: dict[str, Any]) -> Any:
    """What a config says it is; where it has no `model_type`, its first architecture's, or that."""
    listed = raw.get("architectures")
    first = listed[0] if isinstance(listed, list) and listed else None
    known = _ARCHITECTURES.get(first, first) if isinstance(first, str) else None
    return known if raw.get("model_type") is None else raw["model_type"]


def finite(value: Any) -> bool:
    """Whether it is a number, no bool, within float32 (JSON's whole numbers have no limit)."""
    return type(value) in (int, float) and abs(value) <= FLOAT32_MAX  # NaN is not


def _same(value: Any, other: Any) -> bool:
    """Equal as JSON: false is no 0."""
    return type(value) is type(other) and bool(value == other)


class _Reader:
    """Typed access to a raw config, every complaint with its place."""

    def __init__(self, raw: dict[str, Any], where: str) -> None:
        self.raw = raw
        self.where = where
        self.model_type = model_type(raw)
        if self.model_type not in MODEL_TYPES:
            if self.model_type is None:
                raise self.error("model_type is missing; it must be 'mistral' or 'llama'")
            raise self.error(
                f"architecture {shown(self.model_type)} is not supported; only 'mistral' and"
                " 'llama' are"
            )

    def error(self, text: str) -> ConfigError:
        return ConfigError(f"{self.where}: {text}")

    def integer(self, key: str, default: int | None = None, most: int | None = MOST) -> int:
        """`default` stands for a missing key, never for null."""
        value = self.raw.get(key, default)
        if value is None and key not in self.raw:
            raise self.error(f"{key} is missing")
        if type(value) is not int or value <= 0:
            raise self.error(f"{key} must be a positive whole number, not {shown(value)}")
        if most is not None and value > most:
            raise self.error(f"{key} is {shown(value)}; at most {most} is supported")
        return value

    def optional(self, key: str, default: int) -> int:
        """`default` stands for null too."""
        return default if self.raw.get(key) is None else self.integer(key)

    def tokens(self, key: str, default: int | None = None) -> int:
        """A number of tokens, at most MOST: no sequence can have more."""
        return min(MOST, self.integer(key, default, most=None))

    def number(self, key: str, value: Any, least: float) -> float:
        if type(value) not in (int, float):
            raise self.error(f"{key} must be a number, not {shown(value)}")
        if not finite(value) or value < least:
            bound = "above zero" if least else "not below zero"
            raise self.error(f"{key} must be finite in float32 and {bound}, not {shown(value)}")
        return float(value)

    def boolean(self, key: str) -> bool:
        value = self.raw.get(key, False)
        if not isinstance(value, bool):
            raise self.error(f"{key} must be true or false, not {shown(value)}")
        return value

    def token_ids(self, key: str, several: bool) -> tuple[int, ...]:
        """One id or none, or a list where there may be several. A negative id means none."""
        value = self.raw.get(key)
        ids = value if several and isinstance(value, list) else [] if value is None else [value]
        if any(type(i) is not int for i in ids):
            wanted = "a token id or a list of them" if several else "a token id"
            raise self.error(f"{key} must be {wanted}, not {shown(value)}")
        return tuple(i for i in ids if i >= 0)

    def rms_norm_eps(self) -> float:
        value = self.raw.get("rms_norm_eps", 1e-6)
        if type(value) is int:  # as transformers has it
            raise self.error(f"rms_norm_eps must be a number with a point, not {shown(value)}")
        return self.number("rms_norm_eps", value, least=0.0)

    def rope_theta(self) -> float:
        """From `rope_scaling`, else from `rope_parameters`, else from the top level: the first of
        the three that is there, as in transformers."""
        scaling, parameters = self.raw.get("rope_scaling") or None, self.raw.get("rope_parameters")
        for key, value in (("rope_scaling", scaling), ("rope_parameters", parameters)):
            if value is not None and not isinstance(value, dict):
                raise self.error(f"{key} must be an object, not {shown(value)}")
        key, rope = ("rope_scaling", scaling) if scaling else ("rope_parameters", parameters or {})
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default":
            raise self.error(f"{key} of type {shown(kind)} is not supported; only plain RoPE is")
        for name, value in rope.items():
            if isinstance(value, dict) or name in _LAYER_TYPES:
                raise self.error(f"{key} by layer type ({shown(name)}) is not supported")
        self.plain("partial_rotary_factor", rope, f"{key}.")
        if "rope_theta" in rope:
            return self.number(f"{key}.rope_theta", rope["rope_theta"], _FLOAT32_LEAST)
        return self.number("rope_theta", self.raw.get("rope_theta", 10000.0), _FLOAT32_LEAST)

    def window(self, blocks: int) -> int | None:
        """The window every block has: none where `layer_types` says full attention (transformers
        loads a Mistral that has the key as a Ministral), and none in a Llama."""
        kinds = self.layer_types(blocks)
        if len(kinds) > 1:
            raise self.error("layer_types mixes sliding and full attention, which is not supported")
        mistral = self.model_type == "mistral" and "sliding_window" not in self.raw
        null = self.raw.get("sliding_window") is None and not mistral
        window = None if null else self.tokens("sliding_window", 4096)
        if self.model_type == "llama" or "full_attention" in kinds:
            window = None
        if window is None and "sliding_attention" in kinds:
            raise self.error("layer_types says sliding_attention, but the model has no window")
        return window

    def layer_types(self, blocks: int) -> set[str]:
        listed = self.raw.get("layer_types")
        if listed is None:
            return set()
        if not isinstance(listed, list) or not all(isinstance(kind, str) for kind in listed):
            raise self.error("layer_types must be a list of names")
        if len(listed) != blocks:
            raise self.error(f"layer_types has {len(listed)} entries for {blocks} blocks")
        for kind in listed:
            if kind not in _LAYER_TYPES:
                raise self.error(f"layer_types has {shown(kind)}, which is not supported")
        return {_LAYER_TYPES[kind] for kind in listed}

    def layer_map(self, blocks: int) -> tuple[int, ...]:
        value = self.raw.get("layer_map")
        if value is None:
            return tuple(range(blocks))
        if not isinstance(value, list) or not value:
            raise self.error("layer_map must be a list of block numbers")
        if len(value) > MAX_POSITIONS:
            raise self.error(
                f"layer_map has {len(value)} positions; at most {MAX_POSITIONS} can run"
            )
        for position, block in enumerate(value):
            if type(block) is not int or not 0 <= block < blocks:
                raise self.error(
                    f"layer_map[{position}] is {shown(block)}; blocks are numbered 0 to"
                    f" {blocks - 1}"
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
            if not isinstance(pair, list) or len(pair) != 2 or not all(finite(x) for x in pair):
                raise self.error(
                    f"residual_scales[{position}] is {shown(pair)}, not two numbers within float32"
                )
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

    def plain(self, key: str, raw: dict[str, Any], place: str = "") -> None:
        if key in raw and not any(_same(raw[key], value) for value in _PLAIN[key]):
            raise self.error(f"{place}{key} = {shown(raw[key])} is not supported")

    def config(self) -> ModelConfig:
        for key in _PLAIN:
            self.plain(key, self.raw)
        version = self.raw.get("format_version", FORMAT_VERSION)
        if not _same(version, FORMAT_VERSION):
            raise self.error(
                f"format_version {shown(version)} is not {FORMAT_VERSION}: upgrade mlx-cerebrum"
            )
        mistral, llama = self.model_type == "mistral", self.model_type == "llama"
        heads = self.integer("num_attention_heads")
        if mistral:
            kv_heads = self.integer("num_key_value_heads", 8)
        else:
            kv_heads = self.optional("num_key_value_heads", heads)
        hidden = self.integer("hidden_size")
        if heads % kv_heads:
            raise self.error(
                f"num_key_value_heads: {heads} attention heads can't share {kv_heads} key/value"
                " heads evenly"
            )
        if llama and hidden % heads:  # Mistral rounds down
            raise self.error(f"hidden_size ({hidden}) is not a multiple of {heads} heads")
        head_dim = self.optional("head_dim", hidden // heads)
        if head_dim == 0 or head_dim % 2:
            raise self.error(f"head_dim must be even, not {head_dim}: RoPE turns pairs")
        blocks = self.integer("num_hidden_layers")
        if blocks > MAX_BLOCKS:  # before anything of that length is made
            raise self.error(f"num_hidden_layers is {blocks}; at most {MAX_BLOCKS} are supported")
        layer_map = self.layer_map(blocks)
        bos = self.token_ids("bos_token_id", several=False)
        dtype = self.raw.get("dtype", self.raw.get("torch_dtype"))
        return ModelConfig(
            model_type=str(self.model_type),
            hidden_size=hidden,
            num_hidden_layers=blocks,
            intermediate_size=self.integer("intermediate_size"),
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            rms_norm_eps=self.rms_norm_eps(),
            vocab_size=self.integer("vocab_size"),
            rope_theta=self.rope_theta(),
            max_position_embeddings=self.tokens("max_position_embeddings"),
            sliding_window=self.window(blocks),
            tie_word_embeddings=self.boolean("tie_word_embeddings"),
            dtype=dtype if isinstance(dtype, str) else None,
            bos_token_id=bos[0] if bos else None,
            eos_token_ids=self.token_ids("eos_token_id", several=True),
            layer_map=layer_map,
            residual_scales=self.residual_scales(len(layer_map)),
            quantization=self.quantization(),
        )
