"""A synthetic world with exact answers: 1 to 6 equal things on a white square, arranged like the pips of a die.

Small enough to learn on two CPU cores, and drawn at a size that goes through the real VAE and the real 16-pixel tokens.
"""

from .text import words

__all__ = ["words"]
