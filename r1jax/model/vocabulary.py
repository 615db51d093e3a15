"""Log-probabilities of given tokens without all logits in memory at once, each device for its rows and its words.

Devices may share the vocabulary (Megatron-LM, arXiv 1909.08053, section 3). The loop over blocks of tokens runs within
each device: left to the partitioner, every block gathers the head anew and sums its gradient over all devices.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from r1jax import sharding

# Most logits held at once by a device, per [rows x tokens x vocabulary] block of log-probabilities: 256 MB in float32.
LOGITS_AT_ONCE = 2**26


def _block(
    x: Array, head: Array, targets: Array, temperature: float, shared: tuple[str, ...]
) -> tuple[Float[Array, "*n"], Float[Array, "*n"]]:
    z = jnp.matmul(x, head, preferred_element_type=jnp.float32) / temperature
    if not shared:
        total = jax.nn.logsumexp(z, axis=-1)
        mine = jnp.take_along_axis(z, targets[..., None], axis=-1)[..., 0]
        frozen = jax.lax.stop_gradient(z)
        mean = (jax.nn.softmax(frozen, axis=-1) * frozen).sum(-1)
        return mine - total, jax.lax.stop_gradient(total) - mean
    top = jax.lax.pmax(jax.lax.stop_gradient(z).max(-1), shared)
    total = jnp.log(jax.lax.psum(jnp.exp(z - top[..., None]).sum(-1), shared)) + top
    at = targets - jax.lax.axis_index(shared) * z.shape[-1]
    is_mine = (at >= 0) & (at < z.shape[-1])
    mine = jnp.take_along_axis(z, jnp.clip(at, 0, z.shape[-1] - 1)[..., None], axis=-1)[..., 0]
    mine = jax.lax.psum(jnp.where(is_mine, mine, 0), shared)
    frozen, level = jax.lax.stop_gradient((z, total))
    mean = jax.lax.psum((jnp.exp(frozen - level[..., None]) * frozen).sum(-1), shared)
    return mine - total, level - mean


def _here(
    x: Float[Array, "B T D"],
    head: Float[Array, "D V"],
    targets: Int[Array, "B T"],
    temperature: float,
    shared: tuple[str, ...],
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    b, t, _ = x.shape
    size = t
    while size % 2 == 0 and b * size * head.shape[1] > LOGITS_AT_ONCE:
        size //= 2
    block = partial(_block, temperature=temperature, shared=shared)
    if size == t:
        return block(x, head, targets)
    parts = (x.reshape(b, t // size, size, -1).swapaxes(0, 1), targets.reshape(b, t // size, size).swapaxes(0, 1))
    logp, entropy = jax.lax.map(lambda part: jax.checkpoint(block)(part[0], head, part[1]), parts)
    return logp.swapaxes(0, 1).reshape(b, t), entropy.swapaxes(0, 1).reshape(b, t)


def token_logps(
    head: Float[Array, "D V"], x: Float[Array, "B T D"], targets: Int[Array, "B T"], temperature: float
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Log-probability of each target and entropy (no gradient), in nats, of normalised hidden states `x`."""
    layout = sharding.current()
    if layout is None:
        return _here(x, head, targets, temperature, ())
    shared = layout.mesh_axes("vocab")
    rows = layout.spec(("rows", "tokens"))
    run = jax.shard_map(
        partial(_here, temperature=temperature, shared=shared),
        mesh=layout.mesh,
        in_specs=(PartitionSpec(*rows, None), PartitionSpec(None, shared or None), rows),
        out_specs=(rows, rows),
        check_vma=False,
    )
    return run(x, head, targets)
