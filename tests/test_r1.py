"""The whole of R1 in miniature: every stage leaves what the next one needs, and goes on where it was stopped."""

import json
import pathlib
import time
from collections.abc import Callable

import numpy as np
import pytest
from ml_collections import ConfigDict
from tiny_run import SETTINGS, command, execute, make_policy, metrics

from configs import r1
from r1jax import hand_over, hosts, pipeline, run, scorers
from r1jax.checkpoint import latest_step

SMALL = {
    **{key: value for key, value in SETTINGS.items() if key not in ("rl.updates", "grpo.kl_coef")},
    "data.max_prompt_tokens": 160,
    "rl.row_tokens": 256,
    "grpo.kl_coef": 0.0,
    "eval.problems": 2,
    "eval.samples": 2,
    "eval.general_samples": 2,
    "sft.rows": 4,
    "sft.microbatch_rows": 4,
    "sft.row_tokens": 256,
    "sft.epochs": 1.0,
    "curate.samples": 4,
    "curate.prompts": 6,
    "curate.prompts_per_part": 2,
    "curate.general_examples": 8,
    # A random policy writes nothing that is right, whole or in one language.
    "curate.filters": (),
    "preference.row_tokens": 256,
    "preference.rows": 4,
    "preference.epochs": 1.0,
    "preference.valid_every": 2,
    "preference.margin": 0.0,
    "preference.from_update": 2,
    "preference.valid_samples": 2,
    "preference.judge": "judge:prefers_many_letters",
    "checkpoint.save_every": 2,
}
OWN = ("zero", "dev2", "r1")


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("policy")
    make_policy(folder)
    (folder / "judge.py").write_text(
        "def prefers_many_letters(example, first, second):\n    return (len(set(first)) - len(set(second))) / 10\n"
        "def is_even(example, response):\n    return len(response) % 2 == 0\n"
    )
    return folder


def make_config(policy: pathlib.Path, **changes: object) -> ConfigDict:
    """configs/r1.py at a size that takes seconds."""
    config = r1.get_config()
    given = {**SMALL, "model.path": str(policy), "preference.judge": f"{policy}/judge.py:prefers_many_letters"}
    given["preference.safety"] = f"{policy}/judge.py:is_even"
    for key, value in {**given, **changes}.items():
        *groups, name = key.split(".")
        group = config
        for one in groups:
            group = group[one]
        group[name] = value
    config.rewards = ConfigDict({**r1.WATCHED, "variety": 1.0})
    config.reward_paths = ConfigDict({"variety": f"{policy}/rewards.py:variety"})
    config.pipeline = ConfigDict(
        {
            name: {
                key: value
                for key, value in {
                    **own.to_dict(),
                    **({"rl": {"updates": 4}} if name in OWN else {}),
                    **({"optim": {"decay_steps": 4}} if name in OWN else {}),
                    **({"rewards": {**r1.CONSISTENT, "variety": 1.0}} if "rewards" in own else {}),
                    "curate": {k: v for k, v in own.get("curate", {}).items() if k in ("sampler", "general")},
                    "eval": {"every": 2} if name == "r1" else dict(own.get("eval", {})),
                }.items()
                if value != {}
            }
            for name, own in config.pipeline.items()
        }
    )
    return config


@pytest.fixture(scope="module")
def whole(policy: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("whole")
    execute(make_config(policy), folder)
    return folder


STAGES = r1.get_config().stages


def models(folder: pathlib.Path) -> dict[str, bytes]:
    """The weights that every stage left."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.glob("models/**/*.safetensors"))}


def test_every_stage_leaves_a_model_an_evaluation_and_its_data(whole):
    assert {path.name for path in (whole / "models").iterdir()} == set(STAGES)
    assert {path.parent.name for path in whole.glob("models/reward_models/*/score.safetensors")} == {"helpful", "safe"}
    evals = json.loads((whole / "summary.json").read_text())["evals"]
    # Zero before and after, Dev1 and Dev3 after SFT, Dev2 and R1 after RL.
    assert [e["stage"] for e in evals] == ["zero", "zero", "dev1", "dev2", "dev3", "r1"]
    assert all({"pass_at_1", "language_consistency", "general_worth", "general_win_rate"} <= e.keys() for e in evals)
    assert next(e for e in evals if e["stage"] == "dev3")["general_win_rate"] == 0.5
    # What the alarm looked at: R1 before, amid and after.
    validation = json.loads((whole / "summary.json").read_text())["validation"]
    assert [(e["stage"], e["step"]) for e in validation] == [("r1", 0), ("r1", 2), ("r1", 4)]
    assert all({"pass_at_1", "preference"} <= e.keys() for e in validation)
    assert "Watched for reward hacking" in (whole / "report.html").read_text()
    manifest = json.loads((whole / "data" / "dev3.manifest.json").read_text())
    assert manifest["by_source"] == {"dev3": 6, "letters": 8} and manifest["sampling"]["sampled"] == 24
    lines = [json.loads(line) for line in (whole / "data" / "dev3.jsonl").read_text().splitlines()]
    assert len(lines) == 14 and all(one["messages"][-1]["role"] == "assistant" for one in lines)
    assert "Stage dev2" in (whole / "report.html").read_text()


def test_the_run_of_a_released_model_has_the_published_settings():
    config = r1.get_config("deepseek_v3")
    own = {name: pipeline.stage_config(config, name) for name in config.stages}
    for name in ("dev1", "dev3"):
        assert own[name].optim.learning_rate == 5e-5 and own[name].optim.final_share == 0.1
        assert (own[name].sft.epochs, own[name].sft.rows, own[name].sft.row_tokens) == (2.0, 128, 32_768)
    assert own["reward_models"].optim.learning_rate == 6e-6 and own["zero"].optim.learning_rate == 3e-6
    assert own["zero"].rl.temperature == 1.0 and own["r1"].rl.temperature == 0.7
    for name in ("dev2", "r1"):
        assert own[name].grpo.clip_eps_low == own[name].grpo.clip_eps_high == 10.0
        assert own[name].rewards.language == 1.0 and "language" not in own["zero"].rewards
    # 1,700 updates, preference in the last 400: as near as whole rollouts come.
    updates, first = own["r1"].rl.updates, own["r1"].preference.from_update
    assert abs(updates - 1700) < 16 and updates - first == 400
    assert all(own[name].rl.updates % own[name].rl.minibatches == 0 for name in ("zero", "dev2", "r1"))
    with pytest.raises(ValueError, match="there is no R1 of 'deepseek', wanted one of deepseek_v3"):
        r1.get_config("deepseek")


def test_stages_start_where_the_config_says(whole, policy):
    """Dev1 and Dev3 start from the base, R1 from Dev3: a run without learning leaves just those weights."""
    weights = models(whole)
    assert len({weights[f"models/{name}/model.safetensors"] for name in ("zero", "dev1", "dev2", "dev3", "r1")}) == 5
    config = make_config(policy)
    starts = [hand_over.start_of(config, i, whole) for i in range(len(STAGES))]
    assert starts == ["base", "base", "dev1", "base", "dev3", "dev3"]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("pipeline.dev1.curate.editor", "nowhere.py:edit", "config.curate.editor is 'nowhere.py:edit'"),
        ("pipeline.dev3.curate.judge", "http://host/v1", "config.curate.judge is 'http://host/v1': the model's name"),
        ("pipeline.dev3.curate.general", "nowhere.jsonl", "config.curate.general: there is no file nowhere.jsonl"),
        ("pipeline.dev3.curate.sampler", "dev4", "config.curate.sampler is 'dev4', wanted base, a stage before it"),
        ("pipeline.dev1.curate.sampler", "dev2", "config.curate.sampler is 'dev2', wanted base, a stage before it"),
        ("curate.filters", ("corect",), "config.curate.filters names 'corect', wanted some of whole, correct"),
        ("preference.judge", "nowhere.py:f", "config.preference.judge is 'nowhere.py:f'"),
        ("preference.safety", "nowhere.py:f", "config.preference.safety is 'nowhere.py:f'"),
        ("preference.valid_split", "rl", "config.preference.split and valid_split are both 'rl'"),
        ("preference.source", "ask.jsonl", "config.preference.valid_source is empty, and ask.jsonl has no splits"),
        (
            "preference.models",
            "judges",
            "config.preference.models is 'judges', and judges/helpful holds no reward model",
        ),
        ("preference.alarm_action", "shout", "config.preference.alarm_action is 'shout', wanted warn, stop_preference"),
    ],
)
def test_what_a_late_stage_lacks_is_told_before_the_first_begins(policy, tmp_path, key, value, message):
    config = make_config(policy)
    *groups, name = key.split(".")
    group = config
    for one in groups:
        group = group[one] if one in group else group.setdefault(one, ConfigDict())
    with group.unlocked():
        group[name] = value
    with pytest.raises(ValueError, match=message):
        execute(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_finished_stage_is_not_gone_through_again(whole, policy, capsys):
    before = models(whole)
    execute(make_config(policy), whole)
    printed = capsys.readouterr().out
    assert all(f"{name} is done: " in printed for name in STAGES[:-1]) and models(whole) == before


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["dev1", "dev2", "dev3", "reward_models_helpful", "reward_models_safe", "r1"])
def test_stopped_inside_any_stage_it_ends_with_the_same_bits(whole, policy, tmp_path, stage, monkeypatch):
    stop, write = hosts.Stop(), run.metrics.Log.write

    def stopping(self: object, step: int, scalars: dict) -> None:
        write(self, step, scalars)
        stop.requested = stop.requested or (self.stage == stage and step == 2)

    monkeypatch.setattr(run.metrics.Log, "write", stopping)
    with pytest.raises(run.Stopped):
        execute(make_config(policy), tmp_path, stop)
    assert latest_step(tmp_path / "checkpoints" / stage) == 2
    monkeypatch.undo()
    execute(make_config(policy), tmp_path)
    assert models(tmp_path) == models(whole)


@pytest.mark.slow
@pytest.mark.parametrize("part", ["dev1", "reward_models-rl", "reward_models-validation"])
def test_stopped_while_it_samples_it_keeps_the_parts_it_has(whole, policy, tmp_path, part, monkeypatch):
    stop, write = hosts.Stop(), hosts.atomic_write

    def stopping(path: pathlib.Path, content: bytes | str) -> None:
        write(path, content)
        stop.requested = stop.requested or pathlib.Path(path).match(f"*/{part}/part-00001.json")

    monkeypatch.setattr(hosts, "atomic_write", stopping)
    with pytest.raises(run.Stopped):
        execute(make_config(policy), tmp_path, stop)
    assert len(list((tmp_path / "data" / part).glob("part-*.json"))) == 2
    monkeypatch.undo()
    execute(make_config(policy), tmp_path)
    assert models(tmp_path) == models(whole)


@pytest.mark.slow
def test_killed_inside_the_cold_start_it_ends_with_the_same_bits(policy, tmp_path):
    """SIGKILL, which nothing can prepare for; what is sampled is the base's, so that no stage has to come first."""
    file = tmp_path / "config.py"
    file.write_text(
        f"import pathlib, sys\nsys.path.insert(0, {str(pathlib.Path(__file__).parent)!r})\nimport test_r1\n"
        f"def get_config():\n    config = test_r1.make_config(pathlib.Path({str(policy)!r}))\n"
        "    config.update({'stages': ('dev1',), 'cpu_devices': 1})\n"
        "    config.pipeline.dev1.update({'curate': {'sampler': ''}, 'sft': {'epochs': 30.0}})\n    return config\n"
    )
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"

    def run_to_its_end(folder: pathlib.Path) -> None:
        process = command(f"--config={file}", f"--workdir={folder}")
        said = process.communicate(timeout=3600)[0]
        assert process.returncode == 0, said

    run_to_its_end(undisturbed)
    first = command(f"--config={file}", f"--workdir={killed}")
    while len(metrics(killed)) < 3 and first.poll() is None:
        time.sleep(0.02)
    first.kill()
    first.communicate()
    assert 3 <= len(metrics(killed)) < len(metrics(undisturbed)) and not models(killed)
    run_to_its_end(killed)
    assert models(killed) == models(undisturbed) and metrics(killed) == metrics(undisturbed)


# --- the alarm for reward hacking --------------------------------------------------------------------------------


def hackable(run: object, config: object, folder: object, policy: object) -> Callable:
    """A reward model that can be hacked: it likes whatever is no letter."""
    return lambda texts: np.array([sum(not c.isalpha() for c in text) / max(1, len(text)) for _, text in texts])


def scenario(policy: pathlib.Path, **changes: object) -> ConfigDict:
    """The last stage alone; right is what has letters in it, and most prompts are general ones."""
    (policy / "right.py").write_text("def has_letters(prompt, completion, example, **context):\n"
                                     "    letters = sum(c.isalpha() for c in completion)\n"
                                     "    return float(letters >= 8 and example['grader'] != 'judged')\n")  # fmt: skip
    given = {"stages": ("r1",), "eval.general": "", "eval.baseline": "", "eval.problems": 32}
    given |= {"rl.prompts_per_update": 4, "rl.group_size": 8, "rl.microbatch_rows": 8}
    given |= {"preference.from_update": 0, "preference.share": 0.9, "preference.models": str(policy / "judges")}
    for name in ("helpful", "safe"):  # never read: `hackable` is in their place
        (policy / "judges" / name).mkdir(parents=True, exist_ok=True)
        (policy / "judges" / name / scorers.HEAD).touch()
    config = make_config(policy, **{**given, **changes})
    config.reward_paths = ConfigDict({"accuracy": f"{policy}/right.py:has_letters"})
    own = {"rl": {"updates": 24}, "optim": {"learning_rate": 0.1}, "eval": {"every": 8}, "rewards": {"accuracy": 1.0}}
    config.pipeline = ConfigDict({"r1": {"page": "all_scenario_rl", "start": "base", **own}})
    return config


def trained(folder: pathlib.Path) -> list[dict]:
    """What each step of the stage logged."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_hackable_reward_model_sets_off_the_alarm_which_ends_preference(policy, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(scorers, "load", hackable)
    execute(scenario(policy), tmp_path / "watched")
    assert "reward hacking" in caplog.text and "on validation problems fell to" in caplog.text
    # Then there are no general prompts any more, which alone the model scores.
    scores = [r["reward/helpful/mean"] for r in trained(tmp_path / "watched") if "reward/helpful/mean" in r]
    assert scores[0] > 0 and scores[-1] == 0


def test_the_alarm_stops_the_run_or_warns_alone_where_that_is_asked_for(policy, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(scorers, "load", hackable)
    with pytest.raises(ValueError, match=r"reward hacking; lower config\.preference\.weight"):
        execute(scenario(policy, **{"preference.alarm_action": "stop_run"}), tmp_path / "stopped")
    execute(scenario(policy, **{"preference.alarm_action": "warn"}), tmp_path / "warned")
    assert "reward hacking" in caplog.text
    assert all(r["reward/helpful/mean"] > 0 for r in trained(tmp_path / "warned") if "reward/helpful/mean" in r)
    first, *_, last = json.loads((tmp_path / "warned" / "summary.json").read_text())["validation"]
    assert last["preference"] > first["preference"] + 0.05 and last["pass_at_1"] < first["pass_at_1"] / 2


def test_general_prompts_of_a_file_need_no_answers_and_are_scored(policy, tmp_path, monkeypatch):
    for name in ("ask", "valid"):
        lines = [json.dumps({"question": f"{name} somebody for {i} apples"}) for i in range(5)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    monkeypatch.setattr(scorers, "load", hackable)
    config = scenario(policy)
    config.preference.update({"source": f"{tmp_path}/ask.jsonl", "valid_source": f"{tmp_path}/valid.jsonl"})
    config.pipeline.r1.rl.updates = 2
    execute(config, tmp_path / "run")
    assert trained(tmp_path / "run")[0]["reward/helpful/mean"] > 0
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["validation"][0]["preference"] > 0


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (
            "data.source",
            "problems.jsonl",
            "config.preference.valid_problems is empty, and problems.jsonl has no splits",
        ),
        ("preference.source", "ask.jsonl", "config.preference.valid_source is empty, and ask.jsonl has no splits"),
        ("eval.problems", 0, "config.eval.problems is 0: the alarm for reward hacking would have nothing to look at"),
        ("pipeline.r1.eval.every", -1, "config.eval.every is -1: the alarm for reward hacking would have nothing to"),
        ("preference.alarm_action", "shout", "config.preference.alarm_action is 'shout', wanted warn, stop_preference"),
    ],
)
def test_an_alarm_that_could_not_watch_is_refused(policy, tmp_path, monkeypatch, key, value, message):
    monkeypatch.setattr(scorers, "load", hackable)
    config = scenario(policy)
    config.update_from_flattened_dict({key: value})
    with pytest.raises(ValueError, match=message):
        execute(config, tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stages": ("zero", "dev4")}, r"config.stages names 'dev4', wanted .*; did you mean 'dev\d'"),
        ({"pipeline.dev1.page": "cold_stat"}, "config.pipeline.dev1.page names 'cold_stat', .*mean 'cold_start'"),
        (
            {"pipeline.dev2.rl": {"update": 3}},
            "config.pipeline.dev2.rl.update: there is no .*mean updates",
        ),
        ({"pipeline.dev2.rll": {"updates": 3}}, "config.pipeline.dev2.rll: there is no key config.rll"),
        ({"pipeline.dev1.start": "dev3"}, "config.pipeline.dev1.start is 'dev3', wanted base, a stage before it"),
    ],
)
def test_a_pipeline_that_cannot_be_is_refused_at_start(policy, tmp_path, changes, message):
    config = make_config(policy)
    for key, value in changes.items():
        *groups, name = key.split(".")
        group = config
        for one in groups:
            group = group[one]
        with group.unlocked():
            group[name] = ConfigDict(value) if isinstance(value, dict) else value
    with pytest.raises(ValueError, match=message):
        execute(config, tmp_path)


def test_no_usable_sample_is_an_error_that_counts_why(policy, tmp_path):
    config = make_config(policy, **{"stages": ("dev1",), "curate.filters": ("correct",)})
    config.pipeline.dev1.curate.sampler = ""
    with pytest.raises(ValueError, match=r"dev1: no sample is left .*\(24 sampled, 24 dropped by correct\)"):
        execute(config, tmp_path)
    assert not (tmp_path / "data" / "dev1.jsonl").exists() and not (tmp_path / "models").exists()
