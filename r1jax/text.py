"""Text and token ids: tokenizers of released-model folders, R1-Zero's prompt template, reflective words.

The template is the one of the DeepSeek-R1 report (arXiv 2501.12948, table 1), the list of reflective words that of its
analysis of R1-Zero's training. A tokenizer here is a small protocol: SentencePiece's `tokenizer.model` and Hugging
Face's `tokenizer.json` both become one. Sampled ids are never encoded again: decoding is for graders and readers. Chat
templates are `chat`'s.
"""

import collections
import dataclasses
import itertools
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, SupportsIndex, runtime_checkable

import sentencepiece

from r1jax import chat
from r1jax.folders import Folder, folder_at

TEMPLATES = {
    "r1_zero": (
        "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. "
        "The assistant first thinks about the reasoning process in the mind and then provides the user with "
        "the answer. The reasoning process and answer are enclosed within <think> </think> and <answer> </answer> "
        "tags, respectively, i.e., <think> reasoning process here </think> <answer> answer here </answer>. "
        "User: {question}. Assistant:"
    ),
    "plain": "User: {question}. Assistant:",
}

CHAT = "chat"  # in place of a name of TEMPLATES: the chat template of the released model

REFLECTIVE_WORDS = ("wait", "mistake", "however", "but", "retry", "error", "verify", "evaluate", "check")
_REFLECTIVE = re.compile(rf"\b(?:{'|'.join(REFLECTIVE_WORDS)})\b", re.IGNORECASE)

UNDECODABLE = "\N{REPLACEMENT CHARACTER}"
SPACE_MARK = "\u2581"  # how SentencePiece writes a space in its pieces


def render_prompt(template: str, question: str) -> str:
    """The prompt of `question` under a template of TEMPLATES; a final period that the question has is not doubled.

    Raises:
      ValueError: there is no such template.
    """
    if template not in TEMPLATES:
        raise ValueError(
            f"unknown prompt template {template!r}: config.data.template must be one of {', '.join(TEMPLATES)} or "
            f"{CHAT!r}, the model's own"
        )
    return TEMPLATES[template].format(question=question.strip().removesuffix("."))


def reflective_words(text: str) -> int:
    """How many reflective words stand in `text`: whole words of REFLECTIVE_WORDS in any case."""
    return len(_REFLECTIVE.findall(text))


def reflective_counts(text: str) -> dict[str, int]:
    """How often each of REFLECTIVE_WORDS stands in `text`, as `reflective_words` counts them."""
    found = collections.Counter(word.lower() for word in _REFLECTIVE.findall(text))
    return {word: found[word] for word in REFLECTIVE_WORDS}


@runtime_checkable
class Tokenizer(Protocol):
    """What the rest of r1jax asks of a tokenizer.

    `encode` adds no special tokens. `decode` keeps tags such as `<think>`, leaves out the begin, end and padding
    tokens, shows ids or bytes that mean nothing as U+FFFD, and never raises. Any of `eos_ids` ends a completion;
    `adds_bos` says whether the model has seen its texts with the begin token before them.
    """

    vocab_size: int
    eos_id: int
    bos_id: int | None
    pad_id: int
    eos_ids: frozenset[int]
    adds_bos: bool
    template: chat.Template | None

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Iterable[SupportsIndex]) -> str: ...


@dataclasses.dataclass(frozen=True)
class SentencePieceTokenizer:
    """A `tokenizer.model` (SentencePiece: arXiv 1808.06226)."""

    processor: sentencepiece.SentencePieceProcessor
    vocab_size: int
    eos_id: int
    bos_id: int | None
    pad_id: int
    eos_ids: frozenset[int]
    adds_bos: bool
    template: chat.Template | None

    def encode(self, text: str) -> list[int]:
        # Lone surrogates are no text in any encoding. A literal space mark would become a space: it goes in as bytes.
        text = text.encode("utf-8", "replace").decode("utf-8")
        first, *others = text.split(SPACE_MARK)
        ids = self.processor.encode(first)
        for other in others:
            ids += [self.processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_MARK.encode()]
            ids += self.processor.encode(other)
        return ids

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        return _decode_runs(ids, self._is_known, self.processor.decode)

    def _is_known(self, i: int) -> bool:
        return 0 <= i < self.vocab_size and not self.processor.is_unknown(i)


@dataclasses.dataclass(frozen=True)
class JsonTokenizer:
    """A `tokenizer.json` of the library `tokenizers`, its special tokens as `tokenizer_config.json` names them."""

    backend: Any
    known_ids: frozenset[int]
    vocab_size: int
    eos_id: int
    bos_id: int | None
    pad_id: int
    eos_ids: frozenset[int]
    adds_bos: bool
    template: chat.Template | None

    def encode(self, text: str) -> list[int]:
        text = text.encode("utf-8", "replace").decode("utf-8")
        return self.backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        silent = {*self.eos_ids, self.bos_id, self.pad_id}
        kept = [i for i in map(int, ids) if i not in silent]
        return _decode_runs(
            kept, self.known_ids.__contains__, lambda run: self.backend.decode(run, skip_special_tokens=False)
        )


def _decode_runs(ids: Iterable[SupportsIndex], known: Callable[[int], bool], decode: Callable[[list[int]], str]) -> str:
    runs = itertools.groupby(map(int, ids), known)
    return "".join(decode(list(run)) if is_known else UNDECODABLE * len(list(run)) for is_known, run in runs)


def forced(prompt: str, opening: str) -> str:
    """What is put before a completion so that it begins with `opening`: nothing where the prompt ends with it."""
    return "" if not opening.strip() or prompt.rstrip().endswith(opening.strip()) else opening


def encode_prompt(
    tokenizer: Tokenizer, template: str, question: str | Sequence[chat.Message], opening: str = ""
) -> tuple[str, list[int]]:
    """Text and ids of a question under a template of TEMPLATES or CHAT; under CHAT it may be all messages so far.

    The ids go on with what is `forced` by `opening`, the text does not: that is the completion's.

    The begin token comes first where the model has learned with it; a chat template writes it itself.

    Raises:
      ValueError: there is no such template, or the model has none of its own.
    """
    if template != CHAT:
        prompt = render_prompt(template, question)
        ids = tokenizer.encode(prompt + forced(prompt, opening))
        return prompt, [tokenizer.bos_id, *ids] if tokenizer.adds_bos and ids[:1] != [tokenizer.bos_id] else ids
    if tokenizer.template is None:
        raise ValueError(
            f"config.data.template is {CHAT!r}, but the model has no chat template (chat_template.jinja or "
            f"tokenizer_config.json); choose one of {', '.join(TEMPLATES)}"
        )
    messages = [{"role": "user", "content": question}] if isinstance(question, str) else question
    prompt = tokenizer.template.render(messages, add_generation_prompt=True)
    return prompt, tokenizer.encode(prompt + forced(prompt, opening))


class TextStream:
    """The text of a completion while it grows, never with half a character at its end."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._decode = tokenizer.decode
        self._ids: list[int] = []
        # Decoding begins at `_from`: the tokens before `_until` give the context, their text is shown already.
        self._from = self._until = self._shown = 0

    def add(self, ids: Iterable[SupportsIndex]) -> str:
        """The text that these further ids make certain."""
        self._ids += map(int, ids)
        text = self._decode(self._ids[self._from :])
        # Of a character that is still incomplete at most three bytes are there.
        pending = len(text) - len(text.rstrip(UNDECODABLE))
        end = max(len(text) - min(pending, 3), self._shown)
        new, self._shown = text[self._shown : end], end
        if not pending and len(text) > 0:
            self._from, self._until = self._until, len(self._ids)
            self._shown = len(self._decode(self._ids[self._from :]))
        return new

    def end(self) -> str:
        """What is left, a character cut short as U+FFFD."""
        text = self._decode(self._ids[self._from :])
        new, self._shown = text[self._shown :], len(text)
        return new


def load_tokenizer(folder: str | Path | Folder) -> Tokenizer:
    """The tokenizer of a released-model folder: its `tokenizer.json`, else its `tokenizer.model`.

    Raises:
      ValueError: the folder has neither, or the file cannot be read, or no end-of-sequence token is named.
    """
    folder = folder_at(folder)
    for name, load in {"tokenizer.json": _load_json, "tokenizer.model": _load_sentencepiece}.items():
        if folder.has(name):
            return load(folder)
    raise ValueError(
        f"no tokenizer.json or tokenizer.model in {folder}: config.model.path must be a released-model folder"
    )


def _read_json(folder: Folder, name: str) -> dict[str, Any]:
    """A JSON object of the folder, empty where the file is not there."""
    if not folder.has(name):
        return {}
    try:
        found = json.loads(folder.text(name))
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {folder.path(name)} ({error})") from error
    if not isinstance(found, dict):
        raise ValueError(f"{folder.path(name)} must hold a JSON object")
    return found


def _eos_ids(folder: Folder, eos: int) -> frozenset[int]:
    """The token that ends a text, and those with which chats end (Llama 3, Qwen: generation_config.json)."""
    more = _read_json(folder, "generation_config.json").get("eos_token_id")
    return frozenset([eos, *(more if isinstance(more, list) else [] if more is None else [more])])


def _load_sentencepiece(folder: Folder) -> SentencePieceTokenizer:
    path = folder.path("tokenizer.model")
    try:
        processor = sentencepiece.SentencePieceProcessor(model_proto=folder.read("tokenizer.model"))
        size = processor.vocab_size()
    except (OSError, RuntimeError) as error:
        raise ValueError(f"{path} is not a SentencePiece model ({error}); see config.model.path") from error
    if size == 0 or processor.eos_id() < 0:
        raise ValueError(f"{path} is empty or has no end-of-sequence piece; see config.model.path")
    bos, eos, pad = processor.bos_id(), processor.eos_id(), processor.pad_id()
    config = _read_json(folder, "tokenizer_config.json")
    return SentencePieceTokenizer(
        processor,
        size,
        eos,
        bos if bos >= 0 else None,
        pad if pad >= 0 else eos,
        _eos_ids(folder, eos),
        # Such folders are Llama's, whose tokenizer adds it unless told not to; without a configuration it is our own.
        adds_bos=bos >= 0 and bool(config and config.get("add_bos_token", True)),
        template=_template(folder, config),
    )


def _load_json(folder: Folder) -> JsonTokenizer:
    import tokenizers  # only where a released model asks for it: the embedded base does not

    path, config_path = folder.path("tokenizer.json"), folder.path("tokenizer_config.json")
    try:
        backend = tokenizers.Tokenizer.from_buffer(folder.read("tokenizer.json"))
    except Exception as error:  # the Rust side raises bare Exception
        raise ValueError(
            f"{path} is not a tokenizer of the `tokenizers` library ({error}); see config.model.path"
        ) from error
    if not folder.has("tokenizer_config.json"):
        raise ValueError(f"cannot read {config_path}, which names the special tokens: it is not there")
    config = _read_json(folder, "tokenizer_config.json")
    special = {kind: backend.token_to_id(token) for kind, token in special_tokens(config).items()}
    eos, bos, pad = (special.get(f"{kind}_token") for kind in ("eos", "bos", "pad"))
    if eos is None:
        raise ValueError(f"{config_path} names no eos_token that tokenizer.json knows: completions could not end")
    known = frozenset(backend.get_vocab(with_added_tokens=True).values())
    # Said in one of two places: DeepSeek's configuration asks for it, Llama 3's tokenizer does it.
    adds_bos = bool(config.get("add_bos_token")) or backend.encode("").ids[:1] == [bos]
    return JsonTokenizer(
        backend,
        known,
        max(known) + 1,
        eos,
        bos,
        eos if pad is None else pad,
        _eos_ids(folder, eos),
        adds_bos=bos is not None and adds_bos,
        template=_template(folder, config),
    )


def special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """The special tokens that a `tokenizer_config.json` names, by their key, such as "bos_token"."""
    named = {key: value for key, value in config.items() if key.endswith("_token")}
    texts = {key: value.get("content") if isinstance(value, dict) else value for key, value in named.items()}
    return {key: text for key, text in texts.items() if isinstance(text, str)}


def _template(folder: Folder, config: Mapping[str, Any]) -> chat.Template | None:
    source = config.get("chat_template")
    if isinstance(source, list):  # several by name
        source = {one["name"]: one["template"] for one in source}.get("default")
    if folder.has("chat_template.jinja"):
        source = folder.text("chat_template.jinja")
    return None if source is None else chat.Template(source, special_tokens(config))


def check_fits(tokenizer: Tokenizer, model_vocab_size: int) -> None:
    """Raises ValueError when the tokenizer has ids that the model's embedding has not; a padded embedding is fine."""
    if tokenizer.vocab_size > model_vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} ids but the model's embedding only {model_vocab_size} rows: "
            "config.model.path must hold weights and tokenizer of the same model"
        )
