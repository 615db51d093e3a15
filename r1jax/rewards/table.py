"""The table of rewards and the table of graders.

A reward is `f(prompt, completion, example, **context) -> float`. The accuracy reward of R1 (DeepSeek-R1, arXiv
2501.12948, section 2.2) is one reward whatever the task: it asks the grader that the example names.
"""

import difflib
import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from r1jax.rewards import code, countdown, exact, instructions, math
from r1jax.rewards.form import format_reward, with_forced_thought
from r1jax.rewards.language import language_id_reward, language_reward, reflection_count
from r1jax.rewards.penalties import length_penalty, repetition_penalty
from r1jax.rewards.worth import worth

Example = Mapping[str, Any]
Reward = Callable[..., float]


class Grader(NamedTuple):
    """How the answers of one kind of task are judged."""

    grade: Callable[[str, Example], bool]  # of a completion
    answer: Callable[[str, Example], str | None]  # the same text for all completions that a vote should count together
    check_example: Callable[[Example], None]  # ValueError if `grade` could not use the gold


GRADERS: dict[str, Grader] = {
    "choice": Grader(exact.grade_choice, exact.answer_choice, exact.check_choice),
    "code": Grader(code.grade, code.answer, code.check_example),
    "countdown": Grader(countdown.grade, countdown.answer, countdown.check_example),
    "exact": Grader(exact.grade_exact, exact.answer_exact, exact.check_exact),
    "instructions": Grader(instructions.grade, instructions.answer, instructions.check_example),
    "math": Grader(math.grade, math.answer, math.check_example),
    # What no rule calls right: rewarded by models of preference.
    "judged": Grader(lambda completion, example: False, lambda completion, example: None, lambda example: None),
}


def _suggestion(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _grader(name: Any, example: Example) -> Grader:
    if name not in GRADERS:
        raise ValueError(
            f"example {example.get('id')!r}: field 'grader' is {name!r}, wanted one of {', '.join(GRADERS)}"
            + _suggestion(str(name), GRADERS)
        )
    return GRADERS[name]


def _graded(name: Any, prompt: str, completion: str, example: Example) -> float:
    return float(_grader(name, example).grade(with_forced_thought(prompt, completion), example))


def accuracy(prompt: str, completion: str, example: Example, **context: Any) -> float:
    """1.0 if the grader that the example names finds the final answer correct, else 0.0."""
    return _graded(example.get("grader"), prompt, completion, example)


def countdown_reward(prompt: str, completion: str, example: Example, **context: Any) -> float:
    """`accuracy` of the countdown grader, whatever grader the example names."""
    return _graded("countdown", prompt, completion, example)


def math_reward(prompt: str, completion: str, example: Example, **context: Any) -> float:
    """`accuracy` of the math grader, whatever grader the example names."""
    return _graded("math", prompt, completion, example)


REWARDS: dict[str, Reward] = {
    "accuracy": accuracy,
    "format": format_reward,
    "countdown": countdown_reward,
    "math": math_reward,
    "code_share": code.passed_share,
    "f1": exact.f1_reward,
    "instructions_share": instructions.followed_share,
    "language": language_reward,
    "language_id": language_id_reward,
    "length": length_penalty,
    "repetition": repetition_penalty,
    "reflection": reflection_count,
    "worth": worth,
}
# Which grader's golds a reward reads that is not named after it.
READS = {"code_share": "code", "f1": "exact", "instructions_share": "instructions"}


def canonical_answer(prompt: str, completion: str, example: Example) -> str | None:
    """The answer that a majority vote counts, None if there is none or the example's grader is not in the table."""
    grader = GRADERS.get(example.get("grader", ""))
    return grader.answer(with_forced_thought(prompt, completion), example) if grader else None


def check_examples(examples: Iterable[Example], rewards: Collection[str]) -> None:
    """Checks that every gold is what its grader reads, for use when data is loaded.

    An example may name a grader that is not in the table as long as `rewards` does not hold "accuracy".

    Raises:
      ValueError: naming the record and the field.
    """
    for example in examples:
        name = example.get("grader")
        if name in GRADERS or "accuracy" in rewards:
            _grader(name, example).check_example(example)
        for direct in GRADERS.keys() & {READS.get(reward, reward) for reward in rewards}:
            GRADERS[direct].check_example(example)


def resolve(name: str) -> Reward:
    """The reward that `name` means: a name of REWARDS, "package.module:function" or "path/to/file.py:function".

    Raises:
      ValueError: there is no such reward, or its module cannot be imported.
    """
    if name in REWARDS:
        return REWARDS[name]
    source, colon, function = name.rpartition(":")
    if not colon:
        raise ValueError(
            f"unknown reward {name!r} in config.rewards{_suggestion(name, REWARDS)} (wanted one of "
            f"{', '.join(REWARDS)}, or a name that config.reward_paths maps to path/to/file.py:function)"
        )
    try:
        module = _module_of_file(Path(source)) if source.endswith(".py") else importlib.import_module(source)
    except Exception as error:
        raise ValueError(f"reward {name!r} in config.rewards: cannot import {source!r}: {error!r}") from error
    reward = getattr(module, function, None)
    if not callable(reward):
        suggestion = _suggestion(function, (key for key, value in vars(module).items() if callable(value)))
        raise ValueError(f"reward {name!r} in config.rewards: {source!r} has no function {function!r}{suggestion}")
    return reward


def _module_of_file(path: Path) -> ModuleType:
    path = path.resolve(strict=True)
    # Two files of the same name are two modules; dataclasses and pickle look a module up by its name.
    name = f"{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec and spec.loader, path
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
