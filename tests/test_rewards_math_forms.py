"""Families of spelling that the math grader must see through, and near misses that it must not; laws by random case."""

import random
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from r1jax.rewards.math import canonical, equivalent, extract_answer, grade

# gold | answer; each pair is tried both ways.
SAME = r"""
x+z | z+x
\sqrt{1/2} | \frac{\sqrt2}{2}
1,000.99 | 1000.99
0.5 | 50\%
50% | 1/2
10^{10} | 10000000000
1.5 \times 10^3 | 1500
1.5 \cdot 10^{3} | 1.5e3
3\cdot10^{-5} | 0.00003
x \geq 5 | x >= 5
[5,\infty) | x\ge 5
(-\infty, 3) \cup (5,\infty) | x<3 \text{ or } x>5
(-\infty,3)\cup(5,+\infty) | (5,\infty) \cup (-\infty, 3)
x\in[1,2] | [1,2]
x \in [1,2] | 1\le x\le 2
\{1,2,3\} | 1,2,3
\{ -1, 2 \} | x=-1, x=2
\{ -1, 2 \} | x=2 \text{ or } x=-1
y=2x+3 | 2x+3
y = 2x+3 | y=3+2x
2x-y+3=0 | y=2x+3
x^2+y^2=4 | x^2+y^2-4=0
\frac{x}{2}+\frac{y}{3}=1 | 3x+2y=6
\begin{pmatrix}1\\2\end{pmatrix} | \begin{bmatrix} 1 \\ 2 \end{bmatrix}
\begin{pmatrix} 1/2 & 0 \\ 0 & 2 \end{pmatrix} | \frac12\begin{pmatrix}1&0\\0&4\end{pmatrix}
\log_2 8 | 3
\log_{10} 100 | 2
\log 100 | 2
\ln 4 | 2\ln 2
\log 4 | 2 \log 2
\log_2 3 | \frac{\ln 3}{\ln 2}
\frac{\log 3}{\log 2} | \log_2 3
\sin 30^\circ | 1/2
\sin(30^{\circ}) | 0.5
\cos \frac{\pi}{3} | \frac12
\sin 2x | 2\sin x\cos x
\sin^2 x + \cos^2 x | 1
\cos^{-1} 0 | \frac{\pi}{2}
\arctan 1 | \pi/4
|x-3| | |3-x|
\left|x\right| | |x|
\sqrt{(x)^2} | |x|
\binom{5}{2} | 10
\dbinom{n}{2} | \frac{n(n-1)}{2}
\frac{n!}{(n-1)!} | n
2^{n+1} | 2\cdot 2^n
e^{2x} | (e^x)^2
0.\overline{3} | 1/3
0.1\overline{6} | \frac16
3 \frac{1}{2} | 7/2
3\tfrac12 | 3.5
-2\frac{1}{3} | -7/3
x^{1/3} | \sqrt[3]{x}
\sqrt[3]{-8} | -2
\frac{1}{\sqrt{2}} | \frac{\sqrt{2}}{2}
\frac{3+\sqrt5}{2} | 1.5+\frac{\sqrt{5}}{2}
2 \pm \sqrt 3 | 2+\sqrt3, 2-\sqrt3
x = \pm 3 | 3, -3
\pm 3 | \{-3, 3\}
6+9i | 9i+6
\frac{1}{1+i} | \frac{1-i}{2}
52_8 | 52_{8}
52_8 | (52)_8
3:4 | 3 : 4
(1,2),(3,4) | (3,4), (1,2)
\text{even} | even
\text{Evelyn} | Evelyn
\text{(C)} | C
C | \textbf{(C)}
C | \mathrm{C}
C | (C)\ 12
90^\circ | 90 \text{ degrees}
90 | 90°
5 \text{ cm} | 5cm
5\text{ cm}^2 | 5
25\ \text{m}^2 | 25
5 | 5 \text{ apples}
5 | 5\,\mathrm{kg}
\$ 3.50 | 3.5
12 | 12元
12 | 12 个
30000 | 3万
5 \text{ million} | 5000000
1{,}000{,}000 | 1000000
three | 3
\text{two} | 2
½ | 0.5
x² | x^2
x₁ | x_1
3×10⁸ | 300000000
√2 | \sqrt{2}
≥ | \ge
2π | 2\pi
−5 | -5
１２ | 12
f(x)=x^2+1 | x^2+1
f(x) = x^2+1 | f(x) = 1+x^2
(x,y)=(1,2) | (1,2)
a=1,b=2 | a=1, b=2
AB = 5 | 5
\angle ABC = 60^\circ | 60
\text{Area} = 12 | 12
x = 2+3 = 5 | 5
\frac{10}{2} = 5 | 5
\emptyset | \text{no solution}
\varnothing | \{\}
\mathbb{R} | (-\infty,\infty)
\lfloor 3.7 \rfloor | 3
\lceil 3.2 \rceil | 4
\max(3,5) | 5
\gcd(12,18) | 6
x(x+1) | x^2+x
(x+1)(x-1)(x+2) | x^3+2x^2-x-2
\frac{x^2-4}{x-2} | x+2
\frac{a}{b} | a/b
2xy | 2yx
\alpha+\beta | \beta+\alpha
x_1+x_2 | x_2+x_1
\frac{3}{4}\text{ cup} | 3/4
0.75 | 75 percent
1e-3 | 0.001
\boxed{7} | 7
$7$ | 7
\displaystyle\frac{1}{2} | 1/2
\frac{\frac{1}{2}}{3} | 1/6
(\frac{1}{2}) | 0.5
{5} | 5
\{5\} | 5
5. | 5
7:30 | 7:30
\sqrt{50} | 5\sqrt2
2^{\frac{1}{2}} | \sqrt{2}
\frac{\pi}{2} \text{ radians} | \frac{\pi}{2}
1 - \frac{1}{e} | \frac{e-1}{e}
x > 3 | 3 < x
x\le -2 | (-\infty,-2]
\left(-\infty,-2\right] | (-\infty, -2]
-2 < x < 3 | 3 > x > -2
x \ne 2 | x \neq 2
10! | 3628800
\sum_{i=1}^{n} i | \sum_{i=1}^n i
1.0 | 1
-\frac{3}{4} | \frac{-3}{4}
\frac{-3}{4} | -0.75
11\frac{1}{2}\% | 11.5\%
5^{th} | 5^{th}
4 \text{ or } 6 | 4, 6
1, 2, \text{ and } 3 | 1,2,3
\cot x | \frac{\cos x}{\sin x}
\sec^2 x - 1 | \tan^2 x
\sqrt{x}\sqrt{x} | x
x\sqrt{3} | \sqrt{3}x
\frac{2\sqrt{3}}{3} | \frac{2}{\sqrt{3}}
8\sqrt{3}-4\sqrt{2} | 4(2\sqrt3-\sqrt2)
\left(\frac{3}{2}, -\frac{1}{2}\right) | (1.5,-0.5)
i | \sqrt{-1}
p - q | -q+p
3x^2 \text{ for } x>0 | 3x^2 \text{ for } x>0
10 \text{ inches} | 10 \text{ inch}
6 \text{ ft} | 6 \text{ feet}
36 \text{ cm}^2 | 36 \text{ square cm}
36 \text{ cm}^2 | 36 cm^2
C | \text{option C}
5 | \text{the answer is } 5
"""
DIFFERENT = r"""
5 | 6
x=5 | 3x+2=17
x=5 | 2x=10
x<5 | 2x<10
1/3 | 0.33
\pi | 3.14
\pi | 22/7
(1,2) | (2,1)
(1,2) | [1,2]
\{1,2\} | \{1,2,3\}
1 | 1,2
3 | 3, 4
3 | 3 \text{ or } 4
5 | \text{between } 4 \text{ and } 6
5 | 4 < x < 6
x>3 | x<3
x>3 | x\ge 3
x>3 | y>3
-2<x<3 | -2\le x<3
x=3 | x=-3
\pm 3 | 3
3 | \pm 3
y=2x | y=3x
x^2+1 | x^2-1
5 \text{ cm} | 5 \text{ m}
36 \text{ cm}^2 | 36 \text{ cm}
36 \text{ cubic feet} | 36 \text{ square feet}
\$5 | 5\%
52_8 | 52_9
A | B
A | A, B
A | \text{A or B}
\text{yes} | \text{no}
\sin x | \cos x
\log_2 8 | 8
\ln 2 | \log_2 2
10 | 1 0
12 | 1,2
100 | 10^3
0.28 | 28
5 | 5!
5 | 5x
5 | 5i
5 | |x|
5 | \frac{5}{0}
\frac{0}{0} | 1
\infty | -\infty
\emptyset | 0
\begin{pmatrix}1\\2\end{pmatrix} | \begin{pmatrix}1&2\end{pmatrix}
\begin{pmatrix}1\\2\end{pmatrix} | \begin{pmatrix}2\\1\end{pmatrix}
3:4 | 4:3
7:30 | 7:45
x^2 | x^3
x_1 | x_2
x+y | xy
\sqrt{2} | 1.414
2\sqrt{3} | 3\sqrt{2}
(-\infty,3)\cup(5,\infty) | (-\infty,3)
x<3 \text{ or } x>5 | x<3
1000 | 1.000
3 \text{ million} | 3
30 | 3万
x=2,y=3 | x=3,y=2
east | seat
\text{cat} | \text{act}
5 | x
x | y
5 | 7=5
5 | 2+2=5
a=1 | b=1
2, 2, 3 | 2, 3
\frac{x^2-1}{x-1} | x-1
0 | \text{zero solutions}
5 | the answer
5 | \text{not } 5
5 | \ne 5
x=5 | x\ne 5
6 | 6 \text{ or more}
2^{10} | 2^{11}
1/2 | 1/3
\frac{12}{34} | 12/43
[0,1) | (0,1]
\text{Monday} | \text{Mon}
"""


def pairs(table):
    return [tuple(part.strip() for part in line.split(" | ")) for line in table.strip().splitlines()]


@pytest.mark.parametrize("table, equal", [(SAME, True), (DIFFERENT, False)], ids=["same", "different"])
def test_a_family_of_spellings(table, equal):
    both_ways = [way for gold, answer in pairs(table) for way in [(gold, answer), (answer, gold)]]
    assert not [way for way in both_ways if equivalent(*way) != equal]


def test_a_box_or_tags_around_an_answer_change_nothing():
    for gold, answer in pairs(SAME) + pairs(DIFFERENT):
        if "boxed" in answer:  # two boxes side by side are one list
            continue
        expected = equivalent(gold, answer)
        assert grade(rf"<think>5</think> So \boxed{{{answer}}}.", {"answer": gold}) == expected, answer
        assert grade(f"<think>5</think> <answer>{answer}</answer>", {"answer": gold}) == expected, answer


# A formula as text and its value by exact arithmetic; depth is bounded, so is every number.
NUMBERS = st.integers(-30, 30).map(lambda n: (f"({n})" if n < 0 else str(n), Fraction(n)))


def _joined(pair):
    (left, x), (right, y), sign = pair
    return {
        "+": lambda: (f"({left}+{right})", x + y),
        "-": lambda: (f"({left}-{right})", x - y),
        "*": lambda: (rf"{left} \cdot {right}", x * y) if "+" not in left + right else (f"({left})*({right})", x * y),
        "/": lambda: (rf"\frac{{{left}}}{{{right}}}", x / y) if y else (f"({left}+{right})", x + y),
    }[sign]()


FORMULAS = st.recursive(NUMBERS, lambda f: st.tuples(f, f, st.sampled_from("+-*/")).map(_joined), max_leaves=6)


@settings(max_examples=150, deadline=None)
@given(FORMULAS, FORMULAS)
def test_formulas_agree_with_exact_rational_arithmetic(one, other):
    (left, x), (right, y) = one, other
    assert equivalent(left, f"{x.numerator}/{x.denominator}")
    assert equivalent(left, right) == (x == y)
    assert not equivalent(left, str(x + 1))


@settings(max_examples=150, deadline=None)
@given(
    st.text(max_size=60) | st.text(alphabet=r"\{}()[]|^_0123xyi+-*/=<>,.;:%$ frcsqtboxedlgp!&", max_size=60),
    st.text(alphabet=r"\{}()[]|^_0123xyi+-*/=<>,.%$ ", max_size=40),
)
def test_any_text_is_equal_to_itself_and_equality_has_no_direction(one, other):
    assert equivalent(one, one)
    assert equivalent(one, other) == equivalent(other, one)
    canonical(one)
    extract_answer(one + other)


def test_a_vote_and_the_grade_agree_on_random_polynomials():
    draw = random.Random(0)
    for _ in range(40):
        a, b, c = (draw.randint(-9, 9) for _ in range(3))
        expanded = f"{a * b}x^2+({a * c + b})x+{c}"
        assert equivalent(expanded, f"({a}x+1)({b}x+{c})")
        assert not equivalent(expanded, f"({a}x+1)({b}x+{c})+1")
