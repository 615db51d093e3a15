"""Who rewrites a sampled completion before it is learned from, or says whether it is right where no rule can.

The report lets a model make first-person prose with a summary out of R1-Zero's chains (section 2.3.1). What it does
not rewrite well is dropped and counted (r1jax/curate.py).
"""

import re
from collections.abc import Callable

from r1jax.endpoint import open_asked
from r1jax.rewards.form import ANSWER, ANSWER_END, THINK, THINK_END
from r1jax.types import Example

Editor = Callable[[str, str], str | None]  # question, completion to the new completion; None: drop it
Verifier = Callable[[Example, str], bool | None]  # whether a reply says what the example's answer says; None: no idea

INSTRUCTION = (
    "Rewrite the reasoning below as fluent first-person thought in the language of the question, without repetition. "
    "Keep every step that leads to the answer, the answer itself, and the tags <think> </think> <answer> </answer>. "
    "Reply with the rewritten text alone.\n\nQuestion: {question}\n\nReasoning:\n{completion}"
)
VERIFY = (
    "A question, its reference answer and somebody's answer to it follow. Does that answer say the same as the "
    'reference? Reply with "yes" or "no" and nothing else.\n\nQuestion: {question}\n\nReference answer: {answer}\n\n'
    "Answer: {reply}"
)
SENTENCE_END = re.compile(r"(?<=[.!?。！？])\s*")


def tidy(question: str, completion: str) -> str | None:
    """By rule: white space at the ends goes, and what the thought says a second time."""
    before, opened, rest = completion.strip().partition(THINK)
    thought, closed, after = rest.partition(THINK_END)
    if before or not (opened and closed):
        return None
    sentences = dict.fromkeys(one for one in SENTENCE_END.split(thought.strip()) if one)
    joint = "" if any("\u4e00" <= letter <= "\u9fff" for letter in thought) and " " not in thought.strip() else " "
    return f"{THINK} {joint.join(sentences)} {THINK_END}{after}"


def open_editor(name: str, timeout_s: float, tries: int) -> Editor | None:
    """What config.curate.editor names; None: nothing is rewritten.

    Raises:
        ValueError: there is no such editor.
    """
    if not name:
        return None
    if name == "tidy":
        return tidy
    return open_asked(name, "config.curate.editor", _instruction, _with_its_tags, timeout_s, tries)


def _instruction(question: str, completion: str) -> str:
    return INSTRUCTION.format(question=question, completion=completion)


def _with_its_tags(reply: str, question: str, completion: str) -> str | None:
    """The reply if it has kept what a reader finds thought and answer by."""
    tags = (tag for tag in (THINK, THINK_END, ANSWER, ANSWER_END) if tag in completion)
    return reply if all(tag in reply for tag in tags) else None


def open_verifier(name: str, timeout_s: float, tries: int) -> Verifier | None:
    """What config.curate.judge names; None: nothing is judged.

    Raises:
        ValueError: there is no such judge.
    """
    if not name:
        return None
    asked = open_asked(name, "config.curate.judge", _asking, _yes_or_no, timeout_s, tries)

    def verify(example: Example, reply: str) -> bool | None:
        opinion = asked(example, reply)
        return bool(opinion) if opinion in (True, False) else None  # a user's function may give anything

    return verify


def _asking(example: Example, reply: str) -> str:
    return VERIFY.format(question=example["question"], answer=example["answer"], reply=reply)


def _yes_or_no(said: str, *_: object) -> bool | None:
    return {"yes": True, "no": False}.get(said.strip(" .!*\"'\n").lower())
