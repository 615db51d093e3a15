"""Released configurations (`config.json`) to our frozen record and back; a family of models is one table here.

The spellings are those of Hugging Face `transformers`. A field that shapes the mathematics is read, or has the one
value that we compute; any other field is refused, because ignoring it might change the model.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from r1jax.model.config import ModelConfig, Rope


@dataclasses.dataclass(frozen=True)
class Family:
    """How one `model_type` spells a ModelConfig.

    Attributes:
        architecture: the class that `transformers` loads it with.
        fields: their field -> ours, for fields that must be there.
        optional: their field -> (ours, its value where theirs is absent).
        implied: ours -> the value that the family stands for without saying so.
        only: their field -> the one value we compute, meant also where it is absent.
        ignored: their fields that follow from others or do not reach the forward pass.
        choices: their field -> what each value that we compute means in ours; the first is meant where it is absent.
    """

    architecture: str
    fields: Mapping[str, str]
    implied: Mapping[str, Any]
    only: Mapping[str, Any]
    optional: Mapping[str, tuple[str, Any]] = dataclasses.field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    choices: Mapping[str, Mapping[str, Mapping[str, Any]]] = dataclasses.field(default_factory=dict)


def _same(*names: str) -> dict[str, str]:
    return {name: name for name in names}


_EVERY = _same(
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "rms_norm_eps",
    "max_position_embeddings",
)
_EVERY_OPTIONAL = {
    "tie_word_embeddings": ("tie_word_embeddings", False),
    "initializer_range": ("initializer_range", 0.02),
}
_EVERY_ONLY = {"hidden_act": "silu", "attention_dropout": 0.0, "partial_rotary_factor": 1.0}
_EVERY_IGNORED = (
    *("model_type", "architectures", "auto_map", "torch_dtype", "dtype", "transformers_version", "use_cache"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "pretraining_tp", "output_router_logits"),
    *("rope_theta", "rope_scaling", "rope_parameters", "quantization_config"),
)
_HEADS = {**_EVERY, **_same("num_key_value_heads")}
_HEADS_OPTIONAL = {**_EVERY_OPTIONAL, "head_dim": ("head_dim", 0)}  # zero: hidden_size / num_attention_heads
_NO_WINDOW = {"use_sliding_window": False}
_WINDOW_SHAPE = ("sliding_window", "max_window_layers", "layer_types")  # read only where use_sliding_window is true

_GIVEN = object()  # a choice takes the value of the field of that name
_LATENT = _same("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
_DEEPSEEK_EXPERTS = _same(
    *("n_routed_experts", "num_experts_per_tok", "n_shared_experts", "moe_intermediate_size"),
    *("first_k_dense_replace", "routed_scaling_factor"),
)
_DEEPSEEK_IGNORED = ("num_key_value_heads", "head_dim", "qk_head_dim", "ep_size", "aux_loss_alpha", "seq_aux")

FAMILIES: dict[str, Family] = {
    "deepseek_v3": Family(
        architecture="DeepseekV3ForCausalLM",
        fields={
            **_EVERY,
            **_LATENT,
            **_DEEPSEEK_EXPERTS,
            **_same("n_group", "topk_group", "norm_topk_prob"),
        },
        optional={
            **_EVERY_OPTIONAL,
            "q_lora_rank": ("q_lora_rank", None),
            "num_nextn_predict_layers": ("num_nextn_predict_layers", 0),
        },
        implied={"attention": "mla", "scoring_func": "sigmoid", "group_score": "top2", "router_bias": True},
        only={
            **_EVERY_ONLY,
            "attention_bias": False,
            "moe_layer_freq": 1,
            "topk_method": "noaux_tc",
            "scoring_func": "sigmoid",
            "rope_interleave": True,
        },
        ignored=_DEEPSEEK_IGNORED,
    ),
    # V2-Lite routes greedily, V2 within groups; gates are probabilities as they are (arXiv 2405.04434, section 2.2).
    "deepseek_v2": Family(
        architecture="DeepseekV2ForCausalLM",
        fields={**_EVERY, **_LATENT, **_DEEPSEEK_EXPERTS},
        optional={**_EVERY_OPTIONAL, "q_lora_rank": ("q_lora_rank", None)},
        implied={
            "attention": "mla",
            "scoring_func": "softmax",
            "group_score": "max",
            "norm_topk_prob": False,
            "router_bias": False,
        },
        only={
            **_EVERY_ONLY,
            "attention_bias": False,
            "mlp_bias": False,
            "moe_layer_freq": 1,
            "norm_topk_prob": False,
            "scoring_func": "softmax",
        },
        choices={
            "topk_method": {
                "greedy": {"n_group": 1, "topk_group": 1},
                "group_limited_greedy": {"n_group": _GIVEN, "topk_group": _GIVEN},
            }
        },
        ignored=(*_DEEPSEEK_IGNORED, "n_group", "topk_group"),  # read where topk_method says so
    ),
    "qwen2": Family(
        architecture="Qwen2ForCausalLM",
        fields=_HEADS,
        optional=_HEADS_OPTIONAL,
        implied={"attention": "gqa", "qkv_bias": True, "qk_norm": False, "n_routed_experts": 0},
        only={**_EVERY_ONLY, **_NO_WINDOW},
        ignored=_WINDOW_SHAPE,
    ),
    "qwen3": Family(
        architecture="Qwen3ForCausalLM",
        fields={**_HEADS, **_same("head_dim")},
        optional=_EVERY_OPTIONAL,
        implied={"attention": "gqa", "qkv_bias": False, "qk_norm": True, "n_routed_experts": 0},
        only={**_EVERY_ONLY, **_NO_WINDOW, "attention_bias": False},
        ignored=_WINDOW_SHAPE,
    ),
    "qwen3_moe": Family(
        architecture="Qwen3MoeForCausalLM",
        fields={
            **_HEADS,
            **_same("num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob"),
            "num_experts": "n_routed_experts",
        },
        optional=_HEADS_OPTIONAL,
        implied={
            "attention": "gqa",
            "qkv_bias": False,
            "qk_norm": True,
            "scoring_func": "softmax",
            "router_bias": False,
        },
        only={
            **_EVERY_ONLY,
            **_NO_WINDOW,
            "attention_bias": False,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        },
        ignored=(*_WINDOW_SHAPE, "router_aux_loss_coef"),
    ),
    "llama": Family(
        architecture="LlamaForCausalLM",
        fields=_HEADS,
        optional=_HEADS_OPTIONAL,
        implied={"attention": "gqa", "qkv_bias": False, "qk_norm": False, "n_routed_experts": 0},
        only={**_EVERY_ONLY, "attention_bias": False, "mlp_bias": False},
    ),
}

# What transformers 5 writes for the field's released name.
_ALIASES = {"num_local_experts": "num_experts"}

_REQUIRED = object()
# Per kind of length extension: their key -> its value where absent.
_ROPE: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": _REQUIRED},
    "yarn": {
        "factor": _REQUIRED,
        "original_max_position_embeddings": _REQUIRED,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        # Zero for both means that the attention factor follows from `factor` alone.
        "mscale": 0.0,
        "mscale_all_dim": 0.0,
        "attention_factor": None,
        "truncate": True,
    },
    "llama3": {
        "factor": _REQUIRED,
        "original_max_position_embeddings": _REQUIRED,
        "low_freq_factor": _REQUIRED,
        "high_freq_factor": _REQUIRED,
    },
}


def config_from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """Our configuration of a released `config.json`.

    Raises:
        ValueError: unknown model_type, a missing field, a field that we do not know or a value that we do not compute.
    """
    kind = hf.get("model_type")
    if kind not in FAMILIES:
        raise ValueError(f"config.json has model_type {kind!r}; r1jax reads {', '.join(FAMILIES)}")
    family = FAMILIES[kind]
    given = {_ALIASES.get(name, name): value for name, value in hf.items() if value is not None}
    for name, value in given.items():
        if name in family.only and value != family.only[name]:
            raise ValueError(
                f"config.json has {name} = {value!r}; r1jax computes only {family.only[name]!r} for {kind}"
            )
        if name == "layer_types" and set(value) != {"full_attention"}:
            raise ValueError(f"config.json has layer_types {sorted(set(value))}; r1jax computes only 'full_attention'")
        known = (family.fields, family.optional, family.only, family.choices, family.ignored, _EVERY_IGNORED)
        if not any(name in names for names in known):
            raise ValueError(
                f"config.json has {name} = {value!r}, which r1jax does not know for {kind} and which may change the "
                "mathematics; remove the field if it does not"
            )
    if missing := [name for name in family.fields if name not in given]:
        raise ValueError(f"config.json of a {kind} model lacks {', '.join(missing)}")
    ours = {field: given[name] for name, field in family.fields.items()}
    ours |= {field: given.get(name, absent) for name, (field, absent) in family.optional.items()}
    for name, values in family.choices.items():
        ours |= _chosen(kind, name, values, given)
    if "head_dim" in ours and not ours["head_dim"]:
        ours["head_dim"] = ours["hidden_size"] // ours["num_attention_heads"]
    if ours.get("num_nextn_predict_layers", 0) > 1:
        raise ValueError(
            f"config.json has num_nextn_predict_layers = {ours['num_nextn_predict_layers']}; r1jax computes 0 or 1"
        )
    return ModelConfig(**ours, **family.implied, rope=_rope_from_hf(given))


def _chosen(kind: str, name: str, values: Mapping[str, Mapping[str, Any]], given: Mapping[str, Any]) -> dict[str, Any]:
    """What the value of one of a family's `choices` means."""
    value = given.get(name, next(iter(values)))
    if value not in values:
        raise ValueError(f"config.json has {name} = {value!r}; r1jax computes {', '.join(values)} for {kind}")
    if missing := [field for field, there in values[value].items() if there is _GIVEN and field not in given]:
        raise ValueError(f"config.json of a {kind} model with {name} {value!r} lacks {', '.join(missing)}")
    return {field: given[field] if there is _GIVEN else there for field, there in values[value].items()}


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """The `config.json` of the released family that computes this configuration.

    Raises:
        ValueError: no family does; names the fields in which the nearest one differs.
    """
    differences = {}
    for kind, family in FAMILIES.items():
        hf = {"model_type": kind, "architectures": [family.architecture]}
        hf |= {name: getattr(config, field) for name, field in family.fields.items()}
        hf |= {name: getattr(config, field) for name, (field, _) in family.optional.items()}
        hf |= {name: value for name, value in family.only.items() if name != "partial_rotary_factor"}
        hf |= _rope_to_hf(config.rope)
        for name, values in family.choices.items():
            fits = [
                value
                for value, fields in values.items()
                if all(there in (_GIVEN, getattr(config, field)) for field, there in fields.items())
            ]
            hf |= {name: fits[0]} | {field: getattr(config, field) for field in values[fits[0]]}
        if config.attention == "mla":
            hf["num_key_value_heads"] = config.num_attention_heads
        try:
            back = config_from_hf(hf)
        except ValueError as error:
            differences[kind] = [str(error)]
            continue
        if config.n_group == 1:  # nothing is then chosen by groups
            back = dataclasses.replace(back, group_score=config.group_score)
        if back == config:
            return hf
        names = [f.name for f in dataclasses.fields(config) if getattr(back, f.name) != getattr(config, f.name)]
        differences[kind] = [f"{name} = {getattr(config, name)!r}" for name in names]
    nearest = min(differences, key=lambda kind: len(differences[kind]))
    raise ValueError(f"no released family computes this model; {nearest} differs in {', '.join(differences[nearest])}")


def _rope_from_hf(given: Mapping[str, Any]) -> Rope:
    params = dict(given.get("rope_parameters") or given.get("rope_scaling") or {})
    kind = params.pop("type", "default")
    kind = params.pop("rope_type", kind)
    theta = params.pop("rope_theta", given.get("rope_theta"))
    if theta is None:
        raise ValueError("config.json lacks rope_theta")
    if kind not in _ROPE:
        raise ValueError(f"config.json has rope_type {kind!r}; r1jax computes {', '.join(_ROPE)}")
    if params.pop("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError("config.json has a partial_rotary_factor; r1jax rotates all rotary dimensions (1.0)")
    params = {name: value for name, value in params.items() if value is not None}
    if unknown := sorted(set(params) - set(_ROPE[kind])):
        raise ValueError(f"config.json has rope fields {unknown} that r1jax does not know for rope_type {kind!r}")
    values = {name: params.get(name, absent) for name, absent in _ROPE[kind].items()}
    if missing := [name for name, value in values.items() if value is _REQUIRED]:
        raise ValueError(f"config.json lacks {', '.join(missing)} for rope_type {kind!r}")
    return Rope(theta=float(theta), kind=kind, **values)


def _rope_to_hf(rope: Rope) -> dict[str, Any]:
    if rope.kind == "default":
        return {"rope_theta": rope.theta, "rope_scaling": None}
    params = {name: getattr(rope, name) for name in _ROPE[rope.kind]}
    params = {name: value for name, value in params.items() if value != _ROPE[rope.kind][name]}
    # DeepSeek's released code reads `type`, newer loaders `rope_type`.
    return {"rope_theta": rope.theta, "rope_scaling": {"type": rope.kind, "rope_type": rope.kind, **params}}
