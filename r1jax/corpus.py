"""The corpora that the embedded base models learn from, and their tokenizers, from a seed.

    python -m r1jax.corpus --out=DIR --documents=500000 --seed=0 [--mixture=bilingual]
    python -m r1jax.corpus --train_tokenizer --out=DIR [--mixture=bilingual]

A document is a prompt (half of them in R1-Zero's template, half plain), a worked solution by some writer, and the
end-of-sequence token; only problems of the "corpus" split occur. The bilingual mixture asks in English or Chinese, its
writers often mix the two, and a fifth of it are letters. DIR receives `tokens.bin` (uint16, little endian, the
documents one after another) and `index.json`. 500,000 documents take about two minutes on two cores.
"""

import argparse
import functools
import hashlib
import io
import itertools
import json
import multiprocessing
import os
import random
import re
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import rich.console
import rich.progress
import sentencepiece

from r1jax import letters, writers
from r1jax.countdown import LARGEST_INTERMEDIATE, QUESTIONS, example_of, problems_of
from r1jax.phrases import PHRASES, choose_voice, pick
from r1jax.rewards.countdown import grade as countdown_grade
from r1jax.rewards.form import TAGS, format_reward
from r1jax.rewards.worth import grade as letter_grade
from r1jax.text import SPACE_MARK, TEMPLATES, load_tokenizer, reflective_words, render_prompt

BLOCK_DOCUMENTS = 2000  # one random stream each, so that the number of processes does not show in the result
TOKENIZER_SAMPLE = 20_000  # documents
# Phrases of the English mixture for which its vocabulary has no room.
SPELLED_OUT = ("no time. ", "check again: ", " done.", " or something else.")

Document = tuple[str, dict[str, Any], str, str]  # kind of writer, example, prompt, completion


def english(rng: random.Random) -> Document:
    """A Countdown problem and its solution."""
    problem, template, kind = rng.choice(problems_of("corpus")), rng.choice(list(TEMPLATES)), writers.choose_writer(rng)
    example = example_of(problem)
    prompt = render_prompt(template, example["question"])
    return kind, example, prompt, writers.worked_solution(problem, rng, kind)


# Writers of letters: share and how likely each does one thing right.
LETTER_WRITERS = {"careless letter": (0.5, 0.4), "letter": (0.3, 0.65), "careful letter": (0.2, 0.9)}
LETTERS_SHARE, LETTERS_KEEP_FORMAT = 0.2, 0.75


def bilingual(rng: random.Random) -> Document:
    """A Countdown problem or a letter, in English or Chinese, by a writer who may not keep to one language."""
    template = rng.choice(list(TEMPLATES))
    if rng.random() < LETTERS_SHARE:
        letter = rng.choice(letters.letters_of("corpus"))
        kind = pick(rng, {name: share for name, (share, _) in LETTER_WRITERS.items()})
        voice = choose_voice(rng, letter.language)
        thought, reply = letters.written_letter(letter, rng, voice, LETTER_WRITERS[kind][1])
        form = writers.WELL_FORMED if rng.random() < LETTERS_KEEP_FORMAT else pick(rng, writers.ILL_FORMED)
        example = letters.example_of(letter)
        completion = writers.written(form, thought, reply, rng, voice)
        return kind, example, render_prompt(template, example["question"]), completion
    language, problem = rng.choice(list(PHRASES)), rng.choice(problems_of("corpus"))
    kind, voice = writers.choose_writer(rng), choose_voice(rng, language)
    example = example_of(problem, language)
    completion = writers.worked_solution(problem, rng, kind, voice)
    return kind, example, render_prompt(template, example["question"]), completion


class Mixture(NamedTuple):
    """A kind of corpus: where its tokenizer is, and how documents and vocabulary are made."""

    base: Path
    document: Callable[[random.Random], Document]
    vocab_size: int
    languages: tuple[str, ...]
    spelled_out: tuple[str, ...] = ()


MIXTURES = {
    "english": Mixture(Path(__file__).parent / "base", english, 512, ("en",), SPELLED_OUT),
    "bilingual": Mixture(Path(__file__).parent / "base_bilingual", bilingual, 672, tuple(PHRASES)),
}


def documents(seed: int, block: int, count: int, mixture: str = "english") -> Iterator[Document]:
    """The first `count` documents of a block."""
    rng = random.Random(f"corpus {seed} {block}")
    for _ in range(count):
        yield MIXTURES[mixture].document(rng)


def phrases(mixture: Mixture) -> list[str]:
    """Whole phrases that are one token: the template's sentences and what the writers say, but for some."""
    preamble = TEMPLATES["r1_zero"].partition("User: ")[0]
    sentences = [f"{sentence}. " for sentence in re.split(r"\. (?=The |$)", preamble) if sentence]
    questions = [piece for language in mixture.languages for piece in re.split(r"\{\w+\}\.?", QUESTIONS[language])]
    said = [
        phrase.format(answer="").rstrip(".。") if table == "answer" else phrase
        for language in mixture.languages
        for table, phrases_of in PHRASES[language].items()
        for phrase in phrases_of
    ]
    more = letters.tokens() if len(mixture.languages) > 1 else []
    every = [*sentences, "User: ", *questions, " <think> ", " <answer>", *said, *more]
    return [phrase for phrase in dict.fromkeys(every) if phrase and phrase not in mixture.spelled_out]


def train_tokenizer(sample: list[str], mixture: Mixture) -> bytes:
    """A SentencePiece model: bytes, numbers, tags, phrases, and what letters `sample` has.

    One token per number makes arithmetic a table that a small model can learn; the bytes make any text possible. No
    piece crosses the end of a prompt ("Assistant:" is a piece of its own), so that prompt and completion encode apart.
    """
    required = [SPACE_MARK, "Assistant:", *TAGS, *(str(n) for n in range(LARGEST_INTERMEDIATE + 1))]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sample),
        model_writer=model,
        model_type="char",
        vocab_size=mixture.vocab_size,
        byte_fallback=True,
        user_defined_symbols=required + [phrase.replace(" ", SPACE_MARK) for phrase in phrases(mixture)],
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        pad_id=0,
        bos_id=1,
        eos_id=2,
        unk_id=3,
        num_threads=1,
        minloglevel=1,
    )
    return model.getvalue()


_tokenizer = functools.cache(load_tokenizer)


def _block(seed: int, block: int, count: int, mixture: str) -> tuple[bytes, dict[str, Counter[str]]]:
    """The tokens of one block and, for each kind of writer, sums of what the index reports."""
    tokenizer = _tokenizer(MIXTURES[mixture].base)
    tokens: list[int] = []
    sums: dict[str, Counter[str]] = {kind: Counter() for kind in (*writers.WRITERS, *LETTER_WRITERS)}
    for kind, example, prompt, completion in documents(seed, block, count, mixture):
        completion_ids = tokenizer.encode(completion)
        tokens += [*tokenizer.encode(prompt), *completion_ids, tokenizer.eos_id]
        grade = letter_grade if example["grader"] == "judged" else countdown_grade
        sums[kind].update(
            documents=1,
            completion_tokens=len(completion_ids) + 1,
            reflective_words=reflective_words(completion),
            well_formed=format_reward(prompt, completion, example),
            correct=grade(completion, example),
        )
    return np.array(tokens, dtype="<u2").tobytes(), sums


def _index_of(sums: Counter[str]) -> dict[str, float]:
    """The number of documents and the mean of everything else."""
    n = sums["documents"]
    return {"documents": n} | {key: round(total / n, 4) for key, total in sums.items() if key != "documents"}


def write_corpus(
    out: Path, n_documents: int, seed: int, processes: int | None = None, mixture: str = "english"
) -> dict[str, Any]:
    """Writes `tokens.bin` and `index.json` into the new folder `out`, whole or not at all; returns the index.

    Args:
      out: a folder that does not exist yet, or is empty.
      mixture: a name of MIXTURES.
      processes: worker processes, by default one per core; the result does not depend on it.

    Raises:
      ValueError: `out` holds something already, or no document is asked for.
    """
    if n_documents < 1:
        raise ValueError(f"--documents={n_documents}: at least one document is wanted")
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"--out={out} is not empty: name a new folder")
    part = out.with_name(f".{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    starts = range(0, n_documents, BLOCK_DOCUMENTS)
    sizes = [min(BLOCK_DOCUMENTS, n_documents - start) for start in starts]
    kinds: dict[str, Counter[str]] = {kind: Counter() for kind in (*writers.WRITERS, *LETTER_WRITERS)}
    digest, n_tokens = hashlib.sha256(), 0
    try:
        # Spawned, not forked: a caller that has started jax holds threads.
        context = multiprocessing.get_context("spawn")
        with (
            ProcessPoolExecutor(processes or os.cpu_count(), mp_context=context) as pool,
            open(part / "tokens.bin", "wb") as file,
        ):
            blocks = pool.map(_block, itertools.repeat(seed), range(len(sizes)), sizes, itertools.repeat(mixture))
            progress = rich.progress.track(blocks, "corpus", len(sizes), console=rich.console.Console(stderr=True))
            for tokens, sums in progress:
                file.write(tokens)
                digest.update(tokens)
                n_tokens += len(tokens) // 2
                for kind, block_sums in sums.items():
                    kinds[kind].update(block_sums)
            file.flush()
            os.fsync(file.fileno())
        index = {
            "documents": n_documents,
            "tokens": n_tokens,
            "seed": seed,
            "mixture": mixture,
            "sha256": digest.hexdigest(),
            "tokenizer_sha256": hashlib.sha256((MIXTURES[mixture].base / "tokenizer.model").read_bytes()).hexdigest(),
            "all": _index_of(sum(kinds.values(), Counter())),
            "kinds": {kind: _index_of(sums) for kind, sums in kinds.items() if sums},
        }
        (part / "index.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
        os.replace(part, out)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return index


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m r1jax.corpus", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--documents", type=int, default=500_000, help="how many documents (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="which documents (default %(default)s)")
    parser.add_argument("--mixture", choices=list(MIXTURES), default="english", help="which kind (default %(default)s)")
    parser.add_argument("--train_tokenizer", action="store_true", help="write tokenizer.model instead of a corpus")
    flags = parser.parse_args(argv)
    try:
        if flags.train_tokenizer:
            written = documents(flags.seed, 0, TOKENIZER_SAMPLE, flags.mixture)
            sample = [prompt + completion for *_, prompt, completion in written]
            flags.out.mkdir(parents=True, exist_ok=True)
            part = flags.out / ".tokenizer.model.part"
            part.write_bytes(train_tokenizer(sample, MIXTURES[flags.mixture]))
            os.replace(part, flags.out / "tokenizer.model")
        else:
            print(json.dumps(write_corpus(flags.out, flags.documents, flags.seed, mixture=flags.mixture), indent=1))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
