"""The walls between files: what may import what, which words belong to one file, how long a file may be."""

import ast
import functools
import importlib
import pathlib
import subprocess
import sys
from collections.abc import Iterator

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent

# Imports point down this list only. A package is one entry; its files may import one another, except stages.
ORDER = [
    "ablate",
    "plan",
    "main",
    "harness",
    "export",
    "pipeline",
    "stages",
    "studies",
    "reinforce",
    "scorers",
    "fine_tune",
    "checks",
    "hand_over",
    "examine",
    "curate",
    "preference",
    "editor",
    "endpoint",
    "loops",
    "next_token",
    "held_out",
    "run",
    "minibatches",
    "evaluate",
    "votes",
    "rollout",
    "updates",
    "flops",
    "grpo",
    "sampler",
    "slots",
    "draw",
    "optim",
    "layerwise",
    "conversations",
    "corpus",
    "benchmarks",
    "records_of",
    "overlap",
    "rewards",
    "data",
    "sources",
    "packing",
    "writers",
    "countdown",
    "queries",
    "letters",
    "phrases",
    "fast_tokenizer",
    "text",
    "chat",
    "checkpoint",
    "metrics",
    "report",
    "analyses",
    "curves",
    "run_folder",
    "model",
    "sharding",
    "placement",
    "hosts",
    "watch",
    "folders",
    "types",
]
JAX_FREE = [
    "conversations",
    "corpus",
    "benchmarks",
    "records_of",
    "overlap",
    "benchmarks",
    "records_of",
    "overlap",
    "rewards",
    "data",
    "sources",
    "packing",
    "writers",
    "countdown",
    "fast_tokenizer",
    "text",
    "chat",
    "watch",
    "folders",
    "types",
]
JAX = {"jax", "jaxlib", "flax", "optax", "orbax", "chex"}
PROCESS_WORDS = {
    "addressable_data",
    "addressable_shards",
    "distributed",
    "local_device_count",
    "local_devices",
    "make_array_from_process_local_data",
    "multihost_utils",
    "process_count",
    "process_index",
    "process_indices",
}
MESH_AXES = {"data", "fsdp", "expert", "context", "tensor"}
MESH_CALLS = {
    *("P", "PartitionSpec", "NamedSharding", "shard_map", "axis_index", "axis_size"),
    *("psum", "pmean", "pmax", "pmin", "all_gather", "all_to_all", "ppermute", "psum_scatter"),
}


def modules() -> dict[str, ast.Module]:
    """The syntax tree of every file of the package, by its dotted name below r1jax."""
    found = {}
    for path in sorted((ROOT / "r1jax").rglob("*.py")):
        parts = path.relative_to(ROOT / "r1jax").with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = ast.parse(path.read_text("utf-8"))
    return found


MODULES = modules()


@functools.cache
def imports(name: str) -> list[str]:
    """Every module that the file names in an import, at its top or inside a function, as absolute dotted names."""
    found = []
    for node in ast.walk(MODULES[name]):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"r1jax.{name}: write imports in full, not relative"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def own(dotted: str) -> str | None:
    """The file behind an imported name ("model.layers" for r1jax.model.layers.rms_norm), None outside the package."""
    parts = dotted.split(".")
    if parts[0] != "r1jax":
        return None
    while ".".join(parts[1:]) not in MODULES:
        parts.pop()
    return ".".join(parts[1:])


def reach(name: str) -> set[str]:
    """All names that the file imports, also through other files of the package."""
    seen, todo, found = set(), [name], set()
    while todo:
        if (here := todo.pop()) not in seen:
            seen.add(here)
            found |= set(imports(here))
            todo += filter(None, map(own, imports(here)))
    return found


def outside(*allowed: str) -> list[str]:
    return [name for name in MODULES if name.split(".")[0] not in allowed]


def calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield getattr(node.func, "attr", getattr(node.func, "id", "")), node


def strings(tree: ast.AST) -> set[str]:
    return {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)}


@pytest.mark.parametrize("name", [name for name in MODULES if name])
def test_imports_point_down(name):
    home = name.split(".")[0]
    assert home in ORDER, f"give r1jax.{home} its place in ORDER, the reading order of the package"
    for target in filter(None, map(own, imports(name))):
        block = target.split(".")[0]
        if block == home:
            assert home != "stages", f"r1jax.{name} imports r1jax.{target}: stages never import one another"
        else:
            assert ORDER.index(block) > ORDER.index(home), f"r1jax.{name} imports r1jax.{target}, which is above it"


@pytest.mark.parametrize("name", [name for name in MODULES if name.split(".")[0] in JAX_FREE])
def test_graders_and_data_reach_no_jax(name):
    assert not {dotted for dotted in reach(name) if dotted.split(".")[0] in JAX}


def test_grader_processes_load_no_jax():
    names = [f"r1jax.{name}" for name in MODULES if name.split(".")[0] in JAX_FREE]
    code = f"import importlib, sys; [importlib.import_module(n) for n in {names}]; print({JAX} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"


def test_importing_the_package_loads_nothing():
    code = "import sys; before = set(sys.modules); import r1jax; print(sorted(set(sys.modules) - before))"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "['r1jax']"


def test_grpo_knows_neither_model_nor_flax():
    if "grpo" in MODULES:
        assert not {d for d in reach("grpo") if d.startswith(("flax", "r1jax.model"))}


@pytest.mark.parametrize(
    ("library", "homes"), [("orbax", ("checkpoint",)), ("ml_collections", ("main", "pipeline", "stages"))]
)
def test_a_library_has_one_home(library, homes):
    for name in outside(*homes):
        assert library not in {dotted.split(".")[0] for dotted in imports(name)}, f"r1jax.{name} imports {library}"


def test_only_hosts_asks_which_process_this_is():
    for name in outside("hosts"):
        words = {n.attr for n in ast.walk(MODULES[name]) if isinstance(n, ast.Attribute)}
        words |= {dotted.split(".")[-1] for dotted in imports(name)}
        assert not words & PROCESS_WORDS, f"r1jax.{name} asks {sorted(words & PROCESS_WORDS)}: that belongs to hosts"


def test_only_sharding_names_mesh_axes():
    for name in outside("sharding"):
        assert "fsdp" not in strings(MODULES[name]), f"r1jax.{name} names the mesh axis fsdp"
        for function, node in calls(MODULES[name]):
            axes = MESH_AXES & strings(node) if function in MESH_CALLS else set()
            assert not axes, f"r1jax.{name}:{node.lineno} gives mesh axes {sorted(axes)} to {function}"


def test_files_are_short():
    folders = [ROOT / folder for folder in ("r1jax", "configs", "launch", "tests")]
    lengths = {path: path.read_text("utf-8").count("\n") for folder in folders for path in folder.rglob("*.py")}
    assert not {str(path.relative_to(ROOT)): n for path, n in lengths.items() if n > 400}


def test_every_config_key_is_read():
    def leaves(config: dict, path: str = "config") -> Iterator[tuple[str, str]]:
        for key, value in config.items():
            yield key, f"{path}.{key}"
            if isinstance(value, dict):
                yield from leaves(value, f"{path}.{key}")

    read = set()
    for tree in MODULES.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                read.add(node.attr)
            elif isinstance(node, ast.arg):  # a block that goes into a function as keywords
                read.add(node.arg)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):  # names of a table
                read.add(node.value)
    keys = importlib.import_module("configs.base").get_config().to_dict()
    assert not [path for key, path in leaves(keys) if key not in read]
