"""Distillation beside RL alone: both from the same student, with what each cost; what is said where data is missing."""

import json
import pathlib

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from tiny import DEEPSEEK, QWEN
from tiny_run import SETTINGS, execute, make_policy, metrics

from configs import distill as config_file
from r1jax import conversations, flops, hand_over, hosts, pipeline, run, run_folder
from r1jax.checkpoint import latest_step
from r1jax.model import convert
from r1jax.packing import pack_documents
from r1jax.stages import distill
from r1jax.text import load_tokenizer

TALKS = [("Using 1, 2, 3 and + - *, make 9.", "<think> 1+2=3 </think> <answer>(1+2)*3</answer>")] * 6


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("policy")
    make_policy(folder)
    roles = ("user", "assistant")
    lines = [{"messages": [{"role": r, "content": t} for r, t in zip(roles, talk, strict=True)]} for talk in TALKS]
    (folder / "talks.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def make_config(policy: pathlib.Path, **changes: object) -> ConfigDict:
    """configs/distill.py at a size that takes seconds."""
    config = config_file.get_config()
    small = {**SETTINGS, "rl.updates": 2, "grpo.kl_coef": 0.0, "data.max_prompt_tokens": 160, "rl.row_tokens": 256}
    small |= {"model.path": str(policy), "sft.data": str(policy / "talks.jsonl"), "sft.rows": 2, "sft.row_tokens": 96}
    small |= {"eval.problems": 5, "eval.samples": 2, "eval.general_samples": 2}
    for key, value in {**small, **{key.replace("__", "."): value for key, value in changes.items()}}.items():
        group, _, name = key.rpartition(".")
        (config[group] if group else config)[name] = value
    # A random policy solves nothing, so RL has a reward that its completions differ in.
    config.rewards = ConfigDict({**config.rewards.to_dict(), "variety": 1.0})
    config.reward_paths = ConfigDict({"variety": f"{policy}/rewards.py:variety"})
    return config


@pytest.fixture(scope="module")
def whole(policy: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("whole")
    execute(make_config(policy), folder)
    return folder


def test_one_command_leaves_both_students_an_evaluation_of_each_and_what_they_cost(whole, policy):
    base = convert.load(policy)[1]
    for name in ("rl_alone", "distill"):
        assert not np.array_equal(convert.load(whole / "models" / name)[1]["embed"], base["embed"]), f"{name} learns"
    evals = json.loads((whole / "summary.json").read_text())["evals"]
    assert [(e["stage"], e["step"]) for e in evals] == [("rl_alone", 0), ("rl_alone", 2), ("distill", 3)]
    for record in evals:
        assert {"general_worth", "language_consistency"} <= record.keys()
        assert {name: part["n_problems"] for name, part in record["by_language"].items()} == {"en": 1, "zh": 4}
    spent = run_folder.read_run(whole).training_flops
    assert spent("rl_alone") > 0 and spent("distill") > 0 and spent("rl_alone", 1) < spent("rl_alone")
    assert "10¹² operations" in (whole / "report.html").read_text()


def test_both_begin_at_the_base_and_the_last_word_compares_them(policy, tmp_path, capsys):
    config = make_config(policy)
    assert [hand_over.start_of(config, i, tmp_path) for i in range(2)] == ["base", "base"]
    # Nothing but the order of the stages is asked for: either alone, too.
    config.stages = ("distill",)
    execute(config, tmp_path)
    assert "distill against" not in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "step", "saved"), [("rl_alone", 1, 2), ("distill", 2, 2)])
def test_stopped_inside_either_it_ends_with_the_same_bits(whole, policy, tmp_path, stage, step, saved, monkeypatch):
    stop, write = hosts.Stop(), run.metrics.Log.write

    def stopping(self: object, at: int, scalars: dict) -> None:
        write(self, at, scalars)
        stop.requested = stop.requested or (self.stage == stage and at == step)

    monkeypatch.setattr(run.metrics.Log, "write", stopping)
    with pytest.raises(run.Stopped):
        execute(make_config(policy), tmp_path, stop)
    assert latest_step(tmp_path / "checkpoints" / stage) == saved and not (tmp_path / "models" / stage).exists()
    monkeypatch.undo()
    execute(make_config(policy), tmp_path)
    for name in ("rl_alone", "distill"):
        one, other = (folder / "models" / name / "model.safetensors" for folder in (tmp_path, whole))
        assert one.read_bytes() == other.read_bytes(), name
    assert metrics(tmp_path) == metrics(whole)


def test_the_operations_of_sft_are_those_of_the_tokens_read(whole, policy):
    """Six conversations of one length, three times: the metric is the closed form."""
    records = [r for r in metrics(whole) if r["stage"] == "distill"]
    model = convert.load(policy)[0]
    rows = conversations.read(str(policy / "talks.jsonl"), "", load_tokenizer(policy), "r1_zero", 96).rows
    n = int((rows.segments > 0).sum()) // 6
    each = 3 * sum(2 * flops.active_weights(model) + at * flops.attention_per_pair(model) for at in range(n))
    assert sum(r["compute/flops"] for r in records) == pytest.approx(3 * 6 * each)


def test_packed_rows_cost_what_their_documents_cost_alone():
    rows = pack_documents(np.ones(24, np.int32), np.array([5, 9, 10]), 12)
    documents = sum(flops.forward(QWEN, 1, at) for n in (5, 9, 10) for at in range(n - 1))
    assert flops.packed(QWEN, rows.positions, rows.segments > 0).sum() == pytest.approx(documents)
    assert flops.packed(QWEN, np.zeros((1, 4), int), np.zeros((1, 4), bool)).tolist() == [0.0]


def test_sampling_reads_a_prompt_once_and_decodes_token_by_token():
    one = flops.forward(DEEPSEEK, 4, 2) + sum(
        flops.decode(DEEPSEEK, 1, 4 + at + 0.5) for n in (3, 6) for at in range(n)
    )
    assert flops.sampled(DEEPSEEK, [(4, [3, 6])]) == pytest.approx(one)


OURS = {"stage": "distill", "pass_at_1": 0.5, "general_worth": 0.6}
OURS |= {"by_language": {"en": {"pass_at_1": 0.6}, "zh": {"pass_at_1": 0.4}}}
THEIRS = {**OURS, "stage": "rl_alone", "pass_at_1": 0.3, "general_worth": 0.3}
THEIRS |= {"by_language": {"en": {"pass_at_1": 0.5}, "zh": {"pass_at_1": 0.1}}, "cons_at_k": 0.9}


def test_the_comparison_names_every_set_and_where_it_is_lost():
    said = distill.comparison(OURS, THEIRS, 1.5)
    assert said.startswith("distill against rl_alone, which had 1.50 of its operations: pass@1 50.0% to 30.0%, ")
    assert "pass@1 of zh 40.0% to 10.0%" in said and said.endswith("better on every measured set")
    said = distill.comparison({**OURS, "general_worth": 0.3}, THEIRS, 0.5)
    assert "so give it more" in said and said.endswith("not better in worth of general instructions")


def test_missing_conversations_are_told_of_before_the_first_stage_begins(policy, tmp_path):
    config = make_config(policy, sft__data=str(tmp_path / "dev3.jsonl"))
    with pytest.raises(ValueError, match=r"config.sft.data is .*dev3.jsonl', which is not there; .*configs/r1.py"):
        execute(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    # A stage of the same run may write them.
    distill.check(make_config(policy, sft__data=str(tmp_path / "run" / "data" / "dev3.jsonl")), tmp_path / "run")


def test_the_six_students_have_the_published_settings():
    rates = {name: config_file.get_config(name).optim.learning_rate for name in config_file.STUDENTS}
    assert rates == {
        "qwen_1_5b": 1e-4, "qwen_7b": 8e-5, "qwen_14b": 7e-5, "qwen_32b": 6e-5, "llama_8b": 5e-5, "llama_70b": 2e-5,
    }  # fmt: skip
    one = config_file.get_config("llama_8b")
    assert (one.sft.rows, one.sft.row_tokens, one.sft.epochs) == (64, 32_768, 2.0)
    assert (one.optim.schedule, one.optim.final_share, one.stages) == ("cosine", 0.1, ("distill",))
    assert pipeline.stage_config(one, "rl_alone").optim.learning_rate == 2e-6
    with pytest.raises(ValueError, match="there is no student 'qwen', wanted one of qwen_1_5b"):
        config_file.get_config("qwen")


def test_the_packaged_student_is_dense_small_and_reads_as_its_teacher():
    student, teacher = (pipeline.PACKAGED[f"packaged:{name}"] for name in ("student", "bilingual"))
    config, params = convert.load(student)
    weights = sum(np.size(leaf) for leaf in jax.tree.leaves(params))
    assert (config.attention, config.n_moe, config.tie_word_embeddings, config.qkv_bias) == ("gqa", 0, True, True)
    assert 3e5 < weights < 5e5 and sum(path.stat().st_size for path in student.iterdir()) < 2.5e6
    assert (student / "tokenizer.model").read_bytes() == (teacher / "tokenizer.model").read_bytes()
