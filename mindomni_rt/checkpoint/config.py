"""Model configuration: frozen dataclasses, read from the published JSON files, free of torch.

Source of every number in `published()`: the released configuration files (spec, section 1).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from ..errors import BadCheckpointError


def _known(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments for a dataclass from a plain mapping: lists become tuples, unknown keys are an error."""
    names = {f.name for f in fields(cls)}
    unknown = sorted(set(values) - names)
    if unknown:
        raise BadCheckpointError(f"{cls.__name__}: unknown keys {unknown}; known are {sorted(names)}")
    return {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding. kind: "plain", "mrope" (three axes, Qwen2.5-VL) or "longrope" (Phi-3)."""

    kind: str = "plain"
    theta: float = 10000.0
    mrope_section: tuple[int, ...] = ()
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    original_max_positions: int = 0
    max_positions: int = 32768

    def __post_init__(self) -> None:
        if self.kind not in ("plain", "mrope", "longrope"):
            raise BadCheckpointError(f"rope kind {self.kind!r}: expected plain, mrope or longrope")


@dataclass(frozen=True, kw_only=True)
class StackConfig:
    """A stack of transformer blocks: pre-norm RMSNorm, rotary attention, gated SiLU MLP."""

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    intermediate_size: int
    rms_norm_eps: float
    rope: RopeConfig
    qkv_bias: bool = False
    fused: bool = False  # qkv_proj and gate_up_proj as one matrix each (Phi-3 layout)

    def __post_init__(self) -> None:
        for name in ("hidden_size", "num_heads", "num_kv_heads", "intermediate_size"):
            if getattr(self, name) <= 0:
                raise BadCheckpointError(f"{name} = {getattr(self, name)}: expected a positive number")
        if self.hidden_size % self.num_heads or self.num_heads % self.num_kv_heads:
            raise BadCheckpointError(
                f"hidden_size {self.hidden_size}, {self.num_heads} heads, {self.num_kv_heads} KV heads do not divide"
            )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """Qwen2.5-VL's vision tower."""

    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    out_hidden_size: int
    patch_size: int = 14
    temporal_patch_size: int = 2
    merge_size: int = 2
    window_size: int = 112  # pixels
    full_attention_layers: tuple[int, ...] = ()
    in_channels: int = 3
    rms_norm_eps: float = 1e-6

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def patch_dim(self) -> int:
        return self.in_channels * self.temporal_patch_size * self.patch_size**2


@dataclass(frozen=True, kw_only=True)
class LanguageConfig:
    """Qwen2.5-VL's language model and the token ids the pipeline needs."""

    stack: StackConfig
    vocab_size: int
    max_positions: int
    image_token_id: int
    vision_start_token_id: int
    vision_end_token_id: int
    tie_embeddings: bool = False


@dataclass(frozen=True, kw_only=True)
class ConnectorConfig:
    """One Linear with bias, then a few blocks of the decoder's kind under a causal mask."""

    input_size: int
    stack: StackConfig


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """OmniGen's diffusion transformer."""

    stack: StackConfig
    latent_channels: int = 4
    patch_size: int = 2
    position_grid: int = 192  # patches a side of the position table: the largest image is 16 * 192 pixels
    position_base: int = 64
    time_frequencies: int = 256
    text_vocab_size: int = 0  # OmniGen's own text embedding: optional, used as a teacher in training


@dataclass(frozen=True, kw_only=True)
class VAEConfig:
    """diffusers' AutoencoderKL as SDXL uses it."""

    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    scaling_factor: float = 0.13025
    shift_factor: float = 0.0

    @property
    def downscale(self) -> int:
        return 2 ** (len(self.block_out_channels) - 1)


@dataclass(frozen=True, kw_only=True)
class ImageConfig:
    """preprocessor_config.json: how an input image becomes patches."""

    min_pixels: int = 4 * 28 * 28
    max_pixels: int = 16384 * 28 * 28
    image_mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """generation_config.json: when text ends and the penalty that greedy decoding applies too."""

    eos_token_ids: tuple[int, ...]
    repetition_penalty: float = 1.0


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """All of MindOmni."""

    vision: VisionConfig
    language: LanguageConfig
    connector: ConnectorConfig
    decoder: DecoderConfig
    vae: VAEConfig
    image: ImageConfig = field(default_factory=ImageConfig)
    generation: GenerationConfig
    edit_features: str = "vit"  # "vit+vae" on checkpoints trained with VAE features of the input image

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
                    },
                )
            )
        except (KeyError, TypeError) as error:
            raise BadCheckpointError(f"model configuration is incomplete: {error}") from error


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
