"""Released folders in and out: what is read is what was written, and the published names are ours."""

import dataclasses
import gzip
import json
import math
import pathlib

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from folders import BFLOAT16, CONFIGS, DEEPSEEK, edit, random_tree, read
from safetensors.numpy import save_file

from configs import models
from r1jax import run
from r1jax.model import convert, fp8, safetensors_io, tensors, transformer
from r1jax.model.config import ModelConfig
from r1jax.model.families import config_from_hf, config_to_hf
from r1jax.sharding import make_mesh

PUBLISHED = pathlib.Path(__file__).resolve().parents[2] / "shared/data/deepseek_r1"

every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def assert_same(got: dict, want: dict) -> None:
    """Bit for bit, dtype for dtype, leaf for leaf."""
    got, want = flatten_dict(got, sep="."), flatten_dict(want, sep=".")
    assert got.keys() == want.keys()
    for at, leaf in want.items():
        assert got[at].dtype == leaf.dtype, at
        np.testing.assert_array_equal(np.asarray(got[at]), np.asarray(leaf), err_msg=at)


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    """A saved DEEPSEEK model in one file."""
    convert.save(random_tree(DEEPSEEK), DEEPSEEK, tmp_path / "model")
    return tmp_path / "model"


def test_plan_is_the_published_list() -> None:
    if not PUBLISHED.is_dir():
        pytest.skip(f"{PUBLISHED} is not here: the published names, shapes and dtypes cannot be compared")
    hf = json.loads((PUBLISHED / "config.json").read_text())
    with gzip.open(PUBLISHED / "params_map.json.gz") as stream:
        published = {name: (tuple(t["shape"]), t["dtype"]) for name, t in json.load(stream).items()}
    assert len(published) == 91_991
    assert convert.tensor_plan(hf) == published


def test_published_configuration_comes_back() -> None:
    if not PUBLISHED.is_dir():
        pytest.skip(f"{PUBLISHED} is not here: the published configuration cannot be read")
    config = config_from_hf(json.loads((PUBLISHED / "config.json").read_text()))
    assert (config.n_dense, config.n_moe, config.cache_width, config.rope.factor) == (3, 58, 576, 40)
    assert config_from_hf(config_to_hf(config)) == config


# config.json of deepseek-ai/DeepSeek-V2-Lite, as it was published.
V2_LITE = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "aux_loss_alpha": 0.001,
    "bos_token_id": 100000,
    "eos_token_id": 100001,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 10944,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v2",
    "moe_intermediate_size": 1408,
    "moe_layer_freq": 1,
    "n_group": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 27,
    "num_key_value_heads": 16,
    "pretraining_tp": 1,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 0.707,
        "mscale_all_dim": 0.707,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 1.0,
    "scoring_func": "softmax",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "topk_group": 1,
    "topk_method": "greedy",
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "v_head_dim": 128,
    "vocab_size": 102400,
}


def test_v2_lite_is_the_published_one() -> None:
    config, preset = config_from_hf(V2_LITE), run.model_config(models.MODELS["deepseek_v2_lite"])
    assert dataclasses.replace(preset, group_score=config.group_score) == config, "one group: its score does not count"
    sizes = [math.prod(shape) for shape, _ in convert.tensor_plan(V2_LITE).values()]
    assert sum(sizes) == 15_706_484_224
    assert {kind for _, kind in convert.tensor_plan(V2_LITE).values()} == {"BF16"}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("tiny", "deepseek_v3"),
        ("deepseek_v2_lite", "deepseek_v2"),
        ("qwen2_5_7b", "qwen2"),
        ("qwen3_30b_a3b", "qwen3_moe"),
    ],
)
def test_architectures_by_name_have_a_released_family(name: str, kind: str) -> None:
    config = run.model_config(models.MODELS[name])
    hf = config_to_hf(config)
    assert hf["model_type"] == kind
    assert dataclasses.replace(config_from_hf(hf), group_score=config.group_score) == config


@every_config
def test_leaves_are_the_models(config: ModelConfig) -> None:
    declared = flatten_dict(transformer.shapes(config, BFLOAT16), sep=".")
    ours = flatten_dict(random_tree(config, BFLOAT16), sep=".")
    assert {at: (a.shape, a.dtype) for at, a in ours.items()} == {at: (a.shape, a.dtype) for at, a in declared.items()}


@every_config
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_there_and_back_is_the_identity(config: ModelConfig, dtype: str, tmp_path: pathlib.Path) -> None:
    tree = random_tree(config, jnp.dtype(dtype))
    convert.save(tree, config, tmp_path / "out")
    back_config, back = convert.load(tmp_path / "out")
    assert back_config == config
    assert_same(back, tree)


@every_config
def test_a_saved_folder_holds_its_plan(config: ModelConfig, tmp_path: pathlib.Path) -> None:
    convert.save(random_tree(config), config, tmp_path / "out")
    plan = convert.tensor_plan(json.loads((tmp_path / "out/config.json").read_text()))
    stored = safetensors_io.open_folder(tmp_path / "out")
    assert {name: (t.shape, "F32") for name, t in stored.items()} == plan


def test_arrangement_by_hand() -> None:
    size = {"H": 2, "n": 1, "r": 4, "D": 1, "v": 2, "c": 1}
    (query,) = tensors.MLA_QUERY
    stored = np.arange(10.0)[:, None]  # rows: head 0 is [n, r r r r], head 1 alike
    want = np.array([[[0, 1, 3, 2, 4], [5, 6, 8, 7, 9]]])  # pairs (1, 2), (3, 4) become halves (1, 3), (2, 4)
    np.testing.assert_array_equal(tensors.to_ours(stored, query, "attn.q", size), want)
    both = tensors.MLA[2]
    stored = np.arange(6.0)[:, None]  # rows: head 0 is [n, v, v]
    np.testing.assert_array_equal(tensors.to_ours(stored, both, "attn.k_b", size), [[[0], [3]]])
    np.testing.assert_array_equal(tensors.to_ours(stored, both, "attn.v_b", size), [[[1, 2], [4, 5]]])


def test_sharded_equals_single(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    config, tree = convert.load(folder)
    convert.save(tree, config, tmp_path / "shards", max_shard_bytes=8192)
    files = sorted((tmp_path / "shards").glob("*.safetensors"))
    assert len(files) > 2 and files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((tmp_path / "shards/model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {file.name for file in files}
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in safetensors_io.open_folder(folder).values())
    assert_same(convert.load(tmp_path / "shards")[1], tree)


@pytest.mark.parametrize("sizes", [{"fsdp": 2, "expert": 2, "tensor": 2}, {"data": 8}, {"expert": 8}], ids=str)
def test_load_onto_a_mesh_equals_load(folder: pathlib.Path, sizes: dict) -> None:
    _, plain = convert.load(folder)
    _, spread = convert.load(folder, mesh=make_mesh(sizes))
    assert_same(spread, plain)
    experts = spread["moe"]["mlp"]["gate"]
    parts = sizes.get("expert", 1) * sizes.get("tensor", 1)
    assert experts.addressable_shards[0].data.shape[1] == 8 // parts


def test_loaded_weights_can_be_donated(folder: pathlib.Path) -> None:
    _, tree = convert.load(folder)
    want = np.asarray(tree["embed"]) + 1
    step = jax.jit(lambda t: jax.tree.map(lambda a: a + 1, t), donate_argnums=0)
    np.testing.assert_array_equal(step(tree)["embed"], want)
    assert_same(convert.load(folder)[1], random_tree(DEEPSEEK))


def test_load_casts_all_but_the_router(folder: pathlib.Path) -> None:
    _, tree = convert.load(folder, dtype="bfloat16")
    assert_same(tree, random_tree(DEEPSEEK, BFLOAT16))


def quantise(folder: pathlib.Path, block: tuple[int, int]) -> None:
    """Makes every matrix of the folder FP8 in blocks, as the published checkpoint is."""
    rng = np.random.default_rng(1)
    hf = json.loads((folder / "config.json").read_text())
    hf |= {"torch_dtype": "bfloat16"}
    hf["quantization_config"] = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": list(block)}
    (folder / "config.json").write_text(json.dumps(hf))
    out = {}
    stored = read(folder)
    for name, (shape, dtype) in convert.tensor_plan(hf).items():
        if dtype == "F8_E4M3":
            out[name] = rng.standard_normal(shape, np.float32).astype(ml_dtypes.float8_e4m3fn)
        elif name.endswith("_scale_inv"):
            out[name] = rng.uniform(0.5, 2, shape).astype(np.float32)
        else:
            out[name] = stored[name].astype(ml_dtypes.bfloat16 if dtype == "BF16" else np.float32)
    save_file(out, folder / "model.safetensors")


def test_dequantise_by_hand() -> None:
    rng = np.random.default_rng(0)
    weight = np.arange(256, dtype=np.uint8)[:255].reshape(15, 17).view(ml_dtypes.float8_e4m3fn)
    scale = rng.standard_normal(fp8.scale_shape(weight.shape, (4, 8))).astype(np.float32)
    want = [[np.float32(weight[i, j]) * scale[i // 4, j // 8] for j in range(17)] for i in range(15)]
    np.testing.assert_array_equal(fp8.dequantise(weight, scale, (4, 8)), np.array(want))


def test_fp8_folder_is_dequantised(folder: pathlib.Path) -> None:
    quantise(folder, (4, 3))
    stored = read(folder)
    name = "model.layers.2.mlp.experts.5.down_proj.weight"
    want = fp8.dequantise(stored[name], stored[name + "_scale_inv"], (4, 3)).T
    _, exact = convert.load(folder, dtype="float32")
    _, short = convert.load(folder)
    np.testing.assert_array_equal(exact["moe"]["mlp"]["down"][1, 5], want)
    np.testing.assert_array_equal(short["moe"]["mlp"]["down"][1, 5], want.astype(ml_dtypes.bfloat16))
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(short["dense"])} == {"bfloat16"}
    _, spread = convert.load(folder, mesh=make_mesh({"fsdp": 2, "expert": 2, "tensor": 2}), dtype="float32")
    assert_same(spread, exact)


def test_tied_folder_may_repeat_the_embedding(tmp_path: pathlib.Path) -> None:
    config = CONFIGS["qwen2"]
    convert.save(random_tree(config), config, tmp_path / "out")
    edit(tmp_path / "out", lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"]}))
    assert_same(convert.load(tmp_path / "out")[1], random_tree(config))


def test_folder_without_its_mtp_layer_loads_without_one(folder: pathlib.Path) -> None:
    edit(folder, lambda t: [t.pop(name) for name in list(t) if name.startswith("model.layers.3.")])
    config, tree = convert.load(folder)
    assert config == dataclasses.replace(DEEPSEEK, num_nextn_predict_layers=0)
    assert "mtp" not in tree


def test_extra_files_and_fields_travel(tmp_path: pathlib.Path) -> None:
    fields = {"bos_token_id": 3, "eos_token_id": 5, "vocab_size": 7}
    convert.save(random_tree(DEEPSEEK), DEEPSEEK, tmp_path / "a/b", {"tokenizer.json": b"{}"}, hf_fields=fields)
    assert (tmp_path / "a/b/tokenizer.json").read_text() == "{}"
    hf = json.loads((tmp_path / "a/b/config.json").read_text())
    assert (hf["eos_token_id"], hf["vocab_size"], hf["torch_dtype"]) == (5, 40, "float32")


def test_fp8_out_and_in_is_within_half_a_step(tmp_path: pathlib.Path) -> None:
    rng = np.random.default_rng(0)
    weight = (rng.standard_normal((10, 13)) * np.exp2(rng.integers(-4, 4, (10, 13)))).astype(np.float32)
    weight[:4, :3] = 0
    values, scale = fp8.quantise(weight, (4, 3))
    back = fp8.dequantise(values, scale, (4, 3))
    by_value = np.repeat(np.repeat(scale, 4, 0), 3, 1)[:10, :13]
    assert np.abs(values.astype(np.float32)).max() == 448 and not back[:4, :3].any()
    # A step of e4m3 is an eighth of the power of two below; under 2^-6 it is 2^-9.
    step = np.exp2(np.maximum(np.floor(np.log2(np.maximum(np.abs(weight / by_value), 1e-9))), -6) - 3) * by_value
    assert (np.abs(back - weight) <= step / 2 * (1 + 1e-6)).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_fp8_folder_comes_back(folder: pathlib.Path, tmp_path: pathlib.Path, dtype: str) -> None:
    quantise(folder, (4, 3))
    config, tree = convert.load(folder, dtype=dtype)
    convert.save(tree, config, tmp_path / "again", dtype="bfloat16", block=(4, 3))
    before, after = read(folder), read(tmp_path / "again")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        if name + fp8.SCALE not in before:
            if not name.endswith(fp8.SCALE):
                np.testing.assert_array_equal(after[name], tensor, err_msg=name)
            continue
        want = fp8.dequantise(tensor, before[name + fp8.SCALE], (4, 3))
        got = fp8.dequantise(after[name], after[name + fp8.SCALE], (4, 3))
        scale = np.repeat(np.repeat(before[name + fp8.SCALE], 4, 0), 3, 1)[: want.shape[0], : want.shape[1]]
        ulp = np.exp2(np.maximum(np.floor(np.log2(np.maximum(np.abs(want / scale), 1e-9))), -6) - 3) * scale
        assert (np.abs(got - want) <= ulp).all(), name
    hf = json.loads((tmp_path / "again/config.json").read_text())
    assert hf["quantization_config"]["weight_block_size"] == [4, 3] and hf["torch_dtype"] == "bfloat16"
    assert convert.tensor_plan(hf) == {
        name: (t.shape, {"float8_e4m3fn": "F8_E4M3", "bfloat16": "BF16", "float32": "F32"}[t.dtype.name])
        for name, t in after.items()
    }


def test_fp8_is_for_deepseek_kinds(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match="FP8 blocks are for DeepSeek kinds; this model is a qwen3"):
        convert.save(random_tree(CONFIGS["qwen3"]), CONFIGS["qwen3"], tmp_path / "out", block=fp8.RELEASED)
    assert not (tmp_path / "out").exists()
