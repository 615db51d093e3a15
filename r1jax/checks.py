"""What stages ask before the first of them begins: a mistake should not wait for ten thousand updates."""

import pathlib

from r1jax import curate, hand_over
from r1jax.editor import open_editor, open_verifier
from r1jax.run import Config


def check_sampler(config: Config, workdir: pathlib.Path) -> None:
    """Raises ValueError where nobody stands behind config.curate.sampler; config.stages are those before."""
    if sampler := config["curate"]["sampler"]:
        hand_over.resolve(config, "config.curate.sampler", sampler, config["stages"], workdir)


def check_curation(config: Config, workdir: pathlib.Path) -> None:
    """Raises ValueError for what training data cannot be sampled, filtered, rewritten or mixed with."""
    c = config["curate"]
    curate.check_filters(config)
    open_editor(c["editor"], c["editor_timeout_s"], c["editor_tries"])
    open_verifier(c["judge"], c["editor_timeout_s"], c["editor_tries"])
    check_sampler(config, workdir)
    is_to_come = pathlib.Path(c["general"]).absolute().parent == workdir / "data"  # a stage before may write it
    if not is_to_come or pathlib.Path(c["general"]).exists():
        curate.general_data(config, config["seed"])
