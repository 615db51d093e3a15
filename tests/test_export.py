"""Any stage's checkpoint becomes a released-model folder: the weights of the run, whole or not at all."""

import dataclasses
import json
import pathlib
import resource
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from folders import read
from safetensors.numpy import load_file
from tiny_run import POLICY, ROOT, STAGE, execute, make_config, make_policy

from r1jax import chat, checkpoint, export, hand_over, pipeline, run, text
from r1jax.folders import folder_at
from r1jax.model import convert, fp8, lora, transformer


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> dict[str, pathlib.Path]:
    """The run folders of a policy trained whole and of one trained by adapters, and where both began."""
    made = tmp_path_factory.mktemp("runs")
    make_policy(made / "policy")
    short = {"rl__updates": 4, "eval__problems": 0, "grpo__kl_coef": 0.05}
    execute(make_config(made / "policy", **short), made / "whole")
    adapters = {"lora__rank": 2, "lora__targets": ("q_proj", "kv_b_proj", "o_proj", "down_proj")}
    execute(make_config(made / "policy", **short, **adapters), made / "adapted")
    return {name: made / name for name in ("policy", "whole", "adapted")}


@pytest.mark.parametrize("kind", ["whole", "adapted"])
def test_the_newest_checkpoint_is_what_the_run_left(kind: str, finished: dict, tmp_path: pathlib.Path) -> None:
    export.export(finished[kind], tmp_path / "out")
    got, want, began = read(tmp_path / "out"), read(finished[kind] / "models" / STAGE), read(finished["policy"])
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        np.testing.assert_allclose(got[name], tensor, atol=0 if kind == "whole" else 1e-6, rtol=0, err_msg=name)
    moved = {name for name in got if not np.array_equal(got[name], began[name])}
    if kind == "whole":
        assert "model.embed_tokens.weight" in moved
    else:
        targets = ("q_proj", "kv_b_proj", "o_proj", "shared_experts.down_proj", "mlp.down_proj")
        assert moved and all(name.endswith(tuple(f"{t}.weight" for t in targets)) for name in moved)


def test_an_adapted_run_leaves_a_peft_folder_and_small_checkpoints(finished: dict) -> None:
    folder = finished["adapted"] / "adapters" / STAGE
    assert {file.name for file in folder.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    described = json.loads((folder / "adapter_config.json").read_text())
    assert described["r"] == 2 and described["base_model_name_or_path"] == str(finished["policy"])

    def saved_bytes(kind: str) -> int:
        return sum(f.stat().st_size for f in (finished[kind] / "checkpoints").rglob("*") if f.is_file())

    assert saved_bytes("adapted") < saved_bytes("whole") / 2


def test_a_stage_goes_on_with_the_adapters_of_the_one_before_in_one_go_or_in_two(
    finished: dict, tmp_path: pathlib.Path
) -> None:
    page = {"page": STAGE, "start": "base"}
    settings = {"pipeline": {"first": page, "second": {"page": STAGE}}, "rl__updates": 2, "eval__problems": 0}
    settings |= {"lora__rank": 2, "lora__targets": ("q_proj", "o_proj")}
    both = make_config(finished["policy"], stages=("first", "second"), **settings)
    execute(both, tmp_path / "at once")
    execute(make_config(finished["policy"], stages=("first",), **settings), tmp_path / "in two")
    execute(both, tmp_path / "in two")
    first, second, resumed = (
        [
            load_file(tmp_path / run / "adapters" / stage / "adapter_model.safetensors"),
            read(tmp_path / run / "models" / stage),
        ]
        for run, stage in (("at once", "first"), ("at once", "second"), ("in two", "second"))
    )
    for before, after, again in zip(first, second, resumed, strict=True):
        assert any(not np.array_equal(before[name], after[name]) for name in after)
        assert all(np.array_equal(again[name], after[name]) for name in after)
    export.export(tmp_path / "in two", tmp_path / "out")
    for name, tensor in read(tmp_path / "out").items():
        np.testing.assert_allclose(tensor, second[1][name], atol=1e-6, rtol=0, err_msg=name)

    # Adapters of another size are not trained on: the whole model gets fresh ones. Elsewhere, nothing is different.
    shutil.rmtree(tmp_path / "in two" / "models" / "second")
    (tmp_path / "in two").rename(tmp_path / "moved")
    wider = make_config(finished["policy"], stages=("first",), **{**settings, "lora__rank": 4})
    first = ("first", tmp_path / "moved")
    assert hand_over.adapters_of(wider, *first) is None
    assert hand_over.adapted_by(wider, *first).root == str(tmp_path / "moved/models/first")
    assert hand_over.adapters_of(both, *first) == tmp_path / "moved/adapters/first"
    assert hand_over.adapted_by(both, *first).root == str(finished["policy"])
    described = tmp_path / "moved/adapters/first/adapter_config.json"
    for moved, root in (("/gone/models/first", str(tmp_path / "moved/models/first")), ("gone", None)):
        written = json.loads(described.read_text()) | {"base_model_name_or_path": moved}
        described.write_text(json.dumps(written))
        assert getattr(hand_over.adapted_by(both, *first), "root", None) == root
    (tmp_path / "moved/adapters/first/adapter_model.safetensors").write_bytes(b"cut")
    with pytest.raises(ValueError, match="adapter_model.safetensors is damaged"):
        execute(both, tmp_path / "moved")
    described.write_text("{}")
    with pytest.raises(ValueError, match=r"adapter_config.json is damaged \(KeyError"):
        execute(both, tmp_path / "moved")


def test_steps_and_stages_are_chosen(finished: dict, tmp_path: pathlib.Path) -> None:
    export.export(finished["whole"], tmp_path / "early", STAGE, 2)
    export.export(finished["whole"], tmp_path / "late", step=4)
    early, late = read(tmp_path / "early"), read(tmp_path / "late")
    assert any(not np.array_equal(early[name], late[name]) for name in early)
    for wrong, says in (
        ({"stage": "distill"}, f"none of stage distill; there is {STAGE} at step 2, 4"),
        ({"step": 3}, f"none of step 3; there is {STAGE} at step 2, 4"),
    ):
        with pytest.raises(ValueError, match=says):
            export.export(finished["whole"], tmp_path / "none", **wrong)
    run_folder, stage_folder = finished["whole"], finished["whole"] / "checkpoints" / STAGE
    assert export.locate(run_folder) == (run_folder, None, None)
    assert export.locate(stage_folder) == (run_folder, STAGE, None)
    assert export.locate(stage_folder / "2") == (run_folder, STAGE, 2)
    with pytest.raises(ValueError, match="is no run folder"):
        export.export(tmp_path / "absent", tmp_path / "none")
    (tmp_path / "empty").mkdir()
    config = json.loads((finished["whole"] / "config.json").read_text())
    (tmp_path / "empty/config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"has no whole checkpoint of {STAGE} yet"):
        export.export(tmp_path / "empty", tmp_path / "none")
    (tmp_path / "empty/config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is no run's config"):
        export.export(tmp_path / "empty", tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_what_lies_beside_the_weights(finished: dict, tmp_path: pathlib.Path) -> None:
    export.export(finished["whole"], tmp_path / "out", dtype="bfloat16")
    tokenizer = text.load_tokenizer(tmp_path / "out")
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
    assert json.loads((tmp_path / "out/generation_config.json").read_text()) == ids
    hf = json.loads((tmp_path / "out/config.json").read_text())
    assert ids.items() <= hf.items() and hf["torch_dtype"] == "bfloat16"
    source = (tmp_path / "out/chat_template.jinja").read_text()
    talk = [{"role": "user", "content": "What is 2+2?"}]
    want = text.render_prompt("r1_zero", "What is 2+2?")
    assert chat.Template(source).render(talk, add_generation_prompt=True).rstrip("\n") == want
    assert {t.dtype.name for name, t in read(tmp_path / "out").items() if "bias" not in name} == {"bfloat16"}


def test_fp8_blocks_are_within_half_a_step(finished: dict, tmp_path: pathlib.Path) -> None:
    export.export(finished["whole"], tmp_path / "out", dtype="bfloat16", in_fp8=True)
    got, want = read(tmp_path / "out"), read(finished["whole"] / "models" / STAGE)
    quantised = [name for name in got if name + fp8.SCALE in got]
    assert len(quantised) > 10 and not any("norm" in name or "embed" in name for name in quantised)
    for name in quantised:
        values = fp8.dequantise(got[name], got[name + fp8.SCALE], fp8.RELEASED)
        assert np.abs(values - want[name]).max() <= np.abs(want[name]).max() / 28, name
    config, tree = convert.load(tmp_path / "out", dtype="float32")
    assert config == POLICY and jax.tree.leaves(tree)[0].dtype == np.float32


def test_an_existing_folder_and_a_full_disk_leave_everything_as_it_was(finished: dict, tmp_path: pathlib.Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").write_text("here before")
    with pytest.raises(ValueError, match="exists and is not an empty folder"):
        export.export(finished["whole"], tmp_path / "out")
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["mine"]
    shutil.rmtree(tmp_path / "out")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))  # refuses bytes as a full disk does
    try:
        with pytest.raises(OSError, match=f"{tmp_path / 'out'} could not be written: File too large"):
            export.export(finished["whole"], tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


def test_transformers_computes_the_same(finished: dict, tmp_path: pathlib.Path) -> None:
    torch = pytest.importorskip("torch", reason="torch is not here: no reference to compare with")
    transformers = pytest.importorskip("transformers", reason="transformers is not here: no reference to compare with")
    words = [sys.executable, "-m", "r1jax.export", f"--checkpoint={finished['adapted']}", f"--out={tmp_path / 'out'}"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and f"{tmp_path / 'out'} holds " in done.stdout, done.stderr
    config, params = convert.load(finished["adapted"] / "models" / STAGE)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, 40))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager").eval()
    with torch.no_grad():
        want = theirs(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(transformer.forward(params, config, jnp.asarray(tokens)), want, atol=1e-4, rtol=0)
    again = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 1 and again.stderr.startswith("r1jax: ") and "not an empty folder" in again.stderr


# Memory is counted from where the packages are imported and the peak is set back (proc(5), clear_refs).
STREAM = """
import pathlib, sys
import jax
jax.config.update("jax_platforms", "cpu")
from r1jax import checkpoint, export
def memory(line):
    status = pathlib.Path("/proc/self/status").read_text()
    return next(1024 * int(l.split()[1]) for l in status.splitlines() if l.startswith(line))
export.export(sys.argv[1], sys.argv[2] + "-first")  # what jax and tensorstore set up once is no part of it
checkpoint.CACHE_BYTES = 1 << 22
before = memory("VmRSS")
pathlib.Path("/proc/self/clear_refs").write_text("5")
export.export(sys.argv[1], sys.argv[2])
print(memory("VmHWM") - before)
"""


@pytest.mark.skipif(not pathlib.Path("/proc/self/clear_refs").exists(), reason="the kernel counts no peak memory")
@pytest.mark.parametrize("adapters", [False, True])
def test_an_export_holds_a_few_tensors_at_a_time(
    adapters: bool, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = {"hidden_size": 256, "intermediate_size": 1024, "moe_intermediate_size": 768, "num_hidden_layers": 12}
    config = dataclasses.replace(POLICY, **wide)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda s: jnp.asarray(rng.random(s.shape, np.float32)), transformer.shapes(config))
    base, workdir = tmp_path / "base", tmp_path / "run"
    convert.save(params, config, base, run.companions(folder_at(pipeline.BASE)))
    monkeypatch.setattr(checkpoint, "SPLIT_BYTES", 1 << 20)
    written = {"stages": [STAGE], "model": {"path": str(base)}, "data": {"template": "plain"}}
    saved, whole = params, params
    if adapters:
        written["lora"] = {"rank": 2, "alpha": 4.0, "targets": ["o_proj", "down_proj"]}
        asked = run.adapting(config, written["lora"])
        saved = jax.tree.map(lambda s: jnp.asarray(rng.random(s.shape, np.float32)), lora.shapes(config, asked))
        whole = lora.merge(params, saved, config, asked)
    with checkpoint.Checkpoints(workdir / "checkpoints" / STAGE, save_every=1, keep=1) as checkpoints:
        checkpoints.save(3, {"policy": saved}, {})
    (workdir / "config.json").write_text(json.dumps(written))
    words = [sys.executable, "-c", STREAM, str(workdir), str(tmp_path / "out")]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert total > 100e6 and int(done.stdout) < total / 5, f"{int(done.stdout) / total:.2f} of the policy"
    _, back = convert.load(tmp_path / "out")
    for got, want in zip(jax.tree.leaves(back), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5 if adapters else 0, rtol=0)
