"""The command: python -m r1jax.main --config=configs/zero.py [--config.KEY=VALUE ...] --workdir=DIR

Flags to config to pipeline, nothing else. A config may name an ablation: --config=configs/zero.py:no_kl.
The same command again goes on where the run folder stands.
"""

import difflib
import hashlib
import importlib.metadata
import importlib.util
import json
import pathlib
import platform
import re
import sys
import traceback
from collections.abc import Iterable

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file; keys are set by --config.KEY=VALUE.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Run folder; a run that is there already goes on.")

# Where every key stands with its unit and default.
BASE = pathlib.Path("configs/base.py")


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of an error message: what was probably meant, or nothing."""
    near = difflib.get_close_matches(name, list(known), 1)
    return f"; did you mean {near[0]}?" if near else ""


def keys(config: ConfigDict, above: str = "") -> dict[str, object]:
    """Value by dotted key, the groups of keys as well."""
    out: dict[str, object] = {}
    for name, value in config.items():
        out[above + name] = value
        if isinstance(value, ConfigDict):
            out |= keys(value, f"{above}{name}.")
    return out


def load_config(spec: str) -> ConfigDict:
    """The config that --config names, PATH or PATH:ABLATION.

    Raises:
        ValueError: no such file, no such ablation.
    """
    path = pathlib.Path(spec.split(":", 1)[0])
    if not path.is_file():
        there = sorted(str(p) for p in {*path.parent.glob("*.py"), *BASE.parent.glob("*.py")})
        raise ValueError(f"--config={spec}: there is no file {path}{nearest(str(path), there)}")
    found = importlib.util.spec_from_file_location("config_file", path)
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    try:
        return module.get_config(*spec.split(":", 1)[1:])
    except (TypeError, ValueError) as error:
        raise ValueError(f"--config={spec}: {error}") from error


def usage(config: ConfigDict) -> str:
    """The command and every key with its value here and its meaning from configs/base.py."""
    meanings, place = {}, []
    for line in BASE.read_text("utf-8").splitlines() if BASE.is_file() else ():
        if found := re.match(r'( {12,})"(\w+)": .*?(?:  # (.*))?$', line):
            place[(len(found[1]) - 12) // 4 :] = [found[2]]
            meanings[".".join(place)] = found[3] or ""
    lines = [
        f"  --config.{f'{key}={json.dumps(value)}':<44} {meanings.get(key, '')}".rstrip()
        for key, value in keys(config).items()
        if not isinstance(value, ConfigDict)
    ]
    return "\n".join(
        [__doc__.strip(), "", "Keys and their values in this config (configs/base.py has them all):", *lines]
    )


def parse(argv: list[str]) -> list[str]:
    """Parses the command line; what is wrong with it ends the program with one line."""
    words = iter(argv)
    spec = next((w.partition("=")[2] or next(words, "") for w in words if re.fullmatch(r"--?config(=.*)?", w)), "")
    help_wanted = any(re.fullmatch(r"-h|--?help(short|full)?", word) for word in argv)
    try:
        if help_wanted:
            print(usage(load_config(spec or str(BASE))))
            sys.exit()
        if not spec:
            raise ValueError("--config=configs/zero.py (or another config) is missing; --help shows all keys")
        known = keys(load_config(spec))
        for word in argv:
            found = re.match(r"--?(?:no)?config\.([^=]+)", word)
            if found and found[1] not in known:
                raise ValueError(f"there is no key config.{found[1]}{nearest(found[1], known)} (--help shows all)")
        rest = flags.FLAGS(argv)
        if len(rest) > 1:
            raise ValueError(f"what is {rest[1]!r}? Keys are set by --config.KEY=VALUE")
        if _WORKDIR.value is None:
            raise ValueError("--workdir=DIR is missing: the folder that this run is kept in")
    except (ValueError, flags.Error) as error:
        sys.exit(f"r1jax: {error}")
    return rest


def facts(config: ConfigDict, workdir: str) -> dict[str, object]:
    """What all hosts of a run must have alike: every key, the folder, the versions, the code file by file."""
    package = pathlib.Path(__file__).parent
    out = {f"config.{key}": value for key, value in keys(config).items() if not isinstance(value, ConfigDict)}
    out |= {"--workdir": str(workdir), "version of python": platform.python_version()}
    out |= {f"version of {name}": importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "numpy")}
    for path in sorted(package.rglob("*.py")):
        out[f"code of r1jax/{path.relative_to(package)}"] = hashlib.sha256(path.read_bytes()).hexdigest()[:12]
    return json.loads(json.dumps(out, default=str))


# What a user can do something about: told in one line.
SAID = (ValueError, OSError, FloatingPointError)


def main(argv: list[str]) -> None:
    """Runs the stages of the config."""
    from r1jax import hosts, pipeline, run  # after the flags: a mistake in them should not wait for jax

    try:
        hosts.initialize(_CONFIG.value.cpu_devices)
        with hosts.together(facts(_CONFIG.value, _WORKDIR.value), SAID, run.Stopped):
            pipeline.execute(_CONFIG.value, _WORKDIR.value)
    except run.Stopped:
        hosts.say("stopped on request; everything is saved: the same command goes on")
        sys.exit(hosts.TRY_AGAIN)
    except SAID as error:
        logging.debug("traceback", exc_info=True)
        sys.exit(f"r1jax: {error}")
    except RuntimeError as error:  # a device's
        if not hosts.may_pass(error):
            raise
        traceback.print_exc()
        sys.exit(hosts.TRY_AGAIN)


def cli() -> None:
    """Entry point."""
    logging.set_verbosity(logging.WARNING)
    app.run(main, flags_parser=parse)


if __name__ == "__main__":
    cli()
