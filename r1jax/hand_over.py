"""Whose policy a stage begins with: the base's, another stage's, or that of any released-model folder.

One rule for config.pipeline.NAME.start and config.curate.sampler: "base", a stage before it, a stage that left its
model in WORKDIR/models at another time, a path or URL. What stages left must be kin of what the run begins with.
"""

import dataclasses
import pathlib
from collections.abc import Sequence

from r1jax.folders import Folder, folder_at
from r1jax.model import convert, families, lora
from r1jax.model.config import ModelConfig
from r1jax.run import Config, Policy, adapters_folder, model_folder

BASE = "base"
# Pages that leave the policy as it is: whoever begins with such a stage gets what that one was given.
HANDING_ON = ("reward_models", "evaluate", "mcts")
TOKENIZERS = ("tokenizer.json", "tokenizer.model")  # the first that is there is read


def page_of(config: Config, name: str) -> str:
    """The page that a stage goes through, by default that of its name."""
    return config["pipeline"].get(name, {}).get("page", name)


def place_of(workdir: pathlib.Path, name: str) -> Folder:
    """What a stage of that name left in WORKDIR/models, else the folder at that path or URL."""
    left = model_folder(workdir, name)
    return folder_at(left if left.exists() else name)


def adapters_of(config: Config, name: str, workdir: pathlib.Path) -> pathlib.Path | None:
    """The folder of the adapters that a stage left, if config.lora asks for such: who begins with it trains them on.

    Where it left others, or none, its whole model gets fresh ones.
    """
    left, wanted = adapters_folder(workdir, name), config["lora"]
    if name == BASE or not wanted["rank"] or not (left / lora.SETTINGS).exists():
        return None
    was, _ = lora.settings(left)
    is_such = (was.rank, was.alpha, set(was.targets)) == (wanted["rank"], wanted["alpha"], set(wanted["targets"]))
    return left if is_such else None


def adapted_by(config: Config, start: str, workdir: pathlib.Path) -> Folder | None:
    """The folder whose weights a stage trains, or adapts, that begins with `start`; None: config.model.path's."""
    if start == BASE:
        return None
    if (left := adapters_of(config, start, workdir)) is None:
        return place_of(workdir, start)
    _, base = lora.settings(left)
    if folder_at(base).exists():
        return folder_at(base)
    # The run folder or the base has moved since.
    here = model_folder(workdir, pathlib.Path(base).name)
    return folder_at(here) if pathlib.Path(base).parent.name == here.parent.name and here.exists() else None


def asked(config: Config, name: str, before: Sequence[str]) -> str:
    """Whose policy the config gives to a stage that comes after others; empty where it does not say.

    The first stage of a run begins with the base, unless it is taken out of a pipeline.
    """
    if given := config["pipeline"].get(name, {}).get("start", ""):
        return given
    if before:
        return before[-1]
    is_part = name in config["pipeline"] and not set(config["pipeline"]) <= set(config["stages"])
    return "" if is_part else BASE


def ahead_of(name: str, before: Sequence[str]) -> tuple[str, ...]:
    """The stages before a stage that is one of `before`; none for any other."""
    last = max((i for i, one in enumerate(before) if one == name), default=0)
    return tuple(before[:last])


def resolve(config: Config, key: str, name: str, before: Sequence[str], workdir: pathlib.Path) -> str:
    """Whose policy `name` stands for: "base", a stage that left one or will by then, or a folder.

    Args:
        key: that gave the name, for messages.
        before: stages of this run that are done when the policy is wanted.

    Raises:
        ValueError: it is nothing of these.
    """
    given, seen = name, set()
    while page_of(config, name) in HANDING_ON and name not in seen:
        seen.add(name)
        before = ahead_of(name, before)
        name = asked(config, name, before)
    if name == BASE or name in before or (name and place_of(workdir, name).has("config.json")):
        return name
    what = f"{given!r}" + f", which begins with {name!r}" * (name != given)
    there = ", ".join(sorted(path.parent.name for path in (workdir / "models").glob("*/config.json"))) or "none"
    raise ValueError(
        f"{key} is {what}, wanted {BASE}, a stage before it in config.stages, one that left its model in "
        f"{workdir / 'models'} ({there}), or a released-model folder"
    )


def start_of(config: Config, i: int, workdir: pathlib.Path) -> str:
    """Whose policy the i-th stage starts from, as `resolve` gives it.

    Raises:
        ValueError: nobody's, or the config does not say whose.
    """
    name, before = config["stages"][i], config["stages"][:i]
    key = f"config.pipeline.{name}.start"
    if not (start := asked(config, name, before)):
        raise ValueError(
            f"{key} is missing, and config.stages begins with {name}, a part of config.pipeline: set it to {BASE}, to "
            f"a stage that left its model in {workdir / 'models'}, or to a released-model folder"
        )
    return resolve(config, key, start, before, workdir)


def root_of(config: Config, name: str, before: Sequence[str], workdir: pathlib.Path) -> str:
    """What the policy of a stage grew from: "base", or a folder that it or a stage before it was told to start from."""
    seen = set()
    while name not in seen:
        seen.add(name)
        start = asked(config, name, before) or BASE
        is_stage = start in before or start in config["pipeline"] or model_folder(workdir, start).exists()
        if start == BASE or not is_stage or pathlib.Path(start).is_absolute():
            return start
        name, before = start, ahead_of(start, before)
    return BASE


def difference(one: ModelConfig, other: ModelConfig) -> str:
    """How two architectures differ, in words, as far as a released-model folder can tell; empty where they do not."""
    one, other = (families.config_from_hf(families.config_to_hf(config)) for config in (one, other))
    pairs = {f.name: (getattr(one, f.name), getattr(other, f.name)) for f in dataclasses.fields(ModelConfig)}
    differing = [f"{name} {a} and {b}" for name, (a, b) in pairs.items() if a != b]
    more = f" (and {len(differing) - 3} more)" if len(differing) > 3 else ""
    return ", ".join(differing[:3]) + more


def tokenizer_of(folder: Folder) -> bytes:
    """The file that a folder's tokenizer is read from."""
    return next((folder.read(name) for name in TOKENIZERS if folder.has(name)), b"")


def check_kin(config: Config, starts: Sequence[str], base: Policy, workdir: pathlib.Path) -> None:
    """Raises ValueError where a model in WORKDIR/models that the run takes up is not of the kind that it begins with.

    Args:
        starts: whose policy each stage starts from.
        base: what the run begins with.
    """
    stages = config["stages"]
    others = [(start, ()) for start in starts if start != BASE and start not in stages]
    for name, before in [*others, *((stage, stages[:i]) for i, stage in enumerate(stages))]:
        left = model_folder(workdir, name)
        if pathlib.Path(name).is_absolute() or not (left / "config.json").exists():
            continue
        root = root_of(config, name, before, workdir)
        folder = base.folder if root == BASE else folder_at(root)
        wanted = base.config if root == BASE else convert.open_model(folder)[0]
        found = difference(convert.open_model(left)[0], wanted)
        if not found and tokenizer_of(folder_at(left)) != tokenizer_of(folder):
            found = "their tokenizers"
        if found:
            raise ValueError(
                f"{left} is of another model than {folder}, which {name} would begin with: they differ in {found}. Set "
                "config.model.path (or name, or the start of a stage) to what this run folder began with, or start "
                "anew under another --workdir"
            )
