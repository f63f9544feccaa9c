"""Mutant k of seed s: which kind it is, and the change itself."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from dataclasses import replace

from . import graphs, options, pictures, places, values, weights, words
from .asked import reason
from .change import Change, Mutant, Random
from .sources import Source

Maker = Callable[[Random, Source], Change]
TARGETS = {"bundle": 36, "checkpoint": 30, "options": 20, "pictures": 14}  # of a hundred
SHARDED = {"file name": places.renamed}
PICKLED = {"pickled weights": weights.pickled}
SLOW = {"vocabulary files": words.slow_files}


def json_change(make: Callable[[Random, object], values.Result]) -> Maker:
    def change(rng: Random, source: Source) -> Change:
        files = [name for name in sorted(source.files) if name.endswith(".json")]
        manifests = ["manifest.json"] * 8 if source.is_bundle else []
        name = rng.choice([*files, *manifests])
        text, at, old, new = make(rng, json.loads(source.files[name]))
        asked = "another tokenizer" if _of_tokenizer(name) else reason(name, at, old, new)
        note = f"{name}: {'.'.join(map(str, at))[:80]} from {str(old)[:40]!r} to {str(new)[:40]!r}"
        return Change(files={name: text}, note=note, asked=asked)

    return change


def _of_tokenizer(name: str) -> bool:
    return name.endswith(
        ("tokenizer.json", "vocab.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.json")
    )


def json_bytes(rng: Random, source: Source) -> Change:
    name = rng.choice([name for name in sorted(source.files) if name.endswith(".json")])
    text, *_ = values.bytes_changed(rng, None, source.files[name])
    # A changed digit or key is another setting; which one is not followed here.
    asked = "" if name == "manifest.json" else "other bytes"
    return Change(files={name: text}, note=f"{name}: bytes changed", asked=asked)


JSON: dict[str, Maker] = {kind: json_change(make) for kind, make in values.MUTATIONS.items()}
BOTH: dict[str, Maker] = {**JSON, "json bytes": json_bytes, "tokenizer parts": words.tokenizer, **words.FOR_ALL,
                          "numbers": weights.numbers, "bytes": places.noise}  # fmt: skip
FOLDERS = {kind: make for kind, make in places.MUTATIONS.items() if kind != "file name"}
KINDS: Mapping[str, Mapping[str, Maker | None]] = {
    "bundle": {**BOTH, **FOLDERS, **SHARDED, **graphs.MUTATIONS},
    "checkpoint": {**BOTH, **FOLDERS, **weights.MUTATIONS, **SHARDED, **PICKLED, **SLOW},
    "options": dict.fromkeys(options.KINDS),
    "pictures": dict.fromkeys(pictures.MUTATIONS),
}
# Kinds with many places to change are drawn more often.
OFTEN = {"json type": 5, "json number": 5, "json text": 2, "json key": 3, "json list": 2, "template hostile": 4, "template edited": 2,
         "tokenizer parts": 3, "graph node": 3, "graph attribute": 3, "graph tensor": 3, "graph bytes": 2, "tensor names": 2,
         "tensor shape": 2, "tensor offsets": 2}  # fmt: skip


def kinds() -> list[str]:
    """All kinds of mutations, as the record names them."""
    return sorted(f"{target}, {kind}" for target, found in KINDS.items() for kind in found)


def make(sources: Mapping[str, Source], seed: int, number: int) -> Mutant:
    """The same mutant whenever it is asked for."""
    rng = random.Random(f"{seed}/{number}")
    target = rng.choices(list(TARGETS), list(TARGETS.values()))[0]
    if target == "options":
        return options.make(rng, seed, number)
    found = KINDS[target]
    kind = rng.choices(list(found), [OFTEN.get(k, 1) for k in found])[0]
    if target == "pictures":
        return pictures.make(rng, kind, seed, number)
    source = sources[_source(rng, target, kind)]
    maker = found[kind]
    assert maker is not None
    change = maker(rng, source)
    if not change.needs_image:
        change = replace(change, needs_image=rng.random() < (0.5 if "processor" in str(list(change.files)) else 0.12))
    return Mutant(
        seed=seed, number=number, target=target, kind=kind, source=source.name, change=change, fixed=rng.random() < 0.75
    )


def _source(rng: Random, target: str, kind: str) -> str:
    if target == "bundle":
        return "bundle"
    if kind in SHARDED:
        return "sharded"
    if kind in PICKLED:
        return "pickled"
    if kind in SLOW:
        return "slow tokenizer"
    if kind == "tokenizer parts":
        return "checkpoint"
    return rng.choices(("checkpoint", "sharded", "slow tokenizer"), (6, 2, 1))[0]
