"""A released-layout model with random weights and a real tokenizer, trained on GSM8K, exported, opened by others."""

import gzip
import json
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from tiny_run import REWARDS, ROOT, STAGE, metrics, run_main

from r1jax import export, run, text
from r1jax.model import convert, transformer

SHARED = ROOT.parent / "shared" / "data"

QWEN = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 64,
    "qk_norm": True,  # qwen3: for qwen2, transformers 5 splits digits its own way, whatever tokenizer.json says
    "tie_word_embeddings": True,
    "max_position_embeddings": 1024,
    "initializer_range": 0.2,
}


@pytest.mark.slow
def test_a_released_model_goes_in_and_out(tmp_path: pathlib.Path) -> None:
    if not SHARED.is_dir():
        pytest.skip(f"{SHARED} is absent: neither the real tokenizer nor GSM8K is here")
    torch = pytest.importorskip("torch", reason="torch is not here: no reference to compare with")
    transformers = pytest.importorskip("transformers", reason="transformers is not here: no reference to compare with")
    published = SHARED / "deepseek_r1"
    files = {
        "tokenizer.json": gzip.decompress((published / "tokenizer.json.gz").read_bytes()),
        "tokenizer_config.json": (published / "tokenizer_config.json").read_bytes(),
    }
    vocab_size = json.loads((published / "config.json").read_text())["vocab_size"]
    model = run.model_config({"vocab_size": vocab_size, **QWEN})
    rng = np.random.default_rng(0)
    weights = {
        name: rng.normal(0, 0.2, leaf.shape).astype(np.float32)
        for name, leaf in flatten_dict(transformer.shapes(model), sep=".").items()
    }
    released = {"bos_token_id": 0, "eos_token_id": 1}
    convert.save(unflatten_dict(weights, sep="."), model, tmp_path / "in", files, released, dtype="bfloat16")

    # Random weights solve nothing: without a reward that completions differ in, there would be no gradient.
    (tmp_path / "rewards.py").write_text(REWARDS)
    shrunk = {
        "rewards": {"accuracy": 1.0, "variety": 1.0},
        "reward_paths": {"variety": f"{tmp_path}/rewards.py:variety"},
        "model.path": tmp_path / "in",
        "data.source": SHARED / "gsm8k_train.jsonl",
        "data.max_prompt_tokens": 512,
        "rl.updates": 2,
        "rl.minibatches": 1,
        "rl.prompts_per_update": 2,
        "rl.group_size": 2,
        "rl.max_completion_tokens": 16,
        "rl.row_tokens": 0,
        "rl.microbatch_rows": 2,
        "sampler.slots": 8,
        "sampler.prefill_prompts": 4,
        "eval.problems": 0,
        "grading.workers": 0,
    }
    flags = [f"--config.{key}={value}" for key, value in shrunk.items()]
    code, printed = run_main("--config=configs/zero.py", f"--workdir={tmp_path / 'run'}", *flags)
    assert code == 0, printed
    assert [record["step"] for record in metrics(tmp_path / "run")] == [1, 2]
    export.export(tmp_path / "run", tmp_path / "out", STAGE)

    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager").eval()
    assert theirs.config.model_type == "qwen3" and theirs.generation_config.eos_token_id == 1
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    talk = [{"role": "user", "content": "Natalia sold 48 clips. How many are left?"}]
    prompt = tokenizer.apply_chat_template(talk, add_generation_prompt=True, tokenize=False)
    assert prompt == tokenizer.bos_token + text.render_prompt("r1_zero", talk[0]["content"])
    ours = text.load_tokenizer(tmp_path / "out")
    _, ids = text.encode_prompt(ours, "r1_zero", talk[0]["content"])
    assert ids[0] == 0 and ids == tokenizer(prompt, add_special_tokens=False).input_ids
    config, params = convert.load(tmp_path / "out")
    with torch.no_grad():
        want = theirs(torch.tensor([ids])).logits.numpy()
    got = np.asarray(transformer.forward(params, config, jnp.asarray([ids])))
    np.testing.assert_allclose(got, want, atol=1e-4, rtol=0)
    assert not np.array_equal(params["embed"], convert.load(tmp_path / "in", dtype="float32")[1]["embed"])
