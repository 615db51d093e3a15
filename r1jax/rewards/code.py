"""Grades programs by their tests, in the sandbox: R1's accuracy reward for code (arXiv 2501.12948, section 2.2).

Three kinds of test: standard input and output (Codeforces, LiveCodeBench), the call of a function with its expected
value (LiveCodeBench, LeetCode) and code that asserts (HumanEval, MBPP). Of the first two the program never sees what is
expected. Code that asserts runs in the program's own process: that it ran to its end is proved by a number that the
program is not told, but a program written against this very file could find it; prefer the other kinds for training.
"""

import ast
import dataclasses
import json
import math
import re
from collections.abc import Collection, Mapping, Sequence
from decimal import Decimal, InvalidOperation
from typing import Any

from r1jax.rewards.form import after_thinking, answer_span
from r1jax.rewards.layers import ALL
from r1jax.rewards.sandbox import Finished, Sandbox

COMPILE_TIMEOUT_S = 30.0
LANGUAGES = ("python", "cpp")
# A longer program is none that a task asks for.
MAX_CHARACTERS = 100_000
# What a test may have: standard input and output, a call and its value, or code (also as a bare string).
KINDS = ({"input", "output"}, {"call", "args", "expected"}, {"code"})

_FENCE = re.compile(r"```[ \t]*([A-Za-z+#0-9]*)[^\n]*\n(.*?)(?:```|\Z)", re.DOTALL)
_OF_LANGUAGE = {"python": ("python", "py", "python3", ""), "cpp": ("cpp", "c++", "cc", "")}


@dataclasses.dataclass(frozen=True)
class TestReport:
    """The verdict of each test, in order: "passed", "wrong", "error", "timeout", "output", "disk", "died", "compile".

    "wrong" is another output or value, or an assertion that failed; "error" any other exception, signal or exit.
    messages: the last words of the program on standard error, by test.
    """

    __test__ = False  # of pytest

    verdicts: tuple[str, ...]
    messages: tuple[str, ...]

    @property
    def passed_share(self) -> float:
        """The share of tests that passed."""
        return sum(verdict == "passed" for verdict in self.verdicts) / len(self.verdicts)

    @property
    def all_passed(self) -> bool:
        """True if every test passed."""
        return all(verdict == "passed" for verdict in self.verdicts)


_accepts: tuple[str, ...] = ()
_sandbox: Sandbox | None = None


def accept_missing(layers: Collection[str]) -> None:
    """Says which layers of the sandbox may be missing for this process (config.grading.sandbox_accepts).

    Raises:
      ValueError: something that is no layer.
    """
    global _accepts
    if unknown := set(layers) - set(ALL):
        raise ValueError(f"config.grading.sandbox_accepts has {min(unknown)!r}, wanted of {', '.join(ALL)}")
    _accepts = tuple(layers)


def sandbox() -> Sandbox:
    """The sandbox of this process, started when first asked for.

    Raises:
      SandboxError: a layer is missing that is not accepted.
    """
    global _sandbox
    if _sandbox is None:
        _sandbox = Sandbox(_accepts)
    return _sandbox


def _same_number(one: str, other: str) -> bool:
    try:
        return Decimal(one) == Decimal(other)
    except InvalidOperation:
        return False


def same_output(expected: str, found: str) -> bool:
    """True if the outputs have the same lines, apart from space at their ends and how a number is written."""
    wanted, got = (text.strip().splitlines() for text in (expected, found))
    if len(wanted) != len(got):
        return False
    for line, other in zip(wanted, got, strict=True):
        if line.rstrip() == other.rstrip():
            continue
        tokens, others = line.split(), other.split()
        if len(tokens) != len(others):
            return False
        if not all(a == b or _same_number(a, b) for a, b in zip(tokens, others, strict=True)):
            return False
    return True


def same_value(expected: Any, found: Any) -> bool:
    """Equality of values as JSON has them: tuples are lists, floats may differ in the last digits, True is not 1."""
    if isinstance(expected, list | tuple) and isinstance(found, list | tuple):
        return len(expected) == len(found) and all(map(same_value, expected, found))
    if isinstance(expected, dict) and isinstance(found, dict):
        pairs = {str(key): value for key, value in expected.items()}
        return pairs.keys() == found.keys() and all(same_value(value, found[key]) for key, value in pairs.items())
    if isinstance(expected, bool) or isinstance(found, bool):
        return expected is found
    if isinstance(expected, float) or isinstance(found, float):
        numbers = isinstance(expected, int | float) and isinstance(found, int | float)
        return numbers and math.isclose(expected, found, rel_tol=1e-9, abs_tol=1e-12)
    return expected == found


def _verdict(done: Finished, is_right: bool) -> str:
    if done.reason:
        return done.reason
    if is_right:
        return "passed"
    if done.status == 0 and done.completed:
        return "wrong"
    return "wrong" if "\nAssertionError" in done.stderr else "error"


def _run_python(program: str, test: str | Mapping[str, Any], timeout_s: float, memory_mb: int) -> tuple[str, str]:
    if isinstance(test, str) or "code" in test:
        done = sandbox().run(program, timeout_s, memory_mb, tests=test if isinstance(test, str) else test["code"])
        return _verdict(done, done.completed), done.stderr
    if "call" in test:
        done = sandbox().run(program, timeout_s, memory_mb, call=(test["call"], list(test["args"])))
        return _verdict(done, done.completed and same_value(test["expected"], done.value)), done.stderr
    done = sandbox().run(program, timeout_s, memory_mb, stdin=test["input"])
    # A program may well leave by sys.exit(0).
    return _output_verdict(done, test["output"]), done.stderr


def _output_verdict(done: Finished, expected: str) -> str:
    if done.reason or done.status:
        return done.reason or "error"
    return "passed" if same_output(expected, done.stdout) else "wrong"


def _run_cpp(program: str, tests: Sequence, timeout_s: float, memory_mb: int) -> TestReport:
    compiled = sandbox().compile_cpp(program, COMPILE_TIMEOUT_S)
    if compiled.status or compiled.reason:
        return TestReport(("compile",) * len(tests), (compiled.stderr[-500:],) * len(tests))
    results = []
    for i, test in enumerate(tests):
        done = sandbox().run_binary(timeout_s, memory_mb, test["input"], last=i == len(tests) - 1)
        results.append((_output_verdict(done, test["output"]), done.stderr[-500:]))
    return TestReport(*map(tuple, zip(*results, strict=True)))


def check_tests(tests: Any, language: str = "python") -> None:
    """Raises ValueError that says which test is none that `run_tests` knows."""
    if not isinstance(tests, list | tuple) or not tests:
        raise ValueError(f"the tests must be a list that is not empty, got {tests!r:.80}")
    if language not in LANGUAGES:
        raise ValueError(f"the language is {language!r}, wanted one of {', '.join(LANGUAGES)}")
    for i, test in enumerate(tests):
        if isinstance(test, str) and test.strip() and language == "python":
            continue
        if not isinstance(test, Mapping) or not any(kind <= test.keys() for kind in KINDS):
            raise ValueError(
                f"test {i} is {test!r:.80}, wanted code or an object with input and output or with call, args, expected"
            )
        if language == "cpp" and "input" not in test:
            raise ValueError(f"test {i} is no input and output, and a C++ program has only these")
        texts = [name for name in ("input", "output", "call", "code") if name in test]
        if wrong := [name for name in texts if not isinstance(test[name], str)]:
            raise ValueError(f"test {i}: {wrong[0]} is {test[wrong[0]]!r:.80}, wanted a text")
        if "call" in test and not isinstance(test["args"], list | tuple):
            raise ValueError(f"test {i}: args is {test['args']!r:.80}, wanted a list")


def run_tests(
    program: str,
    tests: list,
    timeout_s: float = 6.0,
    memory_mb: int = 512,
    language: str = "python",
    all_tests: bool = True,
) -> TestReport:
    """Runs each test on a fresh start of the program.

    Args:
      tests: code that asserts (text, or {"code": ...}), {"input": ..., "output": ...} for standard input and output,
        or {"call": name, "args": [...], "expected": ...}; see `check_tests`.
      timeout_s: wall time for each test.
      all_tests: if False, the tests behind the first that fails are not run and count as failed.

    Raises:
      ValueError: tests of another form.
      SandboxError: this machine cannot confine programs as `accept_missing` wants.
    """
    check_tests(tests, language)
    if len(program) > MAX_CHARACTERS:
        return TestReport(("error",) * len(tests), ("the program is too long",) * len(tests))
    if language == "cpp":
        return _run_cpp(program, tests, timeout_s, memory_mb)
    results: list[tuple[str, str]] = []
    for test in tests:
        if results and not all_tests and results[-1][0] != "passed":
            results.append((results[-1][0], "not run"))
            continue
        verdict, stderr = _run_python(program, test, timeout_s, memory_mb)
        results.append((verdict, stderr[-500:]))
    return TestReport(*map(tuple, zip(*results, strict=True)))


def extract_program(completion: str, language: str = "python") -> str | None:
    """The last fenced block of the language behind the thinking; without any, the answer block if it is a program."""
    text = after_thinking(completion)
    blocks = [match[2] for match in _FENCE.finditer(text) if match[1].lower() in _OF_LANGUAGE[language]]
    if blocks:
        return blocks[-1]
    span = answer_span(text)
    block = text[slice(*span)].strip() if span else None
    if block and language == "python":
        try:
            ast.parse(block)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return None
    return block


def _limits(example: Mapping[str, Any]) -> dict[str, Any]:
    return {name: example[name] for name in ("timeout_s", "memory_mb", "language") if name in example}


def _report(completion: str, example: Mapping[str, Any], all_tests: bool) -> TestReport | None:
    program = extract_program(completion, example.get("language", "python"))
    if program is None:
        return None
    program = example.get("setup", "") + "\n" + program
    return run_tests(program, _tests(example), **_limits(example), all_tests=all_tests)


def _tests(example: Mapping[str, Any]) -> list:
    tests = example["answer"]
    return json.loads(tests) if isinstance(tests, str) else tests


def grade(completion: str, example: Mapping[str, Any]) -> bool:
    """True if the program of the completion passes every test of the example (its field "answer")."""
    report = _report(completion, example, all_tests=False)
    return report is not None and report.all_passed


def passed_share(prompt: str, completion: str, example: Mapping[str, Any], **context: Any) -> float:
    """The share of the example's tests that the program of the completion passes: a partial reward."""
    report = _report(completion, example, all_tests=True)
    return 0.0 if report is None else report.passed_share


def answer(completion: str, example: Mapping[str, Any]) -> str | None:
    """The program itself; programs are not voted on."""
    return extract_program(completion, example.get("language", "python"))


def check_example(example: Mapping[str, Any]) -> None:
    """Raises ValueError that names the record and the field if its tests or limits are none."""
    try:
        check_tests(_tests(example), example.get("language", "python"))
        for name in ("timeout_s", "memory_mb"):
            value = example.get(name, 1)
            if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
                raise ValueError(f"{name} is {value!r}, wanted a number above 0")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"example {example.get('id')!r}: field 'answer': {error}") from None
