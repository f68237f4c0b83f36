"""mergekit's passthrough configuration: what of it is accepted, and what it means.

What has one meaning, with one source model, is accepted; what mergekit would ignore or drop
(reversed ranges, unknown or repeated keys, NaN) is refused.
"""

from dataclasses import dataclass, field

from mlx_cerebrum.errors import PlanError
from mlx_cerebrum.plan.yaml_places import Item

DTYPES = ("float32", "float16", "bfloat16")
_TOP = (
    *("merge_method", "slices", "models", "modules", "dtype", "out_dtype", "parameters"),
    *("base_model", "tokenizer_source", "tokenizer", "chat_template"),
    "name",  # mergekit-multi's, of one of a file's several documents
)


@dataclass(frozen=True)
class Scale:
    """One `parameters.scale`: the first entry whose filter is in the tensor's name decides.

    entries: (filter, values); filter None or "*" takes every tensor, and several values are a
        gradient over the slice's layers.
    """

    entries: tuple[tuple[str | None, tuple[float, ...]], ...]
    place: str
    # What `entries` hold for a tensor, by its name: a search among thousands would take minutes.
    _found: dict[str, tuple[float, ...] | None] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def value(self, name: str, t: float) -> float | None:
        """The factor for a source tensor at `t` (0 to 1) of the way through its slice."""
        if name not in self._found:
            self._found[name] = next(
                (vs for pattern, vs in self.entries if pattern in (None, "*") or pattern in name),
                None,
            )
        values = self._found[name]
        if values is None:
            return None
        at = t * (len(values) - 1)
        low = int(at)
        high = min(low + 1, len(values) - 1)
        return (1 - (at - low)) * values[low] + (at - low) * values[high]


@dataclass(frozen=True)
class Slice:
    """A run of source blocks, `layer_range` half-open; None is the whole model.

    scales: the settings that reach this slice, the nearest (source, then slice, module, top)
        first; one that has no entry for a tensor leaves it to the next.
    """

    layer_range: tuple[int, int] | None
    scales: tuple[Scale, ...]
    place: str

    def bounds(self, num_blocks: int) -> tuple[int, int]:
        """`layer_range` within a model of `num_blocks`. Raises PlanError past its end."""
        start, end = self.layer_range or (0, num_blocks)
        if end > num_blocks:
            raise PlanError(
                f"{self.place}: [{start}, {end}] ends past the model's {num_blocks} blocks"
            )
        return start, end

    def scale(self, name: str, t: float) -> tuple[float, Scale] | None:
        """The factor for a source tensor and the setting it comes from, or None."""
        for scale in self.scales:
            value = scale.value(name, t)
            if value is not None:
                return value, scale
        return None


@dataclass(frozen=True)
class Merge:
    """A configuration as read: the source's name (never opened) and what to do with it."""

    source: str
    slices: tuple[Slice, ...]
    dtype: str | None
    out_dtype: str | None
    tokenizer_source: bool


def read(root: Item) -> Merge:
    """Read a passthrough configuration. Raises PlanError with the place of what is wrong."""
    return _Reader().merge(root)


class _Reader:
    def __init__(self) -> None:
        self.source: str | None = None

    def merge(self, root: Item) -> Merge:
        keys = root.mapping(*_TOP)
        method = root.require(keys, "merge_method")
        if method.text() != "passthrough":
            raise method.error(f"{method.shown()} is not supported; a layer plan is a passthrough")
        dtypes = [self.dtype(keys.get(key)) for key in ("dtype", "out_dtype")]
        top = self.scales(keys)
        if "modules" in keys:
            self.only_one_of(keys, "modules")
            modules = keys["modules"].mapping("default")
            module = keys["modules"].require(modules, "default")
            inner = module.mapping("slices", "models", "parameters")
            slices = self.slices(module, inner, self.scales(inner) + top)
        else:
            slices = self.slices(root, keys, top)
        rebuilt = self.tokenizer(keys)
        self.same_source(keys.get("base_model"))
        if "name" in keys:
            keys["name"].text()
        template = keys.get("chat_template")
        if template and template.text() != "auto":
            raise template.error("only 'auto' (the source's own template) can be honoured")
        assert self.source is not None  # every slice names it
        return Merge(self.source, slices, dtypes[0], dtypes[1], rebuilt)

    def only_one_of(self, keys: dict[str, Item], kept: str) -> None:
        for other in ("slices", "models", "modules"):
            if other in keys and other != kept:
                raise keys[other].error(f"stands beside {kept}; only one of them may be given")

    def slices(
        self, parent: Item, keys: dict[str, Item], outer: tuple[Scale, ...]
    ) -> tuple[Slice, ...]:
        if "models" in keys:
            self.only_one_of(keys, "models")
            models = keys["models"].sequence()
            for model in models[1:]:
                raise model.error("a second model; a layer plan has one source model")
            return (self.source_slice(models[0], outer, whole=True),)
        if "slices" not in keys:
            raise parent.error("no slices; a plan lists the layer ranges to run under slices")
        return tuple(self.slice(item, outer) for item in keys["slices"].sequence())

    def slice(self, item: Item, outer: tuple[Scale, ...]) -> Slice:
        keys = item.mapping("sources", "parameters", "base_model")
        sources = item.require(keys, "sources").sequence()
        for source in sources[1:]:
            raise source.error("a second source in one slice; passthrough copies exactly one")
        part = self.source_slice(sources[0], self.scales(keys) + outer)
        self.same_source(keys.get("base_model"))
        return part

    def source_slice(self, item: Item, outer: tuple[Scale, ...], whole: bool = False) -> Slice:
        keys = item.mapping("model", "parameters", *([] if whole else ["layer_range"]))
        self.same_source(item.require(keys, "model"))
        scales = self.scales(keys) + outer
        if whole:
            return Slice(None, scales, item.place)
        layer_range = item.require(keys, "layer_range")
        return Slice(self.layer_range(layer_range), scales, layer_range.place)

    def layer_range(self, item: Item) -> tuple[int, int]:
        ends = item.sequence()
        if len(ends) != 2:
            raise item.error(f"must be two whole numbers [start, end), not {len(ends)}")
        start, end = (number.integer() for number in ends)
        if start < 0:
            raise item.error(f"[{start}, {end}] starts below block 0")
        if start == end:
            raise item.error(f"[{start}, {end}] is empty: the end is not included")
        if start > end:
            raise item.error(f"[{start}, {end}] runs backwards; write [{end}, {start}]")
        return start, end

    def same_source(self, item: Item | None) -> None:
        """The one source model's name; a second name is refused."""
        if item is None:
            return
        name = self.model_name(item)
        if self.source not in (None, name):
            raise item.error(
                f"{name!r} is a second model beside {self.source!r}; a plan has one source model"
            )
        self.source = name

    def model_name(self, item: Item) -> str:
        """`path`, `path@revision`, or mergekit's mapping `{model: {path:, revision:}}`."""
        if item.kind != "map":
            name = item.text()
            if "+" in name:
                raise item.error("names an adapter after '+'; merge it into the model first")
            return name
        keys = item.mapping("model", "lora", "override_architecture")
        inner = item.require(keys, "model")
        if "lora" in keys:
            raise keys["lora"].error("names an adapter; merge it into the model first")
        if "override_architecture" in keys:
            raise keys["override_architecture"].error("can't be honoured; remove it")
        if inner.kind != "map":
            return self.model_name(inner)
        parts = inner.mapping("path", "revision")
        path = inner.require(parts, "path").text()
        return f"{path}@{parts['revision'].text()}" if "revision" in parts else path

    def tokenizer(self, keys: dict[str, Item]) -> bool:
        """Whether the tokenizer is made anew: `tokenizer_source`, or `tokenizer` in its place.

        With one source model, its tokenizer is also the union's and the base's.
        """
        source = keys.get("tokenizer_source")
        if "tokenizer" in keys:
            if source is not None:
                raise keys["tokenizer"].error("stands beside tokenizer_source; give one of them")
            parts = keys["tokenizer"].mapping("source", "tokens", "pad_to_multiple_of")
            source, tokens, pad = map(parts.get, ("source", "tokens", "pad_to_multiple_of"))
            # Rows of the embedding can be neither added nor computed.
            if tokens and not (tokens.kind == "map" and not tokens.node.value):
                raise tokens.error("adds or replaces tokens, which a layer plan can't; remove it")
            if pad and pad.integer() not in (0, 1):
                raise pad.error("adds rows to the embedding, which a layer plan can't; remove it")
        if source and not (source.kind == "str" and source.text() in ("base", "union")):
            self.same_source(source)
        return "tokenizer" in keys or source is not None

    def dtype(self, item: Item | None) -> str | None:
        if item is None:
            return None
        name = item.text().removeprefix("torch.")
        if name not in DTYPES:
            raise item.error(f"{item.shown()} is not one of {', '.join(DTYPES)}")
        return name

    def scales(self, keys: dict[str, Item]) -> tuple[Scale, ...]:
        """The `parameters` of one level: none, or one Scale."""
        if "parameters" not in keys:
            return ()
        parameters = keys["parameters"].mapping("scale")
        if "scale" not in parameters:
            raise keys["parameters"].error("holds no scale, the one parameter of a passthrough")
        item = parameters["scale"]
        if any(each.kind == "map" for each in _listed(item)):
            entries = tuple(self.entry(each) for each in _listed(item))
        else:
            entries = ((None, self.numbers(item)),)
        return (Scale(entries, item.place),)

    def entry(self, item: Item) -> tuple[str | None, tuple[float, ...]]:
        keys = item.mapping("filter", "value")
        pattern = keys["filter"].text() if "filter" in keys else None
        return pattern, self.numbers(item.require(keys, "value"))

    def numbers(self, item: Item) -> tuple[float, ...]:
        """A number, or the list of numbers that makes a gradient."""
        return tuple(value.number() for value in _listed(item))


def _listed(item: Item) -> list[Item]:
    return item.sequence() if item.kind == "seq" else [item]
