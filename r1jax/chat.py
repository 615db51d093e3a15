"""Chat templates of released models: Jinja in a sandbox, rendered as Hugging Face's `transformers` renders them.

A template comes from a model folder, so it is somebody else's program: it reads plain data and can neither import nor
change anything (jinja2's ImmutableSandboxedEnvironment).
"""

import dataclasses
import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

Message = Mapping[str, Any]  # "role" and "content", whatever else the template reads


@dataclasses.dataclass(frozen=True)
class Template:
    """A chat template and the special tokens that it may name, by their key in tokenizer_config.json."""

    source: str
    special_tokens: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def render(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """The messages as the text that the model was trained on.

        Args:
            add_generation_prompt: ends with what comes before an answer of the assistant.
            variables: what else the template reads, for instance enable_thinking.

        Raises:
            ValueError: the template is malformed, or refuses these messages.
        """
        import jinja2

        given = {
            "messages": _plain(messages),
            "tools": _plain(tools),
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            return _compile(self.source).render(**given, **{**self.special_tokens, **variables})
        except (jinja2.TemplateError, TypeError, KeyError) as error:
            raise ValueError(f"the model's chat template does not render these messages: {error}") from error


def _plain(value: Any) -> Any:
    """Copies of JSON types only: a template can call any method of what it is given."""
    return json.loads(json.dumps(value, ensure_ascii=False))


@functools.lru_cache(16)
def _compile(source: str) -> Any:
    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} marks what the assistant wrote, for loss masks; its body is rendered as it is."""

        tags = frozenset({"generation"})

        def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(["name:endgeneration"], drop_needle=True)

    def fail(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **how: Any) -> str:
        # jinja2's own would escape HTML.
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **how)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = fail
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment.from_string(source)
