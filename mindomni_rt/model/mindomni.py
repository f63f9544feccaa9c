"""The five modules together, and how tensors of a checkpoint become them."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch import Tensor, nn

from ..checkpoint.config import ModelConfig
from ..checkpoint.layout import PARTS, Checkpoint, LoadReport, TensorEntry, open_checkpoint
from ..errors import BadCheckpointError
from .connector import Connector
from .decoder import DiffusionDecoder
from .language import LanguageModel
from .pickled import read_pickled
from .vae import AutoencoderKL
from .vision import VisionTower

logger = logging.getLogger(__name__)

# Tensors that a checkpoint may lack as a whole group, and what is lost without them.
_OPTIONAL = {
    ("decoder", "input_x_embedder."): "VAE features of a reference image (edit_features='vit+vae')",
    ("vae", "encoder."): "encoding images to latents",
    ("vae", "quant_conv."): "encoding images to latents",
}


class MindOmniModel(nn.Module):
    """MindOmni: `vision`, `language`, `connector`, `decoder` (prefix and denoiser) and `vae`.

    Construct under `torch.device("meta")` for shapes alone. `load_model` fills it from a checkpoint.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.vision = VisionTower(config.vision)
        self.language = LanguageModel(config.language)
        self.connector = Connector(config.connector)
        self.decoder = DiffusionDecoder(config.decoder)
        self.vae = AutoencoderKL(config.vae)


def load_model(
    path: Path | Checkpoint,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    vae_dtype: torch.dtype | None = None,
) -> tuple[MindOmniModel, LoadReport]:
    """A checkpoint folder as modules in eval mode without gradients, and what the load did.

    dtype None keeps the stored one; on the CPU such tensors stay mapped to the file until touched. vae_dtype is
    dtype unless given. Raises BadCheckpointError naming file, tensor, expected and found; never loads partially.
    """
    checkpoint = path if isinstance(path, Checkpoint) else open_checkpoint(Path(path))
    report = LoadReport(str(checkpoint.path), computed=list(checkpoint.computed), unused=list(checkpoint.unused))
    with torch.device("meta"):
        model = MindOmniModel(checkpoint.config)
    for part in PARTS:
        module: nn.Module = getattr(model, part)
        entries = dict(checkpoint.tensors[part])
        _drop_absent(part, module, entries, report)
        if part == "language" and checkpoint.config.language.tie_embeddings:
            entries.pop("lm_head.weight", None)  # the tie decides, as in transformers
            report.computed.append("language.lm_head.weight (tied)")
        _check(part, module, entries, report, checkpoint)
        state = _read(entries, vae_dtype or dtype if part == "vae" else dtype, device)
        module.load_state_dict(state, strict=False, assign=True)
        report.read[part] = len(state)
        report.bytes[part] = sum(t.numel() * t.element_size() for t in state.values())
    if checkpoint.config.language.tie_embeddings:
        model.language.lm_head.weight = model.language.embed_tokens.weight
    left = [name for name, p in model.named_parameters() if p.is_meta]
    if left:
        raise BadCheckpointError(f"{checkpoint.path}: nothing was loaded for {left[0]}")
    if report.unused:
        logger.warning("%d tensors of %s have no use here: %s …", len(report.unused), report.path, report.unused[0])
    return model.eval().requires_grad_(False), report


def _drop_absent(part: str, module: nn.Module, entries: dict[str, TensorEntry], report: LoadReport) -> None:
    """Removes optional submodules of which the checkpoint has no tensor at all."""
    for (owner, prefix), purpose in _OPTIONAL.items():
        if owner == part and not any(name.startswith(prefix) for name in entries):
            setattr(module, prefix.removesuffix("."), None)
            report.absent.append(f"{part}.{prefix}* ({purpose})")


def _check(
    part: str, module: nn.Module, entries: dict[str, TensorEntry], report: LoadReport, checkpoint: Checkpoint
) -> None:
    wanted = {name: tuple(t.shape) for name, t in module.state_dict().items()}
    if part == "language" and checkpoint.config.language.tie_embeddings:
        wanted.pop("lm_head.weight")
    files = sorted({str(e.file) for e in entries.values()}) or [str(checkpoint.path)]
    for name, shape in wanted.items():
        if name not in entries:
            raise BadCheckpointError(f"{files[0]}: tensor {name} of {part} is missing; expected shape {shape}")
        found = entries[name]
        if found.shape != shape:
            raise BadCheckpointError(f"{found.file}: tensor {found.key} has shape {found.shape}; expected {shape}")
        if found.dtype not in ("F32", "F16", "BF16", "F64"):
            raise BadCheckpointError(f"{found.file}: tensor {found.key} is {found.dtype}; expected F32, F16 or BF16")
    for name in sorted(set(entries) - set(wanted)):
        report.unused.append(f"{part}.{name}")
        del entries[name]


def _read(entries: dict[str, TensorEntry], dtype: torch.dtype | None, device: torch.device | str) -> dict[str, Tensor]:
    from safetensors import SafetensorError, safe_open

    state: dict[str, Tensor] = {}
    for path in sorted({e.file for e in entries.values()}):
        here = {name: e for name, e in entries.items() if e.file == path}
        if path.suffix == ".pt":
            tensors = read_pickled(path)
            state.update({name: tensors[e.key].to(device, dtype) for name, e in here.items()})
            continue
        try:
            with safe_open(path, framework="pt") as file:
                state.update({name: file.get_tensor(e.key).to(device, dtype) for name, e in here.items()})
        except (SafetensorError, OSError) as error:
            raise BadCheckpointError(f"{path} could not be read: {error}") from error
    return state
