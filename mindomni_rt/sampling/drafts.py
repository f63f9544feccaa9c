"""Guessing ahead: tokens that followed the same words before, verified by the model in one pass.

The model's own choice at every place decides; a guess only saves the passes for places where it was right. The text is
the one that decoding token by token gives (up to the rounding of a pass over several rows, where it has one). Free of
torch.
"""

from __future__ import annotations

from collections.abc import Sequence

LONGEST = 3  # words of context that a guess must share


class PromptLookup:
    """Drafts the continuation of the last place where the text's latest n tokens stood before, longest n first."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self._tokens: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}  # n-gram -> where its latest earlier occurrence ends
        self._before: dict[tuple[int, ...], int] = {}
        for token in tokens:
            self.push(token)

    def push(self, token: int) -> None:
        """Adds a token of the prompt or the text."""
        self._tokens.append(token)
        end = len(self._tokens)
        for size in range(1, LONGEST + 1):
            if end >= size:
                gram = tuple(self._tokens[end - size :])
                if gram in self._after:
                    self._before[gram] = self._after[gram]
                self._after[gram] = end

    def draft(self, count: int) -> list[int]:
        """At most `count` tokens; none when nothing matches."""
        for size in range(LONGEST, 0, -1):
            gram = tuple(self._tokens[-size:])
            end = self._before.get(gram) if len(gram) == size else None
            if end is not None:
                return self._tokens[end : end + count]
        return []


def accepted(draft: Sequence[int], chosen: Sequence[int]) -> int:
    """How many drafted tokens the model chose too, from the first on. chosen: one more than the draft."""
    count = 0
    while count < len(draft) and draft[count] == chosen[count]:
        count += 1
    return count
