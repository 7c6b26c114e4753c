"""Templates render in a child process exactly as they do in transformers."""

import copy
import gc
import json
import os
import signal
import subprocess
import sys
import threading

import pytest

from jax_lora.data.chat_template import ChatTemplate
from jax_lora.data.template_process import RenderError, TemplateLimits, TemplateProcess
from tests.tiny_model import write_tokenizer

LIMITS = TemplateLimits(seconds=10, memory=2**30, output=2**20)
HI = json.dumps({"messages": [{"role": "user", "content": "hi"}]})
TURNS = [
    {"role": "system", "content": " be brief \n"},
    {"role": "user", "content": "a < b & '\u00fc' \u2028 \ud83d\ude00", "name": None},
    {
        "role": "assistant",
        "content": "",
        "thinking": "hm",
        "tool_calls": [{"function": {"name": "f", "arguments": {"x": [1, 2.5, None, True]}}}],
    },
    {"role": "tool", "content": "0"},
]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"b": 1, "a": 2}}}]


def process(template):
    return TemplateProcess(template, {"bos_token": "<s>"}, LIMITS)


@pytest.mark.parametrize(
    "template",
    [
        "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] "
        "{{ m.content | trim }}\n{% endfor %}",
        "{{ messages | tojson }}{{ tools | tojson(indent=2, sort_keys=true) }}",
        "{{ messages | tojson(ensure_ascii=true, separators=(',', ':')) }}",
        "  {% if tools is not none %}\n  {% set n = namespace(a=1) %}"
        "{% set n.a = 2 %}{{ n.a }}{% endif %}",
        "{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}"
        "{{ m.role }}{% endfor %}",
        "{% generation %}{{ messages[0].content }}\n{% endgeneration %}"
        "{{ eos_token }}{{ pad_token }}",
        "{{ messages[2].reasoning_content }}{{ messages[2].thinking }}"
        "{{ messages[1].name is defined }}",
        "{{ strftime_now('%Y') }}{{ dict(a=1) }}{{ dict.fromkeys('ab', 0) }}"
        "{{ documents is none }}",
        "{{ add_generation_prompt }}{{ undefined_name }}{{ messages | length }}",
        "{% macro f(x='d') %}{{ x | upper }}{{ caller() }}{% endmacro %}"
        "{% call f() %}.{% endcall %}",
        "{{ raise_exception('not ' + messages[0].role) }}",
        "{{ namespace(__class__=1) }}",
        "{{ messages.append(1) }}",
        "{{ undefined_name.attribute }}",
        "{% for %}",
        "{{ {}.__class__ }}{{ cycler.__init__.__globals__ }}",
        "{{ 'x'.format.__self__ }}{{ '%s' | format(1) }}{{ 1 / 0 }}",
    ],
)
def test_templates_render_as_in_transformers(tmp_path, template):
    transformers = pytest.importorskip("transformers")
    folder = write_tokenizer(tmp_path, bos="<s>", template=template)
    chat, theirs = ChatTemplate(folder), transformers.AutoTokenizer.from_pretrained(folder)

    def outcome(render):
        try:
            return render()
        except Exception:
            return "an error"

    for tools in (None, TOOLS):
        for answer_next in (False, True):
            assert outcome(
                lambda t=tools, a=answer_next: chat.render(TURNS, answer_next=a, tools=t)
            ) == outcome(
                lambda t=tools, a=answer_next: theirs.apply_chat_template(
                    TURNS, tokenize=False, add_generation_prompt=a, tools=t
                )
            )


def test_the_error_of_a_template_is_its_message():
    answers = process("{{ raise_exception('odd roles') }}").render([HI])
    assert answers == [{"error": "odd roles"}]


def test_a_lone_surrogate_passes_both_ways():
    request = json.dumps({"messages": [{"role": "user", "content": "\ud800"}]})
    assert process("{{ messages[0].content }}").render([request]) == [{"text": "\ud800"}]


def test_a_process_that_ended_is_started_again():
    renderer = process("{{ messages[0].content }}")
    renderer.render([HI])
    os.kill(renderer._child.process.pid, signal.SIGKILL)
    renderer._child.process.wait()
    assert renderer.render([HI]) == [{"text": "hi"}]


def test_a_process_that_ends_while_it_renders_is_an_error():
    renderer = process("{{ messages[0].content }}")
    renderer.render([HI])
    os.kill(renderer._child.process.pid, signal.SIGSTOP)
    threading.Timer(0.2, renderer._child.process.kill).start()
    with pytest.raises(RenderError, match="exit code -9"):
        renderer.render([HI])
    assert renderer.render([HI]) == [{"text": "hi"}]


def test_threads_share_a_process():
    renderer = process("{{ messages[0].content }}")
    found = {}

    def render(text):
        request = json.dumps({"messages": [{"role": "user", "content": text}]})
        found[text] = renderer.render([request])[0]["text"]

    threads = [threading.Thread(target=render, args=(str(n),)) for n in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {str(n): str(n) for n in range(20)}


FORK = """
import os
from jax_lora.data.template_process import TemplateLimits, TemplateProcess
renderer = TemplateProcess("{{ messages[0].content }}", {}, TemplateLimits(10, 2**30, 2**20))
request = '{"messages": [{"content": "hi"}]}'
first = renderer.render([request])
pid = os.fork()
if pid == 0:
    right = renderer.render([request]) == first
    renderer._stop()
    os._exit(0 if right else 1)
right = all(renderer.render([request]) == first for _ in range(20))
code = os.waitpid(pid, 0)[1]
print(right and code == 0 and renderer.render([request]) == first)
"""


def test_a_forked_process_has_a_child_of_its_own():
    done = subprocess.run([sys.executable, "-c", FORK], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("True\n", "")


def test_a_copy_has_a_process_of_its_own_and_both_end_with_their_owners():
    renderer = process("{{ messages[0].content }}")
    other = copy.copy(renderer)
    assert renderer.render([HI]) == other.render([HI])
    children = [each._child.process for each in (renderer, other)]
    assert children[0].pid != children[1].pid
    del renderer, other
    gc.collect()
    assert all(child.returncode is not None for child in children)
