"""Models that are asked by text: behind a chat-completions server, or a function of yours in their place.

Servers are asked by the protocol that OpenAI's, vLLM's and SGLang's speak. What fails costs its own item and nothing
else: an editor's sample, a judge's pair.
"""

import http.client
import json
import os
import queue
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any, TypeVar

from absl import logging

from r1jax.rewards.table import resolve

T = TypeVar("T")

REFUSED = (401, 403, 404)  # no other text will be answered either
TOO_MUCH = (400, 413, 422)  # this one never will


def open_asked(
    name: str,
    key: str,
    say: Callable[..., str],
    read: Callable[..., T | None],
    timeout_s: float,
    tries: int,
) -> Callable[..., T | None]:
    """What a key of the config names: "http(s)://HOST/v1#MODEL", "module:function" or "FILE.py:function".

    Args:
        say: the message to a server, of the arguments.
        read: what a server's reply means, of the reply and the arguments; None: nonsense, and it is asked again.
        timeout_s: of one try.

    Returns:
        A function of the arguments; None where no try gave an answer, or the user's function raised.

    Raises:
        ValueError: there is no such function, or the model's name is missing; names `key`.
    """
    if name.startswith(("http://", "https://")):
        url, _, model = name.partition("#")
        if not model:
            raise ValueError(f"{key} is {name!r}: the model's name is missing, {url}#MODEL")
        return lambda *asked: ask(url, model, say(*asked), lambda text: read(text, *asked), key, timeout_s, tries)
    return open_function(name, key)


def open_function(name: str, key: str) -> Callable[..., Any]:
    """A user's function that a key of the config names, which gives None where it raises.

    Raises:
        ValueError: there is no such function; names `key`.
    """
    try:
        function = resolve(name)
    except ValueError as error:
        raise ValueError(f"{key} is {name!r}: {error}") from error

    def call(*asked: Any) -> Any:
        try:
            return function(*asked)
        except Exception as error:  # whatever a user's function raises
            logging.warning("%s (%s) raised %r", name, key, error)
            return None

    return call


def ask(
    url: str, model: str, text: str, read: Callable[[str], T | None], key: str, timeout_s: float, tries: int
) -> T | None:
    """What a server replies to one message, read; None when every try failed or was nonsense.

    The server's own key, if it wants one, stands in the environment as OPENAI_API_KEY.

    Raises:
        ValueError: it refuses whatever it is asked; names `key`.
    """
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": text}]}).encode()
    for attempt in range(tries):
        try:
            content = json.loads(_post(f"{url.rstrip('/')}/chat/completions", body, timeout_s))
            reply = content["choices"][0]["message"]["content"].strip()
            if reply and (found := read(reply)) is not None:
                return found
        except urllib.error.HTTPError as error:
            if error.code in REFUSED:
                raise ValueError(f"{key}: {url} refuses to answer ({error})") from error
            if error.code in TOO_MUCH:
                return None
        except (OSError, ValueError, LookupError, TypeError, AttributeError, http.client.HTTPException):
            pass  # down, slow or nonsense
        if attempt + 1 < tries:
            time.sleep(min(2.0**attempt, 30.0))
    return None


def _post(url: str, body: bytes, timeout_s: float) -> bytes:
    """The response, whole within `timeout_s`.

    A thread reads it: a socket's own limit holds for each wait alone, so that a server that drips keeps to it, also in
    its headers, and finding a host has none.
    """
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {os.environ.get('OPENAI_API_KEY', '')}"}
    request, end_s = urllib.request.Request(url, body, headers), time.monotonic() + timeout_s
    heard: queue.SimpleQueue[bytes | Exception] = queue.SimpleQueue()

    def read() -> None:
        pieces = []
        try:
            with urllib.request.urlopen(request, timeout=timeout_s) as response:
                while time.monotonic() < end_s and (piece := response.read1(1 << 16)):
                    pieces.append(piece)
            heard.put(b"".join(pieces))
        except Exception as error:  # raised again where it is waited for
            heard.put(error)

    threading.Thread(target=read, daemon=True).start()
    try:
        found = heard.get(timeout=timeout_s)
    except queue.Empty:
        raise TimeoutError(f"{url} took longer than {timeout_s} s") from None
    if isinstance(found, Exception):
        raise found
    return found
