"""A SentencePiece model of characters and whole phrases, such as that of the packaged base, as a `tokenizer.json`.

`transformers` reads SentencePiece models of merges (Llama's) only. The same ids come out of the library `tokenizers`:
phrases are its added tokens, whose longest match wins as SentencePiece's does, and characters are merges without any.
"""

import json
from typing import Any

from r1jax.text import SPACE_MARK, SentencePieceTokenizer

CHARACTERS = 4  # TrainerSpec.ModelType.CHAR
CONTROL = 3  # ModelProto.SentencePiece.Type.CONTROL


def describe(tokenizer: SentencePieceTokenizer) -> dict[str, Any] | None:
    """`tokenizer.json` and `tokenizer_config.json` by name, None for a SentencePiece model of another kind.

    Both libraries give the same ids to every text without a literal U+2581, by which SentencePiece marks spaces.
    """
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto.FromString(tokenizer.processor.serialized_model_proto())
    if model.trainer_spec.model_type != CHARACTERS or model.normalizer_spec.name != "identity":
        return None
    pieces = [(i, piece.piece, piece.type) for i, piece in enumerate(model.pieces)]
    whole = {"single_word": False, "lstrip": False, "rstrip": False}
    added = [
        {"id": i, "content": piece, **whole, "normalized": kind != CONTROL, "special": kind == CONTROL}
        for i, piece, kind in pieces
        if kind == CONTROL or (len(piece) > 1 and not tokenizer.processor.is_byte(i))
    ]
    described = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": SPACE_MARK},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": SPACE_MARK}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": tokenizer.processor.id_to_piece(tokenizer.processor.unk_id()),
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {piece: i for i, piece, _ in pieces},
            "merges": [],
        },
    }
    named = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "pad": tokenizer.pad_id}
    tokens = {f"{kind}_token": tokenizer.processor.id_to_piece(i) for kind, i in named.items() if i is not None}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **tokens}
    return {"tokenizer.json": described, "tokenizer_config.json": config}


def files_of(tokenizer: SentencePieceTokenizer) -> dict[str, bytes]:
    """The files of `describe` as bytes; none for a model of another kind."""
    files = describe(tokenizer) or {}
    return {name: (json.dumps(content, ensure_ascii=False) + "\n").encode() for name, content in files.items()}
