"""Models behind a server: slow, down, refusing, talking nonsense; and what is made of their replies."""

import http.server
import json
import random
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from r1jax import editor, endpoint, preference


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
            for piece in body if isinstance(body, list) else [body]:
                self.wfile.write(piece if isinstance(piece, bytes) else json.dumps(piece).encode())
                self.wfile.flush()
                time.sleep(0.1 if isinstance(body, list) else 0.0)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}/v1", replies
        running.shutdown()


def said(text: str) -> tuple[int, dict]:
    return 200, {"choices": [{"message": {"content": text}}]}


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "time", type("Time", (), {"sleep": lambda _: None, "monotonic": time.monotonic}))


def plainly(url: str, tries: int = 3, timeout_s: float = 5.0) -> str | None:
    return endpoint.ask(url, "m", "text", str, "config.some.key", timeout_s, tries)


def test_a_server_is_asked_again_when_it_fails_or_answers_nonsense(server):
    url, replies = server
    replies += [(500, b"down"), (200, b"not json"), said("better")]
    edit = editor.open_editor(f"{url}#some-model", 5.0, 3)
    assert edit("the question", "the reasoning") == "better" and not replies
    replies += [(500, b""), (200, {"choices": []}), said(" ")]
    assert edit("the question", "the reasoning") is None
    asked = edit("the question", "the reasoning")
    assert "some-model" in asked and "the question" in asked and "the reasoning" in asked


def test_an_editor_that_loses_the_tags_is_asked_again(server):
    url, replies = server
    good = "<think> I add. </think> <answer>2</answer>"
    replies += [said("I am sorry."), said("<think> I add. 2"), said(good)]
    assert editor.open_editor(f"{url}#m", 5.0, 3)("q", "<think> 1+1=2 </think> <answer>2</answer>") == good


def test_who_refuses_everybody_stops_the_run_and_who_refuses_a_text_costs_it(server):
    url, replies = server
    replies.append((401, b""))
    with pytest.raises(ValueError, match=r"config\.some\.key: .* refuses to answer .*401"):
        plainly(url)
    replies += [(413, b""), said("the next")]
    assert plainly(url) is None and replies, "it is not asked again"
    assert plainly(url) == "the next"
    assert plainly("http://127.0.0.1:9/v1", 2, 1.0) is None


def test_a_server_that_drips_is_left_in_time(server):
    url, replies = server
    replies.append((200, [b" "] * 60))
    before = time.monotonic()
    assert plainly(url, 1, 0.5) is None
    assert time.monotonic() - before < 2.0


def test_a_server_that_drips_its_headers_is_left_in_time():
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def answer() -> None:
            with listening.accept()[0] as one:
                one.recv(1 << 16)
                for _ in range(60):
                    one.sendall(b"H")
                    time.sleep(0.1)

        threading.Thread(target=answer, daemon=True).start()
        before = time.monotonic()
        assert plainly(f"http://127.0.0.1:{listening.getsockname()[1]}/v1", 1, 0.5) is None
        assert time.monotonic() - before < 2.0


def test_what_speaks_no_http_is_a_failure_like_others():
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def answer() -> None:
            for _ in range(2):
                with listening.accept()[0] as one:
                    one.recv(1 << 16)
                    one.sendall(b"who is there?\r\n\r\n")

        threading.Thread(target=answer, daemon=True).start()
        assert plainly(f"http://127.0.0.1:{listening.getsockname()[1]}/v1", 2) is None


@pytest.mark.parametrize(
    ("text", "difference"),
    [
        ("7 4", 3.0),
        ("7, 4", 3.0),
        ("7/10 4/10", 3.0),
        ("Rating: 7.5 4", 3.5),
        ("Reply 1: 4\nReply 2: 9", -5.0),
        ("nan nan", None),
        ("999 -3", None),
        ("7 -4", None),
        ("7", None),
        ("the first", None),
    ],
)
def test_ratings_are_read_or_asked_for_again(server, text, difference):
    url, replies = server
    replies += [said(text)] * 2
    judge = preference.open_judge(f"{url}#m", 5.0, 2)
    assert judge({"question": "q"}, "a", "b") == difference
    assert len(replies) == (0 if difference is None else 1)


def test_a_verifier_says_yes_or_no(server):
    url, replies = server
    verify = editor.open_verifier(f"{url}#m", 5.0, 2)
    replies += [said("Yes."), said("perhaps"), said("no"), said("perhaps"), said("well")]
    example = {"question": "q", "answer": "2"}
    assert [verify(example, "two") for _ in range(3)] == [True, False, None] and not replies


def test_a_function_that_raises_gives_nothing(tmp_path):
    (tmp_path / "mine.py").write_text("def judge(*_):\n    raise KeyError('x')\n")
    assert preference.open_judge(f"{tmp_path}/mine.py:judge", 1.0, 1)({}, "a", "b") is None
    (tmp_path / "odd.py").write_text("def judge(*_):\n    return float('nan')\n")
    judge = preference.open_judge(f"{tmp_path}/odd.py:judge", 1.0, 1)
    assert preference.judged_gap(judge, {}, "a", "b", 4, random.Random(0)) is None
