"""The node `mindomni::SegmentAttention`: what graphs, plugin and engines agree on. Needs neither torch nor triton."""

from __future__ import annotations

DOMAIN, NAME = "mindomni", "SegmentAttention"
VERSION = 1
INPUTS = ("q", "condition_k", "condition_v", "time_k", "time_v", "image_k", "image_v")
OUTPUT = "joined"
