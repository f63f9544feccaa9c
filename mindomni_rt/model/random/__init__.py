"""Checkpoints of random weights at the published sizes, to rehearse every command before the download."""
