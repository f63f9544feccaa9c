"""Mutations of a folder: files that are missing, special, swapped, added, and names that lead elsewhere."""

from __future__ import annotations

import json
from collections.abc import Callable

from .change import Change, Random, Special, flipped
from .sources import Source

EXTRA = (
    "mllm/chat_template.jinja", "mllm/added_tokens.json", "mllm/processor_config.json", "mllm/tokenizer.json",
    "mllm/model.safetensors", "mllm/special_tokens_map.json", "mindomni.json", "image_decoder/model.pt", "config.json",
    "mllm/modeling.py", "sitecustomize.py", "torch.py", "mllm/model.safetensors.index.json", "README.md", "x" * 200,
)  # fmt: skip
NAMES = (
    "../outside/{}", "/etc/passwd", "{outside}/{}", "a/../../outside/{}", "./{}", "", ".", "..", "mllm", "/dev/zero",
    "x" * 300, "C:\\windows\\{}", "..\\outside\\{}", "{}\0", "~/{}", "file:///etc/passwd", "{}/", "//{}", "é.onnx",
)  # fmt: skip


def missing(rng: Random, source: Source) -> Change:
    name = rng.choice(sorted(source.files))
    # What a checkpoint may lack has a documented default, which is another setting.
    return Change(files={name: None}, note=f"{name} is missing", asked=_lacking(source, name))


def _lacking(source: Source, name: str) -> str:
    optional = ("generation_config.json", "special_tokens_map.json", "tokenizer_config.json")
    return f"no {name}" if name.endswith(optional) and not source.is_bundle else ""


def special(rng: Random, source: Source) -> Change:
    name = rng.choice(sorted(source.files))
    made = [Special("folder"), Special("pipe"), Special("link", "/dev/zero"), Special("link", name.rpartition("/")[2])]
    if source.is_bundle:  # a link in a checkpoint is its owner's, and followed
        made += [Special("link", f"{{outside}}/{name.rpartition('/')[2]}"), Special("link", "/etc/passwd")]
    chosen = rng.choice(made)
    return Change(files={name: chosen}, note=f"{name} is a {chosen.kind} {chosen.target}")


def swapped(rng: Random, source: Source) -> Change:
    first, second = rng.sample(sorted(source.files), 2)
    return Change(
        files={first: source.files[second], second: source.files[first]},
        note=f"{first} and {second} change places",
        asked="one JSON file read as another" if "tokenizer_config.json" in first + second else "",
    )


def emptied(rng: Random, source: Source) -> Change:
    name = rng.choice(sorted(source.files))
    data = source.files[name]
    new = rng.choice(
        (b"", data[: rng.randrange(len(data))], data + b"\0", data[:-1], rng.randbytes(min(len(data), 4096)))
    )
    return Change(files={name: new}, note=f"{name} has {len(new)} bytes in place of {len(data)}")


def added(rng: Random, source: Source) -> Change:
    name = rng.choice([name for name in EXTRA if name not in source.files])
    contents = [b"", b"{}", b"raise SystemExit(3)", rng.randbytes(100), *source.files.values()]
    template = b"{{ messages[0]['content'] }}"
    small = [data for data in contents if len(data) < 2**16]
    data = rng.choice([template, *small])
    listed = source.is_bundle and rng.random() < 0.5
    asked = f"{name} is there" if listed or not source.is_bundle else ""
    return Change(files={name: data}, note=f"{name} added, listed: {listed}", asked=asked, listed=listed)


def renamed(rng: Random, source: Source) -> Change:
    """Names in a manifest or index that lead elsewhere. A sentinel folder beside the mutant holds real files."""
    file = "manifest.json" if source.is_bundle else "mllm/model.safetensors.index.json"
    data = json.loads(source.files[file])
    if not source.is_bundle:
        key = rng.choice(sorted(data["weight_map"]))
        name = odd_name(rng, data["weight_map"][key])
        data["weight_map"][key] = name
        return Change(files={file: json.dumps(data).encode()}, note=f"index: {key} in {name[:80]!r}")
    graph = data["graphs"][rng.choice(sorted(data["graphs"]))]
    action = rng.randrange(3)
    old = graph["file"] if action == 0 or not graph["data"] else graph["data"][0]
    name = odd_name(rng, old)
    if action == 0:
        graph["file"] = name
    elif graph["data"]:
        graph["data"][0] = name
    if action != 1:
        data["files"][name] = data["files"].pop(old)
    return Change(files={file: json.dumps(data).encode()}, note=f"manifest: {old} is {name[:80]!r}")


def odd_name(rng: Random, name: str) -> str:
    return rng.choice(NAMES).replace("{}", name)


def noise(rng: Random, source: Source) -> Change:
    name = rng.choice(sorted(source.files))
    asked = "" if name == "manifest.json" else "other bytes, which no check of the format finds"
    return Change(files={name: flipped(rng, source.files[name])}, note=f"{name}: bytes changed", asked=asked)


MUTATIONS: dict[str, Callable[[Random, Source], Change]] = {
    "file missing": missing,
    "file special": special,
    "files swapped": swapped,
    "file cut": emptied,
    "file added": added,
    "file name": renamed,
}
