"""Decontamination: ten words in a row, Chinese characters as words, problems named, training prompts left out."""

import json

import pytest

from r1jax import overlap

LONG = "A train leaves the station at nine and travels sixty miles an hour toward the coast."
ZH = "小勇拍皮球第一次拍了七十七下第二次少九下"


def test_words_have_no_case_or_punctuation_and_characters_are_words():
    assert overlap.words("The cat's 3.5, naïve_end 拍了77下!") == [
        "the", "cat", "s", "3", "5", "naïve", "end", "拍", "了", "77", "下",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("question", "text", "is_found"),
    [
        (LONG, "He said: a TRAIN leaves the station, at nine and travels sixty... bananas", True),  # exactly ten
        (LONG, "a train leaves the station at nine and travels fifty miles an hour toward the", False),  # nine, seven
        (ZH, "题目：小勇拍皮球，第一次拍了七十", True),
        (ZH, "小勇拍皮球，第一次拍", False),
        ("Find x.", "We find X and are done.", True),
        ("Find x.", "We find y.", False),
        ("???", "anything", False),
    ],
)
def test_ten_words_in_a_row(question, text, is_found):
    assert overlap.overlapping([question, "unrelated"], ["first text", text]) == ([0] if is_found else [])


def test_agrees_with_the_slow_way():
    texts = [f"{'x ' * i}" + " ".join(map(str, range(i, i + 14))) for i in range(0, 60, 20)]
    questions = [" ".join(map(str, range(i, i + 12))) for i in range(60)]

    def slow(question: str) -> bool:
        runs = [question.split()[i : i + 10] for i in range(3)]
        said = [text.split() for text in texts]
        return any(run == one[i : i + 10] for run in runs for one in said for i in range(len(one)))

    want = [i for i, question in enumerate(questions) if slow(question)]
    assert overlap.overlapping(questions, texts) == want and 0 < len(want) < 60


def test_chats_and_prompts_are_read_and_problems_named(tmp_path):
    chats, prompts = tmp_path / "chats.jsonl", tmp_path / "prompts.jsonl"
    talk = [{"role": "user", "content": "Solve"}, {"role": "assistant", "content": f"The task says: {LONG} So 3."}]
    chats.write_text(json.dumps({"messages": talk}) + "\n")
    prompts.write_text(json.dumps({"problem": "nothing alike", "solution": {"steps": [ZH]}}) + "\n")
    examples = [
        {"id": "a", "question": "one"},
        {"id": "b", "question": f"Please: {LONG}", "asked": LONG},
        {"id": "c", "question": ZH},
        {"id": "d", "question": "Please answer in a box of the usual form and say why"},
    ]
    got = overlap.report(examples, [str(chats), str(prompts)])
    assert got == {"against": [str(chats), str(prompts)], "n": 10, "overlapping": 2, "share": 0.5, "ids": ["b", "c"]}
    with pytest.raises(ValueError, match=r"config\.eval\.decontaminate: there is no file .*none.jsonl"):
        overlap.report(examples, [str(tmp_path / "none.jsonl")])
    with pytest.raises(ValueError, match=r"config\.eval\.decontaminate: config\.data\.source is 'nothing'"):
        overlap.report(examples, ["nothing"])


def test_training_prompts_that_overlap_are_left_out(tmp_path):
    problems = tmp_path / "test.jsonl"
    problems.write_text(json.dumps({"problem": LONG, "answer": "3"}) + "\n")
    train = [
        {"id": "a", "question": f"{LONG} Now what?"},
        {"id": "b", "question": "3"},
        {"id": "c", "question": "four"},
    ]
    clean, dropped = overlap.without(train, [str(problems)], "test")
    assert [one["id"] for one in dropped] == ["a", "b"] and [one["id"] for one in clean] == ["c"]
