"""Log-probabilities whose tokens and vocabulary are spread over devices are those of one device, gradients too."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1jax import sharding
from r1jax.model import vocabulary

B, T, D, V = 4, 8, 6, 10


def both(layout: sharding.Layout | None) -> tuple:
    keys = jax.random.split(jax.random.key(0), 3)
    x, head = jax.random.normal(keys[0], (B, T, D)) / 3, jax.random.normal(keys[1], (D, V))
    targets = jax.random.randint(keys[2], (B, T), 0, V)
    weights = jnp.linspace(-1, 1, B * T).reshape(B, T)

    def loss(x: jax.Array, head: jax.Array) -> tuple:
        with sharding.use(layout):
            logp, entropy = vocabulary.token_logps(head, x, targets, 0.7)
        return (weights * logp).sum(), (logp, entropy)

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(x, head)


@pytest.mark.parametrize("in_blocks", [False, True], ids=["at once", "in blocks"])
@pytest.mark.parametrize("sizes", [{"fsdp": 2, "context": 2, "tensor": 2}, {"data": 4, "context": 2}])
def test_spread_over_devices_they_are_one_devices(monkeypatch, sizes, in_blocks):
    want = both(None)
    if in_blocks:
        monkeypatch.setattr(vocabulary, "LOGITS_AT_ONCE", 10)
    got = both(sharding.layouts(sharding.make_mesh(sizes))["train"])
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-5), got, want)


def test_they_are_log_softmax_and_its_entropy():
    (_, (logp, entropy)), _ = both(None)
    keys = jax.random.split(jax.random.key(0), 3)
    z = jax.random.normal(keys[0], (B, T, D)) @ jax.random.normal(keys[1], (D, V)) / 3 / 0.7
    p = jax.nn.softmax(z)
    targets = jax.random.randint(keys[2], (B, T), 0, V)
    np.testing.assert_allclose(logp, jnp.take_along_axis(jnp.log(p), targets[..., None], -1)[..., 0], atol=1e-4)
    np.testing.assert_allclose(entropy, -(p * jnp.log(p)).sum(-1), atol=1e-4)
