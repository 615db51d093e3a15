"""Chat templates render as transformers renders them, and cannot leave their sandbox."""

import json
import pathlib

import pytest

from r1jax import chat, text
from r1jax.export import chat_template

PUBLISHED = pathlib.Path(__file__).resolve().parents[2] / "shared/data/deepseek_r1/tokenizer_config.json"

CHATML = """{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.content is string %}
        {{- message.content | trim }}
    {%- else %}
        {%- for part in message.content %}{{ part['text'] }}{% endfor %}
    {%- endif %}
    {{- '<|im_end|>' }}
{% endfor %}
{%- if tools %}{{ tools | tojson(indent=2) }}{{ tools[0] | tojson }}{% endif %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
MARKED = """{{ bos_token }}{% for m in messages %}
  {% if loop.index > 3 %}{% break %}{% endif %}
    {% if m['role'] == 'assistant' %}{% generation %}
 {{ m['content'] }}{{ eos_token }}
    {% endgeneration %}{% else %}[{{ m['content'] }}]{% endif %}
{% endfor %}{{ namespace(a=1).a }}{{ strftime_now('%Y')[:2] }}"""

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "小明 <b>&</b> \"quotes\" 'x' 🍎?\n"},
    {"role": "assistant", "content": "<think>\n1+1\n</think>\n\n2"},
    {"role": "user", "content": "  And $\\frac{1}{2}$?  "},
]
TOOL = {"type": "function", "function": {"name": "f", "description": "é < ü", "parameters": {"a": [1, 2.5, None]}}}
CALL = {"type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
CALLS = [
    TALK[1],
    {"role": "assistant", "content": None, "tool_calls": [CALL, CALL]},
    {"role": "tool", "content": "one"},
    {"role": "tool", "content": "two"},
]
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}


def published() -> str:
    if not PUBLISHED.exists():
        pytest.skip(f"{PUBLISHED} is absent")
    return json.loads(PUBLISHED.read_text("utf-8"))["chat_template"]


@pytest.mark.parametrize("source", [CHATML, MARKED, "published"], ids=["ChatML", "marked", "DeepSeek-R1"])
@pytest.mark.parametrize("messages", [TALK, TALK[:1], TALK[1:2], CALLS, CALLS[:2]], ids=range(5))
@pytest.mark.parametrize("prompt", [False, True])
def test_rendered_as_theirs(source: str, messages: list, prompt: bool) -> None:
    theirs = pytest.importorskip("transformers.utils.chat_template_utils", reason="transformers is not here")
    source = published() if source == "published" else source
    if source == CHATML and messages in (CALLS, CALLS[:2]):
        messages = [m for m in messages if m["content"]]
    given = {"tools": [TOOL], "add_generation_prompt": prompt}
    got = chat.Template(source, TOKENS).render(messages, **given)
    (want,), _ = theirs.render_jinja_template([messages], chat_template=source, **given, **TOKENS)
    assert got == want


def test_the_published_template_by_hand() -> None:
    got = chat.Template(published(), {"bos_token": "<BOS>"}).render(TALK, add_generation_prompt=True)
    assert got.startswith("<BOS>Be brief.<｜User｜>小明 <b>&</b>")
    assert got.endswith("<｜Assistant｜>\n\n2<｜end▁of▁sentence｜><｜User｜>  And $\\frac{1}{2}$?  <｜Assistant｜>")


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe|undefined"),
        ("{{ messages.append(1) }}", "append"),
        ("{% for", "expected"),
        ("{{ messages[0]['content'] + 1 }}", "concatenate"),
        ("{{ messages[9]['content'] }}", "no element|undefined"),
    ],
)
def test_a_template_that_fails_or_reaches_out_is_an_error(source: str, says: str) -> None:
    with pytest.raises(ValueError, match=f"chat template does not render.*({says})"):
        chat.Template(source).render(TALK)


def test_a_template_cannot_change_what_it_is_given() -> None:
    talk = [dict(message) for message in TALK]
    with pytest.raises(ValueError, match="chat template does not render"):
        chat.Template("{{ messages[0].update({'content': 'x'}) }}").render(talk)
    assert talk == TALK


@pytest.mark.parametrize("template", sorted(text.TEMPLATES))
@pytest.mark.parametrize(
    "question", ["Why?", " Using 3, 5 and + make 8. \n", "Say {{ x }}, {question} and %}..", "小明"]
)
def test_the_exported_template_is_the_training_prompt(template: str, question: str) -> None:
    talk, want = [{"role": "user", "content": question}], text.render_prompt(template, question)
    assert chat.Template(chat_template(template)).render(talk, add_generation_prompt=True) == want
    assert chat.Template(chat_template(template, True), TOKENS).render(talk) == f"<s>{want}"
