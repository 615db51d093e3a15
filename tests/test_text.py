"""Tokenizers lose nothing and never raise on what was sampled; templates are the published ones."""

import gzip
import itertools
import json
import pathlib
import random

import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st

from r1jax import corpus, fast_tokenizer, writers
from r1jax.countdown import problems_of, question_of
from r1jax.text import (
    REFLECTIVE_WORDS,
    TEMPLATES,
    TextStream,
    check_fits,
    encode_prompt,
    load_tokenizer,
    reflective_counts,
    reflective_words,
    render_prompt,
)

SHARED = pathlib.Path(__file__).resolve().parents[2] / "shared" / "data"
BASE_FOLDER = corpus.MIXTURES["english"].base
BASE = load_tokenizer(BASE_FOLDER)


@pytest.fixture(scope="module")
def json_folder(tmp_path_factory) -> pathlib.Path:
    """A byte-level tokenizer.json without merges, with R1's kind of special tokens."""
    folder = tmp_path_factory.mktemp("json")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    model = tokenizers.models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[])
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["<bos>", "<eos>"])
    backend.add_tokens(["<think>"])
    begin = backend.token_to_id("<bos>")
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", begin)]
    )
    backend.save(str(folder / "tokenizer.json"))
    config = {"bos_token": {"content": "<bos>"}, "eos_token": "<eos>", "pad_token": None}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@given(st.text())
@example("\u2581 \u2581\u2581 literal space marks")
@example("  two  spaces \t\n\r\x00 and </s> <pad> <0x41> \ufeff")
@example("小明有12个苹果 🍎🏽 e\u0301")
def test_any_text_comes_back(text):
    assert BASE.decode(BASE.encode(text)) == text


def test_any_text_comes_back_through_tokenizer_json(json_folder):
    tokenizer = load_tokenizer(json_folder)

    @given(st.text())
    @example("<think> 小明 🍎 </think>")
    def law(text):
        assert tokenizer.decode(tokenizer.encode(text)) == text.replace("<eos>", "").replace("<bos>", "")

    law()


def test_gsm8k_comes_back():
    path = SHARED / "gsm8k_test.jsonl"
    if not path.exists():
        pytest.skip(f"{path} is absent")
    for line in path.read_text(encoding="utf-8").splitlines()[:100]:
        for text in json.loads(line).values():
            assert not isinstance(text, str) or BASE.decode(BASE.encode(text)) == text


@given(st.lists(st.integers(-5, 600)))
def test_decoding_never_raises(ids):
    text = BASE.decode(ids)
    assert text.count("\ufffd") >= sum(not 0 <= i < BASE.vocab_size for i in ids)


def test_odd_ids_and_bytes_show_and_markers_do_not(json_folder):
    tag = BASE.encode("<think>")
    assert BASE.decode([BASE.bos_id, *tag, BASE.vocab_size, -1, BASE.eos_id, BASE.pad_id]) == "<think>\ufffd\ufffd"
    assert BASE.decode(BASE.encode("é")[:1]) == "\ufffd"
    other = load_tokenizer(json_folder)
    tag = other.encode("<think>")
    assert tag == [other.vocab_size - 1] and other.pad_id == other.eos_id
    assert other.decode([other.bos_id, *tag, 9999, other.eos_id]) == "<think>\ufffd"
    assert other.decode(other.encode("é")[:1]) == "\ufffd"


@pytest.mark.parametrize("surrogate", ["\ud800", "a\udfffb"])
def test_lone_surrogates_do_not_raise(surrogate, json_folder):
    for tokenizer in (BASE, load_tokenizer(json_folder)):
        assert tokenizer.decode(tokenizer.encode(surrogate)) == surrogate.encode("utf-8", "replace").decode()


def assert_streams(tokenizer, ids):
    """What was shown never has to be taken back, and is never half a character."""
    stream, shown = TextStream(tokenizer), ""
    for n, i in enumerate(ids, 1):
        new = stream.add([i])
        shown += new
        whole = tokenizer.decode(ids[:n])
        assert whole.startswith(shown)
        # Whatever is held back is less than a character.
        assert len(whole) - len(shown) <= 3 and set(whole[len(shown) :]) <= {"\ufffd"}
    assert shown + stream.end() == tokenizer.decode(ids)


@settings(deadline=None)
@given(st.text(), st.lists(st.integers(0, 511), max_size=12), st.text())
@example("小明🍎", [], "e\u0301 👩‍🚀")
@example(" ", [], "  a")
def test_text_streams_by_whole_characters(before, noise, after):
    ids = BASE.encode(before) + noise + BASE.encode(after)
    assert_streams(BASE, ids)


def test_text_of_tokenizer_json_streams_by_whole_characters(json_folder):
    tokenizer = load_tokenizer(json_folder)

    @settings(deadline=None)
    @given(st.text(), st.lists(st.integers(0, 300), max_size=12), st.text())
    @example("小明🍎", [], "é")
    def law(before, noise, after):
        assert_streams(tokenizer, tokenizer.encode(before) + noise + tokenizer.encode(after))

    law()
    stream = TextStream(tokenizer)
    assert [stream.add([i]) for i in tokenizer.encode("é🍎")] == ["", "é", "", "", "", "🍎"]
    assert stream.add(tokenizer.encode("🍎")[:2]) == "" and stream.end() == "\ufffd"


def test_the_begin_token_comes_where_the_model_has_learned_with_it(json_folder, tmp_path):
    # This tokenizer.json adds it by itself; a chat template writes what it wants.
    tokenizer = load_tokenizer(json_folder)
    prompt, ids = encode_prompt(tokenizer, "plain", "Why?")
    assert tokenizer.adds_bos and ids == [tokenizer.bos_id, *tokenizer.encode(prompt)]
    with pytest.raises(ValueError, match=r"config\.data\.template is 'chat', but the model has no chat template"):
        encode_prompt(tokenizer, "chat", "Why?")

    def variant(**fields):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        backend = json.loads((json_folder / "tokenizer.json").read_text())
        (folder / "tokenizer.json").write_text(json.dumps(backend | {"post_processor": None}))
        config = json.loads((json_folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps(config | fields))
        return folder

    assert not load_tokenizer(variant()).adds_bos
    assert load_tokenizer(variant(add_bos_token=True)).adds_bos
    assert not load_tokenizer(variant(add_bos_token=True, bos_token=None)).adds_bos
    folder = variant(chat_template="{{ bos_token }}[{{ messages[0].content }}]")
    prompt, ids = encode_prompt(load_tokenizer(folder), "chat", "Why?")
    assert prompt == "<bos>[Why?]" and ids == [tokenizer.bos_id, *tokenizer.encode("[Why?]")]
    (folder / "chat_template.jinja").write_text("({{ messages[0].content }})")
    assert encode_prompt(load_tokenizer(folder), "chat", "Why?")[0] == "(Why?)", "the file of its own comes first"
    (folder / "generation_config.json").write_text('{"eos_token_id": [257, 5]}')
    assert load_tokenizer(folder).eos_ids == {257, 5}
    # SentencePiece folders: Llama's add it unless told otherwise, our own has no tokenizer_config.json.
    model = (BASE_FOLDER / "tokenizer.model").read_bytes()
    for config, adds in ((None, False), ({}, False), ({"legacy": True}, True), ({"add_bos_token": False}, False)):
        (tmp_path / "tokenizer.model").write_bytes(model)
        if config is not None:
            (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        assert load_tokenizer(tmp_path).adds_bos is adds


def test_a_number_is_one_token_wherever_it_stands():
    alone = {n: BASE.encode(str(n)) for n in range(200)}
    assert all(len(ids) == 1 for ids in alone.values())
    for n, (before, after) in itertools.product(
        alone, [("(", ")"), ("=", ", "), ("*", "="), ("- ", "."), (", ", "\n")]
    ):
        assert BASE.encode(f"{before}{n}{after}") == BASE.encode(before) + alone[n] + BASE.encode(after)


@given(st.text(), st.text(), st.sampled_from(sorted(TEMPLATES)))
def test_prompt_and_completion_encode_apart(question, completion, template):
    prompt = render_prompt(template, question)
    assert BASE.encode(prompt + completion) == BASE.encode(prompt) + BASE.encode(completion)


def test_the_task_costs_few_tokens():
    rng = random.Random(0)
    for problem in problems_of("test")[:200]:
        prompt = render_prompt("r1_zero", question_of(problem))
        assert len(BASE.encode(prompt)) <= 16
        completion = writers.worked_solution(problem, rng, "patient")
        assert BASE.encode(prompt + completion) == BASE.encode(prompt) + BASE.encode(completion)
    assert len(BASE.encode("8-3=5, 5*2=10, wait, that is not it. ")) <= 12
    assert [len(BASE.encode(tag)) for tag in ("<think>", "</think>", "<answer>", "</answer>")] == [1, 1, 1, 1]


@pytest.fixture(scope="module")
def deepseek(tmp_path_factory) -> pathlib.Path:
    """The published tokenizer of DeepSeek-R1."""
    packed, folder = SHARED / "deepseek_r1" / "tokenizer.json.gz", tmp_path_factory.mktemp("deepseek")
    if not packed.exists():
        pytest.skip(f"{packed} is absent")
    (folder / "tokenizer.json").write_bytes(gzip.decompress(packed.read_bytes()))
    for name in ("tokenizer_config.json", "config.json"):
        (folder / name).write_bytes((packed.parent / name).read_bytes())
    return folder


def test_the_tokenizer_of_deepseek_r1(deepseek):
    tokenizer = load_tokenizer(deepseek)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (0, 1, 1)
    assert tokenizer.vocab_size == 128_815
    check_fits(tokenizer, json.loads((deepseek / "config.json").read_text())["vocab_size"])
    for text in (" <think> 3*5=15, wait. </think>\n<answer>小明 🍎</answer>", "\\frac{1}{2}"):
        assert tokenizer.decode([*tokenizer.encode(text), tokenizer.eos_id]) == text
    prompt, ids = encode_prompt(tokenizer, "r1_zero", "What is 2+2?")
    assert ids == [0, *tokenizer.encode(prompt)]
    prompt, ids = encode_prompt(tokenizer, "chat", "What is 2+2?")
    assert prompt == "<｜begin▁of▁sentence｜><｜User｜>What is 2+2?<｜Assistant｜>"
    assert ids[:2] == [0, 128_803] and ids[-1] == 128_804 and ids.count(0) == 1


def many_strings() -> list[str]:
    """More than 2,000 texts: English, Chinese, LaTeX, code, emoji, tags, odd spaces, random characters."""
    out = []
    for file, n in (("gsm8k_test", 500), ("cmath_zh", 400), ("math500", 400), ("humaneval", 164), ("mbpp", 300)):
        lines = (SHARED / f"{file}.jsonl").read_text("utf-8").splitlines()[:n]
        out += [
            next(v for k, v in json.loads(line).items() if k in ("question", "problem", "prompt", "text"))
            for line in lines
        ]
        out += [json.loads(line)["solution"] for line in lines if "solution" in json.loads(line)]
    rng = random.Random(0)
    alphabet = "aZ9 \n\t\r .,;:!?'\"()[]{}<>=+-*/\\^_$#@%&|~`éßñ中文字日本語ひカнет🍎👩‍🚀🏽\u0301\u200d\xa0\u3000﷽"
    out += ["".join(rng.choices(alphabet, k=rng.randint(1, 60))) for _ in range(500)]
    tags = ["<think>", "</think>", "<answer>", "</answer>", "<｜User｜>", "\n\n", "  ", "1234567", "小明", "🍎", "x=1"]
    out += ["".join(rng.choices(tags, k=rng.randint(1, 12))) for _ in range(200)]
    return out


def test_the_ids_of_deepseek_r1_are_those_of_its_library(deepseek):
    tokenizer, texts = load_tokenizer(deepseek), many_strings()
    assert len(set(texts)) > 2000
    theirs = tokenizers.Tokenizer.from_file(str(deepseek / "tokenizer.json"))
    encoded = [one.ids for one in theirs.encode_batch(texts, add_special_tokens=False)]
    assert [tokenizer.encode(text) for text in texts] == encoded
    # Every text comes back, also in pieces as it is sampled.
    assert [tokenizer.decode(ids) for ids in encoded] == texts
    for ids, text in list(zip(encoded, texts, strict=True))[::4]:
        stream = TextStream(tokenizer)
        assert "".join([*(stream.add([i]) for i in ids), stream.end()]) == text


def test_the_ids_of_deepseek_r1_are_those_of_transformers(deepseek):
    transformers = pytest.importorskip("transformers", reason="transformers is not here: nothing to compare with")
    tokenizer, theirs = load_tokenizer(deepseek), transformers.AutoTokenizer.from_pretrained(deepseek)
    texts = many_strings()
    assert [tokenizer.encode(text) for text in texts] == theirs(texts, add_special_tokens=False)["input_ids"]
    talk = [
        {"role": "user", "content": texts[0]},
        {"role": "assistant", "content": "Hm."},
        {"role": "user", "content": "?"},
    ]
    want = theirs.apply_chat_template(talk, add_generation_prompt=True, tokenize=False)
    assert tokenizer.template.render(talk, add_generation_prompt=True) == want


def test_a_tokenizer_too_large_for_the_embedding_is_refused():
    check_fits(BASE, BASE.vocab_size)
    check_fits(BASE, BASE.vocab_size + 64)
    with pytest.raises(ValueError, match=r"512 ids.*only 511 rows.*config\.model\.path"):
        check_fits(BASE, 511)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no tokenizer.json or tokenizer.model"),
        ({"tokenizer.model": b""}, "tokenizer.model"),
        ({"tokenizer.model": b"not a model"}, "tokenizer.model is not a SentencePiece model"),
        ({"tokenizer.json": b'{"truncated'}, "tokenizer.json is not a tokenizer"),
        ({"tokenizer.json": None}, "cannot read .*tokenizer_config.json"),
        ({"tokenizer.json": None, "tokenizer_config.json": b"[1"}, "cannot read .*tokenizer_config.json"),
        ({"tokenizer.json": None, "tokenizer_config.json": b'{"eos_token": "<end>"}'}, "names no eos_token"),
    ],
)
def test_broken_folders_are_named(files, message, tmp_path, json_folder):
    for name, content in files.items():
        (tmp_path / name).write_bytes((json_folder / name).read_bytes() if content is None else content)
    with pytest.raises(ValueError, match=message) as caught:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_the_template_is_the_published_one():
    prompt = render_prompt("r1_zero", "Using 3, 5, 7 and + - *, make 26.")
    assert prompt == (
        "A conversation between User and Assistant. "
        "The user asks a question, and the Assistant solves it. "
        "The assistant first thinks about the reasoning process in the mind and "
        "then provides the user with the answer. "
        "The reasoning process and answer are enclosed within <think> </think> and <answer> </answer> tags, "
        "respectively, i.e., <think> reasoning process here </think> <answer> answer here </answer>. "
        "User: Using 3, 5, 7 and + - *, make 26. Assistant:"
    )
    assert prompt.endswith(render_prompt("plain", "Using 3, 5, 7 and + - *, make 26."))


def test_a_question_keeps_its_own_end():
    assert render_prompt("plain", "What is {x} in {question}?") == "User: What is {x} in {question}?. Assistant:"
    assert render_prompt("plain", "Say it. ") == "User: Say it. Assistant:"
    with pytest.raises(ValueError, match=r"'chatml'.*config\.data\.template.*r1_zero"):
        render_prompt("chatml", "Say it.")


def test_reflective_words_are_whole_words_in_any_case():
    assert reflective_words("Wait, a MISTAKE. However, but retry; error: verify, evaluate, check.") == 9
    assert reflective_words("waiter, checked, butter, unverify") == 0
    assert reflective_words("wait wait") == 2
    counts = reflective_counts("Wait, wait, CHECK it; but a waiter")
    assert {word: n for word, n in counts.items() if n} == {"wait": 2, "check": 1, "but": 1}
    assert tuple(counts) == REFLECTIVE_WORDS


def test_the_base_as_a_tokenizer_json_gives_the_same_ids(tmp_path):
    for name, content in fast_tokenizer.files_of(BASE).items():
        (tmp_path / name).write_bytes(content)
    other = load_tokenizer(tmp_path)
    for field in ("vocab_size", "eos_id", "bos_id", "pad_id", "eos_ids", "adds_bos"):
        assert getattr(other, field) == getattr(BASE, field), field

    @settings(deadline=None)
    @given(st.text().map(lambda text: text.replace("\u2581", " ")))
    @example("Using 3, 5, 7 and + - *, make 26. <think> 3*5=15, wait, that is not it. </think>  12345 小明 🍎")
    @example("</s> <pad> <0x41> <answer>\n\t200199  ")
    def law(text):
        ids = BASE.encode(text)
        # Control tokens written out are text to SentencePiece, the tokens themselves to the other.
        if not any(token in text for token in ("<s>", "</s>", "<pad>", "<unk>")):
            assert other.encode(text) == ids
            assert other.decode(ids) == text

    law()
    rng = random.Random(0)
    for problem in problems_of("test")[:100]:
        text = render_prompt("r1_zero", question_of(problem)) + writers.worked_solution(problem, rng, "patient")
        assert other.encode(text) == BASE.encode(text)
