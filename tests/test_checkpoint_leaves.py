"""A checkpoint's leaves without the state that they are of: read where they are indexed, part by part."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from test_checkpoint import HOST, assert_same, shapes, tree

from r1jax import checkpoint
from r1jax.checkpoint import Checkpoints


def test_leaves_are_read_where_they_are_indexed(tmp_path, monkeypatch):
    if jax.device_count() < 8:
        pytest.skip("wants 8 simulated devices")
    monkeypatch.setattr(checkpoint, "SPLIT_BYTES", 64)
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    spread = NamedSharding(mesh, PartitionSpec(None, "x", "y"))
    stack = np.random.default_rng(0).integers(0, 2**32, (3, 8, 4), np.uint32).view(np.float32)
    saved = tree() | {"stack": jax.device_put(stack, spread)}
    checkpoints = Checkpoints(tmp_path, save_every=1, keep=1)
    checkpoints.save(1, saved, HOST)
    checkpoints.wait()
    lazy = checkpoints.open(1, shapes(saved))
    assert_same(saved, jax.tree.map(lambda leaf: leaf[()], lazy))
    for layer in np.arange(3):
        assert lazy["stack"][(layer,)].tobytes() == stack[layer].tobytes()
    assert_same(saved, checkpoints.restore(1, shapes(saved))[0])
    with pytest.raises(ValueError, match="no checkpoint of step 2"):
        checkpoints.open(2, shapes(saved))
    with pytest.raises(ValueError, match=r"stack is float32\[3,8,4\] there"):
        checkpoints.open(1, shapes(saved) | {"stack": jax.ShapeDtypeStruct((3, 8), jnp.float32)})
    checkpoints.close()
