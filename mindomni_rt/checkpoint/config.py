"""Model configuration: frozen dataclasses, read from the published JSON files, free of torch.

Every field's type carries its limits, which `__post_init__` checks: a size that no machine holds is refused here,
before anything is allocated. Source of every number in `published()`: the released configuration files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Annotated, Any

from ..checks import Many, Number, OneOf, Whole, check_fields
from ..errors import BadCheckpointError

# Limits far above any model of this kind. They bound memory, not ambition.
Width = Annotated[int, Whole(1, 2**16)]
Wide = Annotated[int, Whole(1, 2**20)]
Count = Annotated[int, Whole(1, 1024)]
Positions = Annotated[int, Whole(1, 2**21)]
TokenId = Annotated[int, Whole(0, 2**22)]
Epsilon = Annotated[float, Number(0.0, 1.0, above=True)]
EDIT_FEATURES = ("vit", "vit+vae")
MAX_SIDE = 3072
MAX_STEPS = 1000
PIXELS = Whole(16, MAX_SIDE, step=16)
Side = Annotated[int, PIXELS]
Steps = Annotated[int, Whole(1, MAX_STEPS)]
Guidance = Annotated[float, Number(0, 1000)]
_FACTORS = Many(Number(0.0, 1e6, above=True), most=2**12)


class _Checked:
    """A configuration whose fields' limits are checked when it is made."""

    def __post_init__(self) -> None:
        check_fields(self, BadCheckpointError, f"{type(self).__name__}: ")

    def _require(self, holds: bool, message: str) -> None:
        if not holds:
            raise BadCheckpointError(f"{type(self).__name__}: {message}")


def _known(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments for a dataclass from a plain mapping: lists become tuples, unknown keys are an error."""
    names = {f.name for f in fields(cls)}
    unknown = sorted(set(values) - names)
    if unknown:
        raise BadCheckpointError(f"{cls.__name__}: unknown keys {unknown}; known are {sorted(names)}")
    return {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}


@dataclass(frozen=True, kw_only=True)
class RopeConfig(_Checked):
    """Rotary position embedding. kind: "plain", "mrope" (three axes, Qwen2.5-VL) or "longrope" (Phi-3)."""

    kind: Annotated[str, OneOf(("plain", "mrope", "longrope"))] = "plain"
    theta: Annotated[float, Number(1.0, 1e12, above=True)] = 10000.0
    mrope_section: Annotated[tuple[int, ...], Many(Whole(1, 2**12), most=3)] = ()
    short_factor: Annotated[tuple[float, ...], _FACTORS] = ()
    long_factor: Annotated[tuple[float, ...], _FACTORS] = ()
    original_max_positions: Annotated[int, Whole(0, 2**21)] = 0
    max_positions: Positions = 32768

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(
            self.kind != "longrope" or self.original_max_positions > 1,
            f"original_max_positions = {self.original_max_positions}: LongRoPE needs the context of its training",
        )


@dataclass(frozen=True, kw_only=True)
class StackConfig(_Checked):
    """A stack of transformer blocks: pre-norm RMSNorm, rotary attention, gated SiLU MLP."""

    hidden_size: Width
    num_layers: Annotated[int, Whole(0, 1024)]  # a connector without blocks is a linear map
    num_heads: Count
    num_kv_heads: Count
    intermediate_size: Wide
    rms_norm_eps: Epsilon
    rope: RopeConfig
    qkv_bias: bool = False
    fused: bool = False  # qkv_proj and gate_up_proj as one matrix each (Phi-3 layout)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(
            not self.hidden_size % (2 * self.num_heads) and not self.num_heads % self.num_kv_heads,
            f"hidden_size {self.hidden_size}, {self.num_heads} heads, {self.num_kv_heads} KV heads do not divide",
        )
        if self.rope.kind == "mrope":
            self._require(
                sum(self.rope.mrope_section) == self.head_dim // 2,
                f"mrope_section {self.rope.mrope_section}: expected a sum of head_dim / 2 = {self.head_dim // 2}",
            )
        for name in ("short_factor", "long_factor") if self.rope.kind == "longrope" else ():
            count = len(getattr(self.rope, name))
            self._require(
                count == self.head_dim // 2, f"{name} has {count} entries; expected head_dim / 2 = {self.head_dim // 2}"
            )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads


@dataclass(frozen=True, kw_only=True)
class VisionConfig(_Checked):
    """Qwen2.5-VL's vision tower."""

    hidden_size: Width
    num_layers: Count
    num_heads: Count
    intermediate_size: Wide
    out_hidden_size: Width
    patch_size: Annotated[int, Whole(1, 256)] = 14
    temporal_patch_size: Annotated[int, Whole(1, 16)] = 2
    merge_size: Annotated[int, Whole(1, 16)] = 2
    window_size: Annotated[int, Whole(1, 4096)] = 112  # pixels
    full_attention_layers: Annotated[tuple[int, ...], Many(Whole(0, 1023), most=1024)] = ()
    in_channels: Annotated[int, Whole(3, 3)] = 3
    rms_norm_eps: Epsilon = 1e-6

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(
            not self.hidden_size % (4 * self.num_heads),
            f"vision hidden_size {self.hidden_size}, {self.num_heads} heads: expected a head size divisible by 4",
        )
        self._require(
            self.window_size >= self.patch_size * self.merge_size,
            f"window_size = {self.window_size}: expected at least one merged patch, "
            f"{self.patch_size * self.merge_size} pixels",
        )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def patch_dim(self) -> int:
        return self.in_channels * self.temporal_patch_size * self.patch_size**2


@dataclass(frozen=True, kw_only=True)
class LanguageConfig(_Checked):
    """Qwen2.5-VL's language model and the token ids the pipeline needs."""

    stack: StackConfig
    vocab_size: Annotated[int, Whole(1, 2**22)]
    max_positions: Positions
    image_token_id: TokenId
    vision_start_token_id: TokenId
    vision_end_token_id: TokenId
    tie_embeddings: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("image_token_id", "vision_start_token_id", "vision_end_token_id"):
            value = getattr(self, name)
            self._require(value < self.vocab_size, f"{name} = {value}: expected below vocab_size = {self.vocab_size}")


@dataclass(frozen=True, kw_only=True)
class ConnectorConfig(_Checked):
    """One Linear with bias, then a few blocks of the decoder's kind under a causal mask."""

    input_size: Width
    stack: StackConfig


@dataclass(frozen=True, kw_only=True)
class DecoderConfig(_Checked):
    """OmniGen's diffusion transformer."""

    stack: StackConfig
    latent_channels: Annotated[int, Whole(1, 256)] = 4
    patch_size: Annotated[int, Whole(1, 64)] = 2
    position_grid: Count = 192  # patches a side of the position table: the largest image is 16 * 192 pixels
    position_base: Count = 64
    time_frequencies: Annotated[int, Whole(2, 2**16, step=2)] = 256
    text_vocab_size: Annotated[int, Whole(0, 2**22)] = (
        0  # OmniGen's own text embedding: optional, used as a teacher in training
    )


@dataclass(frozen=True, kw_only=True)
class VAEConfig(_Checked):
    """diffusers' AutoencoderKL as SDXL uses it."""

    block_out_channels: Annotated[tuple[int, ...], Many(Whole(1, 2**14), most=8, least=1)] = (128, 256, 512, 512)
    layers_per_block: Annotated[int, Whole(1, 64)] = 2
    norm_num_groups: Annotated[int, Whole(1, 2**14)] = 32
    in_channels: Annotated[int, Whole(3, 3)] = 3
    out_channels: Annotated[int, Whole(3, 3)] = 3
    latent_channels: Annotated[int, Whole(1, 256)] = 4
    scaling_factor: Annotated[float, Number(0.0, 1e6, above=True)] = 0.13025
    shift_factor: Annotated[float, Number(-1e6, 1e6)] = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(
            not any(channels % self.norm_num_groups for channels in self.block_out_channels),
            f"block_out_channels {self.block_out_channels}: expected multiples of norm_num_groups = "
            f"{self.norm_num_groups}",
        )

    @property
    def downscale(self) -> int:
        return 2 ** (len(self.block_out_channels) - 1)


@dataclass(frozen=True, kw_only=True)
class ImageConfig(_Checked):
    """preprocessor_config.json: how an input image becomes patches."""

    min_pixels: Annotated[int, Whole(1, 2**31)] = 4 * 28 * 28
    max_pixels: Annotated[int, Whole(1, 2**31)] = 16384 * 28 * 28
    image_mean: Annotated[tuple[float, ...], Many(Number(-1e3, 1e3), 3, 3)] = (0.48145466, 0.4578275, 0.40821073)
    image_std: Annotated[tuple[float, ...], Many(Number(0, 1e3, above=True), 3, 3)] = (
        0.26862954,
        0.26130258,
        0.27577711,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(
            self.min_pixels <= self.max_pixels,
            f"min_pixels = {self.min_pixels}: expected at most max_pixels = {self.max_pixels}",
        )


@dataclass(frozen=True, kw_only=True)
class GenerationConfig(_Checked):
    """generation_config.json: when text ends and the penalty that greedy decoding applies too."""

    eos_token_ids: Annotated[tuple[int, ...], Many(Whole(0, 2**22), most=4096, least=1)]
    repetition_penalty: Annotated[float, Number(0.0, 1e3, above=True)] = 1.0


@dataclass(frozen=True, kw_only=True)
class RecommendedConfig(_Checked):
    """What a request takes where it leaves a setting unset. The defaults are the published model's.

    trained_sides: the least and the most pixels a side that the model was trained for; None where that is not known.
    """

    width: Side = 1024
    height: Side = 1024
    num_inference_steps: Steps = 50
    guidance_scale: Guidance = 3.0
    trained_sides: Annotated[tuple[int, int] | None, Many(PIXELS, 2, 2)] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.trained_sides is not None:
            low, high = self.trained_sides
            self._require(low <= high, f"trained_sides = [{low}, {high}]: expected the least first")
            self._require(
                all(low <= side <= high for side in (self.width, self.height)),
                f"width = {self.width}, height = {self.height}: expected within trained_sides = [{low}, {high}]",
            )

    def covers(self, width: int, height: int) -> bool:
        """Whether the model was trained for a size; True where that is not known."""
        return self.trained_sides is None or all(
            self.trained_sides[0] <= side <= self.trained_sides[1] for side in (width, height)
        )

    def __str__(self) -> str:
        text = f"{self.width}x{self.height}, {self.num_inference_steps} steps, guidance {self.guidance_scale:g}"
        return text if self.trained_sides is None else f"{text}; {self.range()}"

    def range(self) -> str:
        """The sizes that the model was trained for, in words."""
        assert self.trained_sides is not None
        low, high = self.trained_sides
        return f"trained for sides of {low} pixels" if low == high else f"trained for sides of {low} to {high} pixels"


PUBLISHED = RecommendedConfig()


@dataclass(frozen=True, kw_only=True)
class ModelConfig(_Checked):
    """All of MindOmni."""

    vision: VisionConfig
    language: LanguageConfig
    connector: ConnectorConfig
    decoder: DecoderConfig
    vae: VAEConfig
    image: ImageConfig = field(default_factory=ImageConfig)
    generation: GenerationConfig
    edit_features: Annotated[str, OneOf(EDIT_FEATURES)] = "vit"  # "vit+vae": trained with VAE features of the input
    recommended: RecommendedConfig = field(default_factory=RecommendedConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        for what, found, expected in (
            ("vision out_hidden_size", self.vision.out_hidden_size, self.language.stack.hidden_size),
            ("connector hidden_size", self.connector.stack.hidden_size, self.decoder.stack.hidden_size),
            ("connector input_size", self.connector.input_size, self.language.stack.hidden_size),
            ("VAE latent_channels", self.vae.latent_channels, self.decoder.latent_channels),
        ):
            self._require(found == expected, f"{what} = {found}: expected {expected}, as in the part that it meets")
        self._require(
            self.decoder.stack.hidden_size % 4 == 0,
            f"decoder hidden_size = {self.decoder.stack.hidden_size}: expected a multiple of 4 for its position table",
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-able data; `from_dict` reads it back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ModelConfig:
        def stack(d: Mapping[str, Any]) -> StackConfig:
            return StackConfig(**_known(StackConfig, {**d, "rope": RopeConfig(**_known(RopeConfig, d["rope"]))}))

        def with_stack(kind: Any, d: Mapping[str, Any]) -> Any:
            return kind(**_known(kind, {**d, "stack": stack(d["stack"])}))

        try:
            return cls(
                **_known(
                    cls,
                    {
                        **data,
                        "vision": VisionConfig(**_known(VisionConfig, data["vision"])),
                        "language": with_stack(LanguageConfig, data["language"]),
                        "connector": with_stack(ConnectorConfig, data["connector"]),
                        "decoder": with_stack(DecoderConfig, data["decoder"]),
                        "vae": VAEConfig(**_known(VAEConfig, data["vae"])),
                        "image": ImageConfig(**_known(ImageConfig, data["image"])),
                        "generation": GenerationConfig(**_known(GenerationConfig, data["generation"])),
                        "recommended": recommended_config(data.get("recommended", {})),
                    },
                )
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise BadCheckpointError(f"model configuration is incomplete: {error}") from error


def recommended_config(data: Mapping[str, Any]) -> RecommendedConfig:
    """From plain data; what is absent is the published model's. Raises BadCheckpointError."""
    return RecommendedConfig(**_known(RecommendedConfig, data))


def published() -> ModelConfig:
    """The published sizes: Qwen2.5-VL-7B, a two-layer connector, OmniGen 3.8 B, SDXL's VAE.

    The 48 LongRoPE factors live in the checkpoint's own config; ones stand here, so cost, memory and shapes are
    exact and positions are not.
    """
    longrope = RopeConfig(
        kind="longrope",
        theta=10000.0,
        short_factor=(1.0,) * 48,
        long_factor=(1.0,) * 48,
        original_max_positions=4096,
        max_positions=131072,
    )
    phi3 = dict(
        hidden_size=3072, num_heads=32, num_kv_heads=32, intermediate_size=8192, rms_norm_eps=1e-5, rope=longrope
    )
    qwen = StackConfig(
        hidden_size=3584,
        num_layers=28,
        num_heads=28,
        num_kv_heads=4,
        intermediate_size=18944,
        rms_norm_eps=1e-6,
        qkv_bias=True,
        rope=RopeConfig(kind="mrope", theta=1e6, mrope_section=(16, 24, 24), max_positions=128000),
    )
    return ModelConfig(
        vision=VisionConfig(
            hidden_size=1280,
            num_layers=32,
            num_heads=16,
            intermediate_size=3420,
            out_hidden_size=3584,
            full_attention_layers=(7, 15, 23, 31),
        ),
        language=LanguageConfig(
            stack=qwen,
            vocab_size=152064,
            max_positions=128000,
            image_token_id=151655,
            vision_start_token_id=151652,
            vision_end_token_id=151653,
        ),
        connector=ConnectorConfig(input_size=3584, stack=StackConfig(num_layers=2, fused=True, **phi3)),  # type: ignore[arg-type]
        decoder=DecoderConfig(stack=StackConfig(num_layers=32, fused=True, **phi3)),  # type: ignore[arg-type]
        vae=VAEConfig(),
        image=ImageConfig(min_pixels=3136, max_pixels=12845056),
        generation=GenerationConfig(eos_token_ids=(151645, 151643), repetition_penalty=1.05),
    )
