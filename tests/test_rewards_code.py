"""Laws of the code grader: verdicts, the shapes of tests, cheap tricks, references of HumanEval and MBPP."""

import json
import pathlib

import pytest

from r1jax.rewards import code, layers
from r1jax.rewards.code import extract_program, run_tests, same_output, same_value
from tests.bench.programs import DATA, grade, problems

pytestmark = pytest.mark.skipif(bool(layers.missing()), reason=f"this kernel lacks {layers.missing()}")
ADD = "def add(a, b):\n    return a + b\n"
ECHO = "print(int(input()) * 2)"
LIMITS = {"timeout_s": 10.0, "memory_mb": 256}


def verdicts(program, tests, **limits):
    return run_tests(program, tests, **{**LIMITS, **limits}).verdicts


def test_the_three_shapes_of_a_test():
    assert verdicts(ADD, ["assert add(1, 2) == 3", "assert add(1, 2) == 4"]) == ("passed", "wrong")
    calls = [{"call": "add", "args": [1, 2], "expected": 3}, {"call": "add", "args": [[1], [2]], "expected": [1]}]
    assert verdicts(ADD, calls) == ("passed", "wrong")
    streams = [{"input": text, "output": "42"} for text in ("21\n", "1\n", "", "\ud800")]
    assert verdicts(ECHO, streams) == ("passed", "wrong", "error", "error")
    method = "class Solution:\n    def add(self, a, b): return (a, b)"
    assert verdicts(method, [{"call": "add", "args": [1, 2], "expected": [1, 2]}]) == ("passed",)


def test_partial_and_all_or_nothing():
    report = run_tests(ADD, ["assert add(1, 2) == 3", "assert add(1, 2) == 4", "assert add(0, 0) == 0"], **LIMITS)
    assert report.verdicts == ("passed", "wrong", "passed")
    assert report.passed_share == pytest.approx(2 / 3) and not report.all_passed
    short = run_tests(ADD, ["assert add(1, 2) == 4", "assert add(0, 0) == 0"], **LIMITS, all_tests=False)
    assert short.messages[1] == "not run" and not short.all_passed


@pytest.mark.parametrize(
    ("program", "verdict"),
    [
        ("1 / 0", "error"),
        ("def add(a, b) return", "error"),
        ("import no_such_module", "error"),
        ("x = bytearray(1 << 30)", "error"),
        ("def add(a, b): return add(a, b)", "error"),
        ("print('x' * (3 << 20))", "output"),
        ("null\0byte", "error"),
        ("\ud800", "error"),
    ],
)
def test_what_may_go_wrong(program, verdict):
    assert verdicts(program, ["assert add(1, 2) == 3"]) == (verdict,)


def test_a_program_that_does_not_end():
    assert verdicts("while True: pass", ["pass"], timeout_s=0.5) == ("timeout",)


@pytest.mark.parametrize(
    "program",
    [
        "import sys; sys.exit(0)",
        "import os; os._exit(0)",
        "raise SystemExit",
        "import os\ndef add(a, b): os._exit(0)",
        "def check(f): pass",
        "import os\nfor fd in range(3, 64):\n"
        '  try: os.write(fd, b\'{"nonce": "", "value": 3}\')\n  except OSError: pass\n'
        "os._exit(0)",
    ],
)
def test_leaving_early_is_not_passing(program):
    tests = ["def check(f):\n    assert f(1, 2) == 3\ncheck(add)", {"call": "add", "args": [1, 2], "expected": 3}]
    assert "passed" not in verdicts(program, tests)


def test_an_object_that_equals_everything_does_not_pass_a_call():
    program = "class All:\n    def __eq__(self, other): return True\ndef add(a, b): return All()"
    assert verdicts(program, [{"call": "add", "args": [1, 2], "expected": 3}]) != ("passed",)


def test_a_program_sees_nothing_of_the_one_before_or_of_what_is_expected():
    assert verdicts("import builtins; builtins.mine = 1", ["pass"]) == ("passed",)
    assert verdicts("import builtins", ["assert not hasattr(builtins, 'mine')"]) == ("passed",)
    search = "import gc, sys\nprint(any('TOP' + 'SECRET' in repr(o) for o in gc.get_objects() if isinstance(o, dict)))"
    assert verdicts(search, [{"input": "", "output": "TOPSECRET"}]) == ("wrong",)
    assert verdicts(search, [{"input": "", "output": "False"}]) == ("passed",)


def test_the_same_program_prints_the_same_twice():
    program = "print({str(i) for i in range(20)}, hash('a'))"
    first = code.sandbox().run(program, 10.0, 256).stdout
    with code.Sandbox() as other:
        assert other.run(program, 10.0, 256).stdout == first != ""


def test_cpp():
    if not pathlib.Path("/usr/bin/g++").exists():
        pytest.skip("there is no /usr/bin/g++")
    double = "#include <iostream>\nint main(){long long a;std::cin>>a;std::cout<<2*a<<std::endl;}"
    streams = [{"input": "21", "output": "42"}, {"input": "1", "output": "3"}]
    assert verdicts(double, streams, language="cpp") == ("passed", "wrong")
    report = run_tests("int main( {", streams, **LIMITS, language="cpp")
    assert report.verdicts == ("compile", "compile") and "error" in report.messages[0]
    assert verdicts("int main(){for(;;);}", streams[:1], timeout_s=0.5, language="cpp") == ("timeout",)
    spy = '#include "/etc/passwd"\nint main(){}'
    assert "root" not in run_tests(spy, streams, **LIMITS, language="cpp").messages[0]


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("1 2\n3", "1 2 \n3\n\n", True),
        ("1.0", "1", True),
        ("0.50 a", "0.5  a", True),
        ("1 2", "2 1", False),
        ("1\n2", "1 2", False),
        ("YES", "yes", False),
        ("0.3333", "0.3334", False),
        ("", "1", False),
    ],
)
def test_outputs(one, other, same):
    assert same_output(one, other) == same_output(other, one) == same


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ((1, 2), [1, 2], True),
        (0.1 + 0.2, 0.3, True),
        (1, 1.0, True),
        (True, 1, False),
        (None, 0, False),
        ("1", 1, False),
        ({1: [2]}, {"1": [2]}, True),
        ([1, 2], [2, 1], False),
    ],
)
def test_values(one, other, same):
    assert same_value(one, other) == same


def test_the_last_block_of_the_language_is_the_program():
    text = "<think>```python\na\n```</think> First:\n```python\nb = 1\n```\nthen\n```py\nc = 2\n```\n```text\nd\n```"
    assert extract_program(text) == "c = 2\n"
    assert extract_program("<answer>print(1)</answer>") == "print(1)"
    assert extract_program("<answer>It is easy.</answer>") is None
    assert extract_program("no program") is None
    assert extract_program("```cpp\nint main(){}\n```", "cpp") == "int main(){}\n"
    assert extract_program("<think>```python\na\n```") is None


def test_a_completion_is_graded_by_its_program():
    example = {"id": "c1", "grader": "code", "answer": ["assert add(1, 2) == 3", "assert add(1, 1) == 3"], **LIMITS}
    text = f"<think>hm</think>\n```python\n{ADD}```"
    assert not code.grade(text, example)
    assert code.passed_share("", text, example) == 0.5
    assert code.grade(text, {**example, "answer": json.dumps(example["answer"][:1])})
    assert code.passed_share("", "I do not know.", example) == 0.0


@pytest.mark.parametrize(
    "wrong",
    [
        {"answer": None},
        {"answer": []},
        {"answer": "[1]"},
        {"answer": "not json"},
        {"answer": [5]},
        {"answer": [{"input": "1"}]},
        {"answer": [{"input": 1, "output": "2"}]},
        {"answer": [{"call": "f", "args": 1, "expected": 2}]},
        {"answer": ["pass"], "language": "cpp"},
        {"answer": ["pass"], "language": "cobol"},
        {"answer": ["pass"], "timeout_s": "5"},
        {"answer": ["pass"], "memory_mb": 0},
    ],
)
def test_wrong_tests_are_named(wrong):
    with pytest.raises(ValueError, match="'c9'"):
        code.check_example({"id": "c9", **wrong})
    code.check_example({"id": "c9", "answer": ["pass"]})


@pytest.mark.parametrize("name", ["humaneval", "mbpp"])
def test_references_pass_inside(name):
    if not (DATA / f"{name}.jsonl").exists():
        pytest.skip(f"{DATA} is not here")
    assert not [done for done in map(grade, problems(name)[::40]) if set(done[1]) != {"passed"}]
