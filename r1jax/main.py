"""The command: python -m r1jax.main --config=configs/zero.py [--config.KEY=VALUE ...] --workdir=DIR

Flags to config to pipeline, nothing else. A config may name an ablation: --config=configs/zero.py:no_kl.
"""

import sys

from absl import app, flags, logging
from ml_collections import config_flags

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file; keys are set by --config.KEY=VALUE.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Run folder; a run that is there already goes on.")


def main(argv: list[str]) -> None:
    """Runs the stages of the config."""
    if len(argv) > 1:
        raise app.UsageError(f"what is {argv[1]!r}? Keys are set by --config.KEY=VALUE")
    from r1jax import hosts, pipeline, run  # after the flags: --help should not wait for jax

    hosts.initialize()
    try:
        pipeline.execute(_CONFIG.value, _WORKDIR.value)
    except run.Stopped:
        logging.info("stopped on request; everything is saved: the same command goes on")
    except (ValueError, OSError, FloatingPointError) as error:
        logging.debug("traceback", exc_info=True)
        sys.exit(f"r1jax: {error}")


def cli() -> None:
    """Entry point."""
    flags.mark_flags_as_required(["config", "workdir"])
    logging.set_verbosity(logging.WARNING)
    app.run(main)


if __name__ == "__main__":
    cli()
