"""Chat templates against transformers, and what a hostile one may not do."""
# ruff: noqa: E501 a template is one line

from __future__ import annotations

import datetime
import json
import shutil
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from conftest import PARITY
from hypothesis import given, settings
from hypothesis import strategies as st

from mindomni_rt.errors import BadCheckpointError
from mindomni_rt.inputs.prompts import Chat, generate_messages, understand_messages
from mindomni_rt.inputs.template import Template

MESSAGES = generate_messages('two cats, "quoted" & <tagged>\nnext line', think=True, image=True)
SPECIAL = {"bos_token": "<s>", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
TURN = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for p in m['content'] %}{{ p['text'] }}{% endfor %}"
    "<|im_end|>\n{% endfor %}"
)


def theirs(template: str, messages: list[Any] = MESSAGES) -> str:
    from transformers.utils.chat_template_utils import render_jinja_template

    text, _ = render_jinja_template([messages], chat_template=template, add_generation_prompt=True, **SPECIAL)
    return str(text[0])


PIECES = [
    TURN,
    "{% generation %}{{ messages[0].role }}{% endgeneration %}",
    "{% for m in messages %}{% generation %}{{ m.role }}{{ loop.index }}{% endgeneration %}{% endfor %}",
    "{{ strftime_now('%Y') }}",
    "{{ bos_token }}{{ eos_token }}{{ pad_token }}{{ unk_token }}",
    "{% if tools %}T{% else %}no tools{% endif %}{% if documents is defined and documents %}D{% endif %}",
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "{{ messages | tojson }}{{ messages | tojson(indent=2) }}",
    "{% set ns = namespace(n=0, found=false) %}{% for m in messages %}{% set ns.n = ns.n + loop.index %}{% endfor %}{{ ns.n }}",
    "{% macro shout(x, y='!') %}{{ x | upper }}{{ y }}{% endmacro %}{{ shout('a') }}{{ shout('b', y='?') }}",
    "{% macro twice() %}{{ caller() }}{{ caller() }}{% endmacro %}{% call twice() %}x{% endcall %}",
    "{% for m in messages if m.role == 'user' %}{{ loop.last }}{{ loop.length }}{{ m.role }}{% endfor %}",
    "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.role }}{% break %}{% endfor %}",
    "{{ messages | map(attribute='role') | join(', ') }}{{ messages | selectattr('role', 'equalto', 'user') | list | length }}",
    "{{ 'a-b-c'.split('-')[1] }}{{ ' x '.strip() }}{{ 'abc'.startswith('a') }}{{ 'aXa' | replace('a', 'bb') }}",
    "{{ 'aXa'.replace('X', '--') }}{{ ','.join(['a', 'b']) }}{{ 'a' ~ 1 ~ none }}{{ 3 * 'ab' }}{{ 2 ** 5 }}{{ 7 // 2 }}",
    "{% set x %}captured {{ 1 + 1 }}{% endset %}{{ x | trim }}{% filter upper | trim %} y {% endfilter %}",
    "{% set x | upper | trim %} captured {% endset %}{{ x }}",
    "{{ messages[1]['content'][1].text }}{{ messages[0]['content'][:5] }}{{ messages[-1].role | title }}{{ [1, 2, 3][::-1] }}{{ {'a': 1}.items() | list }}",
    "{{ dict(a=1).get('a') }}{{ range(5) | list }}{{ (1, 2) }}{{ 'x' if messages | length > 1 else 'y' }}",
    "{{ undefined_name }}{{ undefined_name is defined }}{{ undefined_name | default('d') }}{{ none }}{{ true }}",
    "{{ 'line\\nline' | indent(2) }}{{ '{\"a\": 1}' | safe }}{{ 'b' in 'abc' }}{{ [3, 1, 2] | sort | first }}",
    "  {% if true %}\n    indented\n  {% endif %}\n",
]


@pytest.mark.parametrize("template", PIECES)
def test_pieces_of_templates_render_as_transformers_renders_them(template: str) -> None:
    assert Template(template, "here").render(MESSAGES, SPECIAL) == theirs(template)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(PIECES), min_size=1, max_size=6), st.text(max_size=40))
def test_mixed_pieces(pieces: list[str], prompt: str) -> None:
    messages = understand_messages(prompt, image=False)
    template = "".join(pieces)
    assert Template(template, "here").render(messages, SPECIAL) == theirs(template, messages)


def test_today() -> None:
    assert Template("{{ strftime_now('%d %b %Y') }}", "here").render([], {}) == f"{datetime.datetime.now():%d %b %Y}"


DOUBLING = "{% set x = 'x' * 1000 %}" + "{% set x = x ~ x %}" * 40
HOSTILE = {
    "center": "{{ 'x' | center(10 ** 10) }}",
    "lipsum": "{{ lipsum(n=10 ** 6) }}",
    "nested loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}{% endfor %}{% endfor %}",
    "loops over text": "{% set t = 'x' * 100000 %}{% for a in t %}{% for b in t %}{{ a }}{% endfor %}{% endfor %}",
    "include": "{% include 'chat_template.jinja' %}",
    "import": "{% import 'x' as y %}",
    "extends": "{% extends 'x' %}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "recursive loop": "{% for a in [messages] recursive %}{{ loop([messages]) }}{% endfor %}",
    "doubling": DOUBLING + "{{ x }}",
    "doubling by plus": "{% set x = 'x' * 1000 %}" + "{% set x = x + x %}" * 40,
    "doubling by list": "{% set x = [1] %}" + "{% set x = [x, x] %}" * 60 + "{{ x }}",
    "doubling by dict": "{% set x = {'a': 1} %}" + "{% set x = {'a': x, 'b': x} %}" * 60 + "{{ x | tojson }}",
    "doubling by capture": "{% set x %}xxxxxxxxxx{% endset %}" + "{% set x %}{{ x }}{{ x }}{% endset %}" * 40,
    "doubling by namespace": "{% set n = namespace(x='xxxx') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "doubling by replace": "{% set x = 'x' * 1000 %}" + "{% set x = x | replace('x', 'xxxxxxxxxx') %}" * 8,
    "doubling by join": "{% set x = 'x' * 1000 %}" + "{% set x = [x, x, x] | join(x) %}" * 20,
    "doubling by method": "{% set x = 'x' * 1000 %}" + "{% set x = x.replace('x', x) %}" * 3,
    "doubling by filter block": "{% filter replace('x', 'xxxxxxxxxxxxxxxx') %}" * 8 + "x" + "{% endfilter %}" * 8,
    "many at once": "{% set x = 'x' * 1000000 %}{{ " + " ~ ".join(["x"] * 20000) + " }}",
    "constant text in loops": "{% for a in range(40000) %}" + "y" * 200000 + "{% endfor %}",
    "constant text in macros": "{% macro f() %}"
    + "y" * 200000
    + "{% endmacro %}{% for a in range(40000) %}{{ f() }}{% endfor %}",
    "power": "{{ 10 ** 10 ** 10 }}",
    "squares": "{% set n = 10 %}" + "{% set n = n * n %}" * 40 + "{{ n }}",
    "repeat": "{{ 'x' * 10 ** 10 }}",
    "repeat a list": "{{ [0] * 10 ** 10 }}",
    "formatting": "{{ '%1000000000d' % 1 }}",
    "format filter": "{{ '%1000000000d' | format(1) }}",
    "format method": "{{ '{:>10000000000}'.format(1) }}",
    "format of markup": "{{ ('{:>10000000000}' | safe).format(1) }}",
    "center of markup": "{{ ('x' | safe).center(10000000000) }}",
    "ljust": "{{ 'x'.ljust(10000000000) }}",
    "zfill": "{{ 'x'.zfill(10000000000) }}",
    "tabs": "{{ '\\t'.expandtabs(10000000000) }}",
    "bytes": "{{ (1).to_bytes(10000000000) }}",
    "fromkeys": "{{ dict.fromkeys(range(99999), 1) }}",
    "round": "{{ 1.5 | round(1000000000, 'ceil') }}",
    "indent": "{{ messages | tojson(indent=1000000000) }}",
    "lazy chain": "{{ range(99999)" + " | map('upper')" * 500 + " | list }}",
    "wide range": "{{ range(10 ** 12) | list }}",
    "batch": "{{ [1] | batch(1000000000, 0) | list }}",
    "wordwrap": "{{ 'x y' | wordwrap(1) }}",
    "deep": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "deep blocks": "{% if 1 %}" * 2000 + "{% endif %}" * 2000,
    "long": "x" * 10**6,
    "division": "{{ 1 / 0 }}",
    "its own error": "{{ raise_exception('no images') }}",
    "classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "environment": "{{ self.__init__.__globals__ }}",
    "generator frames": "{{ (messages | map('upper')).gi_frame.f_builtins }}",
    "date": "{{ strftime_now('%Y' * 1000) }}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_templates_end_in_a_named_error(name: str) -> None:
    tracemalloc.start()
    began = time.process_time()
    try:
        with pytest.raises(BadCheckpointError, match="chat template"):
            Template(HOSTILE[name], "here").render(MESSAGES, SPECIAL)
        assert time.process_time() - began < 30 and tracemalloc.get_traced_memory()[1] < 300e6
    finally:
        tracemalloc.stop()


def folder_with(tmp_path: Path, **files: Any) -> Path:
    shutil.copy(PARITY / "mllm" / "tokenizer.json", tmp_path)
    for name, data in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(data))
    return tmp_path


def test_special_tokens_are_those_of_transformers(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    expected = AutoTokenizer.from_pretrained(PARITY / "mllm").special_tokens_map
    found = Chat(PARITY / "mllm").special_tokens
    assert {k: found[k] for k in expected} == expected
    folder = folder_with(
        tmp_path, tokenizer_config={"chat_template": "{{ eos_token }}|{{ bos_token }}", "eos_token": "<|im_end|>"}
    )
    assert Chat(folder).render([]) == "<|im_end|>|"


def test_the_token_that_ends_a_turn(tmp_path: Path) -> None:
    chat = Chat(PARITY / "mllm")
    assert chat.turn_end == 318  # <|im_end|>
    assert chat.end_tokens((318, 316)) == (318, 316) and chat.end_tokens((316,)) == (316, 318)
    assert Chat(folder_with(tmp_path, tokenizer_config={"chat_template": "nothing"})).turn_end is None


def test_truncation_and_padding_of_the_file_are_off(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    folder = folder_with(tmp_path, tokenizer_config={"chat_template": "{{ messages[1].content[1].text }}"})
    data = json.loads((folder / "tokenizer.json").read_text())
    data["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    data["padding"] = {"strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 316,
                       "pad_type_id": 0, "pad_token": "<|endoftext|>"}  # fmt: skip
    text = "a red circle and two blue squares beside it"
    (folder / "tokenizer.json").write_text(json.dumps(data))
    found = Chat(folder).encode(generate_messages(text, think=False))
    assert found == AutoTokenizer.from_pretrained(folder).encode(text, add_special_tokens=False) and len(found) > 4
