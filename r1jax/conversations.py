"""Conversations as training data: JSON Lines in chat format to packed rows; learned is what the assistant says last.

A line is {"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}]}: what TRL, Axolotl and
the data sets of the hub use.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from r1jax.packing import Rows, pack_documents
from r1jax.sources import read_records
from r1jax.text import CHAT, Tokenizer, encode_prompt

OPENING = "<think>\n"  # some chat templates put it before the answer of the assistant, whose own text has it as well


@dataclasses.dataclass(frozen=True)
class Packed:
    """Rows, and how many conversations they hold; those longer than a row are left out."""

    rows: Rows
    conversations: int
    too_long: int


def messages_of(record: Mapping[str, Any], where: str) -> list[dict[str, str]]:
    """The messages of a record, which end with the assistant's.

    Raises:
        ValueError: there are none, or one is malformed.
    """
    messages = record.get("messages")
    if not isinstance(messages, list) or len(messages) < 2:
        raise ValueError(f'{where}: "messages" must list two messages or more, each with "role" and "content"')
    for message in messages:
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise ValueError(f'{where}: a message must have "role" and "content", both text, got {message!r}')
    if messages[-1]["role"] != "assistant" or not messages[-1]["content"].strip():
        raise ValueError(f"{where}: the last message must be the assistant's and not empty: it is what is learned")
    return messages


def encode(tokenizer: Tokenizer, template: str, messages: list[dict[str, str]], where: str) -> tuple[list, list]:
    """Ids of what comes before the assistant's last message, as in sampling, and of that message with its end.

    Raises:
        ValueError: the template has no place for these messages.
    """
    *before, last = messages
    if template == CHAT:
        prompt, ids = encode_prompt(tokenizer, template, before)
    elif [message["role"] for message in before] == ["user"]:
        prompt, ids = encode_prompt(tokenizer, template, before[0]["content"])
    else:
        roles = ", ".join(message["role"] for message in messages)
        raise ValueError(f"{where}: config.data.template={template} has no place for {roles}; set it to {CHAT}")
    content = last["content"]
    if prompt.endswith(OPENING):
        content = content.removeprefix(OPENING)
    elif template != CHAT and not content.startswith(" "):
        content = " " + content  # these templates end with "Assistant:"
    return ids, [*tokenizer.encode(content), tokenizer.eos_id]


def read(path: str, key: str, tokenizer: Tokenizer, template: str, row_tokens: int) -> Packed:
    """The packed rows of a file; a conversation stands whole in one row.

    Raises:
        ValueError: a missing file, a line that is no conversation (named with file and line), or none that fits a row.
    """
    tokens: list[int] = []
    is_learned: list[bool] = []
    lengths: list[int] = []
    too_long = 0
    for ids, completion in _encoded(path, key, tokenizer, template):
        n = len(ids) + len(completion)
        if n - 1 > row_tokens:
            too_long += 1
            continue
        tokens += ids + completion
        is_learned += [False] * len(ids) + [True] * len(completion)
        lengths.append(n)
    if not lengths:
        what = f"all {too_long} conversations are longer than a row" if too_long else "no conversation"
        raise ValueError(f"{key}: {path} has {what} (config.sft.row_tokens is {row_tokens})")
    rows = pack_documents(np.array(tokens, np.int32), np.array(lengths), row_tokens, np.array(is_learned))
    return Packed(rows, len(lengths), too_long)


def _encoded(path: str, key: str, tokenizer: Tokenizer, template: str) -> Iterator[tuple[list, list]]:
    for number, record in read_records(path, key):
        where = f"{path}, line {number}"
        yield encode(tokenizer, template, messages_of(record, where), where)
