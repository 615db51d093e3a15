"""Prompt sources read what is there and name what is not; their order is a pure function of the cursor."""

import gzip
import json
import sys

import numpy as np
import pytest

from r1jax.data import PromptStream, Source, open_source, order
from r1jax.sources import MANY_ANSWERS, Columns, read_jsonl

NO_GYM = "reasoning-gym is not installed, which takes a C compiler: pip install r1jax[gym]"
RECORD = {"id": "a", "question": "How many?", "answer": "7"}


def stream(n: int = 7, seed: int = 0, shuffle: bool = True) -> PromptStream:
    return PromptStream(Source("numbers", tuple({"id": str(i)} for i in range(n))), seed, shuffle)


def write(path, *lines: str | bytes | dict):
    """A JSONL file with these lines; a dict stands for its JSON."""
    as_bytes = [json.dumps(line) if isinstance(line, dict) else line for line in lines]
    path.write_bytes(b"\n".join(line.encode() if isinstance(line, str) else line for line in as_bytes))
    return path


@pytest.mark.parametrize("shuffle", [True, False])
def test_taking_in_two_pieces_is_taking_at_once(shuffle):
    prompts = stream(shuffle=shuffle)
    assert prompts.take(0, 30) == prompts.take(0, 4) + prompts.take(4, 26)
    assert prompts.take(19, 3) == stream(shuffle=shuffle).take(0, 30)[19:22]


def test_every_epoch_is_a_permutation_of_its_own():
    epochs = [[e["id"] for e in stream(50).take(start, 50)] for start in (0, 50, 100)]
    assert all(sorted(epoch, key=int) == [str(i) for i in range(50)] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert [e["id"] for e in stream(50, seed=1).take(0, 50)] not in epochs


def test_without_shuffling_the_order_is_the_source_s():
    assert [e["id"] for e in stream(3, shuffle=False).take(1, 5)] == ["1", "2", "0", "1", "2"]


def test_the_order_never_changes_between_versions():
    # Worked out once; a change would send resumed runs elsewhere.
    assert order(8, 3, 1).tolist() == [0, 6, 2, 1, 3, 7, 4, 5]
    with pytest.raises(ValueError, match="read-only"):
        order(8, 3, 1)[0] = 0


def test_countdown_needs_no_file():
    source = open_source("countdown", "rl", Columns())
    assert source.name == "countdown" and len(source.examples) > 1000
    assert source.examples[0]["grader"] == "countdown"


@pytest.mark.parametrize("spec", ["countdwon", "tfds:", "gsm8k.json", "", "reasoning_gym"])
def test_an_unknown_source_lists_the_kinds(spec):
    with pytest.raises(ValueError, match=r"must be countdown, .*jsonl.*tfds:NAME.*reasoning_gym:FAMILY"):
        open_source(spec, "train", Columns())


def test_jsonl_keeps_all_columns_and_chooses_some(tmp_path):
    why, what = {"q": "Why?", "gold": 4, "n": 9, "hard": 2.5}, {"q": "é\u2028ü", "gold": [1], "n": 8, "hard": 1}
    path = write(tmp_path / "x.jsonl", why, "", json.dumps(what, ensure_ascii=False))
    columns = Columns(question="q", answer="gold", id="n", level="hard", grader="mine")
    first, second = open_source(str(path), "train", columns).examples
    assert first == why | {"id": "9", "question": "Why?", "answer": "4", "grader": "mine", "level": 2.5}
    assert second == what | {"id": "8", "question": "é\u2028ü", "answer": [1], "grader": "mine", "level": 1}


def test_jsonl_takes_the_final_answer_of_a_solution_and_numbers_what_has_no_id(tmp_path):
    path = write(tmp_path / "x.jsonl", {"question": "How many?", "answer": "6 #### 1 = 5\n#### 1,005 "})
    (example,) = read_jsonl(path, Columns())
    assert example["answer"] == "1,005" and example["id"] == "x-1" and "level" not in example


def test_jsonl_may_be_gzipped_and_begin_with_a_byte_order_mark(tmp_path):
    text = json.dumps(RECORD, ensure_ascii=False).encode("utf-8-sig") + b"\r\n"
    (tmp_path / "plain.jsonl").write_bytes(text)
    (tmp_path / "packed.jsonl.gz").write_bytes(gzip.compress(text))
    for name in ("plain.jsonl", "packed.jsonl.gz"):
        assert open_source(str(tmp_path / name), "train", Columns()).examples == ({**RECORD, "grader": "math"},)


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ('{"question": "a", "answer": }', r"line 3, column 29: not valid JSON: Expecting value"),
        ('{"question": "a", "answ', r"line 3, column 19: not valid JSON: Unterminated string"),
        (b'{"question": "\xc3\xa9\xff", "answer": "1"}', r"line 3, column 16: not valid UTF-8"),
        (r'{"question": "\ud83d\ude00 \ud83d", "answer": "1"}', r"line 3, column 28: half of a surrogate pair"),
        ('["question", "answer"]', r"line 3, column 1: must be a JSON object with columns, not list"),
        ("[" * 100_000, r"line 3, column 1: not usable"),
        ('{"question": "a", "answer": ' + "9" * 5000 + "}", r"line 3, column 1: not usable"),
        (
            {"question": "a", "gold": "1"},
            r"line 3: no column 'answer'; set config.data.answer_column to one of question, gold",
        ),
        ({"question": " ", "answer": "1"}, r"line 3: column 'question' must be a question, got ' '"),
        ({"question": 5, "answer": "1"}, r"line 3: column 'question' must be a question, got 5"),
        ({"question": "a", "answer": None}, r"line 3: column 'answer' must be an answer, got None"),
        ({"question": "a", "answer": "so it is\n####"}, r"line 3: column 'answer' must be an answer"),
        (RECORD, r"line 3: id 'a' already stands in line 1; set config.data.id_column"),
    ],
)
def test_a_bad_line_is_named_with_file_and_place(tmp_path, line, complaint):
    path = write(tmp_path / "x.jsonl", RECORD, "", line)
    with pytest.raises(ValueError, match=r"x\.jsonl, " + complaint):
        read_jsonl(path, Columns())


def test_a_level_must_be_a_number(tmp_path):
    path = write(tmp_path / "x.jsonl", {**RECORD, "level": "hard"})
    with pytest.raises(ValueError, match=r"line 1: column 'level' must be a number, got 'hard'"):
        read_jsonl(path, Columns(level="level"))


def test_missing_empty_and_truncated_files_are_refused(tmp_path):
    (tmp_path / "empty.jsonl").write_bytes(b"\n \n")
    (tmp_path / "short.jsonl.gz").write_bytes(gzip.compress(json.dumps(RECORD).encode() * 99)[:-20])
    (tmp_path / "plain.jsonl.gz").write_text(json.dumps(RECORD))
    (tmp_path / "folder.jsonl").mkdir()
    for name, complaint in {
        "none.jsonl": "there is no file .*none.jsonl",
        "empty.jsonl": "no examples",
        "short.jsonl.gz": "cannot read .*short.jsonl.gz",
        "plain.jsonl.gz": "cannot read .*plain.jsonl.gz",
        "folder.jsonl": "cannot read .*folder.jsonl",
    }.items():
        with pytest.raises(ValueError, match=r"config.data.source.*" + complaint):
            open_source(str(tmp_path / name), "train", Columns())


@pytest.fixture(scope="module")
def tfds_folder(tmp_path_factory):
    """A data folder of TensorFlow Datasets with one prepared dataset, "abacus", laid out as GSM8K."""
    import tensorflow_datasets as tfds

    folder = tmp_path_factory.mktemp("tfds")

    class Abacus(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            text = tfds.features.Text()
            features = tfds.features.FeaturesDict({"question": text, "answer": text, "grade": np.int32})
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, _):
            return {"train": self._generate_examples(3), "test": self._generate_examples(1)}

        def _generate_examples(self, n):
            for i in range(n):
                yield i, {"question": f"¿{i}?", "answer": f"it is\n#### {i}", "grade": i}

    Abacus(data_dir=folder, file_format="array_record").download_and_prepare()
    return folder


def test_tfds_reads_a_prepared_dataset_without_tensorflow(tfds_folder, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tfds_folder))
    examples = open_source("tfds:abacus", "train", Columns(level="grade")).examples
    assert sorted((e["question"], e["answer"], e["level"]) for e in examples) == [
        (f"¿{i}?", str(i), i) for i in range(3)
    ]
    assert json.loads(json.dumps(examples)) == list(examples)
    assert len(open_source("tfds:abacus", "test", Columns()).examples) == 1
    assert "tensorflow" not in sys.modules


def test_tfds_says_what_is_missing(tfds_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tfds_folder))
    with pytest.raises(ValueError, match=r"config.data.split 'tset' .* it has .*train"):
        open_source("tfds:abacus", "tset", Columns())
    with pytest.raises(ValueError, match=r"tfds:abacs'.* knows no such dataset"):
        open_source("tfds:abacs", "train", Columns())
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    with pytest.raises(ValueError, match=rf"not prepared in {tmp_path}/gsm8k.*download_and_prepare"):
        open_source("tfds:gsm8k", "train", Columns())


def test_reasoning_gym_generates_splits_that_share_no_question():
    pytest.importorskip("reasoning_gym", reason=NO_GYM)
    train, test = (open_source("reasoning_gym:coin_flip", s, Columns(), size=200).examples for s in ("train", "test"))
    questions = [e["question"] for e in train + test]
    assert len(questions) == len(set(questions)) and len(test) > 0
    assert train == open_source("reasoning_gym:coin_flip", "train", Columns(), size=200).examples
    assert {e["grader"] for e in train} == {"math"} and all(isinstance(e["answer"], str) for e in train)


def test_reasoning_gym_says_what_is_missing():
    gym = pytest.importorskip(
        "reasoning_gym", reason="reasoning-gym needs a C compiler to install: pip install r1jax[gym]"
    )
    assert set(gym.factory.DATASETS) >= MANY_ANSWERS
    with pytest.raises(ValueError, match=r"reasoning_gym:gdc'.* near it: gcd"):
        open_source("reasoning_gym:gdc", "train", Columns())
    with pytest.raises(ValueError, match=r"config.data.split 'validation'.* it has train, test"):
        open_source("reasoning_gym:gcd", "validation", Columns())
    with pytest.raises(ValueError, match="many right answers"):
        open_source("reasoning_gym:countdown", "train", Columns())
