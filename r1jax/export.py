"""The command: python -m r1jax.export --checkpoint=RUN[/checkpoints/STAGE[/STEP]] --out=DIR [--dtype=bfloat16] [--fp8]

A checkpoint of any stage as a released-model folder, which `transformers` loads with AutoModelForCausalLM. It goes
tensor by tensor, so that a policy trained on many hosts needs the memory of none.
"""

import argparse
import json
import os
import pathlib
import sys
from typing import Any

import jax
import numpy as np

from r1jax import checkpoint, fast_tokenizer, hand_over, pipeline, run, text
from r1jax.folders import Folder
from r1jax.model import convert, fp8, lora, safetensors_io, transformer
from r1jax.model.config import ModelConfig
from r1jax.types import Params

DTYPES = ("float32", "bfloat16", "float16")


def read_config(workdir: pathlib.Path) -> dict[str, Any]:
    """config.json of a run.

    Raises:
        ValueError: this is no run folder, or its config is damaged.
    """
    try:
        config = json.loads((workdir / "config.json").read_text("utf-8"))
        return {"stages": config["stages"], "model": config["model"], "pipeline": {}, **config}
    except FileNotFoundError:
        raise ValueError(f"--checkpoint: {workdir} is no run folder: it has no config.json") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{workdir / 'config.json'} is no run's config ({error!r})") from error


def locate(folder: str | os.PathLike[str]) -> tuple[pathlib.Path, str | None, int | None]:
    """Run folder, stage and step of RUN, RUN/checkpoints/STAGE or RUN/checkpoints/STAGE/STEP; None: the last."""
    path = pathlib.Path(folder).absolute()
    if path.parent.name == "checkpoints":
        return path.parent.parent, path.name, None
    if path.parent.parent.name == "checkpoints" and path.name.isdigit():
        return path.parent.parent.parent, path.parent.name, int(path.name)
    return path, None, None


def choose(workdir: pathlib.Path, stages: list[str], stage: str | None, step: int | None) -> tuple[str, int]:
    """Stage and step of a checkpoint: those asked for, else the run's last stage that has one, and its newest.

    Raises:
        ValueError: there is no such checkpoint; names those there are.
    """
    folders = {name: workdir / "checkpoints" / name for name in stages}
    there = {name: checkpoint.whole_steps(folder) for name, folder in folders.items()}
    there = {name: steps for name, steps in there.items() if steps}
    if not there:
        raise ValueError(f"{workdir} has no whole checkpoint of {', '.join(stages)} yet")
    stage = stage or list(there)[-1]
    listed = "; ".join(f"{name} at step {', '.join(map(str, steps))}" for name, steps in there.items())
    if stage not in there:
        raise ValueError(f"--checkpoint: there is none of stage {stage}; there is {listed}")
    if step is not None and step not in there[stage]:
        raise ValueError(f"--checkpoint: there is none of step {step}; there is {listed}")
    return stage, there[stage][-1] if step is None else step


def open_policy(workdir: pathlib.Path, stage: str | None = None, step: int | None = None) -> tuple[ModelConfig, Params]:
    """The policy that a stage's checkpoint holds as `Lazy` leaves, adapters merged into the weights they belong to.

    Raises:
        ValueError: no such run or checkpoint, a damaged one, or the model that it began with is gone.
    """
    config = read_config(workdir)
    stage, step = choose(workdir, config["stages"], stage, step)
    model = pipeline.model_config(config["stages"], config["model"])
    adapting = run.adapting(model, config.get("lora", {}))
    like = transformer.shapes(model) if adapting is None else lora.shapes(model, adapting)
    with checkpoint.Checkpoints(workdir / "checkpoints" / stage, save_every=1, keep=1) as saved:
        params = saved.open(step, {"policy": like})["policy"]
    if adapting is None:
        return model, params
    start = hand_over.start_of(config, config["stages"].index(stage), workdir)
    folder = hand_over.adapted_by(config, start, workdir) or pipeline.base_folder(config["model"])
    frozen = convert.open_leaves(folder, "float32")[1]
    adapters = jax.tree.map(lambda leaf: leaf[()], params)
    return model, lora.merge_lazily(frozen, adapters, model, adapting)


def chat_template(template: str, adds_bos: bool = False) -> str:
    """A prompt template of text.TEMPLATES as Jinja: what a chat's last user message becomes before an answer.

    Whoever renders it adds no begin token, so that it stands here where the policy was trained with one.
    """
    before, after = text.TEMPLATES[template].split("{question}")
    return (
        f"{'{{ bos_token }}' if adds_bos else ''}"
        "{% set question = messages[-1]['content'].strip() %}"
        "{% if question.endswith('.') %}{% set question = question[:-1] %}{% endif %}"
        f"{{{{ {json.dumps(before)} + question + {json.dumps(after)} }}}}"
    )


def companions(base: Folder, template: str) -> dict[str, bytes]:
    """What lies beside the weights: the base's tokenizer and settings, and how this run put its prompts.

    The chat template is the one that the policy was trained with, whatever its base had.
    """
    files = run.companions(base)
    tokenizer = text.load_tokenizer(base)
    if template != text.CHAT:
        files["chat_template.jinja"] = (chat_template(template, tokenizer.adds_bos) + "\n").encode()
    if "generation_config.json" not in files:
        ends = sorted(tokenizer.eos_ids)
        settings = {
            "bos_token_id": tokenizer.bos_id,
            "eos_token_id": ends if len(ends) > 1 else ends[0],
            "pad_token_id": tokenizer.pad_id,
        }
        files["generation_config.json"] = (json.dumps(settings, indent=2) + "\n").encode()
    if isinstance(tokenizer, text.SentencePieceTokenizer) and "tokenizer_config.json" not in files:
        files |= fast_tokenizer.files_of(tokenizer)
    return files


def export(
    workdir: str | os.PathLike[str],
    out: str | os.PathLike[str],
    stage: str | None = None,
    step: int | None = None,
    dtype: str = "float32",
    in_fp8: bool = False,
) -> None:
    """Writes the folder, whole or not at all; of the base it keeps tokenizer, generation settings and token ids.

    Args:
        dtype: of the tensors; with `in_fp8`, of those that are not matrices.
        in_fp8: matrices as FP8 e4m3 in blocks of 128 x 128, as DeepSeek-V3 was released.

    Raises:
        ValueError: no such checkpoint, an `out` that exists, FP8 for another kind than DeepSeek's.
        OSError: the disk is full; nothing is left under the name of `out`.
    """
    workdir, out = pathlib.Path(workdir), pathlib.Path(out)
    safetensors_io.check_free(out)
    config = read_config(workdir)
    base = pipeline.base_folder(config["model"])
    files = companions(base, config.get("data", {}).get("template", "plain"))
    model, params = open_policy(workdir, stage, step)
    hf = safetensors_io.read_config(base) if base.has("config.json") else {}
    ids = json.loads(files["generation_config.json"])
    fields = {name: hf.get(name, ids.get(name)) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    fields = {name: value for name, value in fields.items() if value is not None}
    block = fp8.RELEASED if in_fp8 else None
    convert.save(params, model, out, files, fields, dtype=np.dtype(dtype), block=block)


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    # The weights go through this host's memory, not that of its accelerators, of which a policy may need many.
    jax.config.update("jax_platforms", "cpu")
    parser = argparse.ArgumentParser(prog="python -m r1jax.export", description=__doc__.split("\n", 2)[2].strip())
    parser.add_argument("--checkpoint", required=True, help="a run's folder, or checkpoints/STAGE or .../STEP in it")
    parser.add_argument("--out", required=True, help="the folder to make")
    parser.add_argument("--dtype", choices=DTYPES, help="of the tensors: float32 is exact; with --fp8 bfloat16")
    parser.add_argument("--fp8", action="store_true", help="matrices in 128 x 128 blocks of FP8 (DeepSeek kinds)")
    asked = parser.parse_args(arguments)
    dtype = asked.dtype or ("bfloat16" if asked.fp8 else "float32")
    try:
        workdir, stage, step = locate(asked.checkpoint)
        export(workdir, asked.out, stage, step, dtype, asked.fp8)
    except (ValueError, OSError) as error:
        sys.exit(f"r1jax: {error}")
    print(f"{asked.out} holds {', '.join(sorted(path.name for path in pathlib.Path(asked.out).iterdir()))}")


if __name__ == "__main__":
    main()
