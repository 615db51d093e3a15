"""Does this RL loop fit that pod, and how fast would it be? Answered by the TPU compiler, without a TPU:

    python -m r1jax.plan --model=deepseek_v3 --topology=v5p:8x8x16 \\
        --layouts=fsdp4-expert32-tensor8,fsdp4-expert16-tensor16

Compiles every program of the loop as a run would (configs/pods.py has each model's settings; --config.KEY=VALUE changes
any) and prints memory, estimated time and collectives. Nothing runs on a TPU: all times are estimates.

    --config=configs/zero.py   whose settings; with --model those of configs/pods.py for that model
    --model=NAME               of configs/models.py
    --topology=NAME            v4, v5p, tpu7x:AxBxC; v5e, v6e:AxB; 2*v5e:16x16 is two slices
    --layouts=A,B              mesh axes with their sizes, fsdp4-expert32-tensor8; after a slash those of decoding
    --search                   ranks the sensible layouts of a topology; compiles those few that fit and promise most
    --ablation=A,B             named ablations of configs/ablations.py, each planned beside the config itself
    --programs=A,B             only these: layout, prefill, insert, resize, generate_short, generate, score, update
    --completion_tokens=N      assumed mean of completions (default: a third of the longest), --prompt_tokens=N (128)
    --json=FILE --html=FILE    the table as rows, and as a page; written anew after each layout
    --xla=A=1,B=2              options of the compiler beside those of launch/env.sh (or of LIBTPU_INIT_ARGS, if set)
    --hlo=DIR                  keeps what the compiler made of every program, as text

A layout or a program that cannot be is a row that says why, and the others are planned. The exit code is 1 where no
layout could be planned at all; one that was and does not fit is an answer.
"""

import os
import re
import sys

from absl import app, flags, logging

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before jax is imported: the machine's own devices are not wanted

from r1jax import main as command

_MODEL = flags.DEFINE_string("model", "", "of configs/models.py")
_TOPOLOGY = flags.DEFINE_string("topology", None, "a TPU slice: v5p:8x8x16")
_LAYOUTS = flags.DEFINE_list("layouts", [], "mesh axes with their sizes: fsdp4-expert32-tensor8")
_SEARCH = flags.DEFINE_bool("search", False, "rank the sensible layouts; compile the most promising")
_ABLATION = flags.DEFINE_list("ablation", [], "of configs/ablations.py")
_PROGRAMS = flags.DEFINE_list("programs", [], "only these")
_COMPLETION = flags.DEFINE_float("completion_tokens", 0, "assumed mean; 0: a third of the longest")
_PROMPT = flags.DEFINE_float("prompt_tokens", 128, "assumed mean")
_JSON = flags.DEFINE_string("json", "", "file for the rows")
_HLO = flags.DEFINE_string("hlo", "", "folder for the compiled programs' text")
_XLA = flags.DEFINE_list("xla", [], "options of the compiler")
_HTML = flags.DEFINE_string("html", "", "file for the page")


def _value(argv: list[str], name: str, default: str = "") -> str:
    words = iter(argv)
    flag = rf"--?{name}(=.*)?"
    return next((w.partition("=")[2] or next(words, "") for w in words if re.fullmatch(flag, w, re.DOTALL)), default)


def _names_config(word: str, before: str) -> bool:
    return bool(re.fullmatch(r"--?config(=.*)?", word, re.DOTALL) or re.fullmatch(r"--?config", before))


def parse(argv: list[str]) -> list[str]:
    """Parses the command line; --model chooses the variant of the config. Ends with one line where it is wrong."""
    if any(re.fullmatch(r"-h|--?help(short|full)?", word) for word in argv):
        print(__doc__.strip())
        sys.exit()
    spec, model = _value(argv, "config", "configs/zero.py"), _value(argv, "model")
    # The config is named anew below, by its model's variant.
    rest = [w for w, before in zip(argv, ["", *argv], strict=False) if not _names_config(w, before)]
    spec = f"{spec}:{model}" if model and ":" not in spec else spec
    try:
        known = command.keys(command.load_config(spec))
        for word in argv:
            found = re.match(r"--?(?:no)?config\.([^=]+)", word)
            if found and found[1] not in known:
                raise ValueError(f"there is no key config.{found[1]}{command.nearest(found[1], known)}")
        left = flags.FLAGS([*rest[:1], f"--config={spec}", *rest[1:]])
        if len(left) > 1:
            raise ValueError(f"what is {left[1]!r}? Keys are set by --config.KEY=VALUE; --help shows the flags")
        if not _TOPOLOGY.value:
            raise ValueError("--topology=v5p:8x8x16 (or another slice) is missing; --help shows the flags")
        if not _LAYOUTS.value and not _SEARCH.value:
            raise ValueError("--layouts=fsdp4-tensor2,... or --search is missing; --help shows the flags")
    except (ValueError, flags.Error) as error:
        sys.exit(f"r1jax.plan: {error}")
    return left


def _options(words: list[str]) -> tuple[tuple[str, str], ...]:
    if wrong := [word for word in words if "=" not in word]:
        raise ValueError(f"--xla={wrong[0]}: wanted NAME=VALUE")
    return tuple(tuple(word.split("=", 1)) for word in words)


def main(argv: list[str]) -> None:
    """Plans, prints, writes."""
    from r1jax import hosts  # after the flags: a mistake in them should not wait for jax
    from r1jax.plan import compare, table, topology
    from r1jax.plan.account import How

    try:
        asked = compare.Asked(
            model=_MODEL.value,
            topology=_TOPOLOGY.value,
            layouts=tuple(_LAYOUTS.value),
            is_search=_SEARCH.value,
            ablations=tuple(_ABLATION.value),
            programs=tuple(_PROGRAMS.value),
            completion_tokens=_COMPLETION.value,
            prompt_tokens=_PROMPT.value,
            how=How((*topology.options(_TOPOLOGY.value), *_options(_XLA.value)), _HLO.value),
        )

        def keep(found: compare.Report) -> None:
            shown = found.title, found.plans, found.topology, found.notes
            if _JSON.value:
                hosts.atomic_write(_JSON.value, table.as_json(*shown))
            if _HTML.value:
                hosts.atomic_write(_HTML.value, table.page(*shown))

        found = compare.compare(flags.FLAGS.config, asked, lambda line: print(line, file=sys.stderr, flush=True), keep)
        print(table.text(found.title, found.plans, found.topology, found.notes))
        hbm = found.topology.chip.hbm
        if not any(row.cost or row.hbm_total > hbm for plan in found.plans for row in plan.rows):
            sys.exit("r1jax.plan: no layout could be planned; above is why")
    except (ValueError, OSError) as error:
        logging.debug("traceback", exc_info=True)
        sys.exit(f"r1jax.plan: {error}")


if __name__ == "__main__":
    logging.set_verbosity(logging.WARNING)
    app.run(main, flags_parser=parse)
