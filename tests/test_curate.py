"""Rejection sampling: what is kept, what each filter drops, and editors that fail."""

import collections
import dataclasses
import json
import types

import numpy as np
import pytest

from configs import base
from r1jax import curate, editor, queries
from r1jax.corpus import MIXTURES
from r1jax.rewards.pool import Graded
from r1jax.rollout import Sample
from r1jax.text import load_tokenizer
from r1jax.types import Completion

GOOD = "<think> let me try. 3*5=15 of 15, off by 0, yes. </think> <answer>3*5</answer>"


def sample(text: str, right: float = 1.0, stop: str = "stop", question: str = "Using 3, 5, make 15.") -> Sample:
    completion = Completion(0, 0, np.zeros(3, np.int32), np.zeros(3, np.float32), stop)
    example = {"id": "a", "question": question, "answer": "15", "grader": "math"}
    return Sample(example, "prompt", (1,), completion, text, Graded(0, {"accuracy": right}, right, "15", (), 0.0))


def config(**changes: object) -> dict:
    settings = base.get_config().to_dict()
    settings["curate"] |= {"keep_per_prompt": 2, **changes}
    return settings


@pytest.mark.parametrize(
    ("filter_", "dropped"),
    [
        ("whole", sample(GOOD, stop="length")),
        ("correct", sample(GOOD, right=0.0)),
        ("format", sample(GOOD + " done.")),
        ("language", sample(GOOD.replace("let me try. ", "让我试试。"))),
        ("language", sample(GOOD, question="用 3, 5 凑出 15")),
        ("repetition", sample(GOOD.replace("let me try. ", "let me try again and again. " * 30))),
        ("length", sample(GOOD.replace("let", "l" + "e" * 100_000 + "t"))),
        ("paragraphs", sample(GOOD.replace("let", "l" + "e" * 5_000 + "t"))),
        ("code", sample(GOOD.replace("let", "```python\nprint()\n``` let"))),
    ],
)
def test_every_filter_drops_what_it_is_for_and_is_counted(filter_, dropped):
    kept, counts = curate.keep([sample(GOOD), dropped], config(filters=(filter_,)))
    assert [s.text for s in kept] == [GOOD] and counts == {"sampled": 2, f"dropped by {filter_}": 1}


def test_the_same_text_is_kept_once_and_no_prompt_gives_too_much():
    texts = [GOOD, GOOD, GOOD.replace("try", "see"), GOOD.replace("try", "think")]
    kept, counts = curate.keep([sample(text) for text in texts], config())
    assert [s.text for s in kept] == [texts[0], texts[2]]
    assert counts == {"sampled": 4, "dropped by duplicate": 1, "dropped by surplus": 1}


def test_a_filter_that_cannot_work_is_refused():
    with pytest.raises(ValueError, match=r"config\.curate\.filters names 'corect', wanted some of whole, correct"):
        curate.check_filters(config(filters=("corect",)))
    settings = config()
    settings["rewards"] = {"format": 1.0}
    with pytest.raises(ValueError, match='config.rewards has no "accuracy"'):
        curate.check_filters(settings)


def test_general_data_is_a_chat_file_or_letters(tmp_path):
    path = tmp_path / "general.jsonl"
    lines = [curate.conversation(f"Hello {i}", "Hi", source="mine") for i in range(40)]
    path.write_text("".join(json.dumps(one) + "\n" for one in lines))
    drawn, counts = curate.general_data(config(general=str(path), general_examples=20), 0)
    assert len(drawn) == 20 and all(one in lines for one in drawn) and drawn != lines[:20]
    assert counts == {"there": 40, "taken": 20}
    for many in (0, 50):
        whole = curate.general_data(config(general=str(path), general_examples=many), 0)
        assert whole == (lines, {"there": 40, "taken": 40})
    path.write_text("\n")
    with pytest.raises(ValueError, match=r"config\.curate\.general: .*general\.jsonl holds no conversation"):
        curate.general_data(config(general=str(path)), 0)
    path.write_text('{"messages": [{"role": "user", "content": "Hello"}]}\n')
    with pytest.raises(ValueError, match=r"general\.jsonl, line 1: .*two messages or more"):
        curate.general_data(config(general=str(path)), 0)
    written, counts = curate.general_data(config(general="letters", general_examples=40), 3)
    assert counts == {"taken": 40} and {one["source"] for one in written} == {"letters"}
    assert written == curate.general_data(config(general="letters", general_examples=40), 3)[0]
    assert sum("r1jax" in one["messages"][1]["content"] for one in written) == 2
    with pytest.raises(ValueError, match=r"config\.curate\.general_examples is 0: letters has no end"):
        curate.general_data(config(general="letters", general_examples=0), 3)


def test_general_data_has_all_kinds_and_thinks_of_letters_alone():
    written, _ = curate.general_data(config(general="general", general_examples=400), 3)
    kinds = collections.Counter(one["source"] for one in written)
    assert kinds == {"letters": 200, "facts": 80, "translation": 80, "self-cognition": 40}
    assert len({one["id"] for one in written}) == 400
    asked = {kind: {one["messages"][0]["content"] for one in written if one["source"] == kind} for kind in kinds}
    for kind, table in queries.SIMPLE.items():
        assert asked[kind] == {question for question, _ in table}
    tokenizer = load_tokenizer(MIXTURES["bilingual"].base)
    for one in written:
        question, reply = (message["content"] for message in one["messages"])
        assert ("<think>" in reply) == (one["source"] == "letters")
        # A character that the vocabulary lacks costs a token for each of its bytes.
        tokens = tokenizer.encode(f"{question} {reply}")
        assert tokenizer.decode(tokens) == f"{question} {reply}" and len(tokens) <= 40


def test_tidy_says_nothing_twice_and_drops_what_has_no_thought():
    text = " <think> let me try. 1+1=2, no. let me try. </think> <answer>2</answer>"
    assert editor.tidy("q", text) == "<think> let me try. 1+1=2, no. </think> <answer>2</answer>"
    assert editor.tidy("q", "<think>等等。不对。等等。</think> <answer>2</answer>") == (
        "<think> 等等。不对。 </think> <answer>2</answer>"
    )
    assert editor.tidy("q", "the answer is 2") is None and editor.tidy("q", "<think> so long") is None


@pytest.mark.parametrize(
    ("name", "message"), [("http://host/v1", "model's name is missing"), ("nowhere:edit", "config.curate.editor")]
)
def test_an_editor_that_cannot_be_had_is_refused(name, message):
    with pytest.raises(ValueError, match=message):
        editor.open_editor(name, 1.0, 1)


# --- editors and judges -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rewritten", "why"),
    [
        (GOOD.replace("let me try", "I try"), None),
        (None, "editor"),
        (" ", "editor"),
        (7, "editor"),
        ("I am sorry, I cannot do that.", "editor: format"),
        (GOOD.replace("let me try. ", "让我试试。"), "editor: language"),
        (GOOD.replace("<answer>3*5", "<answer>3+5"), "editor: answer"),
    ],
)
def test_what_an_editor_writes_is_looked_at_again(rewritten, why):
    assert curate.unfit(sample(GOOD), rewritten, config()) == why


def rejected(monkeypatch, groups: list, **changes: object) -> tuple[list[dict], collections.Counter]:
    """What rejection sampling makes of these groups."""
    monkeypatch.setattr(curate, "sample_parts", lambda run, config, policy, source, name, use: [use(groups)])
    run = types.SimpleNamespace(stage="dev1")
    return curate.reject(run, config(**changes), None)


def test_an_editor_costs_the_samples_it_fails_at_until_it_is_too_often(monkeypatch, tmp_path):
    (tmp_path / "editors.py").write_text(
        "def some(question, completion):\n"
        "    if 'see' in completion:\n"
        "        raise RuntimeError('as a function may')\n"
        "    return completion if 'me try' in completion else 'no.'\n"
    )
    texts = [GOOD, GOOD.replace("try", "see"), GOOD.replace("try", "think")]
    group = [sample(text) for text in texts]
    more = {"keep_per_prompt": 3, "editor": f"{tmp_path}/editors.py:some"}
    lines, counts = rejected(monkeypatch, [group], editor_may_fail=0.7, **more)
    assert [one["messages"][1]["content"] for one in lines] == [GOOD]
    assert counts == {"sampled": 3, "dropped by editor": 1, "dropped by editor: format": 1}
    with pytest.raises(ValueError, match=r"gave nothing usable for 2 of 3; .*editor_may_fail"):
        rejected(monkeypatch, [group], **more)
    with pytest.raises(ValueError, match=r"config\.curate\.editor gave nothing usable for 21 of 32; .*editor_may_fail"):
        rejected(monkeypatch, [group] * 40, **more)


def test_answers_that_no_rule_grades_are_kept_if_a_judge_calls_them_right(monkeypatch, tmp_path):
    (tmp_path / "judges.py").write_text(
        "def fair(example, reply):\n    return None if reply == '4*5' else reply == example['answer']\n"
    )
    texts = [GOOD, GOOD.replace("<answer>3*5", "<answer>3+5"), GOOD.replace("<answer>3*5", "<answer>4*5")]
    example = {**sample(GOOD).example, "grader": "judged", "answer": "3*5"}
    group = [dataclasses.replace(sample(text, right=0.0), example=example) for text in texts]
    lines, counts = rejected(monkeypatch, [group], judge=f"{tmp_path}/judges.py:fair")
    assert [one["messages"][1]["content"] for one in lines] == [GOOD]
    assert counts == {"sampled": 3, "dropped by correct": 1, "dropped by judge": 1}


def test_free_text_that_was_rewritten_is_judged_again(monkeypatch, tmp_path):
    (tmp_path / "both.py").write_text(
        "def fair(example, reply):\n    return reply == example['answer']\n\n\n"
        "def edit(question, text):\n    return text.replace('3*5', '5*3') if 'try' in text else text\n"
    )
    example = {**sample(GOOD).example, "grader": "judged", "answer": "3*5"}
    texts = (GOOD, GOOD.replace("try", "see"))
    group = [dataclasses.replace(sample(text, right=0.0), example=example) for text in texts]
    more = {"judge": f"{tmp_path}/both.py:fair", "editor": f"{tmp_path}/both.py:edit", "editor_may_fail": 1.0}
    lines, counts = rejected(monkeypatch, [group], **more)
    assert [one["messages"][1]["content"] for one in lines] == [texts[1]]
    assert counts == {"sampled": 2, "dropped by editor: answer": 1}
    example = {**example, "grader": "instructions", "instruction_ids": ["punctuation:no_comma"], "kwargs": [{}]}
    free = dataclasses.replace(sample(GOOD), example=example)
    assert curate.unfit(free, GOOD.replace("3*5", "a b"), config()) is None
    assert curate.unfit(free, GOOD.replace("3*5", "a, b"), config()) == "editor: answer"


@pytest.mark.parametrize("opinion", ["'yes'", "[True]", "float('nan')"])
def test_an_opinion_that_is_neither_yes_nor_no_is_none(monkeypatch, tmp_path, opinion):
    (tmp_path / "odd.py").write_text(f"def judge(*_):\n    return {opinion}\n")
    group = [dataclasses.replace(sample(GOOD), example={**sample(GOOD).example, "grader": "judged"})]
    with pytest.raises(ValueError, match=r"config\.curate\.judge gave nothing usable for 1 of 1"):
        rejected(monkeypatch, [group], judge=f"{tmp_path}/odd.py:judge")


def test_a_judge_stands_in_where_the_rewards_have_no_accuracy(monkeypatch, tmp_path):
    (tmp_path / "yes.py").write_text("def judge(*_):\n    return True\n")
    group = [dataclasses.replace(sample(GOOD, right=0.0), example={**sample(GOOD).example, "grader": "my own"})]
    settings = config(judge=f"{tmp_path}/yes.py:judge")
    settings["rewards"] = {"format": 1.0}
    monkeypatch.setattr(curate, "sample_parts", lambda run, config, policy, source, name, use: [use([group])])
    lines, _ = curate.reject(types.SimpleNamespace(stage="dev1"), settings, None)
    assert len(lines) == 1


def test_what_stops_the_one_host_that_asks_stops_all(tmp_path):
    def use(groups: list) -> dict:
        raise ValueError("config.curate.editor: refused")

    run = types.SimpleNamespace(workdir=tmp_path)
    with pytest.raises(ValueError, match="refused"):
        curate.parts_of(run, "dev1", 1, lambda i: curate.told(use, []))
    assert not list(tmp_path.rglob("part-*"))
