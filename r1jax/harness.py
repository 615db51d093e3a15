"""The command: python -m r1jax.harness --model=FOLDER_OR_CHECKPOINT --tasks=gsm8k,mmlu [--limit=100] [--out=FILE.json]

Every task of EleutherAI's lm-evaluation-harness (extra [eval]) on a released folder or on the checkpoint of a run: our
model scores and our sampler writes, the harness asks and grades.
"""

import argparse
import importlib
import json
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from r1jax import export, hosts, sharding, text
from r1jax.draw import DrawConfig
from r1jax.folders import folder_at
from r1jax.model import convert, safetensors_io, transformer
from r1jax.model.config import ModelConfig
from r1jax.rewards.form import after_thinking
from r1jax.rollout import completion_text, stop_text_finder
from r1jax.run import param_shardings
from r1jax.sampler import buckets, sample
from r1jax.slots import SamplerConfig, Verbs
from r1jax.text import Tokenizer
from r1jax.types import Params, Request

try:
    from lm_eval import evaluator, tasks, utils
    from lm_eval.api.model import TemplateLM
except ImportError as error:
    raise ImportError(f"r1jax.harness needs lm-evaluation-harness ({error}): pip install 'r1jax[eval]'") from error

SMALLEST = 64  # tokens of the shortest rows


class HarnessModel(TemplateLM):
    """A policy as the harness sees a model; `params` in the decode layout.

    Args:
        rows: scored or sampled at once.
        max_gen_toks: of an answer, where the task does not say it.
        summary_only: the harness sees what stands behind the thought.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: Params,
        tokenizer: Tokenizer,
        layout: sharding.Layout,
        rows: int = 8,
        max_gen_toks: int = 256,
        summary_only: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.config, self.params, self.words, self.layout = config, params, tokenizer, layout
        self.rows = -(-rows // layout.size("rows")) * layout.size("rows")
        self.max_gen_toks, self.summary_only, self.seed = max_gen_toks, summary_only, seed
        self.max_length = config.max_position_embeddings
        self._score = jax.jit(partial(_score, config=config, layout=layout))

    @property
    def eot_token_id(self) -> int:
        return self.words.eos_id

    @property
    def prefix_token_id(self) -> int:
        return self.words.eos_id if self.words.bos_id is None else self.words.bos_id

    @property
    def tokenizer_name(self) -> str:
        return f"r1jax-{self.words.vocab_size}"

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The model's own, where one is asked for."""
        return self.words.template.source if chat_template and self.words.template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The messages as text.

        Raises:
            ValueError: the model has no chat template.
        """
        if self.words.template is None:
            raise ValueError("--apply_chat_template: the model has no chat template (chat_template.jinja)")
        return self.words.template.render(chat_history, add_generation_prompt=add_generation_prompt)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """The ids of a text, with the begin token before it where the model has learned with one."""
        ids = self.words.encode(string)
        begins = self.words.adds_bos if add_special_tokens is None else add_special_tokens
        return [self.words.bos_id, *ids] if begins and ids[:1] != [self.words.bos_id] else ids

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        rows = [(before + after)[-self.max_length - 1 :] for _, before, after in requests]
        for (_, _, after), row in zip(requests, rows, strict=True):
            if len(after) >= len(row) > 0 and len(after) > self.max_length:
                raise ValueError(f"{len(after)} tokens to score, but the model reads {self.max_length} at most")
        out: list[tuple[float, bool]] = [(0.0, True)] * len(rows)
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
        for start in range(0, len(order), self.rows):
            batch = order[start : start + self.rows]
            logp, is_likeliest = self.score([rows[i] for i in batch])
            for at, i in enumerate(batch):
                last = len(rows[i]) - 1
                scored = slice(last - len(requests[i][2]), last)
                out[i] = float(logp[at, scored].sum(dtype=np.float64)), bool(is_likeliest[at, scored].all())
        return out

    def score(self, rows: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
        """Of each token but the first: its log-probability, and whether none is likelier; both [rows, T - 1]."""
        longest = max(map(len, rows)) - 1
        length = next(n for n in buckets(SMALLEST, longest) if n >= longest)
        tokens, lengths = np.zeros((self.rows, length + 1), np.int32), np.ones(self.rows, np.int32)
        for i, row in enumerate(rows):
            tokens[i, : len(row)], lengths[i] = row, max(len(row) - 1, 1)
        logp, is_likeliest = self._score(self.params, jnp.asarray(tokens), jnp.asarray(lengths))
        return hosts.fetch(logp), hosts.fetch(is_likeliest)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of whole texts, those longer than the context in windows that follow one another."""
        out = []
        for (string,) in (request.args for request in requests):
            ids = self.tok_encode(string, add_special_tokens=False)
            pieces = utils.get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1)
            windows = [(None, *utils.make_disjoint_window(piece)) for piece in pieces]
            out.append(sum(logp for logp, _ in self._loglikelihood_tokens(windows)))
        return out

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """What the sampler writes after each context, up to the first of its stop texts."""
        asked = [request.args for request in requests]
        out = [""] * len(asked)
        by_settings: dict[str, list[int]] = {}
        for i, (_, settings) in enumerate(asked):
            by_settings.setdefault(json.dumps(settings, sort_keys=True), []).append(i)
        for said, group in by_settings.items():
            for i, written in zip(group, self._write([asked[i][0] for i in group], json.loads(said)), strict=True):
                out[i] = written
        return out

    def _write(self, contexts: Sequence[str], settings: dict[str, Any]) -> list[str]:
        until = settings.get("until") or []
        until = [until] if isinstance(until, str) else list(until)
        most = int(settings.get("max_gen_toks") or self.max_gen_toks)
        room = self.max_length - most
        if room < 1:
            raise ValueError(f"the task wants {most} tokens of answer, but the model reads {self.max_length} in all")
        temperature = float(settings.get("temperature") or 0.0) if settings.get("do_sample", True) else 0.0
        drawing = DrawConfig(temperature, int(settings.get("top_k") or 0), float(settings.get("top_p") or 1.0))
        slots = SamplerConfig(slots=self.rows, prefill_prompts=self.rows)
        verbs = Verbs(self.config, slots, drawing, self.layout, tuple(sorted(self.words.eos_ids)))
        wanted = [Request(i, 0, tuple(self.tok_encode(one)[-room:])) for i, one in enumerate(contexts)]
        out = [""] * len(contexts)
        find = stop_text_finder(self.words, until)
        for completion in sample(verbs, self.params, wanted, jax.random.key(self.seed), most, find):
            written = completion_text(self.words, completion)
            ends = [at for at in map(written.find, until) if at >= 0]
            written = written[: min(ends)] if ends else written
            out[completion.prompt] = after_thinking(written) if self.summary_only else written
        return out


def _score(
    params: Params, tokens: jax.Array, lengths: jax.Array, config: ModelConfig, layout: sharding.Layout
) -> tuple[jax.Array, jax.Array]:
    with sharding.use(layout):
        read, targets = tokens[:, :-1], tokens[:, 1:]
        segments = (jnp.arange(read.shape[1]) < lengths[:, None]).astype(jnp.int32)
        x = transformer.hidden(params, config, read, segments=segments).x

        def row(args: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            h, target = args
            z = transformer.logits(params, h)
            logp = jnp.take_along_axis(jax.nn.log_softmax(z), target[:, None], axis=-1)[:, 0]
            return logp, jnp.argmax(z, axis=-1) == target

        return jax.lax.map(row, (x, targets))  # the logits of all rows at once may not fit


def open_model(path: str, dtype: str = "float32", **settings: Any) -> HarnessModel:
    """The model of a released folder, or of a checkpoint as `r1jax.export` takes it.

    Raises:
        ValueError: it is neither.
    """
    folder = folder_at(path)
    if folder.has("config.json") and "model_type" in safetensors_io.read_config(folder):
        mesh = importlib.import_module("configs.base").get_config().mesh.to_dict()
        layouts = sharding.layouts(sharding.make_mesh(mesh))
        config, params = convert.load(folder, layouts["train"].mesh, dtype)
        params = jax.device_put(params, param_shardings(config, layouts["decode"]))
        return HarnessModel(config, params, text.load_tokenizer(folder), layouts["decode"], **settings)
    with tempfile.TemporaryDirectory() as made:
        workdir, stage, step = export.locate(path)
        export.export(workdir, f"{made}/model", stage, step, dtype)
        return open_model(f"{made}/model", dtype, **settings)


def _tasks(names: Sequence[str], own: str | None) -> Any:
    """The tasks of a folder of one's own alone if it has all: reading the harness's thousands takes a minute."""
    if own and set(names) <= set((found := tasks.TaskManager(include_path=own, include_defaults=False)).all_tasks):
        return found
    return tasks.TaskManager(include_path=own)


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m r1jax.harness", description=__doc__.split("\n", 2)[2].strip())
    parser.add_argument("--model", required=True, help="a released folder, or a run's folder or checkpoint")
    parser.add_argument("--tasks", required=True, help="names of the harness's tasks, divided by commas")
    parser.add_argument("--include_path", help="a folder with task files of your own")
    parser.add_argument("--num_fewshot", type=int, help="examples before each question; the task's own if not given")
    parser.add_argument("--limit", type=float, help="problems of each task")
    parser.add_argument("--apply_chat_template", action="store_true", help="put questions by the model's chat template")
    parser.add_argument("--summary_only", action="store_true", help="grade what stands behind the thought")
    parser.add_argument("--max_gen_toks", type=int, default=256, help="of an answer, where the task does not say")
    parser.add_argument("--rows", type=int, default=8, help="scored or sampled at once")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", help="a file for the results as JSON")
    asked = parser.parse_args(arguments)
    settings = {key: getattr(asked, key) for key in ("rows", "max_gen_toks", "summary_only", "seed")}
    try:
        results = evaluator.simple_evaluate(
            model=open_model(asked.model, asked.dtype, **settings),
            tasks=asked.tasks.split(","),
            num_fewshot=asked.num_fewshot,
            limit=asked.limit,
            apply_chat_template=asked.apply_chat_template,
            task_manager=_tasks(asked.tasks.split(","), asked.include_path),
            log_samples=False,
        )
    except (ValueError, OSError) as error:
        sys.exit(f"r1jax: {error}")
    print(utils.make_table(results))
    if asked.out:
        hosts.atomic_write(asked.out, json.dumps(results, indent=1, default=str) + "\n")


if __name__ == "__main__":
    main()
