"""Who rewrites a sampled completion before it is learned from: a rule, a function of yours, or a model behind a server.

The report lets a model make first-person prose with a summary out of R1-Zero's chains (section 2.3.1). A server is
asked by the chat-completions protocol that OpenAI's, vLLM's and SGLang's speak. What fails is dropped and counted.
"""

import json
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable

from r1jax.rewards.form import THINK, THINK_END
from r1jax.rewards.table import resolve

Editor = Callable[[str, str], str | None]  # question, completion to the new completion; None: drop it

INSTRUCTION = (
    "Rewrite the reasoning below as fluent first-person thought in the language of the question, without repetition. "
    "Keep every step that leads to the answer, the answer itself, and the tags <think> </think> <answer> </answer>. "
    "Reply with the rewritten text alone.\n\nQuestion: {question}\n\nReasoning:\n{completion}"
)
SENTENCE_END = re.compile(r"(?<=[.!?。！？])\s*")


def tidy(question: str, completion: str) -> str | None:
    """By rule: white space at the ends goes, and what the thought says a second time."""
    before, opened, rest = completion.strip().partition(THINK)
    thought, closed, after = rest.partition(THINK_END)
    if before or not (opened and closed):
        return None
    sentences = dict.fromkeys(one for one in SENTENCE_END.split(thought.strip()) if one)
    joint = "" if any("\u4e00" <= letter <= "\u9fff" for letter in thought) and " " not in thought.strip() else " "
    return f"{THINK} {joint.join(sentences)} {THINK_END}{after}"


def ask(url: str, model: str, text: str, timeout_s: float, tries: int) -> str | None:
    """The reply of a chat-completions server to one message; None when every try failed or the reply was nonsense.

    The key of the server, if it wants one, stands in the environment as OPENAI_API_KEY.
    """
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": text}]}).encode()
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {os.environ.get('OPENAI_API_KEY', '')}"}
    for attempt in range(tries):
        try:
            request = urllib.request.Request(f"{url.rstrip('/')}/chat/completions", body, headers)
            with urllib.request.urlopen(request, timeout=timeout_s) as answer:
                content = json.load(answer)["choices"][0]["message"]["content"]
            if isinstance(content, str) and content.strip():
                return content.strip()
        except (OSError, ValueError, LookupError, TypeError) as error:
            if isinstance(error, urllib.error.HTTPError) and error.code in (400, 401, 403, 404):
                raise ValueError(
                    f"{url} refuses to answer ({error}); see config.curate.editor, config.preference.judge, "
                    "config.eval.judge"
                ) from error
        if attempt + 1 < tries:
            time.sleep(min(2.0**attempt, 30.0))
    return None


def server(name: str, key: str) -> tuple[str, str]:
    """Address and model of "http(s)://HOST/v1#MODEL".

    Raises:
        ValueError: there is no model; names `key`.
    """
    url, _, model = name.partition("#")
    if not model:
        raise ValueError(f"{key} is {name!r}: the model's name is missing, {url}#MODEL")
    return url, model


def open_editor(name: str, timeout_s: float, tries: int) -> Editor | None:
    """What config.curate.editor names; None: nothing is rewritten.

    Raises:
        ValueError: there is no such editor.
    """
    if not name:
        return None
    if name == "tidy":
        return tidy
    if name.startswith(("http://", "https://")):
        url, model = server(name, "config.curate.editor")
        return lambda question, completion: ask(
            url, model, INSTRUCTION.format(question=question, completion=completion), timeout_s, tries
        )
    try:
        return resolve(name)
    except ValueError as error:
        raise ValueError(f"config.curate.editor is {name!r}: {error}") from error
