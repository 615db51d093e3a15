"""Laws of experts on other devices: however tokens get there, the sum and its gradient are those of one device."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import DEEPSEEK, jit, random_params

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
