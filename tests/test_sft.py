"""Next-token training: conversations to rows with a loss on the answer alone, a run cut short and continued, and
pretraining on the same loop."""

import json
import pathlib

import numpy as np
import pytest
from ml_collections import ConfigDict
from tiny_run import execute, make_config, make_policy, metrics

from configs import models
from r1jax import chat, conversations, corpus, hosts, next_token, rollout
from r1jax.checkpoint import latest_step
from r1jax.model import convert
from r1jax.run import Stopped
from r1jax.text import CHAT, load_tokenizer, render_prompt

TOKENIZER = load_tokenizer(corpus.MIXTURES["english"].base)
ROW = 96
QUESTIONS = [f"Using {i}, 2, 3 and + - *, make {5 + i}." for i in range(1, 13)]


def talk(question: str, answer: str) -> dict:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def write(path: pathlib.Path, records: list[dict]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    answers = [f"<think> {i}+2=2 </think> <answer>{i}+2+3</answer>" for i in range(1, 13)]
    path = tmp_path_factory.mktemp("data") / "talks.jsonl"
    return write(path, [talk(q, a) for q, a in zip(QUESTIONS, answers, strict=True)])


@pytest.fixture(scope="module")
def policy(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("made") / "policy"
    make_policy(folder)
    return folder


def sft_config(policy: pathlib.Path, data: str, **changes) -> ConfigDict:
    shape = {"sft__rows": 2, "sft__microbatch_rows": 1, "sft__row_tokens": ROW, "sft__epochs": 2.0}
    return make_config(policy, stages=("sft",), sft__data=data, **{**shape, **changes})


def test_the_answer_and_its_end_are_learned_and_nothing_else(data: str) -> None:
    packed = conversations.read(data, "config.sft.data", TOKENIZER, "r1_zero", ROW)
    assert (packed.conversations, packed.too_long) == (12, 0)
    learned, read = [], []
    for row, segments in enumerate(packed.rows.segments):
        for segment in range(1, segments.max() + 1):
            here = segments == segment
            targets, mask = packed.rows.targets[row][here], packed.rows.is_completion[row][here]
            assert targets[-1] == TOKENIZER.eos_id and mask[-1]
            learned.append(TOKENIZER.decode(targets[mask][:-1]))
            read.append(TOKENIZER.decode([packed.rows.tokens[row][here][0], *targets[~mask]]))
    assert sorted(read) == sorted(render_prompt("r1_zero", question) for question in QUESTIONS)
    assert sorted(learned) == sorted(f" <think> {i}+2=2 </think> <answer>{i}+2+3</answer>" for i in range(1, 13))


def test_a_chat_template_takes_every_turn_and_thinking_opens_once() -> None:
    class Chatty:
        template = chat.Template(
            "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
            "{% if add_generation_prompt %}[assistant]<think>\n{% endif %}"
        )
        eos_id, encode = TOKENIZER.eos_id, TOKENIZER.encode

    turns = [*talk("6 - 2", "4")["messages"], *talk("and 3 more", "<think>\n4+3\n</think>7")["messages"]]
    ids, answer = conversations.encode(Chatty(), CHAT, turns, "here")
    assert TOKENIZER.decode(ids) == "[user]6 - 2[assistant]4[user]and 3 more[assistant]<think>\n"
    assert TOKENIZER.decode(answer[:-1]) == "4+3\n</think>7" and answer[-1] == TOKENIZER.eos_id
    with pytest.raises(ValueError, match="config.data.template=plain has no place for user, assistant, user, assistan"):
        conversations.encode(Chatty(), "plain", turns, "here")


@pytest.mark.parametrize(
    ("records", "says"),
    [
        ([talk("a", "b"), {"text": "a"}], 'line 2: "messages" must list two messages or more'),
        ([{"messages": [{"role": "user", "content": "a"}] * 2}], "line 1: the last message must be the assistant's"),
        ([talk("a", " \n")], "line 1: the last message must be the assistant's and not empty"),
        ([{"messages": [{"role": "user", "content": 3}, {}]}], "line 1: a message must have .* got .*3"),
        ([talk("a", "é" * ROW)], f"all 1 conversations are longer than a row .*config.sft.row_tokens is {ROW}"),
        ([], "has no conversation"),
    ],
)
def test_what_is_no_conversation_is_named_by_its_line(tmp_path: pathlib.Path, records: list, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        conversations.read(write(tmp_path / "bad.jsonl", records), "config.sft.data", TOKENIZER, "plain", ROW)


def test_long_conversations_are_left_out_and_counted(tmp_path: pathlib.Path) -> None:
    path = write(tmp_path / "some.jsonl", [talk("a", "b"), talk("a", "é" * ROW)])
    packed = conversations.read(path, "config.sft.data", TOKENIZER, "plain", ROW)
    assert (packed.conversations, packed.too_long) == (1, 1)


def test_a_run_learns_what_it_is_shown_and_goes_on_where_it_was_stopped(policy, data, tmp_path, capsys) -> None:
    config = sft_config(policy, data, sft__valid_data=data, sft__valid_every=4, sft__epochs=6.0)
    execute(config, tmp_path / "straight")
    said = capsys.readouterr().out
    records = metrics(tmp_path / "straight")
    n = len(records)
    assert f"12 conversations in {n // 3} rows of {ROW} tokens, 6 epochs of them in {n} steps" in said
    assert [r["step"] for r in records] == list(range(1, n + 1)) and n > 8
    held_out = [r["eval/next_token_loss"] for r in records if "eval/next_token_loss" in r]
    assert len(held_out) >= 2 and held_out[-1] < held_out[0] - 0.5

    with pytest.MonkeyPatch.context() as patch:
        stop, count = hosts.Stop(), next_token.step_metrics

        def after_three(*given):
            stop.requested = stop.requested or calls.append(None) or len(calls) == 3
            return count(*given)

        calls: list = []
        patch.setattr(next_token, "step_metrics", after_three)
        with pytest.raises(Stopped):
            execute(config, tmp_path / "stopped", stop)
    assert [r["step"] for r in metrics(tmp_path / "stopped")] == [1, 2, 3]
    execute(config, tmp_path / "stopped")
    assert metrics(tmp_path / "stopped") == records
    one, other = (tmp_path / name / "models" / "sft" / "model.safetensors" for name in ("straight", "stopped"))
    assert one.read_bytes() == other.read_bytes()


def test_it_is_measured_on_a_schedule_and_on_benchmarks_at_the_end(policy, data, tmp_path) -> None:
    source = write(tmp_path / "sums.jsonl", [{"question": f"{i}+1?", "answer": f"#### {i + 1}"} for i in range(2)])
    changes = {"eval__every": 2, "eval__problems": 2, "eval__samples": 2, "data__max_prompt_tokens": 128}
    config = sft_config(policy, data, eval__benchmarks=(f"gsm8k={source}",), checkpoint__save_every=100, **changes)

    def evals(name: str) -> list[dict]:
        return json.loads((tmp_path / name / "summary.json").read_text())["evals"]

    execute(config, tmp_path / "straight")
    n = len(metrics(tmp_path / "straight"))
    assert n > 2
    steps = [*((step, None) for step in range(2, n, 2)), (n, "gsm8k"), (n, None)]
    assert [(one["step"], one.get("benchmark")) for one in evals("straight")] == steps

    stop, decode = hosts.Stop(), rollout.completion_text

    def stopping(*given):
        stop.requested = True
        return decode(*given)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(rollout, "completion_text", stopping)
        execute(config, tmp_path / "stopped", stop)
    assert latest_step(tmp_path / "stopped" / "checkpoints" / "sft") == 2
    execute(config, tmp_path / "stopped")
    assert evals("stopped") == evals("straight") and metrics(tmp_path / "stopped") == metrics(tmp_path / "straight")
    config.eval.benchmarks = ("gsm8k=nowhere.jsonl",)
    with pytest.raises(ValueError, match=r"there is no file nowhere.jsonl"):
        execute(config, tmp_path / "refused")
    assert not (tmp_path / "refused" / "metrics.jsonl").exists(), "before the first step"


def test_problems_that_stand_in_the_conversations_are_named(policy, data, tmp_path, capsys) -> None:
    problems = [{"id": str(i), "question": QUESTIONS[i] + " " * i, "answer": "1"} for i in range(2)]
    problems.append({"id": "new", "question": "1 + 1?", "answer": "2"})
    source = write(tmp_path / "problems.jsonl", problems)
    execute(sft_config(policy, data, data__source=source, sft__epochs=1.0), tmp_path / "run")
    (record,) = json.loads((tmp_path / "run" / "summary.json").read_text())["evals"]
    assert record["trained_on"] | {"ids": None} == {"problems": 2, "share": pytest.approx(2 / 3), "ids": None}
    assert sorted(record["trained_on"]["ids"]) == ["0", "1"]
    assert "2 of 3 held-out problems are among the training prompts" in capsys.readouterr().out


def test_microbatches_add_up_to_the_whole_step(policy, data, tmp_path) -> None:
    whole = execute(sft_config(policy, data, sft__microbatch_rows=0), tmp_path / "whole").params
    parts = execute(sft_config(policy, data), tmp_path / "parts").params
    np.testing.assert_allclose(whole["embed"], parts["embed"], atol=1e-4)
    with pytest.raises(ValueError, match=r"config.sft.microbatch_rows \(3\) does not divide config.sft.rows \(2\)"):
        execute(sft_config(policy, data, sft__microbatch_rows=3), tmp_path / "uneven")


def test_pretraining_makes_a_model_from_a_corpus(policy, tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(models.MODELS, "miniature", {**models.TINY, "hidden_size": 32, "num_hidden_layers": 2})
    for name, seed in (("corpus", 0), ("valid", 1)):
        corpus.write_corpus(tmp_path / name, 300, seed, 1)
    config = make_config(
        policy,
        stages=("pretrain",),
        model__name="miniature",
        pretrain__corpus=str(tmp_path / "corpus"),
        pretrain__valid_corpus=str(tmp_path / "valid"),
        pretrain__steps=6,
        pretrain__rows=4,
        pretrain__row_tokens=128,
        pretrain__valid_every=3,
        pretrain__valid_rows=4,
    )
    execute(config, tmp_path / "run")
    records = metrics(tmp_path / "run")
    losses = [r["eval/next_token_loss"] for r in records if "eval/next_token_loss" in r]
    assert len(records) == 6 and losses[1] < losses[0] and all("loss/mtp" in r for r in records)
    made, _ = convert.load(tmp_path / "run" / "models" / "pretrain")
    assert (made.num_hidden_layers, made.num_nextn_predict_layers) == (2, 1)
    config.pretrain.corpus = str(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="config.pretrain.corpus is .*nowhere', which holds no corpus"):
        execute(config, tmp_path / "other")
