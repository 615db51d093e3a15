"""The corpus of the embedded base: the mixture of its writers, its problems, its files."""

import functools
import hashlib
import json
import os
import random
import re
import subprocess
import sys

import numpy as np
import pytest

from r1jax import corpus, letters, writers
from r1jax.countdown import LARGEST_INTERMEDIATE, problems_of, question_of
from r1jax.folders import folder_at
from r1jax.model import convert
from r1jax.rewards.countdown import grade
from r1jax.rewards.language import language_of, language_reward
from r1jax.rewards.worth import grade as letter_grade
from r1jax.text import load_tokenizer

EQUATION = re.compile(r"(?<![-+*\d)])(\d+)([-+*])(\d+)=(\d+)")


@functools.cache
def sample(kind: str, n: int = 600) -> list[tuple]:
    """Problems and their solutions by one kind of writer."""
    rng = random.Random(f"test {kind}")
    chosen = [rng.choice(problems_of("corpus")) for _ in range(n)]
    return [(problem, writers.worked_solution(problem, rng, kind)) for problem in chosen]


def wrong_share(text: str) -> tuple[int, int]:
    equations = EQUATION.findall(text)
    return sum(eval(a + op + b) != int(result) for a, op, b, result in equations), len(equations)


def test_patient_writers_are_exact_find_it_and_never_try_twice():
    for problem, text in sample("patient"):
        assert wrong_share(text)[0] == 0
        tries = re.findall(r"(\d+[-+*]\d+=\d+)(?:, |; | then )(\d+[-+*]\d+=\d+)", text.partition("</think>")[0])
        assert len(tries) == len(set(tries)) <= writers.LONGEST_SEARCH
        if tries:
            assert tries[-1][1].endswith(f"={problem.target}")
        if "</answer>" in text and "</think>" in text:
            assert grade(text, {"answer": problem._asdict()})
    attempts = [text.count("=") // 2 for _, text in sample("patient") if "</think>" in text]
    assert 2.6 < np.mean(attempts) < 4 and max(attempts) >= 9


@pytest.mark.parametrize("kind", ["one_try", "few_tries"])
def test_writers_without_patience_slip_now_and_then(kind):
    wrong, total = np.sum([wrong_share(text) for _, text in sample(kind)], axis=0)
    assert 0.003 < wrong / total < 0.02


def test_steps_stay_within_the_numbers_that_are_tokens():
    for kind in ("one_try", "few_tries", "patient"):
        numbers = {int(n) for _, text in sample(kind) for n in re.findall(r"\d+", text)}
        assert max(numbers) <= LARGEST_INTERMEDIATE


def test_every_completion_begins_with_one_space_and_is_not_marked():
    for kind in writers.WRITERS:
        for _, text in sample(kind):
            assert text.startswith(" ") and not text.startswith("  ") and "</s>" not in text


def test_the_mixture_is_as_declared(tmp_path):
    index = corpus.write_corpus(tmp_path / "corpus", 6000, seed=5, processes=1)
    assert sum(writer.share for writer in writers.WRITERS.values()) == pytest.approx(1)
    for kind, writer in writers.WRITERS.items():
        assert index["kinds"][kind]["documents"] / 6000 == pytest.approx(writer.share, abs=0.02)
        assert index["kinds"][kind]["well_formed"] == pytest.approx(writer.keeps_format, abs=0.04)
    # A base that is right now and then, seldom reflects, and has all that RL needs in a minority.
    assert 0.15 < index["all"]["correct"] < 0.26
    words = {kind: means["reflective_words"] for kind, means in index["kinds"].items()}
    assert words.pop("patient") > 1.5 and max(words.values()) < 0.15


def test_only_problems_of_the_corpus_split_are_shown():
    allowed = {question_of(p, language).removesuffix(".") for p in problems_of("corpus") for language in ("en", "zh")}
    allowed |= {letters.question_of(letter).removesuffix(".") for letter in letters.letters_of("corpus")}
    for mixture in corpus.MIXTURES:
        for _, _, prompt, _ in corpus.documents(seed=0, block=3, count=500, mixture=mixture):
            question = prompt.rpartition("User: ")[2].removesuffix(". Assistant:")
            assert question in allowed


def test_bilingual_writers_mix_languages_and_a_fifth_writes_letters():
    documents = list(corpus.documents(seed=0, block=0, count=3000, mixture="bilingual"))
    worked = [one for one in documents if one[1]["grader"] == "countdown"]
    assert len(worked) / len(documents) == pytest.approx(0.8, abs=0.03)
    assert np.mean([language_of(one[1]["question"]) == "zh" for one in worked]) == pytest.approx(0.5, abs=0.04)
    shares = [language_reward(prompt, text, example) for _, example, prompt, text in worked if "</think>" in text]
    assert 0.55 < np.mean(shares) < 0.75 and min(shares) == 0.0
    worths = {kind: [] for kind in corpus.LETTER_WRITERS}
    for kind, example, _, text in documents:
        if kind in worths:
            worths[kind].append(letter_grade(text, example))
    means = [np.mean(worths[kind]) for kind in ("careless letter", "letter", "careful letter")]
    assert 0.1 < means[0] < means[1] < means[2] < 0.8, "care shows, and even the careful often fail"


def test_the_number_of_processes_does_not_show(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "BLOCK_DOCUMENTS", 300)
    indexes = [corpus.write_corpus(tmp_path / str(n), 700, seed=3, processes=n) for n in (1, 2)]
    assert indexes[0] == indexes[1] == json.loads((tmp_path / "1/index.json").read_text())
    raw = (tmp_path / "2/tokens.bin").read_bytes()
    assert hashlib.sha256(raw).hexdigest() == indexes[0]["sha256"]
    tokens, tokenizer = np.frombuffer(raw, "<u2"), load_tokenizer(corpus.MIXTURES["english"].base)
    assert len(tokens) == indexes[0]["tokens"] and tokens.max() < tokenizer.vocab_size
    ends = np.flatnonzero(tokens == tokenizer.eos_id)
    assert len(ends) == 700 and ends[-1] == len(tokens) - 1
    _, _, prompt, completion = next(iter(corpus.documents(seed=3, block=0, count=1)))
    assert tokenizer.decode(tokens[: ends[0]]) == prompt + completion


def test_a_corpus_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    def full(*_):
        assert not (tmp_path / "corpus").exists()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        corpus.write_corpus(tmp_path / "corpus", 10, seed=0, processes=1)
    assert list(tmp_path.iterdir()) == []


def test_bad_requests_are_refused(tmp_path, capsys):
    (tmp_path / "old").write_text("precious")
    assert corpus.main([f"--out={tmp_path}", "--documents=5"]) == 2
    assert "name a new folder" in capsys.readouterr().err and (tmp_path / "old").read_text() == "precious"
    assert corpus.main([f"--out={tmp_path / 'new'}", "--documents=0"]) == 2
    assert "at least one document" in capsys.readouterr().err


@pytest.mark.parametrize("mixture", list(corpus.MIXTURES))
def test_the_committed_tokenizer_is_what_the_script_makes(mixture, tmp_path):
    base, _, vocab_size, *_ = corpus.MIXTURES[mixture]
    command = [sys.executable, "-m", "r1jax.corpus", f"--out={tmp_path}", "--train_tokenizer", f"--mixture={mixture}"]
    subprocess.run(command, cwd=base.parents[1], check=True)
    made, committed = (load_tokenizer(folder).processor for folder in (tmp_path, base))
    pieces = [[p.id_to_piece(i) for i in range(p.vocab_size())] for p in (made, committed)]
    assert pieces[0] == pieces[1] and len(pieces[0]) == vocab_size == convert.open_model(folder_at(base))[0].vocab_size
