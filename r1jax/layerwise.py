"""An optimizer's step with its moments in host memory: each layer's come to the device in turn, and go back.

What ZeRO-Offload is for (arXiv 2101.06840), with the arithmetic left to the device: a chip has far more of it than its
host. Moments that came all at once would save nothing where the step needs most memory; in a loop over a stack of
layers the device holds one layer's, as they were and as they will be, and host memory is written in place. What is in
no stack (tables of the vocabulary, multi-token prediction, adapters) comes at once.
"""

from collections.abc import Callable
from typing import Any

import jax
import optax

from r1jax.model.transformer import STACKS
from r1jax.types import Params

Flat = dict[str, Any]  # leaves by their path
Make = Callable[[Params], optax.GradientTransformation]
# An optimizer of some of the parameters, these, their moments and gradients -> parameters and moments.
Step = Callable[[optax.GradientTransformation, Params, optax.OptState, Params], tuple[Params, optax.OptState]]

DEVICE, HOST = jax.memory.Space.Device, jax.memory.Space.Host


def _name(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _flat(tree: Any) -> Flat:
    return {_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _nested(flat: Flat) -> Params:
    """The dicts that these paths lead through, with nothing else in them."""
    out: Params = {}
    for path, leaf in flat.items():
        *above, last = path.split("/")
        node = out
        for key in above:
            node = node.setdefault(key, {})
        node[last] = leaf
    return out


def _filled(like: Any, flat: Flat) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, _: flat[_name(path)], like)


def _stack(path: str) -> str:
    """The stack of layers that a parameter is in, as the beginning of its path; "" where it is in none."""
    keys = path.split("/")
    return next(("/".join(keys[: i + 1]) for i, key in enumerate(keys) if key in STACKS), "")


def _moved(flat: Flat, memory: jax.memory.Space) -> Flat:
    return {path: jax.device_put(a, memory) for path, a in flat.items()}


def update(
    step: Step, make: Make, params: Params, moments: optax.OptState, grads: Params
) -> tuple[Params, optax.OptState]:
    """One step of all parameters, part by part.

    Args:
        step: of an optimizer whose parameters do not look at one another.
        make: the optimizer of a part of the parameters; its moments have the paths that they have in the whole.
        moments: those of a parameter in host memory, counts on the device.
    """
    flat, slopes, held = _flat(params), _flat(grads), _flat(moments)
    new, new_moments = dict(flat), dict(held)
    for stack in sorted({_stack(path) for path in flat}, reverse=True):  # what is in none comes last
        part = {path: a for path, a in flat.items() if _stack(path) == stack}
        after, moved = _part(step, make(_nested(part)), part, held, {path: slopes[path] for path in part}, bool(stack))
        new |= after
        new_moments |= moved
    return _filled(params, new), _filled(moments, new_moments)


def _part(
    step: Step, optimizer: optax.GradientTransformation, part: Flat, held: Flat, slopes: Flat, is_stack: bool
) -> tuple[Flat, Flat]:
    """A step of the parameters in `part`, which `optimizer` is for; of `held`, the moments of all, its own new ones."""
    like = jax.eval_shape(optimizer.init, _nested(part))
    mine = {path: held[path] for path in _flat(like)}
    away = {path: a for path, a in mine.items() if jax.typeof(a).memory_space == HOST}
    counts = {path: a for path, a in mine.items() if path not in away}

    def one(part: Flat, away: Flat, slopes: Flat) -> tuple[Flat, Flat, Flat]:
        before = _filled(like, _moved(away, DEVICE) | counts)
        params, moments = step(optimizer, _nested(part), before, _nested(slopes))
        moments = _flat(moments)
        back = _moved({path: moments[path] for path in away}, HOST)
        return _flat(params), back, {path: moments[path] for path in counts}

    part, away, counts_after = _by_layer(one, part, away, counts, slopes) if is_stack else one(part, away, slopes)
    return part, away | counts_after


def _by_layer(
    one: Callable[..., tuple[Flat, Flat, Flat]], part: Flat, away: Flat, counts: Flat, slopes: Flat
) -> tuple[Flat, Flat, Flat]:
    """`one` for each layer of a stack; every layer keeps its axis, by which a leaf is known for what it is."""

    def layer(flat: Flat, i: jax.Array) -> Flat:
        return {path: jax.lax.dynamic_slice_in_dim(a, i, 1) for path, a in flat.items()}

    def put(flat: Flat, new: Flat, i: jax.Array) -> Flat:
        return {path: jax.lax.dynamic_update_slice_in_dim(a, new[path], i, 0) for path, a in flat.items()}

    def body(i: jax.Array, carried: tuple[Flat, Flat, Flat]) -> tuple[Flat, Flat, Flat]:
        part, away, _ = carried
        new, back, counts = one(layer(part, i), layer(away, i), layer(slopes, i))
        return put(part, new, i), put(away, back, i), counts

    n = len(next(iter(part.values())))
    return jax.lax.fori_loop(0, n, body, (part, away, counts))
