"""`mindomni train world FOLDER`: the world's autoencoder and its reward model, trained from scratch."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import torch

from mindomni_rt.commands import Parser
from mindomni_rt.outputs import check_target

from .clip import retrieval, save_clip, train_clip
from .vae import check_vae, save_vae, train_vae


def main(argv: Sequence[str] | None = None) -> int:
    """Trains both models; prints what they reach. Raises MindOmniError for mistakes that the user can mend."""
    parser = Parser(prog="mindomni train world", description=__doc__)
    parser.add_argument("folder", type=Path, help="gets vae/ and reward/")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vae-steps", type=int, default=2000)
    parser.add_argument("--only", choices=("vae", "reward"), help="make one of the two")
    options = parser.parse_args(argv)
    check_target(options.folder / "trial", "FOLDER")  # before minutes of training
    torch.set_num_threads(1)
    began = time.perf_counter()

    def tell(step: int, figures: dict[str, float]) -> None:
        shown = " ".join(f"{name} {value:.4f}" for name, value in figures.items())
        print(f"autoencoder step {step}: {shown} ({time.perf_counter() - began:.0f} s)", flush=True)

    if options.only != "reward":
        vae = train_vae(options.seed, options.vae_steps, report=tell)
        save_vae(vae, options.folder / "vae")
        print(f"autoencoder: the verifier reads {check_vae(vae)} of its pictures", flush=True)
    if options.only != "vae":
        clip = train_clip(options.seed)
        save_clip(clip, options.folder / "reward")
        print(f"reward model: retrieval {retrieval(clip):.3f} of 96 ({time.perf_counter() - began:.0f} s)")
    return 0
