"""The token loop: the only one, for every backend, with and without drafts."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from ..backends.base import LanguageSession
from .denoise import check
from .drafts import PromptLookup, accepted


def generate_tokens(session: LanguageSession) -> Iterator[int]:
    """Token ids as they are chosen, the end-of-text token too. Raises GenerationCancelled.

    With draft_tokens each step verifies a guess of what follows, and has to be read before the next guess. Without,
    up to `session.lag` steps are queued before the first is read, so that the device never waits for the host.
    """
    request, written = session.request, 0
    lookup = PromptLookup([int(t) for t in request.token_ids]) if request.draft_tokens else None
    lag = 1 if lookup else session.lag
    queued: deque[list[int]] = deque()  # the draft of each step that is not yet read
    check(request.cancel)
    while written < session.room:
        while written + len(queued) < session.room and len(queued) < lag:
            draft: list[int] = []
            if lookup and written:
                draft = lookup.draft(min(request.draft_tokens, session.room - written - 1))
            session.advance(draft)
            queued.append(draft)
        draft, chosen = queued.popleft(), session.read()
        chosen = chosen[: accepted(draft, chosen) + 1]
        session.keep(len(chosen))
        for token in chosen:
            written += 1
            if lookup:
                lookup.push(token)
            yield token
            check(request.cancel)
            if token in request.eos_token_ids:
                return
