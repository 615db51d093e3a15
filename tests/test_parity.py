"""The same folder gives the same numbers here and in transformers: small random models of every family, float32."""

import dataclasses
import json
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import one_device

from r1jax.draw import DrawConfig
from r1jax.model import convert, safetensors_io, transformer
from r1jax.model.config import ModelConfig
from r1jax.sampler import sample
from r1jax.slots import SamplerConfig, Verbs
from r1jax.types import Request

torch = pytest.importorskip(
    "torch", reason="torch is not here (extra [test], Python 3.11): no reference to compare with"
)
transformers = pytest.importorskip("transformers", reason="transformers is not here: no reference to compare with")

torch.set_num_threads(1)  # tiny models; the tests run in parallel

# Weights far larger than at initialisation, so that attention and routing are sharp and a wrong term shows.
SHAPE = {"vocab_size": 64, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48, "num_hidden_layers": 3}
WIDE = {**SHAPE, "initializer_range": 0.15, "max_position_embeddings": 256, "use_cache": True}
HEADS = {**WIDE, "num_key_value_heads": 2}
DEEPSEEK = {
    **WIDE,
    "model_type": "deepseek_v3",
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "n_routed_experts": 16,
    "num_experts_per_tok": 3,
    "n_shared_experts": 2,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "n_group": 4,
    "topk_group": 2,
    "num_nextn_predict_layers": 1,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "original_max_position_embeddings": 64}
V2 = {key: value for key, value in DEEPSEEK.items() if key not in ("n_group", "topk_group", "num_nextn_predict_layers")}
V2 |= {"model_type": "deepseek_v2", "norm_topk_prob": False}
ROUTED = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 16}
FAMILIES: dict[str, dict[str, Any]] = {
    "deepseek_v3, YaRN, low-rank query": {
        **DEEPSEEK,
        "q_lora_rank": 24,
        "rope_scaling": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.8},
    },
    "deepseek_v3, gates not normalised": {
        **DEEPSEEK,
        "q_lora_rank": None,
        "norm_topk_prob": False,
        "n_group": 1,
        "topk_group": 1,
    },
    "deepseek_v2, greedy, YaRN as V2-Lite": {
        **V2,
        "topk_method": "greedy",
        "q_lora_rank": None,
        "routed_scaling_factor": 1.5,
        "rope_scaling": {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
    },
    "deepseek_v2, groups, YaRN": {
        **V2,
        "topk_method": "group_limited_greedy",
        "n_group": 4,
        "topk_group": 2,
        "q_lora_rank": 24,
        "routed_scaling_factor": 2.0,
        "rope_scaling": {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
    },
    "qwen2, tied": {**HEADS, "model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3, YaRN": {**HEADS, "model_type": "qwen3", "head_dim": 12, "rope_scaling": YARN},
    "qwen3_moe": {**HEADS, **ROUTED, "model_type": "qwen3_moe", "head_dim": 8, "norm_topk_prob": True},
    "llama": {
        **HEADS,
        "model_type": "llama",
        "rope_scaling": {**LLAMA3, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    },
}


LENGTH = 96  # beyond the original context of the extended ones


@dataclasses.dataclass
class Saved:
    """A model of theirs, the folder that it was saved to, the same loaded by us; `ours` gives logits [2, LENGTH, V]."""

    model: Any
    folder: pathlib.Path
    config: ModelConfig
    params: dict
    ours: Callable[..., np.ndarray]


def their_model(fields: dict[str, Any]) -> Any:
    """A random model of transformers with no weight at a value that would hide an error."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(**fields)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, weight in [*model.named_parameters(), *model.named_buffers()]:
            if "norm" in name:
                weight.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                weight.normal_(0, 0.3)
    return model


@pytest.fixture(scope="module", params=FAMILIES.values(), ids=FAMILIES)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """A model of transformers, the folder that it was saved to, and ours as loaded from there."""
    folder = tmp_path_factory.mktemp("theirs") / "model"
    model = their_model(request.param)
    model.save_pretrained(folder)
    config, params = convert.load(folder)
    forward = jax.jit(lambda *given: transformer.forward(params, config, *given))

    def ours(tokens: np.ndarray, positions: np.ndarray | None = None, live: np.ndarray | None = None) -> np.ndarray:
        positions = np.broadcast_to(np.arange(LENGTH), tokens.shape) if positions is None else positions
        live = np.ones_like(tokens) if live is None else live
        return np.asarray(forward(*map(jnp.asarray, (tokens, positions, live))))

    return Saved(model, folder, config, params, ours)


def test_logits(saved: Saved) -> None:
    tokens = np.random.default_rng(0).integers(0, saved.config.vocab_size, (2, LENGTH))
    with torch.no_grad():
        want = saved.model(torch.tensor(tokens)).logits.numpy()
    assert np.abs(want).max() > 1
    np.testing.assert_allclose(saved.ours(tokens), want, atol=1e-4, rtol=0)


def test_padding(saved: Saved) -> None:
    tokens = np.random.default_rng(1).integers(0, saved.config.vocab_size, (2, LENGTH))
    live = np.ones_like(tokens)
    live[0, :20] = 0
    positions = np.maximum(live.cumsum(1) - 1, 0)
    with torch.no_grad():
        want = saved.model(*map(torch.tensor, (tokens, live)), position_ids=torch.tensor(positions)).logits.numpy()
    got = saved.ours(tokens, positions, live)
    np.testing.assert_allclose(got[live == 1], want[live == 1], atol=1e-4, rtol=0)


def test_greedy_decoding(saved: Saved) -> None:
    prompt = np.random.default_rng(2).integers(2, saved.config.vocab_size, (2, LENGTH - 64))
    free = {"eos_token_id": None, "pad_token_id": 0, "do_sample": False, "max_new_tokens": 64}
    theirs = saved.model.generate(torch.tensor(prompt), attention_mask=torch.ones(prompt.shape), **free).numpy()
    # Each of their tokens is our likeliest after the ones before it, so ours would be the same text.
    chosen = saved.ours(theirs).argmax(-1)
    np.testing.assert_array_equal(chosen[:, -65:-1], theirs[:, -64:])


def test_sampled_log_probabilities(saved: Saved) -> None:
    sizes = SamplerConfig(slots=4, tokens_per_dispatch=16, cache_bucket=32, prefill_prompts=2)
    verbs = Verbs(saved.config, sizes, DrawConfig(), one_device()["decode"], [-1])
    rng = np.random.default_rng(4)
    prompts = [tuple(rng.integers(0, saved.config.vocab_size, n).tolist()) for n in (9, 40)]
    requests = [Request(i, member, ids) for i, ids in enumerate(prompts) for member in range(2)]
    for done in sample(verbs, saved.params, requests, jax.random.key(0), 48):
        n = len(prompts[done.prompt])
        with torch.no_grad():
            logits = saved.model(torch.tensor([[*prompts[done.prompt], *done.tokens.tolist()]])).logits[0, n - 1 : -1]
        want = torch.log_softmax(logits, -1).numpy()[np.arange(48), done.tokens]
        np.testing.assert_allclose(done.logp, want, atol=1e-4, rtol=0)


def test_export_is_their_model(saved: Saved, tmp_path: pathlib.Path) -> None:
    convert.save(saved.params, saved.config, tmp_path / "ours")
    how = {"output_loading_info": True, "attn_implementation": "eager"}
    back, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", **how)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    want, got = saved.model.state_dict(), back.state_dict()
    assert want.keys() == got.keys()
    assert all(torch.equal(want[name], got[name]) for name in want)
    tokens = torch.arange(24)[None]
    with torch.no_grad():
        assert torch.equal(back.eval()(tokens).logits, saved.model(tokens).logits)


def test_stored_names_are_theirs(saved: Saved) -> None:
    hf = json.loads((saved.folder / "config.json").read_text())
    if "num_nextn_predict_layers" in hf:
        hf["num_nextn_predict_layers"] = 0  # they name the layer and leave it out
    stored = safetensors_io.open_folder(saved.folder)
    assert convert.tensor_plan(hf) == {name: (tensor.shape, "F32") for name, tensor in stored.items()}


def test_multi_token_prediction(tmp_path: pathlib.Path) -> None:
    layers = pytest.importorskip("transformers.modeling_layers")
    if not hasattr(layers, "MtpModel"):
        pytest.skip("this version of transformers has no multi-token prediction to compare with")
    from transformers.cache_utils import MtpCache

    model = their_model({**DEEPSEEK, "q_lora_rank": 24})
    model.save_pretrained(tmp_path / "main")
    config, params = convert.load(tmp_path / "main")
    config = dataclasses.replace(config, num_nextn_predict_layers=1)
    rng = np.random.default_rng(0)
    layer = jax.tree.map(lambda leaf: leaf[-1:], params["moe"])
    mtp = {"proj": rng.normal(0, 0.2, (64, 32)), "layer": jax.tree.map(lambda leaf: leaf[:, ::-1], layer)}
    mtp |= {name: rng.uniform(0.5, 1.5, 32) for name in ("hidden_norm", "embed_norm", "norm")}
    params["mtp"] = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), mtp)
    convert.save(params, config, tmp_path / "both")

    main = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "both", attn_implementation="eager").eval()
    main._keys_to_ignore_on_load_unexpected = [r"model\.layers\.3.*"]  # the class knows the published depth only
    theirs = layers.MtpModel.from_pretrained(main).eval()
    tokens = np.random.default_rng(3).integers(0, config.vocab_size, (1, 33))
    with torch.no_grad():
        seen = main(torch.tensor(tokens[:, :-1]), output_hidden_states=True)
        # What transformers hands to the layer is the main model's output after its final norm.
        assert torch.equal(main.lm_head(seen.hidden_states[-1]), seen.logits)
        cache = MtpCache(config=main.config.get_mtp_config())
        positions = torch.arange(1, 33)[None]
        last = theirs.forward_layer(0, seen.hidden_states[-1], positions, cache, input_ids=torch.tensor(tokens[:, 1:]))
        want = theirs._project_to_logits(last).numpy()

    def drafted(params: dict, tokens: jax.Array) -> jax.Array:
        x = transformer.hidden(params, config, tokens[:, :-1]).x
        where = jnp.arange(32)[None]
        x, _ = transformer.next_token_hidden(params, config, x, tokens[:, 1:], where, jnp.ones_like(where))
        return transformer.logits(params, x)

    np.testing.assert_allclose(jax.jit(drafted)(params, jnp.asarray(tokens)), want, atol=1e-4, rtol=0)
