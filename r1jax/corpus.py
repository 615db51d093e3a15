"""The corpus that the embedded base model learns from, and its tokenizer, from a seed.

    python -m r1jax.corpus --out=DIR --documents=500000 --seed=0
    python -m r1jax.corpus --train_tokenizer --out=DIR

A document is a prompt (half of them in R1-Zero's template, half plain), a worked solution by some writer, and the
end-of-sequence token; only problems of the "corpus" split occur. DIR receives `tokens.bin` (uint16, little endian, the
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
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import rich.console
import rich.progress
import sentencepiece

from r1jax import writers
from r1jax.countdown import LARGEST_INTERMEDIATE, Problem, example_of, problems_of, question_of
from r1jax.rewards.countdown import grade
from r1jax.rewards.form import TAGS, format_reward
from r1jax.text import SPACE_MARK, TEMPLATES, load_tokenizer, reflective_words, render_prompt

BASE = Path(__file__).parent / "base"
BLOCK_DOCUMENTS = 2000  # one random stream each, so that the number of processes does not show in the result

VOCAB_SIZE = 512
TOKENIZER_SAMPLE = 20_000  # documents
# Phrases of the writers for which the vocabulary has no room.
SPELLED_OUT = ("no time. ", "check again: ", " done.", " or something else.")


def documents(seed: int, block: int, count: int) -> Iterator[tuple[str, Problem, str, str]]:
    """The first `count` documents of a block as (kind of writer, problem, prompt, completion)."""
    rng = random.Random(f"corpus {seed} {block}")
    problems = problems_of("corpus")
    for _ in range(count):
        problem, template, kind = rng.choice(problems), rng.choice(list(TEMPLATES)), writers.choose_writer(rng)
        yield kind, problem, render_prompt(template, question_of(problem)), writers.worked_solution(problem, rng, kind)


def phrases() -> list[str]:
    """Whole phrases that are one token: the template's sentences and what the writers say, but for SPELLED_OUT."""
    preamble = TEMPLATES["r1_zero"].partition("User: ")[0]
    sentences = [f"{sentence}. " for sentence in re.split(r"\. (?=The |$)", preamble) if sentence]
    tables = (
        *(writers.THOUGHTS, writers.SEPARATORS, writers.MISSES, writers.RESIGNATIONS, writers.SURRENDERS),
        *(writers.OPENINGS, writers.RETREATS, writers.HITS, writers.CHECKS, writers.REMARKS),
    )
    frame = [
        "User: ",
        "Using ",
        " and + - *, make ",
        " <think> ",
        " <answer>",
        " the answer is ",
        writers.TARGET,
        writers.DISTANCE,
    ]
    said = [phrase for table in tables for phrase in table if phrase and phrase not in SPELLED_OUT]
    return list(dict.fromkeys(sentences + frame + said))


def train_tokenizer(sample: list[str]) -> bytes:
    """A SentencePiece model of VOCAB_SIZE pieces: bytes, numbers, tags, phrases, and what letters `sample` has.

    One token per number makes arithmetic a table that a small model can learn; the bytes make any text possible. No
    piece crosses the end of a prompt ("Assistant:" is a piece of its own), so that prompt and completion encode apart.
    """
    required = [SPACE_MARK, "Assistant:", *TAGS, *(str(n) for n in range(LARGEST_INTERMEDIATE + 1))]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sample),
        model_writer=model,
        model_type="char",
        vocab_size=VOCAB_SIZE,
        byte_fallback=True,
        user_defined_symbols=required + [phrase.replace(" ", SPACE_MARK) for phrase in phrases()],
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


def _block(seed: int, block: int, count: int) -> tuple[bytes, dict[str, Counter[str]]]:
    """The tokens of one block and, for each kind of writer, sums of what the index reports."""
    tokenizer = _tokenizer(BASE)
    tokens: list[int] = []
    sums: dict[str, Counter[str]] = {kind: Counter() for kind in writers.WRITERS}
    for kind, problem, prompt, completion in documents(seed, block, count):
        completion_ids = tokenizer.encode(completion)
        tokens += [*tokenizer.encode(prompt), *completion_ids, tokenizer.eos_id]
        example = example_of(problem)
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


def write_corpus(out: Path, n_documents: int, seed: int, processes: int | None = None) -> dict[str, Any]:
    """Writes `tokens.bin` and `index.json` into the new folder `out`, whole or not at all; returns the index.

    Args:
      out: a folder that does not exist yet, or is empty.
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
    kinds: dict[str, Counter[str]] = {kind: Counter() for kind in writers.WRITERS}
    digest, n_tokens = hashlib.sha256(), 0
    try:
        # Spawned, not forked: a caller that has started jax holds threads.
        context = multiprocessing.get_context("spawn")
        with (
            ProcessPoolExecutor(processes or os.cpu_count(), mp_context=context) as pool,
            open(part / "tokens.bin", "wb") as file,
        ):
            blocks = pool.map(_block, itertools.repeat(seed), range(len(sizes)), sizes)
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
            "sha256": digest.hexdigest(),
            "tokenizer_sha256": hashlib.sha256((BASE / "tokenizer.model").read_bytes()).hexdigest(),
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
    parser.add_argument("--train_tokenizer", action="store_true", help="write tokenizer.model instead of a corpus")
    flags = parser.parse_args(argv)
    try:
        if flags.train_tokenizer:
            sample = [prompt + completion for *_, prompt, completion in documents(flags.seed, 0, TOKENIZER_SAMPLE)]
            flags.out.mkdir(parents=True, exist_ok=True)
            part = flags.out / ".tokenizer.model.part"
            part.write_bytes(train_tokenizer(sample))
            os.replace(part, flags.out / "tokenizer.model")
        else:
            print(json.dumps(write_corpus(flags.out, flags.documents, flags.seed), indent=1))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
