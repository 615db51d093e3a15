"""Step rewards and tree search: where values are read and learned, how a choice is made, how a tree grows."""

import dataclasses
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import QWEN, jit, one_device, random_params
from tiny_run import execute, make_config, make_policy, metrics

from configs import studies
from r1jax import hosts, run, updates
from r1jax.corpus import MIXTURES
from r1jax.model import transformer
from r1jax.rewards.pool import Graded
from r1jax.studies import mcts, prm, rerank, segments, tree, values
from r1jax.text import load_tokenizer
from r1jax.types import Completion

LAYOUT = one_device()["train"]
PROGRAM = updates.Program(config=QWEN, layout=LAYOUT)
READS = [([5, 6, 7], [8, 9, 10, 11]), ([12], [13, 14]), ([5, 6, 7], [20])]
TARGETS = [np.array([0.5, np.nan, 1.0, 0.25]), np.array([np.nan, 0.75]), np.array([0.0])]


@pytest.fixture(scope="module")
def weights() -> dict:
    head = jax.random.normal(jax.random.key(1), (QWEN.hidden_size,))
    return {"trunk": jax.tree.map(jnp.asarray, random_params(QWEN)), "score": head}


@pytest.fixture(scope="module")
def by_hand(weights) -> list[np.ndarray]:
    """The head's value after each token, each text read alone."""
    hidden = jit(lambda tokens: transformer.hidden(weights["trunk"], QWEN, tokens).x @ weights["score"])
    out = []
    for prompt, ids in READS:
        text = np.zeros((1, 8), np.int32)
        text[0, : len(prompt) + len(ids)] = [*prompt, *ids]
        out.append(np.asarray(hidden(text))[0, len(prompt) : len(prompt) + len(ids)])
    return out


def test_a_value_is_read_after_its_token_wherever_the_text_lies(weights, by_hand):
    valuer = values.make_valuer(jit(updates.make_values(PROGRAM)), weights, 1, 10, LAYOUT)
    for found, wanted in zip(valuer(READS), by_hand, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)


def test_a_value_model_learns_what_is_marked_and_parts_add_up(weights, by_hand):
    logits, targets = np.concatenate(by_hand), np.concatenate(TARGETS)
    is_valued = ~np.isnan(targets)
    logits, targets = logits[is_valued], targets[is_valued]
    wanted = (np.log1p(np.exp(logits)) - targets * logits).mean()
    rows = values.rows_of(READS, TARGETS, 10)
    assert len(rows["tokens"]) == 2 and rows["is_valued"].sum() == len(targets)
    del rows["completion_index"], rows["offset"]
    descent = optax.sgd(1.0)
    update = jit(updates.make_value_update(PROGRAM, descent, values.cross_entropy))
    ends = []
    for shape in ((1, 2), (2, 1)):
        batch = {name: a.reshape(*shape, -1) for name, a in rows.items()}
        state, sums = update(updates.init_state(jax.tree.map(jnp.copy, weights), descent), batch, shape[0])
        assert sums["loss"] == pytest.approx(wanted, rel=1e-4) and sums["tokens"] == len(targets)
        share = 1 - ((logits - targets) ** 2).mean() / targets.var()
        assert values.explained(sums) == pytest.approx(share, rel=1e-3)
        ends.append(state["policy"])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), *ends)
    assert np.abs(ends[0]["score"] - weights["score"]).max() > 1e-3


# --- steps ---------------------------------------------------------------------------------------------------------


def test_a_step_ends_with_its_sentence_and_the_last_one_with_the_completion():
    tokenizer = load_tokenizer(MIXTURES["english"].base)
    tokens = tokenizer.encode(
        " <think> 15-6=9, 9+3=12 of 27, off by 15, no. 6+3=9, 9+15=24 of 27, off by 3. wait, 3*15"
    )
    ends = segments.step_ends(tokens, segments.step_marks(tokenizer))
    starts = [0, *(i + 1 for i in ends[:-1])]
    steps = [tokenizer.decode(tokens[a : b + 1]).strip() for a, b in zip(starts, ends, strict=True)]
    assert steps == ["<think> 15-6=9, 9+3=12 of 27, off by 15, no.", "6+3=9, 9+15=24 of 27, off by 3. wait,", "3*15"]


class Digits:
    """A policy over the tokens 0 to 9 that draws the digits of a list in turn; 9 ends a completion."""

    limit = 3
    tokenizer = types.SimpleNamespace(decode=lambda ids: "".join(f"{i}. " for i in ids))

    def __init__(self, digits: list[int]) -> None:
        self.digits, self.asked = iter(digits), []

    def go_on(self, starts, samples, key, cut=None, most=0) -> list[list[Completion]]:
        self.asked += [s.tokens for s in starts]
        whole = cut is None

        def one() -> Completion:
            ids = [next(self.digits) for _ in range(2 if whole else 1)]
            return Completion(0, 0, np.array(ids), np.zeros(len(ids)), "stop")

        return [[one() for _ in range(samples)] for _ in starts]

    def is_whole(self, tokens) -> bool:
        return len(tokens) >= self.limit or (len(tokens) > 0 and tokens[-1] == 9)

    def text(self, tokens) -> str:
        return "".join(map(str, tokens))


class Pool:
    """Right is what ends with 79; the answer is the whole text."""

    def __init__(self) -> None:
        self.held: list[Graded] = []

    def submit(self, ticket, prompt, text, example) -> None:
        self.held.insert(0, Graded(ticket, {"accuracy": float(text.endswith("79"))}, 0.0, text, (), 0.0))

    def drain(self) -> list[Graded]:
        out, self.held = self.held, []
        return out


def start(*tokens: int) -> segments.Start:
    return segments.Start({"id": "a"}, "prompt", (1,), tokens)


def test_the_chance_of_a_prefix_is_the_share_of_its_continuations_that_end_right():
    writer = Digits([7, 9, 5, 9, 6, 9, 7, 9])
    starts = [start(3), start(7, 9), start(4), start(5, 9)]
    found = segments.success_after(writer, Pool(), starts, 2, jax.random.key(0), "accuracy")
    assert writer.asked == [(3,), (4,)], "what is whole is not gone on from"
    np.testing.assert_array_equal(found, [0.5, 1.0, 0.5, 0.0])


# --- choosing ------------------------------------------------------------------------------------------------------


def made(answer: str | None, is_right: bool, *scores: float, tokens: int = 1, logp: float = 0.0) -> rerank.Candidate:
    return rerank.Candidate(answer, is_right, tokens, logp, np.array(scores))


def test_each_way_to_choose_picks_what_its_name_says():
    four = [
        made("a", False, 0.9, 0.1, tokens=3, logp=-0.1),
        made("a", False, 0.5, 0.5, tokens=2, logp=-0.4),
        made("b", True, 0.1, 0.9, tokens=9, logp=-0.9),
        made(None, False, 0.6, 0.2, tokens=1, logp=-0.2),
    ]
    found = {name: method(four) for name, method in rerank.methods().items()}
    # Means 0.5, 0.5, 0.5, 0.4: the first of equals; least 0.1, 0.5, 0.1, 0.2; last 0.1, 0.5, 0.9, 0.2.
    right = {"best by last score", "vote by last score", "any of them"}
    assert found == {name: 0.25 if name == "one at random" else float(name in right) for name in rerank.methods()}
    nobody = made(None, False, 0.1)
    assert [rerank.methods()["majority"](found) for found in ([nobody], [nobody, nobody, four[2]])] == [0.0, 1.0]


def test_the_table_is_a_mean_over_draws_that_share_nothing():
    problems = [[made("a", True, 0.1), made("b", False, 0.2), made("b", False, 0.3), made("a", True, 0.9)]]
    found = rerank.table(problems, (1, 2, 4))
    assert found["one at random"] == [0.5, 0.5, 0.5] and found["any of them"] == [0.5, 1.0, 1.0]
    assert found["best by last score"] == [0.5, 0.5, 1.0] and found["majority"] == [0.5, 0.5, 1.0]


def test_the_reward_is_the_models_score_alone_and_accuracy_is_kept_to_be_seen(monkeypatch):
    scores = [np.array([0.9, 0.2]), np.array([0.4])]
    monkeypatch.setattr(prm, "step_scores", lambda valuer, policy, samples: scores)
    one = types.SimpleNamespace
    sample = dataclasses.make_dataclass("S", ["graded"])
    group = [
        sample(Graded(0, {"accuracy": 1.0}, 1.0, "a", (), 0.0)),
        sample(Graded(1, {"accuracy": 0.0}, 0.0, "b", (), 0.0)),
    ]
    found = prm.as_reward(None, one(), "least", [group])[0]
    assert [s.graded.reward for s in found] == [0.2, 0.4]
    assert [s.graded.rewards for s in found] == [{"accuracy": 1.0, "process": 0.2}, {"accuracy": 0.0, "process": 0.4}]


# --- trees ---------------------------------------------------------------------------------------------------------


def test_puct_weighs_worth_against_prior_and_visits():
    root = tree.Node((), 1.0, 0.0, False)
    a, b = tree.expand(root, [(1,), (2,), (2,), (2,)])
    assert (a.tokens, a.prior, b.tokens, b.prior) == ((1,), 0.25, (2,), 0.75)
    a.value, b.value = 0.6, 0.3
    assert tree.average(root) == pytest.approx(0.25 * 0.6 + 0.75 * 0.3)
    assert tree.puct(root, 0.0) is a and tree.puct(root, 1.0) is b  # 0.6 + 0.25 against 0.3 + 0.75
    for _ in range(3):
        tree.back_up(b, 0.3)
    assert (root.visits, b.visits, b.worth, a.worth) == (3, 3, pytest.approx(0.3), 0.6)
    # 0.6 + 0.25 * sqrt(3) = 1.03 against 0.3 + 0.75 * sqrt(3) / 4 = 0.62
    assert tree.puct(root, 1.0) is a


def test_a_search_goes_where_the_model_points_and_counts_every_token():
    # Two branches a turn: 3 or 4, below 4 (which the model likes) 7 or 5, below 7 the end.
    writer = Digits([3, 4, 7, 5, 9, 9])
    liked = {(4,): 0.8, (4, 7): 0.9, (4, 7, 9): 0.95}

    def valuer(reads) -> list[np.ndarray]:
        chances = np.array([liked.get(tuple(tokens), 0.1) for _, tokens in reads])
        return [np.array([logit]) for logit in np.log(chances / (1 - chances))]

    search = mcts.Search(start(), tree.Node((), 1.0, 0.0, False))
    settings = mcts.MctsConfig(branches=2, segment_tokens=4, exploration=0.1, budgets=(2, 6))
    mcts.grow([search], writer, valuer, settings, jax.random.key(0))
    assert writer.asked == [(), (4,), (4, 7)] and search.drawn == 6
    assert [(drawn, len(found)) for drawn, found in search.found] == [(2, 0), (6, 1)]
    ((none, (whole,)),) = mcts.tree_candidates([search], writer, Pool())
    assert none == [] and whole.is_right and whole.answer == "479"
    np.testing.assert_allclose(whole.scores, [0.8, 0.9, 0.95])


def test_search_and_sampling_are_held_against_each_other_at_equal_tokens():
    sampled = [[made("a", False, 0.1, tokens=4), made("b", True, 0.2, tokens=4), made("b", True, 0.3, tokens=4)]]
    assert [len(mcts.within(sampled[0], n)) for n in (1, 7, 8, 11, 99)] == [1, 1, 2, 2, 3]
    searched = [[[], [made("c", True, 0.5), made("c", False, 0.1)]]]
    found = mcts.compare(sampled, searched, [[7, 12]])
    assert found["sampling, majority"] == [0.0, 1.0] and found["search, best by last score"] == [0.0, 1.0]
    assert found["sampling, whole completions"] == [1, 3] and found["search, whole completions"] == [0, 2]
    assert found["tokens drawn"] == [7, 12]


# --- whole studies -------------------------------------------------------------------------------------------------


def test_configs_are_found_by_name_and_misspelt_ones_told():
    for name in studies.STUDIES:
        config = studies.get_config(name)
        assert config.stages[-1] in ("reasoning_rl", name.split("_")[0])
    with pytest.raises(ValueError, match="there is no study 'pmr'; did you mean 'prm'"):
        studies.get_config("pmr")


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("prm__together", "sum", r"config\.prm\.together is 'sum', wanted one of mean, least, last"),
        ("prm__continuations", 0, r"config\.prm\.continuations is 0"),
        ("rewards", {"format": 1.0}, 'config.rewards has no "accuracy"'),
    ],
)
def test_settings_that_cannot_work_are_refused(key, value, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        prm.check(make_config(tmp_path, **{key: value}), tmp_path)
    with pytest.raises(ValueError, match=r"config\.mcts\.budgets is \(3, 2\)"):
        mcts.MctsConfig(branches=1, segment_tokens=1, exploration=1.0, budgets=(3, 2))


def small(stage, policy, **changes):
    few = {"curate__prompts": 4, "curate__samples": 2, "prm__continuations": 2, "mcts__budgets": (20, 40)}
    few |= {"value_model__rows": 4, "value_model__epochs": 1.0, "mcts__segment_tokens": 6, "eval__every": -1}
    return make_config(policy, **{"stages": (stage,), "rl__updates": 2, "grpo__kl_coef": 0.0, **few, **changes})


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["prm", "mcts"])
def test_a_study_stopped_amid_samples_value_model_or_grpo_ends_with_the_same_table(stage, tmp_path, monkeypatch):
    make_policy(tmp_path / "policy")
    config = small(stage, tmp_path / "policy", curate__prompts_per_part=2, value_model__epochs=4.0)
    execute(config, tmp_path / "whole")
    write_file, write = hosts.atomic_write, run.metrics.Log.write
    for name in ("part-00000.json", f"{stage}_model", *(["prm"] if stage == "prm" else [])):
        stop = hosts.Stop()

        def file(path, content, stop=stop, name=name):
            write_file(path, content)
            stop.requested = stop.requested or str(path).endswith(name)

        def log(self, step, scalars, stop=stop, name=name):
            write(self, step, scalars)
            stop.requested = stop.requested or self.stage == name

        monkeypatch.setattr(hosts, "atomic_write", file)
        monkeypatch.setattr(run.metrics.Log, "write", log)
        with pytest.raises(run.Stopped):
            execute(config, tmp_path / "stopped", stop)
        monkeypatch.undo()
    execute(config, tmp_path / "stopped")
    one, other = (tmp_path / folder for folder in ("whole", "stopped"))
    assert metrics(one) == metrics(other)
    for path in (one / f"{stage}.json", one / f"{stage}.txt", *one.glob("models/*/*.safetensors")):
        assert path.read_bytes() == (other / path.relative_to(one)).read_bytes(), path


@pytest.mark.parametrize("stage", ["prm", pytest.param("mcts", marks=pytest.mark.slow)])
def test_a_study_runs_and_leaves_a_table(stage, tmp_path):
    make_policy(tmp_path / "policy")
    execute(small(stage, tmp_path / "policy"), tmp_path / "run")
    found, text = ((tmp_path / "run" / f"{stage}.{kind}").read_text() for kind in ("json", "txt"))
    found = json.loads(found)
    if stage == "prm":
        assert found["sizes"] == [1, 2, 4] and set(found["chosen"]) == set(rerank.methods())
        (rollout,) = found["optimised"]
        assert 0 < rollout["score"] < 1 and rollout["step"] == 0 and "GRPO with the least score" in text
        assert (tmp_path / "run" / "models" / "prm").exists()
    else:
        assert found["found"]["tokens drawn"][0] >= 20 and found["found"]["tokens drawn"][1] >= 40
        assert "search, any of them" in text
