"""Laws of a step with moments in host memory: it is the step, one layer's moments at a time, and they go back."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_optim import CONFIG, tree
from tiny import jit

from r1jax import optim, sharding

KIND = sharding.MEMORIES["host"]
LIES = jax.sharding.SingleDeviceSharding(jax.devices()[0])


def params_of(seed: int) -> dict[str, Any]:
    """A policy with a stack of layers below another name, as with a scalar head, and leaves outside of it."""
    return {
        "trunk": tree(seed),
        "score_norm": tree(seed)["norm"],
        "adapters": {"moe.q": tree(seed)["moe"]["attn"]["q"]},
    }


def ready(config: optim.OptimConfig) -> tuple[Any, dict[str, Any], optim.OptimState]:
    """A step, parameters, and moments where the config has them."""
    params = params_of(0)
    optimizer = optim.make_optimizer(config, params)
    lies = sharding.in_memory(jax.tree.map(lambda _: LIES, params), config.moments_on, "optim.moments_on")
    state = optim.init(optimizer, params)
    state = jax.device_put(state, optim.state_like(state, lies, LIES))
    return jit(functools.partial(optim.apply, optimizer), donate_argnums=(0, 1)), params, state


def kinds(state: optim.OptimState) -> set[str]:
    return {a.sharding.memory_kind for a in jax.tree.leaves(state.moments) if a.ndim > 1}


# Muon multiplies matrices, which the CPU does in another order for one of them than for a stack.
@pytest.mark.parametrize(
    ("change", "off"), [({}, 0), ({"moments_dtype": "bfloat16"}, 0), ({"optimizer": "muon"}, 1e-5)], ids=str
)
def test_steps_are_the_same(change, off):
    config, ran = dataclasses.replace(CONFIG, **change), {}
    for where in sharding.MEMORIES:
        step, params, state = ready(dataclasses.replace(config, moments_on=where))
        said = []
        for seed in (1, 2, 3):
            params, state, metrics = step(params, state, params_of(seed), jnp.float32(1))
            said.append(metrics["optim/grad_norm"])
        assert kinds(state) == ({KIND} if where == "host" else {"device"})
        assert float(said[0]) > config.grad_clip_norm
        ran[where] = params, state, said
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=off, atol=off / 10), *ran.values())
    assert np.any(ran["host"][0]["trunk"]["moe"]["mlp"]["router"] != tree(0)["moe"]["mlp"]["router"])


def test_a_non_finite_step_leaves_them_where_and_what_they_were():
    step, params, state = ready(dataclasses.replace(CONFIG, moments_on="host"))
    params, state, _ = step(params, state, params_of(1), jnp.float32(1))
    kept = jax.tree.map(np.array, (params, state.moments))
    params, state, metrics = step(params, state, params_of(2), jnp.float32(np.nan))
    jax.tree.map(np.testing.assert_array_equal, (params, state.moments), kept)
    assert (state.skipped, metrics["optim/skipped"], kinds(state)) == (1, 1, {KIND})


def fetched(jaxpr: Any, within: tuple[str, ...] = ()) -> Iterator[tuple[tuple[int, ...], tuple[str, ...]]]:
    """Shapes of everything that a program brings from host memory, and in which branches and loops it does."""
    for equation in jaxpr.eqns:
        away = [a.aval for a in equation.invars if getattr(a.aval, "memory_space", None) == jax.memory.Space.Host]
        if (name := equation.primitive.name) == "device_put" and away:
            yield away[0].shape, within
        for inner in jax.tree.leaves(equation.params, is_leaf=lambda v: hasattr(v, "eqns") or hasattr(v, "jaxpr")):
            if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                yield from fetched(getattr(inner, "jaxpr", inner), (*within, name))


def test_of_a_stack_one_layers_moments_come_at_a_time_and_none_before_the_gradient():
    config = dataclasses.replace(CONFIG, moments_on="host")
    _, params, state = ready(config)
    step = functools.partial(optim.apply, optim.make_optimizer(config, params))
    found = list(fetched(jax.make_jaxpr(step)(params, state, params, jnp.float32(1)).jaxpr))
    layers = [(1, *a.shape[1:]) for a in jax.tree.leaves(params["trunk"]["moe"])]
    rest = [a.shape for a in jax.tree.leaves({**params, "trunk": {**params["trunk"], "moe": {}}})]
    assert sorted(shape for shape, _ in found) == sorted(2 * (layers + rest))
    # A branch that asks whether the gradient is finite cannot be entered before it is there.
    assert {within[0] for _, within in found} == {"cond"}


def test_a_memory_that_devices_do_not_have_names_the_key(monkeypatch):
    monkeypatch.setitem(sharding.MEMORIES, "host", "attic")
    with pytest.raises(
        ValueError, match=r"config.optim.moments_on is 'host', which these devices do not have: .*attic"
    ):
        ready(dataclasses.replace(CONFIG, moments_on="host"))
    with pytest.raises(ValueError, match="optim.moments_on is 'hots', wanted one of device, host; did you mean 'host'"):
        dataclasses.replace(CONFIG, moments_on="hots")
