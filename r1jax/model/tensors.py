"""The tensors of released models by name: where each lies in our tree, and how its axes are arranged.

The released families agree on names, so the rows hang on the architecture (latent or grouped-query attention, dense or
routed MLP) and not on the family; a family that names a tensor otherwise gets rows of its own here.

A row reads `stored axes -> our axes`, one letter an axis:
    V vocabulary, D width, J twice the width, H heads, K key/value heads, h head width, n and r the no-position and
    rotary parts of a head, v value head width, q and c the ranks of query and of key/value, F dense MLP width,
    E experts, M width of an expert, S of the shared experts.
Letters written together are one stored axis ("Hh D"). A bracket is a concatenation ("(n+v)"), of which a leaf of ours
may hold one term. "~" marks rotary dimensions stored as pairs (2i, 2i+1), which are (i, i + half) in our tree.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping

import numpy as np

from r1jax.model.config import ModelConfig

Sizes = Mapping[str, int]


@dataclasses.dataclass(frozen=True, eq=False)
class Row:
    """One stored tensor: its name, its axes, and the axes of each leaf of ours that it holds."""

    name: str
    stored: str
    ours: Mapping[str, str]
    matrix: bool = False  # quantised in blocks where the folder is


def _matrix(name: str, stored: str, ours: Mapping[str, str]) -> Row:
    return Row(name, stored, ours, matrix=True)


EMBED = Row("model.embed_tokens.weight", "V D", {"embed": "V D"})
NORM = Row("model.norm.weight", "D", {"norm": "D"})
HEAD = Row("lm_head.weight", "V D", {"head": "D V"})

NORMS = (
    Row("input_layernorm.weight", "D", {"attn_norm": "D"}),
    Row("post_attention_layernorm.weight", "D", {"mlp_norm": "D"}),
)
MLA = (
    _matrix("self_attn.kv_a_proj_with_mqa.weight", "(c+r~) D", {"attn.kv_a": "D (c+r)"}),
    Row("self_attn.kv_a_layernorm.weight", "c", {"attn.kv_a_norm": "c"}),
    _matrix("self_attn.kv_b_proj.weight", "H(n+v) c", {"attn.k_b": "c H n", "attn.v_b": "c H v"}),
    _matrix("self_attn.o_proj.weight", "D Hv", {"attn.o": "H v D"}),
)
MLA_QUERY = (_matrix("self_attn.q_proj.weight", "H(n+r~) D", {"attn.q": "D H (n+r)"}),)
MLA_LOW_RANK_QUERY = (
    _matrix("self_attn.q_a_proj.weight", "q D", {"attn.q_a": "D q"}),
    Row("self_attn.q_a_layernorm.weight", "q", {"attn.q_a_norm": "q"}),
    _matrix("self_attn.q_b_proj.weight", "H(n+r~) q", {"attn.q_b": "q H (n+r)"}),
)
GQA = (
    _matrix("self_attn.q_proj.weight", "Hh D", {"attn.q": "D H h"}),
    _matrix("self_attn.k_proj.weight", "Kh D", {"attn.k": "D K h"}),
    _matrix("self_attn.v_proj.weight", "Kh D", {"attn.v": "D K h"}),
    _matrix("self_attn.o_proj.weight", "D Hh", {"attn.o": "H h D"}),
)
GQA_BIAS = (
    Row("self_attn.q_proj.bias", "Hh", {"attn.q_bias": "H h"}),
    Row("self_attn.k_proj.bias", "Kh", {"attn.k_bias": "K h"}),
    Row("self_attn.v_proj.bias", "Kh", {"attn.v_bias": "K h"}),
)
GQA_NORM = (
    Row("self_attn.q_norm.weight", "h", {"attn.q_norm": "h"}),
    Row("self_attn.k_norm.weight", "h", {"attn.k_norm": "h"}),
)
DENSE = (
    _matrix("mlp.gate_proj.weight", "F D", {"mlp.gate": "D F"}),
    _matrix("mlp.up_proj.weight", "F D", {"mlp.up": "D F"}),
    _matrix("mlp.down_proj.weight", "D F", {"mlp.down": "F D"}),
)
ROUTER = (Row("mlp.gate.weight", "E D", {"mlp.router": "D E"}),)
ROUTER_BIAS = (Row("mlp.gate.e_score_correction_bias", "E", {"mlp.router_bias": "E"}),)
EXPERTS = (
    _matrix("mlp.experts.{expert}.gate_proj.weight", "M D", {"mlp.gate": "D M"}),
    _matrix("mlp.experts.{expert}.up_proj.weight", "M D", {"mlp.up": "D M"}),
    _matrix("mlp.experts.{expert}.down_proj.weight", "D M", {"mlp.down": "M D"}),
)
SHARED = (
    _matrix("mlp.shared_experts.gate_proj.weight", "S D", {"mlp.shared.gate": "D S"}),
    _matrix("mlp.shared_experts.up_proj.weight", "S D", {"mlp.shared.up": "D S"}),
    _matrix("mlp.shared_experts.down_proj.weight", "D S", {"mlp.shared.down": "S D"}),
)
NEXT_TOKEN = (
    Row("enorm.weight", "D", {"embed_norm": "D"}),
    Row("hnorm.weight", "D", {"hidden_norm": "D"}),
    Row("eh_proj.weight", "D J", {"proj": "J D"}),
    Row("shared_head.norm.weight", "D", {"norm": "D"}),
)

# Leaves that are float32 whatever the rest is, and names that are stored so.
FLOAT32_LEAVES = ("router", "router_bias")
FLOAT32_STORED = ("e_score_correction_bias",)


@dataclasses.dataclass(frozen=True, eq=False)
class Entry:
    """A row placed in a model: the tensors that stack up to leaves of ours.

    Attributes:
        names: stored tensors in the order of the stacked leading axes.
        lead: sizes of those axes: () for a single tensor, (layers,) or (layers, experts).
        prefix: of the row's leaves in our tree, for instance "moe.".
        copy: holds nothing of its own: the tensor repeats the one that `row` names.
    """

    row: Row
    names: tuple[str, ...]
    lead: tuple[int, ...] = ()
    prefix: str = ""
    copy: bool = False


def entries(config: ModelConfig) -> list[Entry]:
    """Every tensor that a released folder of this configuration holds."""
    stacks = (
        ("dense.", 0, config.n_dense, False),
        ("moe.", config.n_dense, config.n_moe, True),
        ("mtp.layer.", config.num_hidden_layers, config.num_nextn_predict_layers, config.n_routed_experts > 0),
    )
    head = EMBED if config.tie_word_embeddings else HEAD
    out = [Entry(row, (row.name,)) for row in dict.fromkeys((EMBED, head, NORM))]
    for prefix, first, count, routed in stacks:
        out += [
            _stacked(row, range(first, first + count), config, prefix) for row in _layer_rows(config, routed) if count
        ]
    for layer in range(config.num_hidden_layers, config.num_hidden_layers + config.num_nextn_predict_layers):
        at = f"model.layers.{layer}."
        out += [Entry(row, (at + row.name,), prefix="mtp.") for row in NEXT_TOKEN]
        # Released multi-token-prediction layers repeat the main model's embedding and head.
        out += [
            Entry(EMBED, (at + "embed_tokens.weight",), copy=True),
            Entry(head, (at + "shared_head.head.weight",), copy=True),
        ]
    return out


def _stacked(row: Row, layers: range, config: ModelConfig, prefix: str) -> Entry:
    names = [f"model.layers.{layer}.{row.name}" for layer in layers]
    if "{expert}" not in row.name:
        return Entry(row, tuple(names), (len(layers),), prefix)
    experts = range(config.n_routed_experts)
    return Entry(row, tuple(n.format(expert=e) for n in names for e in experts), (len(layers), len(experts)), prefix)


def _layer_rows(config: ModelConfig, routed: bool) -> tuple[Row, ...]:
    rows = NORMS
    if config.attention == "mla":
        rows += MLA + (MLA_QUERY if config.q_lora_rank is None else MLA_LOW_RANK_QUERY)
    else:
        rows += GQA + (GQA_BIAS if config.qkv_bias else ()) + (GQA_NORM if config.qk_norm else ())
    if not routed:
        return rows + DENSE
    rows += ROUTER + (ROUTER_BIAS if config.router_bias else ()) + EXPERTS
    return rows + (SHARED if config.n_shared_experts else ())


def sizes(config: ModelConfig) -> Sizes:
    """The size of each axis letter."""
    values = {
        "VDJ": (config.vocab_size, config.hidden_size, 2 * config.hidden_size),
        "HKh": (config.num_attention_heads, config.num_key_value_heads, config.head_dim),
        "nrv": (config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim),
        "qc": (config.q_lora_rank or 0, config.kv_lora_rank),
        "FEM": (config.intermediate_size, config.n_routed_experts, config.moe_intermediate_size),
        "S": (config.n_shared_experts * config.moe_intermediate_size,),
    }
    return {letter: n for letters, group in values.items() for letter, n in zip(letters, group, strict=True)}


def _factors(axes: str) -> list[tuple[str, ...]]:
    """The factors of all axes in order, each as its terms: "H(n+r~) D" is [H], [n, r~], [D]."""
    return [tuple(found.strip("()").split("+")) for found in re.findall(r"\([^)]*\)|\w", axes)]


def _size(terms: tuple[str, ...], size: Sizes) -> int:
    return sum(size[term.rstrip("~")] for term in terms)


def stored_shape(row: Row, size: Sizes) -> tuple[int, ...]:
    """Shape of the stored tensor."""
    return tuple(math.prod(_size(terms, size) for terms in _factors(axis)) for axis in row.stored.split(" "))


def our_shape(row: Row, leaf: str, size: Sizes) -> tuple[int, ...]:
    """Shape of a leaf of ours, without the stacked leading axes."""
    return tuple(_size(terms, size) for terms in _factors(row.ours[leaf]))


def leading(row: Row) -> str | None:
    """The letter that the stored rows run over first, along which a tensor can be read in pieces; None if it is sorted
    on the way, as "(c+r~)" is."""
    first = _factors(row.stored)[0]
    return first[0] if len(first) == 1 else None


def axis_of(row: Row, leaf: str, letter: str) -> int:
    """Which axis of a leaf of ours that letter is."""
    return _factors(row.ours[leaf]).index((letter,))


def _view(tensor: np.ndarray, row: Row, leaf: str, size: Sizes) -> tuple[np.ndarray, tuple]:
    """The part of a stored tensor that a leaf holds, viewed with our axes, and the index that sorts its rotary part."""
    factors = _factors(row.stored)
    split = tensor.reshape([_size(terms, size) for terms in factors])
    order, index = [], []
    for terms in _factors(row.ours[leaf]):
        axis = next(i for i, there in enumerate(factors) if {t.rstrip("~") for t in there} >= set(terms))
        there = factors[axis]
        order.append(axis)
        if len(terms) < len(there):
            start = _size(there[: there.index(terms[0])], size)
            split = split[(slice(None),) * axis + (slice(start, start + _size(terms, size)),)]
        if there[-1].endswith("~"):
            plain, rotary = np.arange(_size(there[:-1], size)), np.arange(_size(there[-1:], size))
            index.append(np.concatenate([plain, len(plain) + rotary[0::2], len(plain) + rotary[1::2]]))
        else:
            index.append(slice(None))
    return split.transpose(order), tuple(index)


def to_ours(tensor: np.ndarray, row: Row, leaf: str, size: Sizes) -> np.ndarray:
    """A leaf of ours (of one layer, of one expert) out of the stored tensor; a view where nothing is rotary."""
    view, index = _view(tensor, row, leaf, size)
    return view[index]


def to_stored(leaves: Mapping[str, np.ndarray], row: Row, size: Sizes) -> np.ndarray:
    """The stored tensor of these leaves; the inverse of `to_ours`."""
    tensor = np.empty(stored_shape(row, size), next(iter(leaves.values())).dtype)
    for leaf, value in leaves.items():
        view, index = _view(tensor, row, leaf, size)
        view[index] = value
    return tensor


def leaves(entry: Entry, size: Sizes) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Of each leaf of ours in an entry: its name in the row, its path in the tree, its stacked shape."""
    for leaf in entry.row.ours:
        yield leaf, entry.prefix + leaf, entry.lead + our_shape(entry.row, leaf, size)
