"""Laws of the reward pool: what a reward does costs its own item only, and how many processes grade changes nothing."""

import logging
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from r1jax.rewards.children import KillablePool
from r1jax.rewards.pool import RewardPool

# What a reward may do to the process it runs in, by the completion.
USER = """
import math, os, signal, subprocess, sys, threading, time

def hang():
    while True: pass
def hang_in_c(): return 7 ** 7 ** 7 ** 7
def hang_without_alarm():
    signal.signal(signal.SIGALRM, signal.SIG_IGN)
    hang()
def print_without_end():
    while True: print("spam " * 1000, flush=True)
def print_a_lot():
    print("spam " * 1_000_000, file=sys.stderr)
    return 1.0
def leave_a_thread():
    threading.Thread(target=time.sleep, args=(60,)).start()
    return 1.0
def raise_it(): raise KeyError("no such thing")
def cancel(): raise __import__("asyncio").CancelledError
def close_everything(): os.closerange(0, 1000)

ACTS = dict(
    hang=hang, hang_in_c=hang_in_c, hang_without_alarm=hang_without_alarm, print_without_end=print_without_end,
    print_a_lot=print_a_lot, leave_a_thread=leave_a_thread, raise_it=raise_it, cancel=cancel,
    leave=lambda: sys.exit(3), exit=lambda: os._exit(0), kill=lambda: os.kill(os.getpid(), signal.SIGKILL),
    close=close_everything, nan=lambda: math.nan, infinite=lambda: math.inf, text=lambda: "1.0", nothing=lambda: None,
    boolean=lambda: True, fine=lambda: 0.25, pid=os.getpid,
    jax=lambda: float("jax" in sys.modules), platform=lambda: float(os.environ["JAX_PLATFORMS"] == "cpu"),
)

def act(prompt, completion, example, **context):
    return ACTS[completion]()
"""
GOOD = "<think>a</think> <answer>5+3*7</answer>"
EXAMPLE = {"id": "c1", "grader": "countdown", "answer": {"numbers": [3, 5, 7], "target": 26}}
WEIGHTS = {"accuracy": 1.0, "format": 0.5}


@pytest.fixture(scope="module")
def user_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("user") / "mine.py"
    path.write_text(USER)
    return str(path)


def acts(user_file, names, workers=1, timeout_s=1.0):
    with RewardPool({"act": 1.0}, workers, timeout_s, {"act": f"{user_file}:act"}) as pool:
        for ticket, name in enumerate(names):
            pool.submit(ticket, "", name, {})
        return pool.drain()


def test_a_weighted_sum_with_the_rewards_and_the_answer_beside_it():
    with RewardPool(WEIGHTS, 0, 1.0) as pool:
        pool.submit(7, "", GOOD, EXAMPLE)
        pool.submit(3, "", "<answer>5+3*7</answer>", EXAMPLE)
        poor, good = pool.drain()
    assert (good.ticket, good.rewards, good.reward) == (7, {"accuracy": 1.0, "format": 1.0}, 1.5)
    assert (poor.ticket, poor.rewards, poor.reward) == (3, {"accuracy": 1.0, "format": 0.0}, 1.0)
    assert good.answer == poor.answer == "5+3*7"
    assert good.flags == () and 0 < good.seconds < 10


@pytest.mark.parametrize("workers", [0, 1])
def test_a_mark_is_asked_for_where_the_config_says_so(workers):
    example, said = {"id": "m1", "grader": "math", "answer": "5"}, ["the answer is 5", r"\boxed{5}"]
    for asked, rewards, answers in ((True, [0.0, 1.0], [None, "5"]), (False, [1.0, 1.0], ["5", "5"])):
        with RewardPool({"accuracy": 1.0}, workers, 10.0, marked_answers=asked) as pool:
            for ticket, completion in enumerate(said):
                pool.submit(ticket, "", completion, example)
            graded = pool.drain()
        assert ([g.reward for g in graded], [g.answer for g in graded]) == (rewards, answers)


def test_results_do_not_depend_on_the_number_of_processes(user_file):
    def results(workers):
        weights = {**WEIGHTS, "act": 0.1}
        with RewardPool(weights, workers, 5.0, {"act": f"{user_file}:act"}) as pool:
            for ticket in range(60):
                completion = ["fine", GOOD, "nan", "raise_it", "\ud800é", "nothing"][ticket % 6]
                pool.submit(ticket, "a prompt", completion, EXAMPLE)
            graded = pool.drain()
            assert pool.drain() == pool.poll() == []
        return [(g.ticket, g.rewards, g.reward, g.answer, g.flags) for g in graded]

    inline = results(0)
    assert [ticket for ticket, *_ in inline] == list(range(60))
    assert inline[3][-1] == ("error:act",)
    assert results(1) == inline
    assert results(2) == inline


def test_poll_does_not_wait_and_returns_each_item_once():
    with RewardPool(WEIGHTS, 1, 5.0) as pool:
        assert pool.poll() == []
        seen, ticket = [], 0
        while len(seen) < 20:
            if ticket < 20:
                pool.submit(ticket, "", GOOD, EXAMPLE)
                ticket += 1
            seen += [graded.ticket for graded in pool.poll()]
        assert sorted(seen) == list(range(20))
        assert pool.drain() == []


def test_a_reward_that_raises_or_returns_no_number_is_a_flagged_zero(user_file):
    names = ["raise_it", "leave", "cancel", "nan", "infinite", "text", "nothing", "boolean", "fine"]
    graded = acts(user_file, names, timeout_s=10.0)
    assert [g.reward for g in graded] == [0.0] * 7 + [1.0, 0.25]
    assert [g.flags for g in graded] == [("error:act",)] * 3 + [("nan:act",)] * 4 + [()] * 2


def test_the_first_traceback_is_logged_once(user_file, caplog):
    with caplog.at_level(logging.WARNING):
        acts(user_file, ["raise_it"] * 5, workers=2, timeout_s=10.0)
    assert len([r for r in caplog.records if r.name == "r1jax.rewards.pool"]) == 1
    assert "KeyError: 'no such thing'" in caplog.text and "mine.py" in caplog.text


def test_a_hanging_reward_loses_its_own_item_only(user_file):
    names = ["fine", "hang", "fine", "hang_in_c", "fine", "hang_without_alarm", "fine", "print_without_end", "fine"]
    start_s = time.monotonic()
    graded = acts(user_file, names, workers=2)
    assert time.monotonic() - start_s < 60
    assert [g.flags for g in graded] == [() if name == "fine" else ("timeout",) for name in names]
    assert [g.reward for g in graded] == [0.25 if name == "fine" else 0.0 for name in names]
    assert graded[1].rewards == {"act": 0.0} and graded[1].answer is None


def test_a_reward_that_ends_its_process_loses_its_own_item_only(user_file):
    names = ["fine", "exit", "kill", "fine", "close", "fine"]
    graded = acts(user_file, names, timeout_s=10.0)
    assert [g.flags for g in graded] == [() if name == "fine" else ("died",) for name in names]
    assert [g.reward for g in graded] == [0.25 if name == "fine" else 0.0 for name in names]


def test_what_a_reward_prints_or_leaves_behind_harms_nothing(user_file, capfd):
    graded = acts(user_file, ["print_a_lot", "leave_a_thread", "print_a_lot"], timeout_s=10.0)
    assert [g.reward for g in graded] == [1.0] * 3
    assert "spam" not in "".join(capfd.readouterr())


def test_a_process_that_is_killed_from_outside_is_replaced(user_file):
    with RewardPool({"act": 1.0}, 1, 10.0, {"act": f"{user_file}:act"}) as pool:
        pool.submit(0, "", "pid", {})
        (first,) = pool.drain()
        os.kill(int(first.reward), signal.SIGKILL)
        pool.submit(1, "", "fine", {})
        (second,) = pool.drain()
        assert second.reward == 0.25 and second.flags == ()


def test_no_process_outlives_the_pool(user_file):
    (graded,) = acts(user_file, ["pid"], timeout_s=10.0)
    with pytest.raises(ProcessLookupError):
        os.kill(int(graded.reward), 0)


@pytest.mark.parametrize("act", ["hang", "hang_without_alarm", "leave_a_thread"])
def test_a_process_does_not_outlive_a_killed_parent_for_long(user_file, act):
    # Nobody is left to watch the time but the kernel.
    parent = (
        "import os, signal; from r1jax.rewards.pool import RewardPool\n"
        f"pool = RewardPool({{'act': 1.0}}, 1, 0.4, {{'act': {user_file + ':act'!r}}})\n"
        "print(next(iter(pool._pool._children)).process.pid, flush=True)\n"
        f"pool.submit(0, '', {act!r}, {{}}); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run([sys.executable, "-c", parent], cwd=root, stdout=subprocess.PIPE, text=True)
    child = Path("/proc") / done.stdout.strip() / "cmdline"
    deadline_s = time.monotonic() + 300  # two seconds of processor time, if it gets them
    while child.exists() and child.read_bytes() and time.monotonic() < deadline_s:
        time.sleep(0.05)
    assert not (child.exists() and child.read_bytes())


def test_children_have_no_jax_and_no_accelerator(user_file):
    loaded, cpu = acts(user_file, ["jax", "platform"], timeout_s=10.0)
    assert loaded.reward == 0.0
    assert cpu.reward == 1.0


def test_an_unpicklable_example_is_reported_where_it_is_submitted():
    with RewardPool(WEIGHTS, 1, 5.0) as pool:
        with pytest.raises((TypeError, AttributeError, __import__("pickle").PicklingError)):
            pool.submit(0, "", GOOD, {"grader": lambda: None})
        assert pool.drain() == []


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("rewards", "says"),
    [
        ({}, "config.rewards is empty"),
        ({"acuracy": 1.0}, "did you mean 'accuracy'"),
        ({"accuracy": math.nan}, "weight of 'accuracy'"),
        ({"no_such_module:reward": 1.0}, "cannot import"),
    ],
)
def test_a_wrong_table_of_rewards_is_an_error_at_once(rewards, says, workers):
    with pytest.raises(ValueError, match=says):
        RewardPool(rewards, workers, 1.0)


def test_processes_that_cannot_start_are_an_error_and_not_a_loop(tmp_path, monkeypatch):
    (tmp_path / "only_here.py").write_text(
        f"import os\nif os.getpid() != {os.getpid()}: raise ImportError('not in a child')\ndef f(*a, **k): return 1.0\n"
    )
    with pytest.raises(RuntimeError, match="not in a child"):
        RewardPool({"mine": 1.0}, 2, 1.0, {"mine": f"{tmp_path / 'only_here.py'}:f"})
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="did not start"):
        KillablePool("r1jax.rewards.math:pair_grader", (), 1, 1.0)


def test_a_batch_ends_in_time_and_the_pool_goes_on(user_file):
    with RewardPool({"act": 1.0}, 2, 60.0, {"act": f"{user_file}:act"}, batch_timeout_s=3.0) as pool:
        for ticket, name in enumerate(["fine", "hang", "hang", "fine"]):
            pool.submit(ticket, "", name, {})
        start_s = time.monotonic()
        graded = pool.drain()
        assert time.monotonic() - start_s < 30.0
        assert [g.ticket for g in graded] == [0, 1, 2, 3]
        assert graded[1].flags == graded[2].flags == ("late",) and graded[1].reward == 0.0
        pool._batch_timeout_s = 120.0
        pool.submit(9, "", "boolean", {})
        assert [g.reward for g in pool.drain()] == [1.0]


def test_layers_that_may_be_missing_are_named_at_once():
    with pytest.raises(ValueError, match="config.grading.sandbox_accepts has 'selinux'"):
        RewardPool(WEIGHTS, 0, 1.0, sandbox_accepts=("selinux",))
