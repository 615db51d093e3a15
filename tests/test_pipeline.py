"""A whole run from a released-model folder to the report, on the embedded task and on a user's data and rewards; what
it says when the config asks for something impossible."""

import contextlib
import io
import json
import pathlib

import jax
import numpy as np
import pytest
from tiny_run import POLICY, ROOT, STAGE, execute, make_config, make_policy, metrics, outcome, run_main

from configs import base, zero
from r1jax import held_out, hosts, pipeline, run
from r1jax import metrics as names
from r1jax.checkpoint import latest_step
from r1jax.model import convert

SAMPLE = pathlib.Path(__file__).parent / "data" / "gsm8k_sample.jsonl"


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "policy"
    make_policy(folder)
    return folder


def test_a_run_leaves_a_folder_that_tells_all_and_the_same_command_again_changes_nothing(policy, tmp_path):
    config = make_config(policy, rl__updates=4, eval__every=2, grading__workers=1)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        trained = execute(config, tmp_path)
    lines = printed.getvalue().splitlines()
    assert lines[0].startswith(f"{STAGE} of a policy of 0.05M parameters on 1 cpu device, in {tmp_path}")
    assert [line.split(":")[0] for line in lines if line.startswith("evaluation")] == [
        f"evaluation at step {step}" for step in (0, 2, 4)
    ]
    assert sum(line.startswith(f"{STAGE} ") and "/4 " in line for line in lines) == 4
    assert lines[-1] == f"done; it left {tmp_path}/report.html, {tmp_path}/models"

    assert json.loads((tmp_path / "config.json").read_text()) == json.loads(config.to_json())
    assert latest_step(tmp_path / "checkpoints" / STAGE) == 4
    assert "</html>" in (tmp_path / "report.html").read_text()
    assert list((tmp_path / "metrics" / STAGE).iterdir()), "TensorBoard"
    loaded_config, loaded = convert.load(tmp_path / "models" / STAGE)
    assert loaded_config == POLICY
    jax.tree.map(np.testing.assert_array_equal, loaded, trained.params)
    assert not np.array_equal(loaded["embed"], convert.load(policy)[1]["embed"]), "it has learned something"
    assert (tmp_path / "models" / STAGE / "tokenizer.model").read_bytes() == (policy / "tokenizer.model").read_bytes()

    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["wall_s"] > 0 and 0.1 < summary["peak_rss_gb"] < 20
    assert [(e["stage"], e["step"]) for e in summary["evals"]] == [(STAGE, 0), (STAGE, 2), (STAGE, 4)]
    for field in (
        *("n_problems", "k", "pass_at_1", "pass_at_1_ci", "cons_at_k", "mean_completion_tokens", "truncated_share"),
        *("reflective_per_completion", "by_level"),
    ):
        assert all(field in e for e in summary["evals"]), field

    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(r["stage"], r["step"]) for r in records] == [(STAGE, step) for step in (1, 2, 3, 4)]
    for record in records:
        assert all(names._KNOWN.fullmatch(name) for name in record.keys() - {"stage", "step"})
        assert {
            "loss/mean",
            "kl/mean",
            "clip/low_share",
            "clip/high_share",
            "entropy/mean",
            "grad/norm",
        } <= record.keys()
        assert {"mismatch/mean_abs", "optim/lr", "time/update_s"} <= record.keys()
        assert record["mismatch/mean_abs"] < 0.2
    for first in records[::2]:
        assert {"reward/mean", "reward/std", "reward/accuracy/mean", "reward/variety/std"} <= first.keys()
        assert {"group/zero_variance_share", "length/mean", "length/truncated_share"} <= first.keys()
        assert {"throughput/rollout_tokens_per_s", "time/rollout_s", "time/ref_logp_s"} <= first.keys()
        assert first["ratio/mean"] == 1 and first["reward/variety/std"] > 0

    rollouts = sorted((tmp_path / "rollouts").iterdir())
    assert [path.name for path in rollouts] == [
        *(f"{STAGE}-00000{i}.jsonl" for i in (0, 1)),
        *(f"{STAGE}-evaluation-00000{step}.jsonl" for step in (0, 2, 4)),
    ]
    shown = [[json.loads(line) for line in path.read_text().splitlines()] for path in rollouts[2:]]
    assert [[(row["prompt_id"], row["member"]) for row in rows] for rows in shown[1:]] == 2 * [
        [(row["prompt_id"], row["member"]) for row in shown[0]]
    ], "the same problems at each evaluation"
    assert {row["stage"] for rows in shown for row in rows} == {f"{STAGE} evaluation"}
    rows = [json.loads(line) for line in rollouts[1].read_text().splitlines()]
    assert len(rows) == 4 * 4 and {row["step"] for row in rows} == {2}
    for row in rows:
        assert len(row["tokens"]) == len(row["logp"]) <= 12 and row["stop"] in ("stop", "length")
        assert row["reward"] == row["rewards"]["accuracy"] + row["rewards"]["variety"]
    for prompt in {row["prompt_id"] for row in rows}:
        assert abs(sum(row["advantage"] for row in rows if row["prompt_id"] == prompt)) < 1e-5

    before = outcome(tmp_path)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        execute(config, tmp_path)
    assert f"{STAGE} (from step 4 on) of a policy" in printed.getvalue()
    assert outcome(tmp_path) == before


def test_the_samplers_log_probabilities_stand_for_the_old_policys(policy, tmp_path):
    records = {}
    for name in ("policy", "sampler"):
        execute(make_config(policy, rl__updates=2, rl__old_logp=name, eval__problems=0), tmp_path / name)
        records[name] = metrics(tmp_path / name)
        assert ("old_logp_s" in (tmp_path / name / "metrics.jsonl").read_text()) == (name == "policy")
    scored, noted = records["policy"], records["sampler"]
    for name in ("loss/mean", "kl/mean", "ratio/mean", "grad/norm", "entropy/mean"):
        assert [r[name] for r in noted] == pytest.approx([r[name] for r in scored], rel=1e-3, abs=1e-6), name
    assert noted[1]["ratio/mean"] != 1, "the second minibatch is off-policy"


@pytest.mark.parametrize("lora", [{}, {"lora__rank": 2, "lora__targets": ("q_proj",)}], ids=["whole", "lora"])
def test_update_and_score_are_compiled_once_and_while_the_first_rollout_is_sampled(policy, tmp_path, caplog, lora):
    jax.config.update("jax_log_compiles", True)  # as a context it would hold for this thread alone
    try:
        with caplog.at_level("WARNING"):
            execute(make_config(policy, rl__updates=4, eval__problems=0, **lora), tmp_path)
    finally:
        jax.config.update("jax_log_compiles", False)
    for program in ("update", "score"):
        said = f"Finished XLA compilation of jit({program})"
        threads = [r.threadName for r in caplog.records if said in r.getMessage()]
        assert len(threads) == 1 and threads[0].startswith("compile"), (program, threads)


def test_own_data_with_own_columns_and_rewards_of_which_two_fail_is_trained_on(policy, tmp_path):
    lines = sorted(map(json.loads, SAMPLE.read_text().splitlines()), key=lambda r: len(r["question"]))[:5]
    renamed = [{"name": r["id"], "task": r["question"], "result": r["answer"], "steps": 3} for r in lines]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(r) + "\n" for r in renamed))
    rewards = ("variety", "broken", "undefined")
    config = make_config(
        policy,
        data__source=f"{tmp_path}/own.jsonl",
        data__question_column="task",
        data__answer_column="result",
        data__id_column="name",
        data__level_column="steps",
        data__template="plain",
        data__max_prompt_tokens=160,
        rewards=dict.fromkeys(["accuracy", *rewards], 1.0),
        reward_paths={name: f"{policy}/rewards.py:{name}" for name in rewards},
        rl__updates=2,
        rl__row_tokens=0,
        eval__problems=0,
        grpo__kl_coef=0.0,
    )
    execute(config, tmp_path / "run")
    first, second = metrics(tmp_path / "run")
    assert (first["step"], second["step"]) == (1, 2)
    assert first["grading/error_share"] == first["grading/nan_share"] == 1
    assert first["reward/broken/mean"] == first["reward/undefined/mean"] == 0
    assert first["reward/mean"] == first["reward/accuracy/mean"] + first["reward/variety/mean"] > 0
    assert first["grad/norm"] > 0 and second["grad/skipped"] == 0
    rows = [
        json.loads(line) for line in (tmp_path / "run" / "rollouts" / f"{STAGE}-000000.jsonl").read_text().splitlines()
    ]
    gold = {r["id"]: r["answer"] for r in lines}
    assert all(row["gold"] == gold[row["prompt_id"]] and row["level"] == 3 for row in rows)
    assert all(row["flags"] == ["error:broken", "nan:undefined"] for row in rows)


def test_a_model_is_evaluated_alone_and_stays_as_it_is(policy, tmp_path):
    config = make_config(policy, stages=("evaluate",), eval__temperature=0.6, eval__top_p=0.95)
    measured = execute(config, tmp_path)
    jax.tree.map(np.testing.assert_array_equal, measured.params, convert.load(policy)[1])
    summary = json.loads((tmp_path / "summary.json").read_text())
    (record,) = summary["evals"]
    assert (record["stage"], record["step"], record["n_problems"], record["k"]) == ("evaluate", 0, 3, 4)
    rows = (tmp_path / "rollouts" / "evaluate-evaluation-000000.jsonl").read_text().splitlines()
    assert len(rows) == 3 * 4 and len({json.loads(row)["completion"] for row in rows}) > 3
    assert "</html>" in (tmp_path / "report.html").read_text() and not (tmp_path / "models").exists()
    execute(config, tmp_path)
    assert json.loads((tmp_path / "summary.json").read_text())["evals"] == [record]


def test_stopped_amid_benchmarks_it_keeps_those_that_are_measured(policy, tmp_path, monkeypatch):
    named = tuple(f"{name}={tmp_path / name}.jsonl" for name in ("gsm8k", "svamp"))
    for name in ("gsm8k", "svamp"):
        rows = [{"id": i, "question": f"{name}: {i}+1?", "answer": str(i + 1)} for i in range(2)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    few = {"eval__benchmark_samples": 2, "data__max_prompt_tokens": 160}
    config = make_config(policy, stages=("evaluate",), eval__benchmarks=named, **few)

    def evals(folder: pathlib.Path) -> list[dict]:
        return json.loads((folder / "summary.json").read_text())["evals"]

    execute(config, tmp_path / "whole")
    stop, add, asked = hosts.Stop(), names.Summary.add, []

    def stopping(self: names.Summary, *given: dict) -> None:
        add(self, *given)
        stop.requested = True

    monkeypatch.setattr(names.Summary, "add", stopping)
    with pytest.raises(run.Stopped):
        execute(config, tmp_path / "stopped", stop)
    monkeypatch.undo()
    assert evals(tmp_path / "stopped") == evals(tmp_path / "whole")[:1]
    sample = held_out.HeldOut.sample
    monkeypatch.setattr(held_out.HeldOut, "sample", lambda self, *given: asked.append(self) or sample(self, *given))
    execute(config, tmp_path / "stopped")
    assert evals(tmp_path / "stopped") == evals(tmp_path / "whole") and len(asked) == 1


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"stages": ("evaluate",), "eval__problems": 0}, "evaluate has nothing to do: .*config.eval.problems is 0"),
        ({"data__max_prompt_tokens": 8}, "the prompt of '.*' has .* tokens, wanted 1 to 8; raise config.data.max_"),
        ({"rl__max_completion_tokens": 1024}, "config.rl.max_completion_tokens .* 1056 tokens, .* reads 1024 at most"),
        ({"rl__row_tokens": 40}, "allow 44 tokens, but config.rl.row_tokens is 40"),
        ({"rl__group_size": 1}, "config.rl.group_size is 1: a group of one has no baseline"),
        ({"rl__updates": 5}, r"config.rl.updates \(5\) must be a multiple of config.rl.minibatches \(2\)"),
        ({"rl__temperature": 0.0}, "config.rl.temperature is 0.0"),
        ({"rl__old_logp": "trainer"}, "config.rl.old_logp is 'trainer', wanted one of policy, sampler"),
        ({"sampler__slots": 0}, "config.sampler.slots is 0"),
        ({"stages": ("reasonin_rl",)}, "config.stages names 'reasonin_rl', .*did you mean 'reasoning_rl'"),
        ({"stages": ()}, "config.stages is empty"),
        ({"mesh__data": 3}, "config.mesh .*'data': 3.* does not multiply to the 1 devices"),
        ({"mesh__fsdp": 0}, "config.mesh sizes must be positive"),
        ({"rewards": {"acuracy": 1.0}, "reward_paths": {}}, "'acuracy' in config.rewards; did you mean 'accuracy'"),
        ({"reward_paths": {"variety": "nowhere.py:f"}}, "'nowhere.py:f' in config.rewards: cannot import"),
        ({"rewards": {"accuracy": 1.0}}, "config.reward_paths has 'variety', which config.rewards gives no weight"),
        ({"stages": ("sft",), "sft__data": "nowhere.jsonl"}, "config.sft.data: there is no file nowhere.jsonl"),
        ({"data__source": "nowhere.jsonl"}, "config.data.source: there is no file nowhere.jsonl"),
        ({"data__template": "r1"}, "config.data.template must be one of r1_zero, plain"),
        ({"model__path": "nowhere"}, "nowhere"),
        ({"checkpoint__keep": 0}, "config.checkpoint.keep = 0"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_refused_at_the_start_by_the_name_of_its_key(policy, tmp_path, changes, says):
    with pytest.raises(ValueError, match=says):
        execute(make_config(policy, **changes), tmp_path)
    assert not (tmp_path / "metrics.jsonl").exists(), "at the start"


@pytest.mark.parametrize("key", pipeline.SHARED)
def test_what_no_stage_can_have_of_its_own_is_refused_at_start(policy, tmp_path, key):
    group, _, name = key.partition(".")
    value = make_config(policy)[group]
    own = {group: {name: value[name]} if name else value}
    with pytest.raises(
        ValueError, match=rf"config.pipeline.{STAGE}.{key} would be without effect: .*decode_mesh, model.path"
    ):
        execute(make_config(policy, pipeline={STAGE: own}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_what_a_stage_reads_itself_it_can_have_of_its_own(policy):
    own = {"checkpoint": {"keep": 5}, "model": {"remat": "full"}, "eval": {"problems": 1}, "log": {"sample_every": 7}}
    found = pipeline.stage_config(make_config(policy, pipeline={STAGE: own}), STAGE)
    assert (found.checkpoint.keep, found.model.remat, found.eval.problems, found.log.sample_every) == (5, "full", 1, 7)


def flat(tree: dict, above: str = "") -> dict:
    out = {}
    for key, value in tree.items():
        out |= flat(value, f"{above}{key}.") if isinstance(value, dict) else {above + key: value}
    return out


def test_help_shows_every_key_with_its_value_in_the_config_given_and_its_meaning():
    code, text = run_main("--config=configs/zero.py:no_kl", "--help")
    assert code == 0 and "python -m r1jax.main --config=configs/zero.py" in text
    for key, value in flat(zero.get_config("no_kl").to_dict()).items():
        assert f"--config.{key}={json.dumps(value)}" in text
    assert "--config.grpo.kl_coef=0.0 " in text
    meanings = (ROOT / "configs" / "base.py").read_text()
    for key in ("rl.group_size", "eval.every", "grpo.kl_coef"):
        line = next(line for line in text.splitlines() if f"--config.{key}=" in line)
        assert line.split("  ")[-1].strip() in meanings and len(line.split("  ")) > 2
    assert run_main("--helpfull")[1].count("--config.") > len(flat(base.get_config().to_dict()))


def test_a_mistyped_command_ends_with_one_line_that_names_what_was_meant(tmp_path):
    good = ("--config=configs/zero.py", f"--workdir={tmp_path / 'run'}")
    for arguments, says in (
        ((*good, "--config.rl.updatez=3"), "there is no key config.rl.updatez; did you mean rl.updates?"),
        ((*good, "--config.group_size=3"), "there is no key config.group_size; did you mean rl.group_size?"),
        ((*good, "--noconfig.rl.dynamic_samplin"), "did you mean rl.dynamic_sampling?"),
        ((*good, "--config.rl.updates=many"), "flag --config.rl.updates=many: invalid literal"),
        ((*good, "--workdri=x"), "Unknown command line flag 'workdri'. Did you mean: workdir"),
        ((*good, "rl.updates=3"), "what is 'rl.updates=3'? Keys are set by --config.KEY=VALUE"),
        (("--config=configs/zero.py:no_k", good[1]), "there is no ablation 'no_k'; did you mean 'no_kl'?"),
        (("--config=configs/zeor.py", good[1]), "there is no file configs/zeor.py; did you mean configs/zero.py?"),
        (good[:1], "--workdir=DIR is missing"),
        (good[1:], "--config=configs/zero.py (or another config) is missing"),
    ):
        code, text = run_main(*arguments)
        assert code == 1 and text.startswith("r1jax: ") and text.count("\n") == 1, text
        assert says in text
    assert not (tmp_path / "run").exists()
