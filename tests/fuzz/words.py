"""Mutations of chat templates and tokenizers."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from .change import Change, Random, flipped
from .sources import Source

# What a template may try: time, memory, files, Python. {n} is a large number.
HOSTILE = (
    "{{ 'x'|center({n}) }}", "{{ 'x' * {n} }}", "{{ lipsum(n={n}) }}", "{% for i in range({n}) %}x{% endfor %}",
    "{% for i in range(10000) %}{% for j in range(10000) %}x{% endfor %}{% endfor %}", "{% include 'x' %}",
    "{% import 'x' as y %}", "{% extends 'x' %}", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ messages.__class__ }}", "{{ cycler.__init__.__globals__.os }}",
    "{{ 2 ** {n} }}", "{{ [1] * {n} }}", "{{ 'a'.ljust({n}) }}", "{{ '%{n}d' % 1 }}", "{{ '{:{n}}'.format(1) }}",
    "{{ range({n})|list|length }}", "{{ range({n})|sum }}", "{{ messages|tojson(indent={n}) }}", "{{ 'x'|indent({n}) }}",
    "{{ ('x'|list * 1000)|map('upper')|join(('y' * 1000)) }}", "{{ 1 / 0 }}", "{{ messages[{n}] }}", "{{ x.y.z }}",
    "{{ raise_exception('no') }}", "{{ strftime_now('%Y' * {n}) }}", "{{ strftime_now('%c') }}",
    "{% set x = 'ab' %}{% for i in range(60) %}{% set x = x ~ x %}{{ x }}{% endfor %}", "{{ 'a b'|urlize }}",
    "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x|length }}",
    "{{ 'x'.replace('', 'y' * {n}) }}", "{{ {n}|string }}", "{{ '9' * 5000 }}{{ ('9' * 5000)|int + 1 }}",
    "{% call f() %}x{% endcall %}", "{{ self._TemplateReference__context }}", "{{ dict(a=1).update(b=2) }}",
    "{{ messages.append(1) }}", "{{ messages.sort() }}", "{{ messages|batch({n})|list }}", "{{ (1, 2)|random }}",
    "{{ messages|groupby('role')|list }}", "{{ 'x'|filesizeformat }}", "{{ 'a'|wordwrap({n}) }}", "{% raw %}{{ x }}",
    "{% for m in messages recursive %}{{ loop([m]) }}{% endfor %}", "{{ '\\ud800' }}", "{{ joiner('x' * {n})() }}",
    "{% if true %}" * 500, "{{ " + "(" * 500 + "1" + ")" * 500 + " }}", "{{ 1" + " + 1" * 5000 + " }}", "{% block x %}{% endblock %}",
    "{% autoescape true %}<{% endautoescape %}", "{{ namespace.__init__ }}", "{{ messages|map(attribute='__class__')|list }}",
    "{{ messages|selectattr('role', 'in', range({n}))|list }}", "{% generation %}x{% endgeneration %}", "{% break %}",
    "{{ ('x' * 1000000)|title|upper|lower|trim|capitalize }}", "{{ ('a ' * 500000).split()|sort|unique|list|length }}",
    "{{ {n}|abs|float|round({n}) }}", "{% for a in range(200) %}{% for b in range(200) %}{{ 'x' * 999 }}{% endfor %}{% endfor %}",
)  # fmt: skip
LARGE = ("10**10", "10**6", "99999", "2**63", "-1", "1000", "1e300", "'x'")
PATTERNS = (
    "(a+)+$", r"(\w+\s?)+$", r"(\w*)*!", "(?=x)+", "(", "[", "(?P<x>a)\\1", ".*" * 30 + "!", "(x|x|x)*y", "\\p{L}", "",
    "(?i:" * 200, "a{100000}", "(a{1,1000}){1,1000}", r"(?<=a{1,9})b", "\\", r"(.|\s)+?\d{9}", "[^x]+?" * 12 + "@",
)  # fmt: skip


def template_hostile(rng: Random, source: Source) -> Change:
    text = rng.choice(HOSTILE).replace("{n}", rng.choice(LARGE))
    real = _template(source)
    text = rng.choice((text, real + text, text + real, real.replace("{{", f"{text}{{{{", 1)))
    return _with_template(rng, source, text, f"template {text[:80]!r}")


def template_edited(rng: Random, source: Source) -> Change:
    pieces = re.split(r"(\{%.*?%\}|\{\{.*?\}\}|\W)", _template(source))
    for _ in range(rng.randint(1, 4)):
        at, other = rng.randrange(len(pieces)), rng.randrange(len(pieces))
        action = rng.randrange(5)
        if action == 0:
            pieces[at] = ""
        elif action == 1:
            pieces[at], pieces[other] = pieces[other], pieces[at]
        elif action == 2:
            pieces[at] = pieces[at] * rng.choice((2, 50))
        elif action == 3:
            pieces[at] = rng.choice(
                ("{{", "}}", "{%", "%}", "{#", "'", "|", "messages", "[0]", ".x", "\0", "é", "\u202e")
            )
        else:
            pieces.insert(at, rng.choice(HOSTILE).replace("{n}", rng.choice(LARGE)))
    return _with_template(rng, source, "".join(pieces), "template edited")


def _template(source: Source) -> str:
    name = "mllm/chat_template.json" if "mllm/chat_template.json" in source.files else "mllm/tokenizer_config.json"
    return str(json.loads(source.files[name])["chat_template"])


def _with_template(rng: Random, source: Source, text: str, note: str) -> Change:
    if rng.random() < 0.3:
        data = text.encode("utf-8", "surrogatepass")
        return Change(files={"mllm/chat_template.jinja": data}, note=f"jinja file, {note}", asked="another template")
    name = "mllm/chat_template.json" if "mllm/chat_template.json" in source.files else "mllm/tokenizer_config.json"
    data = json.loads(source.files[name])
    data["chat_template"] = rng.choice(
        (text, text, text, [{"name": "default", "template": text}], [text], {"default": text})
    )
    return Change(files={name: json.dumps(data).encode()}, note=f"{name}, {note}", asked="another template")


def tokenizer(rng: Random, source: Source) -> Change:
    """Parts of tokenizer.json that work on text: patterns that take for ever, texts that grow, odd parts."""
    name = "mllm/tokenizer.json"
    data: dict[str, Any] = json.loads(source.files[name])
    action = rng.randrange(8)
    if action == 0:
        pattern = rng.choice(({"Regex": rng.choice(PATTERNS)}, {"String": rng.choice((" ", "", "a" * 10**5))}))
        behaviour = rng.choice(("Isolated", "Removed", "MergedWithNext", "x"))
        data["pre_tokenizer"] = {
            "type": "Split",
            "pattern": pattern,
            "behavior": behaviour,
            "invert": rng.random() < 0.3,
        }
    elif action == 1:
        step = {"type": "Replace", "pattern": {"String": "e"}, "content": rng.choice(("ee", "e" * 1000, ""))}
        data["normalizer"] = {"type": "Sequence", "normalizers": [step] * rng.choice((1, 3, 40, 1000))}
    elif action == 2:
        data["normalizer"] = rng.choice(
            ({"type": "NFKD"}, {"type": "Prepend", "prepend": "x" * 10**6}, {"type": "Precompiled", "precompiled_charsmap": "AAAA"},
             {"type": "Replace", "pattern": {"Regex": rng.choice(PATTERNS)}, "content": "x" * 10**4}, {"type": "x"}, None, [])
        )  # fmt: skip
    elif action == 3:
        data["model"] = rng.choice(
            ({"type": "Unigram", "unk_id": 0, "vocab": [["a", 0.0]]}, {"type": "Unigram", "unk_id": 9, "vocab": []}, {"type": "x"},
             {"type": "WordPiece", "vocab": {}, "unk_token": "u", "continuing_subword_prefix": "", "max_input_chars_per_word": 0},
             {"type": "WordLevel", "vocab": {"a": 2**31}, "unk_token": "a"}, {"type": "BPE", "vocab": {}, "merges": []}, None)
        )  # fmt: skip
    elif action == 4:
        content = rng.choice(("", " ", "e", "a" * 10**5, "<|im_end|>", "\n"))
        token = {"id": rng.choice((0, 5, 328, 9999, 2**31, 2**32 - 1, -1)), "content": content, "special": rng.random() < 0.5,
                 "single_word": False, "lstrip": rng.random() < 0.3, "rstrip": False, "normalized": False}  # fmt: skip
        data["added_tokens"] = [*data["added_tokens"], token]
    elif action == 5:
        vocab = data["model"].get("vocab", {})
        for key in rng.sample(sorted(vocab), min(3, len(vocab))):
            vocab[key] = rng.choice((0, 1, 327, 328, 330, 9999, 2**31, 2**32 - 1, -1, 1.5, "x"))
    elif action == 6:
        data["decoder"] = rng.choice(
            ({"type": "Replace", "pattern": {"Regex": rng.choice(PATTERNS)}, "content": "x" * 10**5}, {"type": "Fuse"}, None, {},
             {"type": "Strip", "content": "e", "start": 10**9, "stop": 10**9}, {"type": "CTC", "pad_token": "", "word_delimiter_token": "", "cleanup": True})
        )  # fmt: skip
    else:
        data["padding"] = {"strategy": {"Fixed": rng.choice((10, 10**9, 2**63))}, "direction": "Right", "pad_to_multiple_of": None,
                           "pad_id": 0, "pad_type_id": 0, "pad_token": "x"}  # fmt: skip
        data["truncation"] = {
            "direction": "Right",
            "max_length": rng.choice((0, 1, 2**63)),
            "strategy": "LongestFirst",
            "stride": rng.choice((0, 99)),
        }
        return Change(files={name: json.dumps(data).encode()}, note="tokenizer: padding and truncation")
    return Change(files={name: json.dumps(data).encode()}, note=f"tokenizer: kind {action}", asked="another tokenizer")


def slow_files(rng: Random, source: Source) -> Change:
    """vocab.json and merges.txt."""
    name = rng.choice(("mllm/vocab.json", "mllm/merges.txt"))
    data = source.files[name]
    if name.endswith(".txt"):
        lines = data.decode().split("\n")
        at = rng.randrange(len(lines))
        lines[at] = rng.choice(("", "a", "a b c", "x" * 10**5, "\0", "é é", lines[at] * 2, " ", "zz yy"))
        new = rng.choice(("\n".join(lines).encode(), flipped(rng, data), b"", b"\xff\xfe" + data))
    else:
        vocab = json.loads(data)
        key = rng.choice(sorted(vocab))
        vocab[key] = rng.choice((0, 329, 9999, 2**31, 2**32, -1, 1.5, "x", None, [], True))
        new = rng.choice((json.dumps(vocab).encode(), flipped(rng, data), b"{}", b"[]"))
    return Change(files={name: new}, note=f"{name} changed", asked="another tokenizer")


FOR_ALL: dict[str, Callable[[Random, Source], Change]] = {
    "template hostile": template_hostile,
    "template edited": template_edited,
}
