"""The stage evaluate on benchmarks: records, forced opening, overlap, judges; by a random policy."""

import dataclasses
import json
import pathlib

import numpy as np
import pytest
from test_evaluate import group
from tiny_run import execute, make_config, make_policy

from r1jax import benchmarks, examine, held_out, rollout
from r1jax.pipeline import BASE
from r1jax.text import encode_prompt, forced, load_tokenizer

QUESTION = "Tom has three apples and buys four more, so how many apples has Tom now"


def sums(path: pathlib.Path, n: int = 3) -> str:
    rows = [{"id": i, "question": f"{QUESTION}, plus {i}?" if i else "1+1?", "answer": str(i)} for i in range(n)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("policy")
    make_policy(folder)
    (folder / "judges.py").write_text(
        "def long(example, first, second):\n"
        "    assert '<think>' not in first + second and 'asked' in example\n"
        "    return None if example['question'].startswith('silent') else float(len(first) - len(second))\n"
    )
    return folder


def settings(policy: pathlib.Path, **changes):
    fixed = {"stages": ("evaluate",), "eval__opening": "<think>\n", "data__template": "plain"}
    return make_config(policy, **fixed, data__max_prompt_tokens=256, **changes)


def test_benchmarks_become_records(policy, tmp_path, capsys):
    train = tmp_path / "train.jsonl"
    train.write_text(json.dumps({"messages": [{"role": "user", "content": f"{QUESTION}?"}]}) + "\n")
    named = (f"gsm8k={sums(tmp_path / 'a.jsonl')}", f"svamp={sums(tmp_path / 'b.jsonl', 2)}")
    config = settings(
        policy, eval__benchmarks=named, eval__benchmark_samples=2, eval__decontaminate=(str(train),), seed=3
    )
    execute(config, tmp_path / "run")
    evals = json.loads((tmp_path / "run" / "summary.json").read_text())["evals"]
    assert [(one["benchmark"], one["n_problems"], one["k"]) for one in evals] == [("gsm8k", 3, 2), ("svamp", 2, 2)]
    first = evals[0]
    found = dict(first["decontamination"])
    assert sorted(found.pop("ids")) == ["gsm8k/1", "gsm8k/2"]
    assert found == {"against": [str(train)], "n": 10, "overlapping": 2, "share": pytest.approx(2 / 3)}
    assert first["seed"] == 3 and first["opening"] == "<think>\n" and first["metric"] == "accuracy"
    assert first["score"] == first["pass_at_1"] == first["pass_at"]["1"] and list(first["cons_at"]) == ["1", "2"]
    assert 0 <= first["truncated_share"] <= 1 and "score_clean" in first
    rows = [json.loads(line) for path in (tmp_path / "run" / "rollouts").iterdir() for line in path.open()]
    assert len(rows) == 10 and all(row["completion"].startswith("<think>\n") for row in rows)
    said = capsys.readouterr()
    assert "gsm8k/1" in said.out + said.err and "95% interval" in said.out + said.err
    # The same command again measures nothing twice.
    execute(config, tmp_path / "run")
    again = json.loads((tmp_path / "run" / "summary.json").read_text())["evals"]
    assert again == evals


def test_a_record_that_was_measured_with_something_else_is_replaced(policy, tmp_path, capsys):
    def evals(**changes):
        execute(settings(policy, **{"eval__problems": 2, "eval__samples": 2, **changes}), tmp_path / "run")
        return json.loads((tmp_path / "run" / "summary.json").read_text())["evals"]

    sample = {"eval__benchmark_samples": 2, "eval__benchmarks": (f"gsm8k={sums(tmp_path / 'a.jsonl')}",)}
    (benchmark,) = evals(**sample)
    before = evals()
    assert before[0] == benchmark and len(before) == 2, "problems after benchmarks"
    assert "anew" not in capsys.readouterr().out
    problems = before[1]
    assert problems["model"] == str(policy) and (problems["seed"], problems["top_p"], problems["k"]) == (0, 1.0, 2)
    make_policy(tmp_path / "other")
    for changes, field, says in [
        ({"seed": 3}, "seed", "evaluate, step 0 is measured anew: seed is 3, was 0"),
        ({"model__path": str(tmp_path / "other")}, "model", f"model is '{tmp_path / 'other'}', was '{policy}', seed"),
        ({"eval__temperature": 0.5}, "temperature", f"model is '{policy}', was"),
        ({"eval__samples": 3}, "k", "anew: k is 3, was 2, temperature is 1.0, was 0.5"),
    ]:
        after = evals(**changes)
        assert len(after) == 2 and after[0] == benchmark and after[1][field] != problems[field]
        assert says in capsys.readouterr().out
    sums(tmp_path / "a.jsonl", 2)
    assert [(one.get("benchmark"), one["n_problems"]) for one in evals(**sample)] == [("gsm8k", 2), (None, 2)]
    assert "evaluate gsm8k, step 0 is measured anew: problems_digest is " in capsys.readouterr().out


def test_what_cannot_be_measured_is_refused_before_anything_is_sampled(policy, tmp_path):
    good = f"gsm8k={sums(tmp_path / 'a.jsonl')}"
    judged = tmp_path / "judged.jsonl"
    judged.write_text(json.dumps({"instruction": "Write.", "output": "ok"}) + "\n")
    for named, message in [
        ((good, good), "names one twice"),
        ((good, f"alpaca_eval={judged}"), r"config\.eval\.judge is empty"),
        ((good, f"mbpp={tmp_path / 'a.jsonl'}"), "mbpp wants the columns"),
    ]:
        with pytest.raises(ValueError, match=message):
            execute(settings(policy, eval__benchmarks=named), tmp_path / "run")
    with pytest.raises(ValueError, match="nothing to do"):
        execute(settings(policy, eval__problems=0), tmp_path / "run")


def test_judged_benchmarks_lose_what_the_judge_is_silent_on(policy, tmp_path):
    path = tmp_path / "judged.jsonl"
    asked = [("silent", ""), ("write", ""), ("draw", "a much longer reply than any" * 20), ("say", "ok")]
    rows = [{"instruction": question, "output": reply or "x"} for question, reply in asked]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = settings(policy, eval__benchmarks=(f"alpaca_eval={path}",), eval__judge=f"{policy}/judges.py:long")
    execute(config, tmp_path / "run")
    (record,) = json.loads((tmp_path / "run" / "summary.json").read_text())["evals"]
    assert record["judge_dropped"] == 1 and record["n_problems"] == 3 and record["metric"] == "win"
    assert "cons_at" not in record and 0 <= record["score"] <= 1
    config.curate.editor_may_fail = 0.1
    with pytest.raises(ValueError, match=r"judge failed on 1 of . problems; see config\.eval\.judge"):
        execute(config, tmp_path / "again")


def test_judges_see_the_summary_only_and_ties_are_halves():
    seen = []

    def judge(example: dict, first: str, second: str) -> float:
        seen.append((first, second))
        return float(len(first) - len(second))

    one = group("ab", right="", id="q", asked="Write.", question="prompt")
    one[0].example["answer"] = one[1].example["answer"] = "1234"
    texts = ["<think>long thought</think> 123456", "<think>other</think> abcd"]
    one = [dataclasses.replace(s, text=text) for s, text in zip(one, texts, strict=True)]
    (kept,), dropped = examine.judged([one], judge, 4, 0.0)
    assert [s.graded.rewards for s in kept] == [{"win": 1.0}, {"win": 0.5}] and dropped == 0
    assert set(map(frozenset, seen)) == {frozenset({"1234", "123456"}), frozenset({"1234", "abcd"})}
    with pytest.raises(ValueError, match="judge failed on 1 of 1"):
        examine.judged([one], lambda *_: None, 1, 0.5)


def test_the_score_of_drop_is_its_f1():
    named = benchmarks.parse("drop=a.jsonl")
    groups = [group("ab", right="b"), group("bb", right="b")]
    for s, f1 in zip((s for one in groups for s in one), [0.2, 1.0, 0.6, 0.6], strict=True):
        s.graded.rewards["f1"] = f1
    record = examine.record_of(groups, named, "evaluate", 0, {"decontamination": None})
    assert record["score"] == pytest.approx(0.6) and record["pass_at_1"] == 0.75 and record["metric"] == "f1"


def test_an_opening_is_forced_once():
    tokenizer = load_tokenizer(BASE)
    assert forced("User: 1+1? Assistant:", "<think>\n") == "<think>\n"
    assert forced("...<|Assistant|><think>\n", "<think>\n") == forced("...<think>", "<think>\n") == ""
    assert forced("x", "") == ""
    prompt, ids = encode_prompt(tokenizer, "plain", "1+1?", "<think>\n")
    assert "<think>" not in prompt and ids == tokenizer.encode(prompt + "<think>\n")
    examples = [{"id": "a", "question": "1+1?"}]
    ((_, encoded),) = rollout.encode_prompts(examples, "plain", tokenizer, 100, "<think>\n")
    assert np.array_equal(encoded, ids)


def test_problems_that_are_trained_on_are_named(capsys):
    problems = [{"id": name, "question": f"What is {name}?"} for name in "abc"]
    found = held_out.leaks(problems, problems[1:2], (), "rl")
    assert found == {"trained_on": {"problems": 1, "share": pytest.approx(1 / 3), "ids": ["b"]}}
    assert "1 of 3 held-out problems are among the training prompts (b)" in capsys.readouterr().out
    assert held_out.leaks(problems, [{"question": "another"}], (), "rl") == {}


def test_reinforcement_learning_ends_with_them_as_well(policy, tmp_path):
    config = make_config(policy, eval__benchmarks=(f"gsm8k={sums(tmp_path / 'a.jsonl')}",), rl__updates=2)
    config.update_from_flattened_dict(
        {"data.max_prompt_tokens": 256, "rl.row_tokens": 512, "eval.benchmark_samples": 2}
    )
    execute(config, tmp_path / "run")
    evals = json.loads((tmp_path / "run" / "summary.json").read_text())["evals"]
    assert [(one["step"], one.get("benchmark")) for one in evals] == [(0, None), (2, None), (2, "gsm8k")]
