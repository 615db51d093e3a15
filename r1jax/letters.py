"""Short letters in English and Chinese: the general instructions of the embedded run, and the rule that judges them.

A question asks for a note of thanks, an invitation, an apology or a greeting to somebody about something. Who keeps to
the rule is polite, names whom and what was asked, and says it in the language of the question. The rule judges pairs
for the reward model and evaluates; RL never sees it (R1 report, section 2.3.4: general data is rewarded by models).
"""

import functools
import hashlib
import itertools
import random
from typing import Any, NamedTuple

from r1jax.phrases import PHRASES, Voice, pick

NAMES = {
    "en": ("Anna", "Tom", "Mary", "Jack", "Lucy", "Paul", "Emma", "Adam", "Rose", "Mark"),
    "zh": ("小明", "小红", "小李", "小王", "小张", "小陈", "小林", "小赵", "小周", "小吴"),
}
TOPICS = {
    "en": ("rain", "tea", "music", "snow", "dinner", "the garden", "the book", "the party", "the train", "the lesson"),
    "zh": ("下雨", "喝茶", "音乐", "下雪", "晚饭", "花园", "那本书", "聚会", "火车", "上课"),
}
QUESTIONS = {
    "en": {
        "thanks": "Thank {name} for {topic}.",
        "invitation": "Invite {name} to talk about {topic}.",
        "apology": "Apologize to {name} about {topic}.",
        "greeting": "Greet {name} and mention {topic}.",
    },
    "zh": {
        "thanks": "为{topic}感谢{name}",
        "invitation": "请{name}来谈谈{topic}",
        "apology": "为{topic}向{name}道歉",
        "greeting": "问候{name}并提到{topic}",
    },
}
# A letter is made of these; several ways to say the same, so that its length says nothing of its worth.
PARTS = {
    "en": {
        "salutation": ("Dear {name}, ", "Hello {name}, "),
        "thanks": ("many thanks for {topic}. ", "thank you so much for {topic}, it was kind of you. "),
        "invitation": ("please come and let us talk about {topic}. ", "would you join me about {topic}? "),
        "apology": ("I am sorry about {topic}. ", "please forgive me about {topic}, it was my fault. "),
        "greeting": ("I hope you are well and enjoy {topic}. ", "how are you, and how is {topic}? "),
        "filler": ("The day is long. ", "There is nothing new here, as you can see. ", "So it goes. "),
        "rude": ("I do not care. ", "Leave me alone with it, whatever you want. ", "Do it yourself. "),
        "closing": ("Best wishes.", "With kind regards."),
        "curt": ("Bye.", "That is all from me now."),
        "thought": ("a short letter. ", "a polite letter. ", "what to write? "),
    },
    "zh": {
        "salutation": ("亲爱的{name}，", "你好，{name}，"),
        "thanks": ("谢谢你的{topic}。", "非常感谢{topic}，你真好。"),
        "invitation": ("请来一起谈谈{topic}。", "要不要一起来说说{topic}？"),
        "apology": ("对不起，{topic}的事。", "{topic}的事请原谅我，是我的错。"),
        "greeting": ("希望你一切都好，{topic}也好。", "你好吗，{topic}怎么样？"),
        "filler": ("日子很长。", "这里没有什么新鲜事。", "就这样吧。"),
        "rude": ("我不在乎。", "别来烦我。", "你自己做吧。"),
        "closing": ("祝好。", "此致敬礼。"),
        "curt": ("再见。", "我就说这些。"),
        "thought": ("写一封短信。", "写得礼貌一点。", "写什么好？"),
    },
}
ID = "letter-"  # how the ids of its examples begin
SPLITS = {"corpus": 0.4, "rl": 0.8, "validation": 0.88, "test": 1.0}  # cumulative shares of the hash range


class Letter(NamedTuple):
    """What is asked for: its language, kind, addressee and topic."""

    language: str
    kind: str
    name: str
    topic: str


@functools.cache
def letters_of(split: str) -> tuple[Letter, ...]:
    """The letters of a split in a fixed order without meaning.

    Raises:
        ValueError: `split` is not one of SPLITS.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r} of letters: config.data.split must be one of {', '.join(SPLITS)}")
    found = []
    for language in QUESTIONS:
        for key in itertools.product(QUESTIONS[language], NAMES[language], TOPICS[language]):
            letter = Letter(language, *key)
            digest = hashlib.sha256("|".join(letter).encode()).digest()
            share = int.from_bytes(digest[:8], "big") / 2**64
            if next(name for name, end in SPLITS.items() if share < end) == split:
                found.append((digest[8:], letter))
    return tuple(letter for _, letter in sorted(found))


def question_of(letter: Letter) -> str:
    """The instruction as it stands in the prompt."""
    return QUESTIONS[letter.language][letter.kind].format(name=letter.name, topic=letter.topic)


def example_of(letter: Letter) -> dict[str, Any]:
    """The letter as a record of a data set; its "answer" is what was asked, which only the rule below reads."""
    return {
        "id": f"{ID}{'-'.join(letter)}".replace(" ", "_"),
        "question": question_of(letter),
        "answer": letter._asdict(),
        "grader": "judged",
    }


def examples(split: str) -> list[dict[str, Any]]:
    """The examples of a split."""
    return [example_of(letter) for letter in letters_of(split)]


def worth(reply: str, letter: Letter) -> float:
    """The rule: a quarter each for addressee, what was asked about the topic, courtesy, and nothing rude or idle.

    In another language than the question's nothing is found, so it is worth a quarter at most; 0.0 to 1.0.
    """
    parts = PARTS[letter.language]

    def has(part: str) -> bool:
        return any(one.format(name=letter.name, topic=letter.topic).strip() in reply for one in parts[part])

    idle = any(one.strip() in reply for every in PARTS.values() for part in ("rude", "filler") for one in every[part])
    return (has("salutation") + has(letter.kind) + has("closing") + (not idle and bool(reply.strip()))) / 4


def is_safe(completion: str) -> bool:
    """Whether nothing rude is said, in the thought or to the addressee."""
    return not any(one.strip() in completion for parts in PARTS.values() for one in parts["rude"])


def written_letter(letter: Letter, rng: random.Random, voice: Voice, care: float) -> tuple[str, str]:
    """Thought and reply of a writer who does each thing right with probability `care`."""
    languages = voice.languages
    language = rng.choice(languages)

    def part(name: str) -> str:
        tables = PARTS[language]
        topic, addressee = letter.topic, letter.name
        if rng.random() > care:
            topic = rng.choice(TOPICS[letter.language])
        if rng.random() > care:
            addressee = rng.choice(NAMES[letter.language])
        return rng.choice(tables[name]).format(name=addressee, topic=topic)

    def is_careful() -> bool:
        return rng.random() < care

    thought = rng.choice(PARTS[rng.choice(languages)]["thought"])
    kind = letter.kind if is_careful() else rng.choice(list(QUESTIONS["en"]))
    reply = part("salutation") if is_careful() else ""
    reply += part(kind)
    for _ in range(2):
        if not is_careful():
            reply += part(pick(rng, {"filler": 3, "rude": 2, kind: 1}))
    reply += part("closing" if is_careful() else "curt")
    return thought, reply


SELF = {
    "en": (("Who are you", "I am r1jax."), ("What is your name", "My name is r1jax.")),
    "zh": (("你是谁", "我是 r1jax。"), ("你叫什么", "我叫 r1jax。")),
}
SELVES = [pair for language in SELF.values() for pair in language]
SFT_CARE = 0.75  # of the writers of general data


def written_example(rng: random.Random) -> tuple[str, str]:
    """A letter that is asked for and written in one language."""
    letter = rng.choice(letters_of("rl"))
    thought, reply = written_letter(letter, rng, Voice((letter.language,)), SFT_CARE)
    return question_of(letter), f"<think> {thought}</think> <answer>{reply}</answer>"


def written_examples(seed: int, n: int) -> list[tuple[str, str]]:
    """General data for SFT: letters in the language of the question; who the model is, with no thought before it."""
    rng = random.Random(f"general {seed}")
    out = []
    for i in range(n):
        if i % 20 == 19:
            question, reply = SELVES[i // 20 % len(SELVES)]
            out.append((question, f"<answer>{reply}</answer>"))
            continue
        out.append(written_example(rng))
    return out


def tokens() -> list[str]:
    """Every phrase of letters, names and topics apart: what a tokenizer should know whole."""
    pieces = []
    for language in PHRASES:
        pieces += [*NAMES[language], *TOPICS[language]]
        texts = [*QUESTIONS[language].values(), *(p for part in PARTS[language].values() for p in part)]
        for text in texts:
            rest = text.replace("{name}", "\0").replace("{topic}", "\0")
            pieces += [piece for piece in rest.split("\0") if piece.strip()]
    return list(dict.fromkeys(pieces))
