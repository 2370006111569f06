"""Tokenizer and chat templates: the same prompt as `transformers` makes, and a template that cannot hurt us."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from tests.unit.platform import tokenizers_for_tests as made

from quire import builtin
from quire.text import (
    BadTemplate,
    BadTokenizer,
    ChatTemplate,
    NoChatTemplate,
    TemplateFailed,
    TemplateRefused,
    Tokenizer,
)
from quire.text.templates import TakesLong, briefly

TOOLS = [
    {
        "type": "function",
        "function": {"name": "get_weather", "description": "Wetter <&> 'now'", "parameters": {"type": "object"}},
    }
]
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "one turn": [{"role": "user", "content": "Hello <b> & 'you' 🙂"}],
    "system": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
    "many": [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b", "reasoning_content": "think"},
        {"role": "user", "content": "c"},
    ],
    "tools": [
        {"role": "user", "content": "Weather?"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [
                {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Köln", "n": 1}}}
            ],
        },
        {"role": "tool", "content": "sunny", "name": "get_weather"},
    ],
}
TEMPLATES = {
    "chatml": made.CHATML,
    "loop controls, namespace, tojson": """
{%- set ns = namespace(first=true, n=0) %}
{%- if tools %}{{ '<tools>' }}{% for tool in tools %}{{ '\\n' ~ (tool | tojson) }}{% endfor %}
{{- '\\n</tools>' }}{% endif %}
{%- for m in messages %}
    {%- if loop.index0 > 5 %}{% break %}{% endif %}
    {%- if m.role == 'system' and not ns.first %}{% continue %}{% endif %}
    {%- set ns.n = ns.n + 1 %}
    {{- bos_token if loop.first else '' }}[{{ m['role'] | upper }}:{{ ns.n }}] {{ (m.content or '') | trim }}
    {%- for call in m.tool_calls or [] %} {{ call.function.arguments | tojson(indent=2) }}{% endfor %}
    {%- if m.reasoning_content is defined %} ({{ m.reasoning_content }}){% endif %}
    {%- set ns.first = false %}
{% endfor %}
{%- if add_generation_prompt %}{{ '[ASSISTANT]' + eos_token * 2 }}{% endif %}""",
    "generation, macro": """
{%- macro turn(m) %}{{ '<' ~ m.role ~ '>' }}{{ m.content }}{% endmacro %}
{%- for m in messages %}
{%- if m.role == 'assistant' %}{% generation %}{{ turn(m) }}
{% endgeneration %}{% else %}{{ turn(m) }}
{% endif %}
{%- endfor %}{{ range(3) | list | join('-') }}
{{- messages | map(attribute='role') | join(',') }}
{{- enable_thinking | default('unset') }} {{ "%s|%5d" | format("x", 3) }} {{ "{:>4}".format("z") }}
{{- messages[::-1] | length }} {{ 'abc'.replace('b', 'XX').split('X') }}
{{- messages[0].content.startswith('H') }}""",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made.write(tmp_path_factory.mktemp("ck"), made.byte_level(), config={"bos_token": "<|endoftext|>"})


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("prompted", [True, False])
def test_prompts_are_those_of_transformers(folder: Path, name: str, conversation: str, prompted: bool) -> None:
    from transformers import PreTrainedTokenizerFast

    theirs = PreTrainedTokenizerFast.from_pretrained(str(folder))
    ours = Tokenizer.load(folder)
    messages = CONVERSATIONS[conversation]
    tools = TOOLS if conversation == "tools" else None
    template = ChatTemplate(TEMPLATES[name], ours.special_tokens)
    expected = theirs.apply_chat_template(
        messages, tools=tools, chat_template=TEMPLATES[name], tokenize=False, add_generation_prompt=prompted
    )
    got = template.render(messages, tools, add_generation_prompt=prompted)
    assert got == expected
    assert ours.encode(got, add_special_tokens=False) == theirs(got, add_special_tokens=False)["input_ids"]


def test_the_final_message_can_be_continued_as_transformers_does(folder: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    messages = [{"role": "user", "content": "Say abc"}, {"role": "assistant", "content": "a b"}]
    theirs = PreTrainedTokenizerFast.from_pretrained(str(folder))
    expected = theirs.apply_chat_template(messages, tokenize=False, continue_final_message=True)
    ours = Tokenizer.load(folder).render(messages, add_generation_prompt=False, continue_final_message=True)
    assert ours == expected
    assert ours.endswith("<|im_start|>assistant\na b")


def test_the_built_in_models_template_renders_as_transformers_does() -> None:
    from transformers import PreTrainedTokenizerFast

    where = builtin.path("tiny")
    theirs = PreTrainedTokenizerFast.from_pretrained(str(where))
    ours = Tokenizer.load(where)
    for name, messages in CONVERSATIONS.items():
        tools = TOOLS if name == "tools" else None
        expected = theirs.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=True)
        assert ours.render(messages, tools) == expected, name
        assert ours.encode(expected, False) == theirs(expected, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize(
    "attack",
    [
        "{% for i in range(10**12) %}x{% endfor %}",
        "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
        "{{ 'a' * 10**10 }}",
        "{{ ['a'] * 10**10 }}",
        "{{ 10 ** (10 ** 8) }}",
        "{% set ns = namespace(s='aaaaaaaa') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
        "{% set ns = namespace(s='aaaaaaaa') %}{% for i in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
        "{% macro f(n) %}{{ f(n) }}{{ f(n) }}{% endmacro %}{{ f(1) }}",
        "{{ 'a' | center(10**10) }}",
        "{{ 'a'.ljust(10**10) }}",
        "{{ '%10000000000d' % 1 }}",
        "{{ '%*d' | format(10**10, 1) }}",
        "{{ '{:>10000000000}'.format(1) }}",
        "{{ '{:>{w}}'.format(1, w=10**10) }}",
        "{{ ('a' * 100000).replace('a', 'b' * 100000) }}",
        "{{ ('a' * 100000) | replace('a', 'b' * 100000) }}",
        "{{ range(100000) | join('b' * 100000) }}",
        "{{ 'a' | indent(10**10, true) }}",
        "{{ {'a': 1} | tojson(indent=10**10) }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ '{0.__class__.__mro__}'.format('') }}",
        "{{ '{x.__class__.__mro__}'.format_map({'x': 1}) }}",
        "{{ cycler.__init__.__globals__.os.popen('true').read() }}",
        "{{ messages.append(1) }}",
        "{{ namespace.__init__.__globals__ }}",
        "{% include '/etc/passwd' %}",
        "{% set ns = namespace(n=3) %}{% for i in range(60) %}{% set ns.n = ns.n * ns.n %}{% endfor %}",
        "{{ [1]|batch(60000000,0)|list }}",
        "{{ [1]|slice(5000000)|list }}",
        "{{ range(60)|map('string')|map('center',16000000)|list }}",
        "{{ (range(100000)|list * 100)|sort|length }}",
        "{{ (range(100000)|list * 100)|unique|list|length }}",
        "{% set s = 'a' * 16000000 %}{{ ([s] * 100000)|sort|length }}",
        "{% set s = 'a' * 16000000 %}{{ ([s] * 100000)|map('upper')|list|length }}",
        "{% set s = 'a' * 16000000 %}{{ ','.join([s]|map('string')) ~ ','.join(([s] * 9)|map('string')) }}",
        "{% set s = 'a' * 16000000 %}{{ [s] * 1000 }}",
        "{% set s = 'a' * 16000000 %}{{ ([s] * 1000)|string }}",
        "{% set s = 'a' * 16000000 %}{{ '%s' % (([s] * 1000),) }}",
        "{% set s = 'a' * 16000000 %}{{ '{}'.format([s] * 1000) }}",
        "{% set s = 'a' * 16000000 %}{% set ns = namespace(s=[s] * 1000) %}{{ ns }}",
        "{% set s = 'a' * 16000000 %}{{ s|list|length }}",
        "{% set s = 'a ' * 8000000 %}{{ s.split()|length }}",
        "{% set s = 'a' * 16000000 %}{% set ns = namespace(l=[]) %}"
        "{% for i in range(100000) %}{% set ns.l = ns.l + [s[i:]] %}{% endfor %}",
        "{% set s = 'a' * 16000000 %}{% set x %}{% for i in range(100000) %}{{ s }}{% endfor %}{% endset %}",
        "{% set x %}{% for i in range(100000) %}" + "a" * 100000 + "{% endfor %}{% endset %}",
        "{% set l = range(100000)|list %}{{ ([l] * 1000)|sum(start=[])|length }}",
        "{% set l = [[[['a'] * 1000] * 1000] * 1000] * 1000 %}{{ l|tojson }}",
        "{% set ns = namespace(l=[]) %}{% for i in range(50) %}{% set ns.l = [ns.l, ns.l] %}{% endfor %}"
        "{{ ns.l }}",
    ],
    ids=lambda attack: attack[:60],
)
def test_a_hostile_template_ends_soon_with_our_error(attack: str) -> None:
    before = time.thread_time()
    with pytest.raises((TemplateFailed, BadTemplate)) as caught:
        text = ChatTemplate(attack, {}).render([{"role": "user", "content": "x"}])
        pytest.fail(f"rendered {len(text)} characters: {text[:100]!r}")
    assert time.thread_time() - before < 2
    assert "__" not in str(caught.value)


def test_what_python_does_not_compile_is_our_error() -> None:
    depth = 30
    source = "".join(f"{{% for a{i} in messages %}}" for i in range(depth)) + "{% endfor %}" * depth
    with pytest.raises(BadTemplate):
        ChatTemplate(source, {})


def test_filters_still_do_their_work() -> None:
    source = """{{ [3, 1, 2] | sort | join('-') }} {{ [1, 1, 2] | unique | list }} {{ [1, 2] | sum }}
{{- ' ' ~ ([{'n': 2}, {'n': 3}] | sum(attribute='n')) }} {{ 'abc'[::-1] }}{{ 'abcd'[1:3] }} {{ nothing | list }}
{{- messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | map('upper') | join('+') }}
{{- {'b': 1, 'a': 2} | dictsort }} {{ none | default('d', true) }} {{ [2, 5] | max }} {{ messages | first }}
{{- ('<' | escape) }} {{ {'k': [1, 'é']} | tojson }} {{ 'x' | indent(2, true) }} {{ [1, 2] | reverse | list }}"""
    messages = [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]
    assert ChatTemplate(source, {}).render(messages) == (
        "1-2-3 [1, 2] 3 5 cbabc []A[('a', 2), ('b', 1)] d 5 {'role': 'user', 'content': 'a'}"
        """&lt; {"k": [1, "é"]}   x [2, 1]"""
    )


def test_a_long_conversation_is_within_the_bounds() -> None:
    template = ChatTemplate(
        TEMPLATES["loop controls, namespace, tojson"].replace("loop.index0 > 5", "false"), {"eos_token": "</s>"}
    )
    messages = [{"role": "user", "content": "word " * 400}] * 2000
    assert len(template.render(messages)) > 2000 * 1999


@pytest.mark.parametrize(
    "probe",
    ["{{ '' | attr('__class__') | attr('__mro__') }}", "{{ raise_exception.__globals__ }}", "{{ ''.__doc__ }}"],
)
def test_python_internals_are_not_there_for_a_template(probe: str) -> None:
    assert ChatTemplate(probe, {}).render([]) == ""


def test_a_templates_own_refusal_reaches_the_user_cleaned() -> None:
    template = ChatTemplate("{{ raise_exception('roles must alternate\n' ~ 'x' * 500) }}", {})
    with pytest.raises(TemplateRefused) as caught:
        template.render([])
    assert str(caught.value).startswith("roles must alternate xxx")
    assert len(str(caught.value)) == 200


def test_a_template_that_does_not_compile_names_its_line() -> None:
    with pytest.raises(BadTemplate, match="line 2"):
        ChatTemplate("ok\n{% for %}", {})


def test_template_sources_in_their_order(tmp_path: Path) -> None:
    backend = made.byte_level()
    messages = [{"role": "user", "content": "x"}]
    none = made.write(tmp_path / "none", backend, template=None)
    with pytest.raises(NoChatTemplate):
        Tokenizer.load(none).render(messages)
    listed = made.write(
        tmp_path / "list",
        backend,
        template=None,
        config={"chat_template": [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]},
    )
    assert Tokenizer.load(listed).render(messages) == "D"
    (listed / "chat_template.jinja").write_text("J")
    assert Tokenizer.load(listed).render(messages) == "J"
    chosen = tmp_path / "mine.jinja"
    chosen.write_text("M")
    assert Tokenizer.load(listed, chosen).render(messages) == "M"
    with pytest.raises(BadTokenizer, match="chatTemplateFile"):
        Tokenizer.load(listed, tmp_path / "absent.jinja")


def test_special_tokens_written_as_objects_are_read(tmp_path: Path) -> None:
    where = made.write(
        tmp_path,
        made.byte_level(),
        template="{{ bos_token }}|{{ eos_token }}",
        config={"bos_token": {"content": "<b>"}},
    )
    assert Tokenizer.load(where).render([]) == "<b>|<|im_end|>"


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"temperature": 0.6, "top_p": 0.9, "top_k": 20, "do_sample": True}, (0.6, 0.9, 20)),
        ({"do_sample": False, "temperature": 0.6}, (0.0, None, None)),
        ({"temperature": "hot", "top_p": 7, "top_k": -3}, (None, None, None)),
        ({}, (None, None, None)),
    ],
)
def test_advised_sampling(tmp_path: Path, config: dict[str, Any], expected: tuple[object, ...]) -> None:
    advised = Tokenizer.load(made.write(tmp_path, made.byte_level(), generation=config)).advised
    assert (advised.temperature, advised.top_p, advised.top_k) == expected


def test_truncation_and_padding_of_the_file_are_switched_off(tmp_path: Path) -> None:
    backend = made.byte_level()
    backend.enable_truncation(4)
    backend.enable_padding(length=32)
    assert len(Tokenizer.load(made.write(tmp_path, backend)).encode("The quick brown fox " * 10)) > 32


@pytest.mark.parametrize("content", [None, "{", "[]"])
def test_a_broken_tokenizer_file_is_our_error_without_paths(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(BadTokenizer) as caught:
        Tokenizer.load(tmp_path)
    assert str(tmp_path) not in str(caught.value)


def test_a_broken_config_is_our_error(tmp_path: Path) -> None:
    made.write(tmp_path, made.byte_level())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps([1]))
    with pytest.raises(BadTokenizer, match=r"tokenizer_config\.json"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("module", ["quire.text", "quire.router.app", "quire.router.__main__"])
def test_no_torch_in_a_fresh_interpreter(module: str) -> None:
    code = f"import sys, {module}; assert not {{'torch', 'transformers', 'numpy'}} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_rendering_is_tried_for_a_moment_and_begun_again_where_it_has_its_time() -> None:
    slow = ChatTemplate("{% for a in range(90) %}{% for b in range(900) %}{% endfor %}{% endfor %}done", {})
    messages = [{"role": "user", "content": "x"}]
    with briefly(0.0), pytest.raises(TakesLong):
        slow.render(messages)
    assert slow.render(messages) == "done"
    with briefly(10.0):
        assert slow.render(messages) == "done"


def test_a_rendering_leaves_no_garbage() -> None:
    """Macros and what they look at hang on each other, and are one of each for every request. In a process of its
    own, as routers are: what others have loaded in this one leaves some behind."""
    code = (
        "import gc\nfrom quire import builtin\nfrom quire.text import Tokenizer\n"
        "tokenizer = Tokenizer.load(builtin.path())\nmessages = [{'role': 'user', 'content': 'x'}]\n"
        "tokenizer.render(messages)\ngc.collect()\ngc.disable()\n"
        "for _ in range(10):\n    tokenizer.render(messages)\n"
        "print(gc.collect())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "0\n"
