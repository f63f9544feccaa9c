"""Names of the six stages, of the five parts whose weights they use, and the tile of the VAE: facts of all layers."""

from __future__ import annotations

STAGES = ("vision", "language", "connector", "prefix", "denoiser", "vae")
PARTS = ("vision", "language", "connector", "decoder", "vae")
PART_OF = {stage: "decoder" if stage in ("prefix", "denoiser") else stage for stage in STAGES}
VAE_TILE = 128
"""Latents a side that the VAE takes whole, 1024 pixels; larger images go through it in tiles."""
