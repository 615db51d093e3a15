r"""Hostile texts for the math verifier, for as long as you like: python -m tests.bench.fuzz --minutes=10

Texts are made by a grammar of everything the reader knows, by splicing of real references and by lists of known
poison. Each has to be graded without an exception within a second of processor time, be equal to itself, and be judged
alike in both directions. Ends with a failure at the first one that is not; prints how many there were, the slowest, and
how the memory of this process grew. With --pool the same texts go through two grading processes instead; with --atheris
the texts are those that Google's fuzzer of that name (`pip install atheris`, libFuzzer) finds by which branches of
r1jax/rewards they reach, from the poison and the references on.
"""

import argparse
import json
import pathlib
import random
import resource
import sys
import tempfile
import time
from collections.abc import Iterator

from r1jax.rewards import math
from r1jax.rewards.pool import RewardPool

DATA = pathlib.Path(__file__).resolve().parents[3] / "shared" / "data"
LIMIT_S = 1.0
INSTRUMENTED_LIMIT_S = 3.0  # counting branches takes time
PIECES = [
    *(
        r"\frac \sqrt \sqrt[3] \sin \cos \tan \log \log_2 \ln \max \min \gcd \lcm \binom \lfloor \rfloor \lceil \left"
        r" \right \begin{pmatrix} \end{pmatrix} \begin{array}{cc} \end{array} & \\ \text{ \mathrm{ \boxed{ \pm \mp"
        r" \infty \cup \in \le \ge \ne \cdot \times \div \pi \alpha \circ \overline{ \% \$ \{ \} \, \! \; { } ( ) [ ]"
        r" | ^ _ ! ' + - * / = < > , . ; : % $ # ~ 0 1 2 3 7 10 99 1e3 1,000 0.5 x y z n i e and or cm 万 个 是 π √ ²"
        r" ½ ∞ ≤ ° − ×"
    ).split(),
    *(
        " ",
        "\n",
        "\0",
        "\u200b",
        "\u3000",
        "\ud800",
        "\U0001d7d9",
        "import os",
        "eval(",
        "__import__('os')",
        "lambda:0",
    ),
]
POISON = [
    r"\log_2.{3}",
    "9^" * 60 + "9",
    "2^{2^{2^{2^{2^{2}}}}}",
    "9!" + "!" * 200,
    "(((9!)!)!)!",
    "9" * 100_000,
    r"\boxed{" * 10_000,
    "(" * 10_000 + ")" * 10_000,
    "{" * 10_000 + "}" * 10_000,
    r"\frac{" * 200 + "1",
    r"\begin{vmatrix}" + r"\\".join("&".join("9" * 40 for _ in range(40)) for _ in range(40)) + r"\end{vmatrix}",
    r"\sum_{k=1}^{\infty} k^k",
    r"\int_{-\infty}^{\infty} e^{x^x} dx",
    r"\prod_{p} \frac{1}{1-p^{-s}}",
    r"\lim_{x\to0} x^{x^x}",
    "1/" * 300 + "0",
    r"\binom{10^{9}}{10^{8}}",
    r"\gcd(10^{400}, x)",
    "x" * 700,
    "x=" * 300,
    "1," * 390,
    r"\{" * 100 + "1" + r"\}" * 100,
    " and " * 150,
    r"\pm 1" * 100,
    "|" * 400,
    "1 cm " * 150,
    "0.\\overline{" + "9" * 300 + "}",
    "\x00" * 1000,
    "\ud800" * 1000,
    "a" + "\u0301" * 5000,
    "$" * 5000,
    "__import__('os').system('true')",
    "<think>" * 5000,
    "####" * 5000,
    "answer is " * 5000,
    "final answer: " * 5000,
    "1" + " " * 50_000 + "2",
    "\\" * 50_000,
]


def texts(seed: int) -> Iterator[str]:
    """Endless hostile texts."""
    draw = random.Random(seed)
    real = (
        [str(json.loads(line)["answer"]) for line in (DATA / "math500.jsonl").open(encoding="utf-8")]
        if DATA.exists()
        else ["1"]
    )
    yield from POISON
    while True:
        kind = draw.randrange(4)
        if kind == 0:
            yield "".join(draw.choices(PIECES, k=draw.randint(1, 60)))
        elif kind == 1:
            one, other = draw.choice(real), draw.choice(real)
            yield one[: draw.randint(0, len(one))] + draw.choice(PIECES) + other[draw.randint(0, len(other)) :]
        elif kind == 2:
            yield draw.choice(PIECES) * draw.randint(1, 400)
        else:
            yield "".join(
                chr(draw.choice([draw.randrange(128), draw.randrange(0x11000)])) for _ in range(draw.randint(1, 80))
            )


def one(text: str, other: str) -> float:
    """Grades `text` in every way there is; the processor time in seconds."""
    start_s = time.process_time()
    assert math.equivalent(text, text)
    assert math.equivalent(text, other) == math.equivalent(other, text), (text, other)
    for gold in ("5", "x+1", r"\frac{1}{2}", "(1,2)", "x>3"):
        assert math.equivalent(gold, text) == math.equivalent(text, gold), (gold, text)
    math.canonical(text)
    math.grade(rf"<think>so</think> \boxed{{{text}}}", {"answer": "5"})
    math.grade(text, {"answer": "5"})
    return time.process_time() - start_s


def memory_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def in_this_process(minutes: float, seed: int) -> None:
    end_s, slowest, count, before = time.monotonic() + 60 * minutes, (0.0, ""), 0, ""
    start_mb = memory_mb()
    for text in texts(seed):
        seconds = one(text, before)
        slowest, count, before = max(slowest, (seconds, text[:60])), count + 1, text
        if seconds > LIMIT_S:
            sys.exit(f"{seconds:.1f} s for {text[:200]!r} ({len(text)} characters)")
        if count == 10_000:
            start_mb = memory_mb()
        if time.monotonic() > end_s:
            break
    print(f"{count} texts, the slowest {slowest[0]:.2f} s ({slowest[1]!r})")
    print(f"memory: {start_mb:.0f} MB after the first 10,000, {memory_mb():.0f} MB in the end")


def in_a_pool(items: int, seed: int) -> None:
    source = texts(seed)
    with RewardPool({"accuracy": 1.0, "format": 1.0}, 2, LIMIT_S) as pool:
        flags, start_mb, start_s = {}, 0.0, time.monotonic()
        for ticket in range(items):
            pool.submit(ticket, "", rf"<think>so</think> \boxed{{{next(source)}}}", {"grader": "math", "answer": "5"})
            if ticket % 500 == 499:
                for graded in pool.drain():
                    for flag in graded.flags:
                        flags[flag] = flags.get(flag, 0) + 1
                start_mb = start_mb or memory_mb()
        print(f"{items} items by two workers in {time.monotonic() - start_s:.0f} s, flags {flags}")
        print(f"memory of the parent: {start_mb:.0f} MB after the first 500, {memory_mb():.0f} MB in the end")


def with_atheris(minutes: float, seed: int) -> None:
    import atheris

    global math
    for name in [name for name in sys.modules if name.startswith("r1jax.rewards")]:
        del sys.modules[name]
    with atheris.instrument_imports(include=["r1jax.rewards"]):
        from r1jax.rewards import math as instrumented
    math = instrumented
    slowest = (0.0, b"")

    def grade(data: bytes) -> None:
        nonlocal slowest
        text, _, other = data.partition(b"\xff")
        seconds = one(*(part.decode("utf-8", "surrogateescape") for part in (text, other)))
        if seconds > slowest[0]:
            slowest = (seconds, text[:60])
            print(f"slowest so far: {seconds:.2f} s for {text[:60]!r} ({len(text)} bytes)", flush=True)
        assert seconds < INSTRUMENTED_LIMIT_S, (seconds, text[:200])

    with tempfile.TemporaryDirectory() as folder:
        source = texts(seed)
        for number in range(2000):
            text = next(source).encode("utf-8", "surrogatepass")[:2000]
            (pathlib.Path(folder) / str(number)).write_bytes(text)
        limits = [f"-max_total_time={int(60 * minutes)}", "-max_len=4000", f"-seed={seed + 1}", "-timeout=20"]
        atheris.Setup([sys.argv[0], *limits, folder], grade)
        atheris.Fuzz()  # ends the process


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--pool", type=int, default=0, help="items to send through two workers, instead of the minutes")
    parser.add_argument("--atheris", action="store_true", help="by coverage")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    if given.pool:
        in_a_pool(given.pool, given.seed)
    elif given.atheris:
        with_atheris(given.minutes, given.seed)
    else:
        in_this_process(given.minutes, given.seed)
