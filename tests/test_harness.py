"""The adapter of lm-evaluation-harness: likelihoods as transformers has them, tasks of both kinds from local files."""

import json
import pathlib

import jax
import numpy as np
import pytest
from tiny_run import POLICY, make_policy

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not here (extra [eval]): no harness to adapt to")

from lm_eval.api.instance import Instance

from r1jax import fast_tokenizer, harness, sharding, text
from r1jax.model import convert

CONTEXTS = [("2 + 3 =", " 5"), ("Wait, 4 * 7", " = 28. So the answer"), ("", "make 24"), ("ends in space ", "x")]
TASK = """
task: local_{kind}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
doc_to_text: "{{{{question}}}}"
"""
CHOICE = """output_type: multiple_choice
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list:
  - metric: acc
"""
WRITE = """output_type: generate_until
doc_to_target: "{{answer}}"
generation_kwargs:
  until: ["\\n"]
  max_gen_toks: 8
metric_list:
  - metric: exact_match
"""


def instances(kind: str, arguments: list[tuple]) -> list[Instance]:
    return [Instance(kind, {}, one, i) for i, one in enumerate(arguments)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    out = tmp_path_factory.mktemp("released") / "model"
    make_policy(out)
    for name, content in fast_tokenizer.files_of(text.load_tokenizer(out)).items():
        (out / name).write_bytes(content)
    return out


@pytest.fixture(scope="module")
def model(folder: pathlib.Path) -> harness.HarnessModel:
    layout = sharding.layouts(sharding.make_mesh({}, jax.devices()[:1]))["decode"]
    config, params = convert.load(folder, dtype="float32")
    return harness.HarnessModel(config, params, text.load_tokenizer(folder), layout, rows=4)


def test_likelihoods_equal_those_of_transformers(model: harness.HarnessModel, folder: pathlib.Path) -> None:
    torch = pytest.importorskip("torch", reason="torch is not here: no reference to compare with")
    transformers = pytest.importorskip("transformers", reason="transformers is not here: no reference to compare with")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    found = model.loglikelihood(instances("loglikelihood", CONTEXTS), disable_tqdm=True)
    for (context, continuation), (logp, is_greedy) in zip(CONTEXTS, found, strict=True):
        cut = context.rstrip()
        before = tokenizer(cut, add_special_tokens=False).input_ids if cut else [model.prefix_token_id]
        ids = tokenizer(context + continuation, add_special_tokens=False).input_ids
        ids = ids if cut else before + ids
        with torch.no_grad():
            logits = theirs(torch.tensor([ids])).logits[0].log_softmax(-1).numpy()
        places = range(len(before), len(ids))
        assert len(places) > 0
        assert logp == pytest.approx(sum(logits[i - 1, ids[i]] for i in places), abs=1e-4)
        assert is_greedy == all(logits[i - 1].argmax() == ids[i] for i in places)


def test_a_whole_text_is_the_sum_of_its_windows(model: harness.HarnessModel) -> None:
    said = "So 3 * 8 = 24. " * 12
    ids = model.tok_encode(said, add_special_tokens=False)
    (whole,) = model.loglikelihood_rolling(instances("loglikelihood_rolling", [(said,)]))
    logp, _ = model.score([[model.prefix_token_id, *ids]])
    assert whole == pytest.approx(logp[0, : len(ids)].sum(), rel=1e-5)
    model.max_length, before = 16, model.max_length
    try:
        (windows,) = model.loglikelihood_rolling(instances("loglikelihood_rolling", [(said,)]))
    finally:
        model.max_length = before
    parts = [[model.prefix_token_id if i == 0 else ids[i - 1], *ids[i : i + 16]] for i in range(0, len(ids) - 16, 16)]
    # The last window has as much context as there is room for.
    rest = len(ids) % 16 or 16
    parts.append(ids[len(ids) - 17 :])
    sums = [model.score([part])[0][0, : len(part) - 1] for part in parts]
    sums[-1] = sums[-1][-rest:]
    assert windows == pytest.approx(sum(float(one.sum()) for one in sums), rel=1e-4)


def test_writing_is_greedy_and_ends_before_the_stop_text(model: harness.HarnessModel) -> None:
    prompt = "3 + 4 ="
    (whole,) = model.generate_until(instances("generate_until", [(prompt, {"until": [], "max_gen_toks": 12})]))
    ids = model.tok_encode(prompt)
    logits_of = jax.jit(lambda tokens: harness.transformer.forward(model.params, POLICY, tokens))
    for _ in range(12):
        padded = np.zeros((1, 64), np.int32)
        padded[0, : len(ids)] = ids
        ids.append(int(logits_of(padded)[0, len(ids) - 1].argmax()))
        if ids[-1] in model.words.eos_ids:
            break
    n = len(model.tok_encode(prompt))
    assert whole == model.words.decode(ids[n:]) and len(whole) > 3
    until = whole[2:4]
    (cut,) = model.generate_until(instances("generate_until", [(prompt, {"until": [until], "max_gen_toks": 12})]))
    assert cut == whole[: whole.index(until)]


def test_tasks_of_both_kinds_run_from_local_files(
    folder: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    rows = {
        "choice": [{"question": f"{i} + 1 =", "choices": [f" {i + 1}", f" {i}"], "answer": 0} for i in range(3)],
        "write": [{"question": f"{i} + 1 =", "answer": str(i + 1)} for i in range(3)],
    }
    for kind, more in (("choice", CHOICE), ("write", WRITE)):
        data = tmp_path / f"{kind}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows[kind]))
        (tmp_path / f"{kind}.yaml").write_text(TASK.format(kind=kind, data=data) + more)
    out = tmp_path / "out.json"
    harness.main(
        [
            f"--model={folder}",
            "--tasks=local_choice,local_write",
            f"--include_path={tmp_path}",
            f"--out={out}",
            "--rows=8",
        ]
    )
    results = json.loads(out.read_text())["results"]
    assert 0 <= results["local_choice"]["acc,none"] <= 1
    assert results["local_write"]["exact_match,none"] == 0.0
