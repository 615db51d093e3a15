"""What a run tells is complete, free of duplicates after a resume, and never ends the run."""

import io
import json
import math
import re
import subprocess
import sys
import time

import ml_dtypes
import numpy as np
import pytest

from r1jax import hosts, metrics
from r1jax.metrics import Log, Moves, Progress, Summary, write_rollout


def records(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def on_board(workdir, stage):
    """(name, step, value) of all TensorBoard scalars, in the order of the files."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in sorted((workdir / "metrics" / stage).iterdir(), key=lambda p: p.stat().st_mtime_ns):
        data, at = path.read_bytes(), 0
        while at < len(data):  # a TFRecord: length, its CRC, the event, its CRC
            n = int.from_bytes(data[at : at + 8], "little")
            event = Event.FromString(data[at + 12 : at + 12 + n])
            found += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
            at += n + 16
    return found


@pytest.fixture
def opened():
    stack = []

    def open_(*args):
        stack.append(Log(*args))
        return stack[-1]

    yield open_
    for log in stack:
        log.close()


def test_a_step_is_on_disk_when_it_is_logged(opened, tmp_path):
    log = opened(tmp_path, "reasoning_rl")
    log.write(1, {"reward/mean": np.float32(0.5), "kl/mean": math.nan, "reward/accuracy/mean": 1})
    record = {"stage": "reasoning_rl", "step": 1, "reward/mean": 0.5, "kl/mean": None, "reward/accuracy/mean": 1}
    assert records(tmp_path) == [record]
    assert on_board(tmp_path, "reasoning_rl") == [("reward/mean", 1, 0.5), ("reward/accuracy/mean", 1, 1.0)]


def test_resuming_drops_what_will_be_logged_again(opened, tmp_path):
    earlier = opened(tmp_path, "cold_start")
    for step in (1, 2):
        earlier.write(step, {"loss/mean": step})
    log = opened(tmp_path, "reasoning_rl")
    for step in range(1, 6):
        log.write(step, {"reward/mean": step})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "reasoning_rl", "st')  # killed while it wrote
    again = opened(tmp_path, "reasoning_rl", 3)
    assert [(r["stage"], r["step"]) for r in records(tmp_path)] == [
        *(("cold_start", step) for step in (1, 2)),
        *(("reasoning_rl", step) for step in (1, 2, 3)),
    ]
    again.write(4, {"reward/mean": 40.0})
    assert [r["step"] for r in records(tmp_path)][-2:] == [3, 4]
    assert ("reward/mean", 4, 40.0) in on_board(tmp_path, "reasoning_rl")
    opened(tmp_path, "reasoning_rl")  # from the beginning
    assert [r["stage"] for r in records(tmp_path)] == ["cold_start"] * 2


def test_a_broken_line_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"stage": "a", "step": 1}\n{"stage": \n{"stage": "a", "step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2 is no record"):
        Log(tmp_path, "a", 1)


def test_only_standard_names(opened, tmp_path):
    log = opened(tmp_path, "a")
    log.write(1, {"reward/accuracy/mean": 0.0, "time/rollout_s": 1.0, "grading/timeout_share": 0.0})
    for name in ("rewards/mean", "reward/a/b/mean", "time/rollout", "kl/mean2"):
        with pytest.raises(AssertionError, match=name):
            log.write(2, {name: 0.0})
    shown = {key for _, key, _ in metrics.COLUMNS}
    assert all(metrics._KNOWN.fullmatch(name) for name in shown)


def test_only_the_writer_writes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(hosts, "index", lambda: 1)
    monkeypatch.setattr(hosts, "agree", lambda value: value)
    log = Log(tmp_path, "a")
    log.write(1, {"loss/mean": 1.0})
    log.close()
    summary = Summary(tmp_path, time.monotonic())
    summary.add({"stage": "a", "step": 0})
    progress = Progress("a", 3)
    progress.step(1, {})
    progress.say("x")
    progress.close()
    write_rollout(tmp_path, "a", 1, [{"reward": 1.0}])
    assert list(tmp_path.iterdir()) == [] and capsys.readouterr().out == ""


def test_a_rollout_is_written_whole_and_replaced(tmp_path):
    row = {
        "completion": "é 中\n",
        "logp": np.array([-0.123456789, np.nan], np.float32),
        "ids": np.array([1, 2]),
        "rewards": {"accuracy": np.float32(1.0), "format": math.inf},
        "weights": np.array([0.5], ml_dtypes.bfloat16),
        "flags": ("timeout",),
        "level": np.int64(3),
        "answer": None,
    }
    write_rollout(tmp_path, "rl", 7, [row, row])
    write_rollout(tmp_path, "rl", 7, [row])
    lines = (tmp_path / "rollouts" / "rl-000007.jsonl").read_text().split("\n")
    assert lines[1:] == [""] and "中" in lines[0]
    assert json.loads(lines[0]) == {
        "completion": "é 中\n",
        "logp": [-0.12346, None],
        "ids": [1, 2],
        "rewards": {"accuracy": 1.0, "format": None},
        "weights": [0.5],
        "flags": ["timeout"],
        "level": 3,
        "answer": None,
    }


def test_the_summary_goes_on_after_a_resume(tmp_path):
    first = Summary(tmp_path, time.monotonic() - 100)
    first.add({"stage": "base", "step": 0, "pass_at_1": 0.1})
    first.add({"stage": "rl", "step": 10, "pass_at_1": math.nan})
    second = Summary(tmp_path, time.monotonic() - 50)
    second.add({"stage": "rl", "step": 10, "pass_at_1": 0.5})
    second.add({"stage": "rl", "step": 20, "pass_at_1": 0.6})
    written = json.loads((tmp_path / "summary.json").read_text())
    assert [(e["stage"], e["step"], e["pass_at_1"]) for e in written["evals"]] == [
        ("base", 0, 0.1),
        ("rl", 10, 0.5),
        ("rl", 20, 0.6),
    ]
    assert 150 <= written["wall_s"] < 160 and 0.05 < written["peak_rss_gb"] < 100


@pytest.mark.parametrize("text", ["", "[]", '{"evals": 3, "wall_s": 1, "peak_rss_gb": 1}', '{"evals": []}'])
def test_a_file_that_is_no_summary_is_not_overwritten(tmp_path, text):
    (tmp_path / "summary.json").write_text(text)
    with pytest.raises(ValueError, match=r"summary\.json .*delete it"):
        Summary(tmp_path, 0.0)


def test_moves_add_up_and_are_forgotten():
    moves = Moves()
    for _ in range(2):
        with moves("rollout"):
            time.sleep(0.02)
    with pytest.raises(KeyError), moves("update"):
        raise KeyError
    taken = moves.take()
    assert list(taken) == ["time/rollout_s", "time/update_s"] and 0.04 <= taken["time/rollout_s"] < 1
    assert moves.take() == {}


STEP = {"reward/mean": 0.25, "reward/accuracy/mean": 0.125, "length/mean": 31.0, "throughput/rollout_tokens_per_s": 5e3}


def test_a_log_file_gets_one_plain_line_per_step():
    out = io.StringIO()
    progress = Progress("reasoning_rl", 120, done=9, out=out)
    progress.step(10, STEP)
    time.sleep(0.02)
    progress.step(11, STEP)
    progress.close()
    first, second = out.getvalue().splitlines()
    assert first.startswith("reasoning_rl  10/120") and "pass  12.5%" in first and "5,000" in first
    assert re.fullmatch(r"reasoning_rl  11/120 .* \d\.\d\d s/step  0:0\d:\d\d left", second)
    assert "\x1b" not in out.getvalue()


def test_time_left_follows_the_last_steps(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    out = io.StringIO()
    progress = Progress("rl", 1000, out=out)
    for step in range(1, 101):
        clock[0] += 60 if step == 1 else 1 if step <= 50 else 4  # compiles, then short, then long completions
        progress.step(step, {})
        if step == 2:
            assert "1.00 s/step  0:16:38 left" in out.getvalue()
    assert out.getvalue().endswith("4.00 s/step  1:00:00 left\n")


def test_a_sample_cannot_disturb_the_terminal():
    out = io.StringIO()
    Progress("rl", 10, out=out).sample(3, "[bold]2+2[/x]?", "\x1b[2J<think>\r" + "y" * 5000 + "end", 1.5)
    text = out.getvalue()
    assert "step 3" in text and "1.500" in text and "[bold]2+2[/x]?" in text and text.endswith("end\n")
    assert "\x1b" not in text and "\r" not in text and len(text) < 2500 and "characters ..." in text


def test_a_log_that_cannot_hold_a_character_does_not_end_the_run(tmp_path):
    with open(tmp_path / "log", "w", encoding="ascii") as out:
        Progress("rl", 10, out=out).sample(1, "中", "é", 0.0)
    assert "completion: ?" in (tmp_path / "log").read_text("ascii")


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_gets_a_live_line_and_messages_above_it(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    out = Terminal()
    progress = Progress("rl", 10, out=out)
    for step in (1, 2):
        progress.step(step, STEP)
    progress.say("[saved] checkpoint 2")
    progress.close()
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue())
    assert "[saved] checkpoint 2" in plain and "2/10" in plain and "reward  0.250" in plain and "left" in plain
    assert "\x1b[2K" in out.getvalue()  # lines are redrawn in place


def test_the_log_does_not_import_torch(tmp_path):
    # In a process of its own: other tests import torch.
    code = (
        "import sys; from r1jax.metrics import Log; Log(sys.argv[1], 'a', 0).close(); sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0 and (tmp_path / "metrics.jsonl").exists(), done.stderr


def test_reading_is_told_every_ten_seconds_and_not_at_all_when_it_is_quick(monkeypatch):
    clock = iter([0.0, 0.5, 2.5, 4.0, 11.0, 12.6, 30.0])
    monkeypatch.setattr(metrics.time, "monotonic", lambda: next(clock))
    out = io.StringIO()
    with metrics.reading("weights from gs://x", out) as show:
        for done in range(1, 7):
            show(done * 10**9, 8 * 10**9)
    assert out.getvalue().splitlines() == [
        "weights from gs://x: 2.0 of 8.0 GB, 0.80 GB/s",
        "weights from gs://x: 5.0 of 8.0 GB, 0.40 GB/s",
        "weights from gs://x: 6.0 of 8.0 GB, 0.20 GB/s",
    ]
