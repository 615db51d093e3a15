"""Preferences: judged in random order, balanced by length, as rows and as a reward; the alarm for reward hacking."""

import pathlib
import random
import types

import numpy as np
import pytest
from test_curate import sample

from configs import base
from r1jax import curate, evaluate, letters, preference
from r1jax.corpus import MIXTURES
from r1jax.data import Mixture, PromptStream, Source
from r1jax.rewards.worth import reply_of, worth
from r1jax.stages import reward_models
from r1jax.text import load_tokenizer

LETTER = letters.Letter("en", "thanks", "Anna", "tea")
BEST = "Dear Anna, many thanks for tea. Best wishes."


@pytest.mark.parametrize(
    ("reply", "value"),
    [
        (BEST, 1.0),
        ("many thanks for tea. Best wishes.", 0.75),
        ("Dear Tom, many thanks for tea. Best wishes.", 0.75),
        ("Dear Anna, many thanks for rain. Best wishes.", 0.75),
        ("Dear Anna, many thanks for tea. I do not care. Best wishes.", 0.75),
        ("亲爱的Anna，谢谢你的tea。祝好。", 0.25),
        ("", 0.0),
    ],
)
def test_the_rule_for_letters(reply, value):
    assert letters.worth(reply, LETTER) == value
    example = letters.example_of(LETTER)
    assert worth("prompt", f"<think> so. </think> <answer>{reply}</answer>", example) == value
    assert worth("prompt", f"<think> {reply}", example) == 0.0 and worth("p", reply, {"id": "countdown-1"}) == 0.0


def test_a_letter_is_of_one_split_and_its_words_are_in_the_tokenizer():
    every = [set(letters.letters_of(split)) for split in letters.SPLITS]
    assert sum(map(len, every)) == len(set.union(*every)) == 800 and min(map(len, every)) > 50
    tokenizer = load_tokenizer(MIXTURES["bilingual"].base)
    for letter in letters.letters_of("test"):
        assert len(tokenizer.encode(letters.question_of(letter))) <= 6


def test_a_judge_that_likes_what_it_reads_first_is_heard_in_both_orders():
    def biased(example: dict, first: str, second: str) -> float:
        return 0.5 + len(first) - len(second)

    rng = random.Random(0)
    gaps = [preference.judged_gap(biased, {"id": "a"}, "long", "abc", 4, rng) for _ in range(400)]
    assert np.mean(gaps) == pytest.approx(1.0, abs=0.05)
    assert preference.judged_gap(lambda *_: None, {}, "a", "b", 4, rng) is None


def test_judges_and_labels_that_cannot_be_had_are_refused():
    with pytest.raises(ValueError, match=r"config\.preference\.judge is .*model's name is missing"):
        preference.open_judge("http://host/v1", 1.0, 1)
    with pytest.raises(ValueError, match=r"config\.preference\.safety is 'nowhere:safe'"):
        preference.open_safety("nowhere:safe")
    assert preference.open_safety("letters")({}, BEST) and not preference.open_safety("letters")({}, "I do not care.")


@pytest.mark.parametrize("gap", ["7", float("inf"), [1]])
def test_a_judgement_that_is_no_number_is_none(gap):
    assert preference.judged_gap(lambda *_: gap, {}, "a", "b", 4, random.Random(0)) is None


def gathered(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path, **changes: object) -> dict:
    """What becomes of two samples each of forty letters, in two parts."""
    groups = [
        [
            preference.replace(sample(f"<think> a </think> <answer>{text}</answer>"), example=letters.example_of(one))
            for text in (BEST, "Bye.")
        ]
        for one in letters.letters_of("rl")[:40]
    ]
    config = base.get_config()
    config.preference.update(changes)
    parts = lambda run, config, sampler, source, name, use, is_general: [use(groups[:20]), use(groups[20:])]  # noqa: E731
    monkeypatch.setattr(curate, "sample_parts", parts)
    this = types.SimpleNamespace(workdir=tmp_path, stage="models", seed=0)
    policy = types.SimpleNamespace(tokenizer=load_tokenizer(MIXTURES["bilingual"].base))
    return reward_models.gather(this, config, policy, "letters", "rl")


def test_a_judge_or_label_that_fails_costs_its_item_until_it_is_too_often(monkeypatch, tmp_path):
    (tmp_path / "mine.py").write_text(
        "def judge(example, first, second):\n    raise KeyError('x')\n\n\n"
        "def prefers(example, first, second):\n"
        "    return (len(first) - len(second)) * (-1) ** len(example['question'])\n\n\n"
        "def some(example, response):\n    return None if 'Bye' in response and 'rain' in str(example) else True\n"
    )
    with pytest.raises(ValueError, match=r"config\.preference\.judge gave nothing usable for 32 of 32; .*may_fail"):
        gathered(monkeypatch, tmp_path, judge=f"{tmp_path}/mine.py:judge")
    mine = {"judge": f"{tmp_path}/mine.py:prefers", "safety": f"{tmp_path}/mine.py:some"}
    made = gathered(monkeypatch, tmp_path, **mine)
    silent = sum("rain" in str(letters.example_of(one)) for one in letters.letters_of("rl")[:40])
    assert 0 < silent == 80 - len(made["labelled"]) and made["pairs"]


def test_rows_that_do_not_fit_are_said_and_labels_all_alike_are_refused(capsys):
    policy = types.SimpleNamespace(tokenizer=load_tokenizer(MIXTURES["bilingual"].base))
    config = base.get_config()
    config.preference.row_tokens = 40
    labelled = [{"question": "q", "response": text, "safe": text == "a"} for text in ("a", "b" * 90, "c")]
    rows = reward_models.rows(config, policy, {"labelled": labelled}, "safe")
    assert "safe: 1 of 3 are longer than config.preference.row_tokens" in capsys.readouterr().out
    assert rows["tokens"].shape == (2, 1, 40) and reward_models.unsafe_share(rows) == 0.5
    with pytest.raises(ValueError, match=r"safe: nothing fits into config\.preference\.row_tokens \(40\)"):
        reward_models.rows(config, policy, {"labelled": labelled[1:2]}, "safe")
    reward_models.check_labels([0.0, 1.0])
    with pytest.raises(ValueError, match=r"config\.preference\.safety says the same of all 2 responses \(unsafe\)"):
        reward_models.check_labels([0.0, 0.0])


def test_pairs_are_kept_above_the_margin_and_counted():
    example = letters.example_of(LETTER)
    texts = [BEST, "Bye.", BEST, BEST, "", BEST, "Hello Anna, Bye.", "Dear Anna, Bye."]
    group = [sample(f"<think> a </think> <answer>{text}</answer>") for text in texts]
    group = [preference.replace(s, example=example) for s in group]
    pairs, counts = preference.pairs_of(group, preference.judge_letters, 4, 0.25)
    assert [(p["chosen"], p["rejected"]) for p in pairs] == [(BEST, "Bye.")]
    assert counts == {"pairs": 4, "alike or empty": 2, "within the margin": 1}
    _, counts = preference.pairs_of(group[:2], lambda *_: None, 4, 0.25)
    assert counts == {"pairs": 1, "judge failed": 1}


def test_after_balancing_length_says_nothing():
    def pair(chosen: int, rejected: int) -> dict:
        return {"chosen": "a" * chosen, "rejected": "b" * rejected}

    kept = preference.balance([pair(5, 3)] * 7 + [pair(2, 4)] * 3 + [pair(3, 3)] * 2, len, seed=0)
    differences = [len(p["chosen"]) - len(p["rejected"]) for p in kept]
    assert (sum(d > 0 for d in differences), sum(d < 0 for d in differences), len(kept)) == (3, 3, 8)


def test_a_row_ends_where_its_response_does_and_too_long_ones_are_empty():
    tokenizer = load_tokenizer(MIXTURES["bilingual"].base)
    texts = [(letters.question_of(LETTER), preference.summary(BEST)), ("Who are you", "a" * 100)]
    rows, fits = preference.rows_of(texts, tokenizer, "r1_zero", 48, labels=[1.0, 0.0])
    assert fits.tolist() == [True, False] and rows["segments"][1].sum() == 0
    last = int(np.flatnonzero(rows["is_last"][0])[0])
    assert rows["tokens"][0, last] == tokenizer.eos_id and rows["segments"][0].sum() == last + 1
    assert rows["label"][0].sum() == 1.0
    assert reply_of(tokenizer.decode(rows["tokens"][0, : last + 1])) == BEST


def test_preference_is_added_to_general_instructions_alone():
    asked = preference.replace(
        sample(f"<think> so </think> <answer>{BEST}</answer>"), example=letters.example_of(LETTER)
    )
    other = sample("<think> 1 </think> <answer>2</answer>")
    read: dict[str, list] = {}

    def scorer(name: str, value: float) -> preference.Scorer:
        def score(texts: list) -> np.ndarray:
            read[name] = texts
            return np.full(len(texts), value)

        return score

    scorers = {"helpful": scorer("helpful", 0.5), "safe": scorer("safe", 0.25)}
    ((first, second),) = preference.with_preference([[asked, other]], scorers, 2.0)
    assert first.graded.reward == asked.graded.reward + 2.0 * 0.75 and second.graded.reward == other.graded.reward
    assert first.graded.rewards.keys() == second.graded.rewards.keys() == {"accuracy", "helpful", "safe"}
    question = letters.question_of(LETTER)
    assert read["helpful"] == [(question, f" <answer>{BEST}</answer>")], "helpfulness reads the summary"
    assert read["safe"] == [(question, asked.text)], "safety reads everything"


@pytest.mark.parametrize(
    ("seen", "hacked"),
    [
        ([(0.5, 0.7)], False),
        ([(0.5, 0.7), (0.8, 0.69)], False),
        ([(0.5, 0.7), (0.8, 0.6)], True),
        ([(0.5, 0.7), (0.4, 0.6)], False),
        ([(0.5, 0.6), (0.6, 0.75), (0.7, 0.65)], True),
    ],
)
def test_the_alarm_is_a_rising_score_over_falling_accuracy(seen, hacked):
    evals = [{"preference": score, "pass_at_1": accuracy} for score, accuracy in seen]
    assert preference.is_hacked(evals, 0.05) is hacked


def test_wins_are_counted_over_all_pairs_of_samples_and_ties_half(capsys):
    assert evaluate.win_rate([[1.0, 0.0]], [[0.0, 0.0]]) == 0.75
    records = [
        {"stage": "dev3", "general_worths": [[0.0, 0.5]]},
        {"stage": "r1", "general_worths": [[0.5, 1.0]]},
        {"stage": "x"},
        {"stage": "more", "step": 2, "general_worths": [[0.5], [1.0]], "general_win_rate": 1.0},
        {"stage": "other", "step": 2, "general_worths": [[0.5]], "general_digest": "abc"},
    ]
    evaluate.add_win_rates(records, "dev3")
    assert [record.get("general_win_rate") for record in records] == [0.5, 0.875, None, None, None]
    said = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in said] == ["more, step 2", "other, step 2"]


def test_general_prompts_join_at_their_position_and_share_and_stop_when_told():
    def stream(name: str) -> PromptStream:
        return PromptStream(Source(name, tuple({"id": f"{name}{i}"} for i in range(100))), 0, shuffle=False)

    mix = Mixture(stream("p"), stream("g"), first=10, share=0.25, is_on=lambda position: position < 30)
    ids = [one["id"] for one in mix.take(0, 10) + mix.take(10, 20) + mix.take(30, 10)]
    assert [i for i, name in enumerate(ids) if name[0] == "g"] == [13, 17, 21, 25, 29]
    assert [name for name in ids if name[0] == "g"] == [f"g{i}" for i in range(5)]
    assert mix.take(12, 3) == mix.take(10, 20)[2:5], "a place in it says what comes"
