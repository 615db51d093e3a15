"""Rejection sampling: what is kept, what each filter drops, and editors that fail."""

import http.server
import json
import threading
from collections.abc import Iterator

import numpy as np
import pytest

from configs import base
from r1jax import curate, editor
from r1jax.rewards.pool import Graded
from r1jax.rollout import Sample
from r1jax.types import Completion

GOOD = "<think> let me try. 3*5=15 of 15, off by 0, yes. </think> <answer>3*5</answer>"


def sample(text: str, right: float = 1.0, stop: str = "stop", question: str = "Using 3, 5, make 15.") -> Sample:
    completion = Completion(0, 0, np.zeros(3, np.int32), np.zeros(3, np.float32), stop)
    example = {"id": "a", "question": question, "answer": "15", "grader": "math"}
    return Sample(example, "prompt", (1,), completion, text, Graded(0, {"accuracy": right}, right, "15", (), 0.0))


def config(**changes: object) -> dict:
    settings = base.get_config().to_dict()
    settings["curate"] |= {"keep_per_prompt": 2, **changes}
    return settings


@pytest.mark.parametrize(
    ("filter_", "dropped"),
    [
        ("whole", sample(GOOD, stop="length")),
        ("correct", sample(GOOD, right=0.0)),
        ("format", sample(GOOD + " done.")),
        ("language", sample(GOOD.replace("let me try. ", "让我试试。"))),
        ("language", sample(GOOD, question="用 3, 5 凑出 15")),
        ("repetition", sample(GOOD.replace("let me try. ", "let me try again and again. " * 30))),
        ("length", sample(GOOD.replace("let", "l" + "e" * 100_000 + "t"))),
        ("paragraphs", sample(GOOD.replace("let", "l" + "e" * 5_000 + "t"))),
        ("code", sample(GOOD.replace("let", "```python\nprint()\n``` let"))),
    ],
)
def test_every_filter_drops_what_it_is_for_and_is_counted(filter_, dropped):
    kept, counts = curate.keep([sample(GOOD), dropped], config(filters=(filter_,)))
    assert [s.text for s in kept] == [GOOD] and counts == {"sampled": 2, f"dropped by {filter_}": 1}


def test_the_same_text_is_kept_once_and_no_prompt_gives_too_much():
    texts = [GOOD, GOOD, GOOD.replace("try", "see"), GOOD.replace("try", "think")]
    kept, counts = curate.keep([sample(text) for text in texts], config())
    assert [s.text for s in kept] == [texts[0], texts[2]]
    assert counts == {"sampled": 4, "dropped by duplicate": 1, "dropped by surplus": 1}


def test_a_filter_that_cannot_work_is_refused():
    with pytest.raises(ValueError, match=r"config\.curate\.filters names 'corect', wanted some of whole, correct"):
        curate.check_filters(config(filters=("corect",)))
    settings = config()
    settings["rewards"] = {"format": 1.0}
    with pytest.raises(ValueError, match='config.rewards has no "accuracy"'):
        curate.check_filters(settings)


def test_general_data_is_a_chat_file_or_letters(tmp_path):
    path = tmp_path / "general.jsonl"
    line = curate.conversation("Hello", "Hi", source="mine")
    path.write_text("".join(json.dumps(line) + "\n" for _ in range(3)))
    assert curate.general_data(config(general=str(path), general_examples=2), 0) == [line, line]
    path.write_text('{"messages": [{"role": "user", "content": "Hello"}]}\n')
    with pytest.raises(ValueError, match=r"general\.jsonl, line 1: .*two messages or more"):
        curate.general_data(config(general=str(path)), 0)
    written = curate.general_data(config(general="letters", general_examples=40), 3)
    assert len(written) == 40 and written == curate.general_data(config(general="letters", general_examples=40), 3)
    assert sum("r1jax" in one["messages"][1]["content"] for one in written) == 2


def test_tidy_says_nothing_twice_and_drops_what_has_no_thought():
    text = " <think> let me try. 1+1=2, no. let me try. </think> <answer>2</answer>"
    assert editor.tidy("q", text) == "<think> let me try. 1+1=2, no. </think> <answer>2</answer>"
    assert editor.tidy("q", "<think>等等。不对。等等。</think> <answer>2</answer>") == (
        "<think> 等等。不对。 </think> <answer>2</answer>"
    )
    assert editor.tidy("q", "the answer is 2") is None and editor.tidy("q", "<think> so long") is None


@pytest.fixture
def server() -> Iterator[tuple[str, list]]:
    """A chat-completions server that gives the replies of a list in turn, and what it was asked."""
    replies: list = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            status, body = replies.pop(0) if replies else (200, {"choices": [{"message": {"content": str(asked)}}]})
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body if isinstance(body, bytes) else json.dumps(body).encode())

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}/v1", replies
        running.shutdown()


def test_a_server_is_asked_again_when_it_fails_or_answers_nonsense(server, monkeypatch):
    monkeypatch.setattr(editor.time, "sleep", lambda _: None)
    url, replies = server
    replies += [(500, b"down"), (200, b"not json"), (200, {"choices": [{"message": {"content": "better"}}]})]
    edit = editor.open_editor(f"{url}#some-model", 5.0, 3)
    assert edit("the question", "the reasoning") == "better" and not replies
    replies += [(500, b""), (200, {"choices": []}), (200, {"choices": [{"message": {"content": " "}}]})]
    assert edit("the question", "the reasoning") is None
    said = edit("the question", "the reasoning")
    assert "some-model" in said and "the question" in said and "the reasoning" in said


def test_a_server_that_refuses_or_is_not_there(server, monkeypatch):
    monkeypatch.setattr(editor.time, "sleep", lambda _: None)
    url, replies = server
    replies.append((401, b""))
    with pytest.raises(ValueError, match=r"refuses to answer .*401.*config\.curate\.editor"):
        editor.ask(url, "m", "text", 5.0, 3)
    assert editor.ask("http://127.0.0.1:9/v1", "m", "text", 1.0, 2) is None


@pytest.mark.parametrize(
    ("name", "message"), [("http://host/v1", "model's name is missing"), ("nowhere:edit", "config.curate.editor")]
)
def test_an_editor_that_cannot_be_had_is_refused(name, message):
    with pytest.raises(ValueError, match=message):
        editor.open_editor(name, 1.0, 1)
