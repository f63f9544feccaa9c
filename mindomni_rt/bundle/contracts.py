"""What every compiled graph takes and gives: names, axes, types, limits. Export, runtime, tests and docs read it here.

A stage is one graph, sometimes two or three: `language` also has `choose` (the greedy token, so that scores stay on the
device); `denoiser` also has `denoiser_first` (the condition_only first step) and `update` (guidance and the solver's
step, for runtimes that have no array library on the device); `connector` has `features` (VAE features of a reference
image); `vae` has `vae_encode`.

The decoder's graphs take the latent as patches (N, patch² · channels), in the order (row, column, channel) in which it
writes its velocity: then one axis, N, describes an image, and the sampler works on patches as well as on pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from ..checkpoint.config import ModelConfig
from ..errors import BadRequestError
from ..stages import STAGES as STAGES
from ..stages import VAE_TILE as TILE

OPSET = 24  # the first with TensorScatter, which updates a KV cache in place
# A masked score. Not -inf: a finite number is exact in every type here, and exp of it is 0 in all of them.
MASKED = -30000.0
DTYPE_BYTES = MappingProxyType({"float32": 4, "float16": 2, "bfloat16": 2, "int64": 8, "bool": 1})

OPTIONAL = frozenset(("denoiser_first", "features", "vae_encode"))
"""Graphs that a bundle may lack: those of a first step without guidance, and of VAE features of reference images."""

Axis = int | str
"""A fixed size, the name of a free axis ("sequence"), or a multiple of one ("4*merged")."""


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """One input or output. dtype "model" is the type that the bundle computes in."""

    name: str
    axes: tuple[Axis, ...]
    dtype: str = "model"

    def free(self) -> set[str]:
        """Names of the free axes."""
        return {split(axis)[1] for axis in self.axes if isinstance(axis, str)}


@dataclass(frozen=True, kw_only=True)
class GraphSpec:
    """One graph. in_place: (input, output) pairs that share memory. head_dim: of its attention, 0 without."""

    name: str
    stage: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    in_place: tuple[tuple[str, str], ...] = ()
    head_dim: int = 0

    def __post_init__(self) -> None:
        assert self.stage in STAGES
        names = [t.name for t in self.inputs + self.outputs]
        assert len(names) == len(set(names)), names

    def tensor(self, name: str) -> TensorSpec:
        return next(t for t in self.inputs + self.outputs if t.name == name)


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Sizes that an engine serves: for each free axis the least, the one it is tuned for, and the most."""

    name: str
    ranges: Mapping[str, tuple[int, int, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for axis, (low, best, high) in self.ranges.items():
            assert 0 < low <= best <= high, (axis, low, best, high)

    def shapes(self, tensor: TensorSpec) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """(least, tuned, most) shapes of a tensor."""
        return tuple(  # type: ignore[return-value]
            tuple(resolve(axis, {k: v[i] for k, v in self.ranges.items()}) for axis in tensor.axes) for i in range(3)
        )

    def check(self, graph: str, sizes: Mapping[str, int]) -> None:
        """Raises BadRequestError naming the axis, its size and the limits. Axes that the profile lacks are free."""
        for axis, size in sizes.items():
            low, _, high = self.ranges.get(axis, (0, 0, size))
            if not low <= size <= high:
                raise BadRequestError(
                    f"{graph}: {size} {axis}; this bundle (profile {self.name!r}) serves {low} to {high}. "
                    "Ask for less, or build a bundle with a larger profile"
                )


def decoding(spec: GraphSpec, profile: Profile) -> Profile | None:
    """Sizes of one token, for which the language graph is tuned besides: a prompt has hundreds of rows.

    None for the other graphs.
    """
    if spec.name != "language":
        return None
    one = dict.fromkeys(("sequence", "scores"), (1, 1, 1))
    return replace(profile, ranges={**profile.ranges, **one})


def split(axis: str) -> tuple[int, str]:
    """Factor and name: "4*merged" is (4, "merged"), "merged" is (1, "merged")."""
    factor, _, name = axis.rpartition("*")
    return int(factor or 1), name


def resolve(axis: Axis, sizes: Mapping[str, int]) -> int:
    """The size of an axis, given those of the free ones."""
    if isinstance(axis, int):
        return axis
    factor, name = split(axis)
    return factor * sizes[name]


def graph_specs(config: ModelConfig) -> dict[str, GraphSpec]:
    """All graphs of a model, by name."""
    language = (_vision(config), _language(config), _choose(config), *_connector(config))
    specs = (*language, _prefix(config), *_denoiser(config), *_vae(config))
    return {spec.name: spec for spec in specs}


def _vision(config: ModelConfig) -> GraphSpec:
    vision = config.vision
    half, group = vision.head_dim // 2, vision.merge_size**2
    window = (vision.window_size // vision.patch_size // vision.merge_size * vision.merge_size) ** 2
    patches = f"{group}*merged"
    return GraphSpec(
        name="vision",
        stage="vision",
        inputs=(
            TensorSpec(name="patches", axes=(patches, vision.patch_dim), dtype="float32"),
            TensorSpec(name="cos", axes=(patches, half), dtype="float32"),
            TensorSpec(name="sin", axes=(patches, half), dtype="float32"),
            TensorSpec(name="slots", axes=(f"{window}*windows",), dtype="int64"),
            TensorSpec(name="places", axes=(patches,), dtype="int64"),
            TensorSpec(name="mask", axes=("windows", 1, window, window), dtype="bool"),
        ),
        outputs=(TensorSpec(name="embeds", axes=("merged", vision.out_hidden_size)),),
        head_dim=vision.head_dim,
    )


def _language(config: ModelConfig) -> GraphSpec:
    stack = config.language.stack
    half = stack.head_dim // 2
    cache = (1, stack.num_kv_heads, "capacity", stack.head_dim)
    layers = [f"{i:02d}" for i in range(stack.num_layers)]
    return GraphSpec(
        name="language",
        stage="language",
        inputs=(
            TensorSpec(name="token_ids", axes=(1, "sequence"), dtype="int64"),
            # Row i of the sequence is row source[i] of [token embeddings | image_embeds].
            TensorSpec(name="source", axes=("sequence",), dtype="int64"),
            TensorSpec(name="image_embeds", axes=("images", stack.hidden_size)),
            TensorSpec(name="cos", axes=("sequence", half), dtype="float32"),
            TensorSpec(name="sin", axes=("sequence", half), dtype="float32"),
            TensorSpec(name="start", axes=(1,), dtype="int64"),
            # Rows of the sequence whose next token is asked for.
            TensorSpec(name="scored", axes=("scores",), dtype="int64"),
            *(TensorSpec(name=f"keys_{i}", axes=cache) for i in layers),
            *(TensorSpec(name=f"values_{i}", axes=cache) for i in layers),
        ),
        outputs=(
            TensorSpec(name="logits", axes=("scores", config.language.vocab_size), dtype="float32"),
            TensorSpec(name="hidden", axes=(1, "sequence", stack.hidden_size)),
            *(TensorSpec(name=f"new_keys_{i}", axes=cache) for i in layers),
            *(TensorSpec(name=f"new_values_{i}", axes=cache) for i in layers),
        ),
        in_place=tuple((f"{kind}_{i}", f"new_{kind}_{i}") for kind in ("keys", "values") for i in layers),
        head_dim=stack.head_dim,
    )


def _choose(config: ModelConfig) -> GraphSpec:
    scores = (1, config.language.vocab_size)
    return GraphSpec(
        name="choose",
        stage="language",
        inputs=(
            TensorSpec(name="logits", axes=scores, dtype="float32"),
            TensorSpec(name="seen", axes=scores, dtype="float32"),  # 1 for each token so far, 0 for the others
            TensorSpec(name="penalty", axes=(1,), dtype="float32"),
        ),
        outputs=(
            TensorSpec(name="token", axes=(1, 1), dtype="int64"),
            TensorSpec(name="new_seen", axes=scores, dtype="float32"),
        ),
        in_place=(("seen", "new_seen"),),
    )


def _connector(config: ModelConfig) -> tuple[GraphSpec, GraphSpec]:
    stack, latent = config.connector.stack, _latent(config)
    half = stack.head_dim // 2
    connector = GraphSpec(
        name="connector",
        stage="connector",
        inputs=(
            TensorSpec(name="hidden", axes=(1, "tokens", config.connector.input_size)),
            TensorSpec(name="cos", axes=("tokens", half), dtype="float32"),
            TensorSpec(name="sin", axes=("tokens", half), dtype="float32"),
        ),
        outputs=(TensorSpec(name="condition", axes=(1, "tokens", stack.hidden_size)),),
        head_dim=stack.head_dim,
    )
    features = GraphSpec(
        name="features",
        stage="connector",
        inputs=(
            TensorSpec(name="latents", axes=(1, "image_tokens", latent), dtype="float32"),
            TensorSpec(name="positions", axes=("image_tokens", stack.hidden_size)),
        ),
        outputs=(TensorSpec(name="features", axes=(1, "image_tokens", stack.hidden_size)),),
    )
    return connector, features


def _prefix(config: ModelConfig) -> GraphSpec:
    decoder, stack = config.decoder, config.decoder.stack
    half = stack.head_dim // 2
    keys = (stack.num_layers, 1, stack.num_kv_heads, "tokens", stack.head_dim)
    times = ("steps", stack.num_layers, 1, stack.num_kv_heads, stack.head_dim)
    return GraphSpec(
        name="prefix",
        stage="prefix",
        inputs=(
            TensorSpec(name="condition", axes=(1, "tokens", stack.hidden_size)),
            TensorSpec(name="features", axes=("steps", decoder.time_frequencies), dtype="float32"),
            TensorSpec(name="cos", axes=("tokens", half), dtype="float32"),
            TensorSpec(name="sin", axes=("tokens", half), dtype="float32"),
            TensorSpec(name="time_cos", axes=(1, half), dtype="float32"),
            TensorSpec(name="time_sin", axes=(1, half), dtype="float32"),
            TensorSpec(name="visible", axes=("tokens", "tokens"), dtype="bool"),
        ),
        outputs=(
            TensorSpec(name="keys", axes=keys),
            TensorSpec(name="values", axes=keys),
            TensorSpec(name="time_keys", axes=times),
            TensorSpec(name="time_values", axes=times),
            TensorSpec(name="modulation", axes=("steps", 2 * stack.hidden_size)),
        ),
        head_dim=stack.head_dim,
    )


def _denoiser(config: ModelConfig) -> tuple[GraphSpec, ...]:
    stack, latent = config.decoder.stack, _latent(config)
    half = stack.head_dim // 2
    image = ("batch", "image_tokens", latent)
    keys = (stack.num_layers, 1, stack.num_kv_heads, "tokens", stack.head_dim)
    times = (stack.num_layers, 1, stack.num_kv_heads, stack.head_dim)
    first = (
        TensorSpec(name="latents", axes=image, dtype="float32"),
        TensorSpec(name="keys", axes=keys),
        TensorSpec(name="values", axes=keys),
    )
    time = (TensorSpec(name="time_keys", axes=times), TensorSpec(name="time_values", axes=times))
    last = (
        TensorSpec(name="modulation", axes=(2 * stack.hidden_size,)),
        TensorSpec(name="cos", axes=("image_tokens", half), dtype="float32"),
        TensorSpec(name="sin", axes=("image_tokens", half), dtype="float32"),
        TensorSpec(name="positions", axes=("image_tokens", stack.hidden_size)),
    )
    velocity = (TensorSpec(name="velocity", axes=image, dtype="float32"),)
    common = {"stage": "denoiser", "outputs": velocity, "head_dim": stack.head_dim}
    # velocity = unguided + scale · (guided - unguided)
    # new_latents = latents + weight · velocity + previous_weight · previous
    update = GraphSpec(
        name="update",
        stage="denoiser",
        inputs=(
            *(TensorSpec(name=n, axes=image, dtype="float32") for n in ("latents", "guided", "unguided", "previous")),
            *(TensorSpec(name=n, axes=(1,), dtype="float32") for n in ("scale", "weight", "previous_weight")),
        ),
        outputs=(
            TensorSpec(name="new_latents", axes=image, dtype="float32"),
            TensorSpec(name="velocity", axes=image, dtype="float32"),
        ),
    )
    return (
        GraphSpec(name="denoiser", inputs=(*first, *time, *last), **common),  # type: ignore[arg-type]
        GraphSpec(name="denoiser_first", inputs=(*first, *last), **common),  # type: ignore[arg-type]
        update,
    )


def _vae(config: ModelConfig) -> tuple[GraphSpec, GraphSpec]:
    vae = config.vae
    factor = vae.downscale
    latents = (1, vae.latent_channels, "rows", "columns")
    pixels = (f"{factor}*rows", f"{factor}*columns")
    decode = GraphSpec(
        name="vae",
        stage="vae",
        inputs=(TensorSpec(name="latents", axes=latents, dtype="float32"),),
        outputs=(TensorSpec(name="pixels", axes=(1, vae.out_channels, *pixels), dtype="float32"),),
        head_dim=vae.block_out_channels[-1],
    )
    encode = GraphSpec(
        name="vae_encode",
        stage="vae",
        inputs=(TensorSpec(name="pixels", axes=(1, vae.in_channels, *pixels), dtype="float32"),),
        outputs=(TensorSpec(name="latents", axes=latents, dtype="float32"),),
        head_dim=vae.block_out_channels[-1],
    )
    return decode, encode


def _latent(config: ModelConfig) -> int:
    """Numbers in one latent patch."""
    return config.decoder.patch_size**2 * config.decoder.latent_channels


# Sizes by use. The reference image's tokens are capped at 1369 by default, a prompt with its template has about 100.
_SIDES = {"512": (256, 512, 512), "1024": (256, 1024, 1024), "any": (16, 1024, 3072)}
_CAPACITY = {"512": 2560, "1024": 2560, "any": 4096}
_IMAGE_EMBEDS = {"512": 1369, "1024": 1369, "any": 2560}
PROFILES = tuple(_SIDES)
MAX_SCORES = 17  # a chosen token and 16 drafts


def profile(name: str, config: ModelConfig) -> Profile:
    """The named profile for a model: "512" and "1024" are tuned for those images, "any" serves every size."""
    if name not in PROFILES:
        raise BadRequestError(f"profile {name!r}: expected one of {', '.join(PROFILES)}")
    low, best, high = ((side // 16) ** 2 for side in _SIDES[name])
    capacity = min(_CAPACITY[name], config.language.max_positions)
    embeds = min(_IMAGE_EMBEDS[name], capacity)
    prompt = min(320, capacity)
    least, tuned, most = (min(TILE, side // 8) for side in _SIDES[name])
    window = config.vision.window_size // config.vision.patch_size // config.vision.merge_size
    return Profile(
        name=name,
        ranges={
            "sequence": (1, prompt, capacity),
            "capacity": (capacity, capacity, capacity),
            "scores": (1, 1, MAX_SCORES),
            "images": (1, 1, embeds),
            "merged": (1, min(324, embeds), embeds),
            # One merged row makes the most windows of its tokens.
            "windows": (1, min(25, embeds), -(-embeds // window) + 1),
            "tokens": (2, prompt, capacity),
            "steps": (1, 50, 200),
            "image_tokens": (low if name != "any" else 1, best, high),
            "batch": (1, 1, 4),
            "rows": (least, tuned, most),
            "columns": (least, tuned, most),
        },
    )
