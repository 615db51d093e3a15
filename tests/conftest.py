"""How the tests run: on CPU as eight simulated devices, shapes checked at every call, slow ones on request."""

import os
import pathlib
import tempfile

# All of this has to be set before jax is imported; subprocesses of the tests inherit it.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + f" --xla_force_host_platform_device_count={os.environ.get('R1JAX_TEST_DEVICES', '8')}"
    + " --xla_backend_optimization_level=1"  # as hosts.initialize
)

# What one test or run compiled, another one takes from there: that halves the time of most files that use jax.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", f"{tempfile.gettempdir()}/r1jax-tests-{os.getuid()}")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")

import pytest
from beartype import BeartypeConf, beartype
from jaxtyping import install_import_hook

# jaxtyping wants the checker as an import path. An int may stand where a float is asked for.
checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
# Only where shapes are declared: the check makes loops of plain Python several times slower.
PACKAGE = pathlib.Path(__file__).resolve().parent.parent / "r1jax"
SHAPED = [path for path in PACKAGE.rglob("*.py") if "from jaxtyping" in path.read_text("utf-8")]
install_import_hook([".".join(p.relative_to(PACKAGE.parent).with_suffix("").parts) for p in SHAPED], "conftest.checked")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests marked slow as well")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: minutes rather than seconds; runs with --slow or RUN_SLOW=1")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--slow") or os.environ.get("RUN_SLOW"):
        return
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.skip(reason="slow: run it with --slow or RUN_SLOW=1"))
