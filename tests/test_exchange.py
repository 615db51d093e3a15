"""Laws of experts on other devices: however tokens get there, the sum and its gradient are those of one device."""

import dataclasses
import importlib.util
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import DEEPSEEK, jit, random_params
from tiny_run import ROOT

from r1jax import sharding
from r1jax.model import exchange as exchanges
from r1jax.model import experts
from r1jax.model.config import EXPERT_EXCHANGES, Paths
from r1jax.model.exchange import peers_per_token
from r1jax.model.moe import moe

COMPOSED = {"rtol": 1e-4, "atol": 1e-4}
MESHES = [{"expert": 8}, {"data": 2, "expert": 2, "tensor": 2}]


# Several rounds, about one, so much room that all_to_all gathers instead; few rows are summed by a product.
@pytest.mark.parametrize(("slack", "few"), [(0.2, 256), (1.0, 0), (8.0, 256)])
@pytest.mark.parametrize("exchange", EXPERT_EXCHANGES)
@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_experts_apart_are_experts_at_hand(
    sizes: dict[str, int], exchange: str, slack: float, few: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experts, "FEW", few)
    p = jax.tree.map(lambda a: a[0], random_params(DEEPSEEK)["moe"]["mlp"])
    x, out = (np.random.default_rng(i).normal(size=(8, 48, 16)).astype(np.float32) for i in (1, 2))
    replay = np.full((8, 48, 2), -1)
    replay[0] = [3, 2]  # all of a device's tokens go to one other, which sends its own elsewhere
    replay[1] = [7, 0]
    devices = jax.devices()[: int(np.prod(list(sizes.values())))]
    layout = sharding.layouts(sharding.make_mesh(sizes, devices))["train"]
    if (
        exchange == "ragged_all_to_all" and sizes == MESHES[1]
    ):  # two experts a device: rows that nobody sent are not read
        bad = lambda keep, rows: jnp.where(keep[:, None, None], rows, jnp.nan)  # noqa: E731
        monkeypatch.setattr(exchanges, "where_rows", bad)

    def both(p: dict, x: jax.Array, layout: sharding.Layout | None, paths: Paths) -> tuple:
        with sharding.use(layout):
            (y, ids), pull = jax.vjp(lambda p, x: moe(p, DEEPSEEK, x, jnp.asarray(replay), paths), p, x)
            return y, ids, pull((jnp.asarray(out), np.zeros(ids.shape, jax.dtypes.float0)))

    run = jit(both, static_argnums=(2, 3))
    want = run(p, x, None, Paths())
    got = run(p, x, layout, Paths(expert_exchange=exchange, expert_slack=slack))
    assert np.abs(want[0]).max() > 0.1
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, **COMPOSED), got, want)


def test_groups_bound_how_far_a_token_travels() -> None:
    config = dataclasses.replace(DEEPSEEK, n_routed_experts=256, num_experts_per_tok=8, n_group=8, topk_group=4)
    assert [peers_per_token(config, n) for n in (2, 4, 8, 16, 64)] == [2, 4, 4, 8, 8]


COMPILE = """
import dataclasses, sys
import jax, jax.numpy as jnp
from configs.models import MODELS
from r1jax import run, sharding
from r1jax.model import transformer
from r1jax.model.config import Paths
from r1jax.model.moe import moe
from r1jax.plan import estimate, topology

sizes = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
config = dataclasses.replace(run.model_config(MODELS["deepseek_v2_lite"]), **sizes)
tpu = topology.open_topology(sys.argv[1])
mesh = sharding.make_mesh({"expert": 4}, list(tpu.devices))
layout = sharding.layouts(mesh)["train"]
lies = run.param_shardings(config, layout)["moe"]["mlp"]
like = lambda s, where: jax.ShapeDtypeStruct(s.shape[1:], s.dtype, sharding=layout.sharding(*where.spec[1:]))
p = jax.tree.map(like, transformer.shapes(config)["moe"]["mlp"], lies)
x = jax.ShapeDtypeStruct((4, 1024, 2048), jnp.bfloat16, sharding=layout.sharding("rows", None, None))
def loss(p, x):
    p = {name: w if "router" in name else jax.tree.map(lambda a: a.astype(x.dtype), w) for name, w in p.items()}
    return moe(p, config, x, None, Paths(expert_exchange="ragged_all_to_all"))[0].astype(jnp.float32).sum()
with sharding.use(layout):
    text = jax.jit(jax.grad(loss, (0, 1))).lower(p, x).compile().as_text()
whole, half = (estimate.cost(text, tpu, mesh, 1, {"grouped": share}) for share in (1.0, 0.5))
sent = sum(size for (kind, _), size in whole.moved.items() if kind == "ragged-all-to-all")
print("priced", whole.kernel_s > 1.4 * half.kernel_s > 0, round(sent / (2048 * 2048 * 2)))
"""


@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="no libtpu: pip install libtpu")
def test_the_ragged_exchange_compiles_for_a_pod_and_its_products_are_priced() -> None:
    def compiled(name: str) -> subprocess.CompletedProcess:
        env = os.environ | {"TPU_SKIP_MDS_QUERY": "1", "JAX_PLATFORMS": "cpu", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
        words = [sys.executable, "-c", COMPILE, name]
        return subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, check=False)

    # Of what is sent, the rows there are and not the room for them: tokens there, the gradient there and back.
    assert (done := compiled("v5p:2x2x1")).stdout.endswith("priced True 3\n"), done.stderr
    assert "which a v5e does not have; set it to all_to_all" in compiled("v5e:2x2").stderr
