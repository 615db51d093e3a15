"""Text and token ids: tokenizers of released-model folders, R1-Zero's prompt template, reflective words.

The template is the one of the DeepSeek-R1 report (arXiv 2501.12948, table 1), the list of reflective words that of its
analysis of R1-Zero's training. A tokenizer here is a small protocol: SentencePiece's `tokenizer.model` and Hugging
Face's `tokenizer.json` both become one. Sampled ids are never encoded again: decoding is for graders and readers.
"""

import dataclasses
import itertools
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol, SupportsIndex, runtime_checkable

import sentencepiece

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
            f"unknown prompt template {template!r}: config.data.template must be one of {', '.join(TEMPLATES)}"
        )
    return TEMPLATES[template].format(question=question.strip().removesuffix("."))


def reflective_words(text: str) -> int:
    """How many reflective words stand in `text`: whole words of REFLECTIVE_WORDS in any case."""
    return len(_REFLECTIVE.findall(text))


@runtime_checkable
class Tokenizer(Protocol):
    """What the rest of r1jax asks of a tokenizer.

    `encode` adds no special tokens. `decode` keeps tags such as `<think>`, leaves out the begin, end and padding
    tokens, shows ids or bytes that mean nothing as U+FFFD, and never raises.
    """

    vocab_size: int
    eos_id: int
    bos_id: int | None
    pad_id: int

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

    def encode(self, text: str) -> list[int]:
        text = text.encode("utf-8", "replace").decode("utf-8")
        return self.backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        silent = {self.eos_id, self.bos_id, self.pad_id}
        kept = [i for i in map(int, ids) if i not in silent]
        return _decode_runs(
            kept, self.known_ids.__contains__, lambda run: self.backend.decode(run, skip_special_tokens=False)
        )


def _decode_runs(ids: Iterable[SupportsIndex], known: Callable[[int], bool], decode: Callable[[list[int]], str]) -> str:
    runs = itertools.groupby(map(int, ids), known)
    return "".join(decode(list(run)) if is_known else UNDECODABLE * len(list(run)) for is_known, run in runs)


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer of a released-model folder: its `tokenizer.json`, else its `tokenizer.model`.

    Raises:
      ValueError: the folder has neither, or the file cannot be read, or no end-of-sequence token is named.
    """
    folder = Path(folder)
    for name, load in {"tokenizer.json": _load_json, "tokenizer.model": _load_sentencepiece}.items():
        if (folder / name).is_file():
            return load(folder / name)
    raise ValueError(
        f"no tokenizer.json or tokenizer.model in {folder}: config.model.path must be a released-model folder"
    )


def _load_sentencepiece(path: Path) -> SentencePieceTokenizer:
    try:
        processor = sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())
        size = processor.vocab_size()
    except (OSError, RuntimeError) as error:
        raise ValueError(f"{path} is not a SentencePiece model ({error}); see config.model.path") from error
    if size == 0 or processor.eos_id() < 0:
        raise ValueError(f"{path} is empty or has no end-of-sequence piece; see config.model.path")
    bos, eos, pad = processor.bos_id(), processor.eos_id(), processor.pad_id()
    return SentencePieceTokenizer(processor, size, eos, bos if bos >= 0 else None, pad if pad >= 0 else eos)


def _load_json(path: Path) -> JsonTokenizer:
    import tokenizers  # only where a released model asks for it: the embedded base does not

    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the Rust side raises bare Exception
        raise ValueError(
            f"{path} is not a tokenizer of the `tokenizers` library ({error}); see config.model.path"
        ) from error
    config_path = path.with_name("tokenizer_config.json")
    try:
        config = json.loads(config_path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {config_path}, which names the special tokens ({error})") from error
    special: dict[str, int | None] = {}
    for kind in ("eos", "bos", "pad"):
        token = config.get(f"{kind}_token")
        token = token["content"] if isinstance(token, dict) else token
        special[kind] = None if token is None else backend.token_to_id(token)
    eos, bos, pad = special["eos"], special["bos"], special["pad"]
    if eos is None:
        raise ValueError(f"{config_path} names no eos_token that {path.name} knows: completions could not end")
    known = frozenset(backend.get_vocab(with_added_tokens=True).values())
    return JsonTokenizer(backend, known, max(known) + 1, eos, bos, eos if pad is None else pad)


def check_fits(tokenizer: Tokenizer, model_vocab_size: int) -> None:
    """Raises ValueError when the tokenizer has ids that the model's embedding has not; a padded embedding is fine."""
    if tokenizer.vocab_size > model_vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} ids but the model's embedding only {model_vocab_size} rows: "
            "config.model.path must hold weights and tokenizer of the same model"
        )
