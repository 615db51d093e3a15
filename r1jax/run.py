"""What all stages of one run share: folder, mesh, seed, signal; and how weights and state come onto the mesh."""

import dataclasses
import fnmatch
import functools
import pathlib
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax

from r1jax import checkpoint, data, hosts, metrics, optim, overlap, sharding, sources, updates
from r1jax.draw import DrawConfig
from r1jax.folders import Folder
from r1jax.model import convert, lora, quantize, transformer
from r1jax.model.config import ModelConfig, Paths, Rope
from r1jax.model.lora import Lora
from r1jax.rewards.pool import RewardPool
from r1jax.rewards.table import check_examples
from r1jax.slots import SamplerConfig, Verbs
from r1jax.text import Tokenizer
from r1jax.types import Params


@dataclasses.dataclass(frozen=True)
class Run:
    """One run of the program, as the stage that is at work sees it.

    Attributes:
        stage: its name, under which checkpoints, metrics and the model are kept.
        policy_of: the policy that a name stands for (hand_over.resolve): an earlier stage, "base", a folder.
    """

    workdir: pathlib.Path
    seed: int
    layouts: dict[str, sharding.Layout]
    stop: Any  # hosts.on_sigterm(): its `requested` turns true on SIGTERM
    summary: metrics.Summary
    stage: str = ""
    policy_of: Callable[[str], "Policy"] | None = None

    def is_interrupted(self) -> bool:
        """Whether to leave off now, alike on all hosts, which have to ask equally often."""
        return self.stop.is_agreed()


@dataclasses.dataclass(frozen=True)
class Policy:
    """A model with its weights (train layout) and its tokenizer.

    Attributes:
        params: what is trained, float32: all weights, or the adapters.
        folder: the released model that it came from, for what lies beside the weights.
        lora: size and place of the adapters; None: there are none.
        frozen: with adapters, the weights that they adapt.
    """

    config: ModelConfig
    params: Params
    tokenizer: Tokenizer
    folder: Folder
    lora: Lora | None = None
    frozen: Params | None = None


# Branches of a run's key, so that draws of different kinds never meet.
ROLLOUT, EVALUATION, ADAPTERS, CURATION, JUDGEMENT = range(5)


class Stopped(Exception):
    """SIGTERM came; everything is saved."""


def model_config(fields: dict[str, Any]) -> ModelConfig:
    """The frozen record for an entry of configs/models.py."""
    fields = dict(fields)
    rope = Rope(**fields.pop("rope", {}))
    return ModelConfig(**fields, rope=rope)


def adapting(config: ModelConfig, fields: Mapping[str, Any]) -> Lora | None:
    """What config.lora asks for: adapters, or None where every weight is trained.

    Raises:
        ValueError: a rank, alpha or target that cannot be.
    """
    if not fields.get("rank"):
        return None
    out = Lora(fields["rank"], fields["alpha"], tuple(fields["targets"]))
    lora.adapted(config, out)
    return out


def param_shardings(config: ModelConfig, layout: sharding.Layout, kind: str = "") -> Params:
    """Where each weight lies in a phase; raises ValueError where a dimension does not divide (config.mesh.*).

    Args:
        kind: as for `decode_layout`.
    """
    axes = transformer.logical_axes(config)
    sharding.check_divides(axes, transformer.shapes(config), layout)
    return sharding.tree_shardings(quantize.logical_axes(axes) if kind else axes, layout)


def random_params(config: ModelConfig, layout: sharding.Layout, seed: int) -> Params:
    """Random weights, made where they will lie."""
    make = jax.jit(partial(transformer.init, config), out_shardings=param_shardings(config, layout))
    return make(jax.random.key(seed))


def state_like(policy: Policy, layout: sharding.Layout, optimizer: optim.Optimizer, moments_on: str) -> updates.State:
    """The training state as shapes with shardings, without making any; `moments_on` is config.optim.moments_on."""
    scalar = layout.sharding()
    lies = param_shardings(policy.config, layout)
    if policy.lora is not None:  # small, so that every device holds them
        lies = jax.tree.map(lambda _: scalar, policy.params)
    lies = updates.state_shardings(lies, optimizer, policy.params, scalar, moments_on)
    shapes = jax.eval_shape(partial(updates.init_state, optimizer=optimizer), policy.params)
    return sharding.laid_out(shapes, lies)


def first_state(policy: Policy, layout: sharding.Layout, optimizer: optim.Optimizer, moments_on: str) -> updates.State:
    """The state before the first step, laid out.

    It takes `policy.params` over, which are gone after the first step: two copies of them need not fit.
    """
    lies = jax.tree.map(lambda a: a.sharding, state_like(policy, layout, optimizer, moments_on))
    params = jax.device_put(policy.params, lies["policy"])
    return {"policy": params, "optim": jax.jit(partial(optim.init, optimizer), out_shardings=lies["optim"])(params)}


def training_state(
    policy: Policy, layout: sharding.Layout, optimizer: optim.Optimizer, moments_on: str, saved: checkpoint.Checkpoints
) -> tuple[updates.State | None, updates.State]:
    """The state before the first step, and its shapes with shardings for `Checkpoints.restore`.

    Where there is a checkpoint there is no state yet, and `policy.params` are gone at once.
    """
    like = state_like(policy, layout, optimizer, moments_on)
    if saved.latest() is None:
        return first_state(policy, layout, optimizer, moments_on), like
    jax.tree.map(lambda a: a.delete(), policy.params)
    return None, like


def score_layout(policy: Policy, layout: sharding.Layout, dtype: str) -> Callable[[Params], Params]:
    """A function that makes of what is trained what `updates.make_score` takes: a reference needs no more.

    Weights come in the compute dtype, in which they are used anyway; adapters stay as they are.
    """
    if policy.lora is not None:
        return lambda params: params
    return jax.jit(partial(updates.cast, dtype=dtype), out_shardings=param_shardings(policy.config, layout))


def decode_layout(policy: Policy, layout: sharding.Layout, dtype: str, kind: str = "") -> Callable[[Params], Params]:
    """A function that lays weights out for decoding, in the compute dtype, from device to device.

    Args:
        kind: of quantize.KINDS, for the large matrices. Only rollouts are sampled from such a policy, since training
            corrects for it: whatever measures the policy or writes by it takes it as it is.
    """
    lies = param_shardings(policy.config, layout, kind)

    def weights(params: Params, frozen: Params | None) -> Params:
        return updates.weights_of(policy.config, policy.lora, params, frozen, dtype, kind)

    return partial(jax.jit(weights, out_shardings=lies), frozen=policy.frozen)


def put_rows(batch: dict[str, Any], layout: sharding.Layout) -> updates.Batch:
    """Host arrays [M, B, T, ...] onto the mesh: to each host its devices' rows.

    Raises:
        ValueError: rows that do not divide over the devices that hold a part of each.
    """
    (tokens,) = {a.shape[2] for a in batch.values()}
    if tokens % (parts := layout.size("residual")):
        axes = " x ".join(f"config.mesh.{axis}" for axis in layout.mesh_axes("residual"))
        raise ValueError(
            f"rows of {tokens} tokens do not divide over {axes} ({parts}); change it or "
            "config.rl.row_tokens, config.pretrain.row_tokens or config.sft.row_tokens"
        )
    lies = {name: layout.sharding(None, "rows", "tokens", *(None,) * (a.ndim - 3)) for name, a in batch.items()}
    return hosts.put(batch, lies)


def open_checkpoints(run: Run, settings: Mapping[str, int]) -> checkpoint.Checkpoints:
    """The checkpoints of this stage of the run; `settings` is config.checkpoint."""
    return checkpoint.Checkpoints(run.workdir / "checkpoints" / run.stage, **settings)


def training_program(config: "Config", policy: Policy, layout: sharding.Layout, **more: Any) -> updates.Program:
    """What every training program of a stage shares, as config.model and config.optim ask for it."""
    model = config["model"]
    return updates.Program(
        config=policy.config,
        layout=layout,
        compute_dtype=model["compute_dtype"],
        remat=model["remat"],
        scan_unroll=model["scan_unroll"],
        paths=paths(config),
        router_bias_rate=config["optim"]["router_bias_rate"],
        lora=policy.lora,
        **more,
    )


def optim_config(config: "Config", steps: int = 0) -> optim.OptimConfig:
    """The optimizer's settings, of config.optim; a schedule lasts `steps` if nothing is said."""
    fields = {key: value for key, value in config["optim"].items() if key != "router_bias_rate"}
    return optim.OptimConfig(**{**fields, "decay_steps": fields["decay_steps"] or steps})


Config = Mapping[str, Any]  # the whole config, or a group of it


def open_source(config: Config, spec: str, split: str, is_general: bool = False) -> data.Source:
    """The prompts that config.data names, their gold answers checked.

    Of the training split those are left out that overlap with config.data.decontaminate.

    Args:
        is_general: instructions without a right answer, which reward models and judges grade.

    Raises:
        ValueError: no such source, or nothing is left of it.
    """
    c = config["data"]
    columns = sources.Columns(
        question=c["question_column"],
        answer=None if is_general else c["answer_column"],
        id=c["id_column"] or None,
        level=None if is_general else c["level_column"] or None,
        grader="judged" if is_general else c["grader"],
    )
    source = data.open_source(spec, split=split, columns=columns, size=c["gym_size"], seed=config["seed"])
    if c["decontaminate"] and split == c["split"]:
        clean, dropped = overlap.without(source.examples, c["decontaminate"], c["eval_split"])
        hosts.say(f"{spec}: {len(dropped)} of {len(source.examples)} prompts overlap with config.data.decontaminate")
        if not clean:
            raise ValueError(f"config.data.decontaminate leaves no prompt of {spec}: all overlap with it")
        source = data.Source(source.name, tuple(clean))
    check_examples(source.examples, list(config["rewards"]))
    return source


def open_pool(config: Config, rewards: Mapping[str, float] | None = None) -> RewardPool:
    """The processes that grade by config.rewards, or by others that need no path."""
    limits = dict(config["grading"])
    accepted = tuple(limits.pop("sandbox_accepts"))
    paths = {} if rewards else dict(config["reward_paths"])
    return RewardPool(dict(rewards or config["rewards"]), **limits, paths=paths, sandbox_accepts=accepted)


def paths(config: Config) -> Paths:
    """How config.model has the model computed."""
    return Paths(**{f.name: config["model"][f.name] for f in dataclasses.fields(Paths)})


def make_verbs(config: Config, policy: Policy, layout: sharding.Layout, drawing: DrawConfig) -> Verbs:
    """The sampling functions of this policy for one way of drawing."""
    settings, dtype = SamplerConfig(**config["sampler"]), config["model"]["cache_dtype"]
    eos_ids = tuple(sorted(policy.tokenizer.eos_ids))
    return _verbs(policy.config, settings, drawing, layout, eos_ids, dtype, paths(config))


_verbs = functools.lru_cache(maxsize=4)(Verbs)  # stages that sample alike share their compiled programs


def check_lengths(policy: Policy, prompt: int, completion: int, row: int = 0) -> None:
    """Raises ValueError where the longest prompt and completion do not fit into the context, or into a row if given."""
    both = prompt + completion
    asked = f"config.data.max_prompt_tokens and config.rl.max_completion_tokens (or length_schedule) allow {both}"
    if both > policy.config.max_position_embeddings:
        raise ValueError(f"{asked} tokens, but the policy reads {policy.config.max_position_embeddings} at most")
    if 0 < row < both:
        raise ValueError(f"{asked} tokens, but config.rl.row_tokens is {row}")


# Files of a released-model folder that stay what they are when the weights change.
COMPANIONS = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt")
COMPANIONS += ("chat_template*", "generation_config.json")


def companions(folder: Folder) -> dict[str, bytes]:
    """The tokenizer, chat template and generation settings of a released-model folder: content by name."""
    kept = [name for name in folder.names() if any(fnmatch.fnmatch(name, pattern) for pattern in COMPANIONS)]
    return {name: folder.read(name) for name in kept}


def model_folder(workdir: pathlib.Path, stage: str) -> pathlib.Path:
    """Where a stage leaves its policy."""
    return workdir / "models" / stage


def adapters_folder(workdir: pathlib.Path, stage: str) -> pathlib.Path:
    """Where a stage leaves its adapters, if it has any."""
    return workdir / "adapters" / stage


def trained(run: Run, like: Params) -> Params:
    """The parameters in this stage's last checkpoint as `Lazy` leaves: no host's memory has room for all of a pod's.

    Args:
        like: arrays or shapes of them.
    """
    with checkpoint.Checkpoints(run.workdir / "checkpoints" / run.stage, save_every=1, keep=1) as saved:
        like = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), like)
        return saved.open(saved.latest(), {"policy": like})["policy"]


def write_model(folder: pathlib.Path, policy: Policy, weights: Params) -> None:
    """A released-model folder in place of what was there; every host writes a part of its files.

    Args:
        weights: of the whole model, as arrays on the host or `Lazy`.
    """
    new = folder.with_name(f".{folder.name}.new")
    if hosts.is_writer():
        shutil.rmtree(new, ignore_errors=True)
    convert.save(weights, policy.config, new, companions(policy.folder), dtype="float32")
    if hosts.is_writer():
        shutil.rmtree(folder, ignore_errors=True)
        new.rename(folder)
    hosts.wait()


def export(run: Run, policy: Policy, params: Params) -> Policy:
    """Leaves what the stage's last checkpoint holds as a released-model folder in WORKDIR/models/STAGE.

    Adapters are merged there and lie in WORKDIR/adapters/STAGE as well.
    """
    weights, place = trained(run, params), adapters_folder(run.workdir, run.stage)
    if policy.lora is None and hosts.is_writer():
        shutil.rmtree(place, ignore_errors=True)  # of another life of this folder: else who comes next takes them up
    if policy.lora is not None:
        adapters = jax.tree.map(lambda leaf: leaf[()], weights)
        if hosts.is_writer():
            lora.save_peft(adapters, policy.config, policy.lora, place, str(policy.folder))
        frozen = convert.open_leaves(policy.folder, "float32")[1]
        weights = lora.merge_lazily(frozen, adapters, policy.config, policy.lora)
    write_model(model_folder(run.workdir, run.stage), policy, weights)
    return dataclasses.replace(policy, params=params)


def check_finite(opt: optim.OptimState, limit: int) -> None:
    """Stops a run whose last `limit` steps were all skipped."""
    optim.check_non_finite(int(opt.skipped_in_a_row), limit)
