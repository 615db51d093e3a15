"""General data for SFT by rule: letters, who the model is, facts and translations, in English and Chinese.

The report's kinds of data beside reasoning, writing, factual question answering, self-cognition and translation
(section 2.3.3), the last three without a thought before the answer, as for simple queries there. The tables are our
choice, and of words that the packaged tokenizer can mostly read whole.
"""

import itertools
import random

from r1jax import letters

FACTS = (
    ("Days in a week?", "7"),
    ("Months in a year?", "12"),
    ("Hours in a day?", "24"),
    ("Minutes in an hour?", "60"),
    ("Legs of a dog?", "4"),
    ("Legs of a bird?", "2"),
    ("Letters from A to Z?", "26"),
    ("What is frozen rain?", "snow"),
    ("一周有几天？", "7"),
    ("一年有几个月？", "12"),
    ("一天有几小时？", "24"),
    ("一小时有几分钟？", "60"),
    ("狗有几条腿？", "4"),
    ("鸟有几条腿？", "2"),
    ("一米有几厘米？", "100"),
    ("彩虹有几种颜色？", "7"),
)
WORDS = (
    ("rain", "雨"),
    ("tea", "茶"),
    ("music", "音乐"),
    ("snow", "雪"),
    ("dinner", "晚饭"),
    ("the garden", "花园"),
    ("the book", "书"),
    ("the party", "聚会"),
    ("the train", "火车"),
    ("the lesson", "课"),
    ("Best wishes.", "祝好。"),
    ("Bye.", "再见。"),
    ("The day is long.", "日子很长。"),
    ("So it goes.", "就这样吧。"),
    ("easy.", "很容易。"),
    ("that is hard.", "这题很难。"),
)
TRANSLATIONS = (
    *((f"In Chinese: {english}", chinese) for english, chinese in WORDS),
    *((f"译成英文：{chinese}", english) for english, chinese in WORDS),
)
SIMPLE = {"self-cognition": tuple(letters.SELVES), "facts": FACTS, "translation": TRANSLATIONS}
# Kinds in the order in which they take turns.
TURNS = ("letters", "facts", "letters", "translation", "letters", "facts", "letters", "translation", "letters",
         "self-cognition")  # fmt: skip


def general_examples(seed: int, n: int) -> list[tuple[str, str, str]]:
    """Kind, question and reply of `n` examples; of the tables everything comes up before anything comes again."""
    rng = random.Random(f"mixed {seed}")
    simple = {kind: itertools.cycle(rng.sample(table, len(table))) for kind, table in SIMPLE.items()}
    out = []
    for kind in itertools.islice(itertools.cycle(TURNS), n):
        if kind == "letters":
            question, reply = letters.written_example(rng)
        else:
            question, answer = next(simple[kind])
            reply = f"<answer>{answer}</answer>"
        out.append((kind, question, reply))
    return out
