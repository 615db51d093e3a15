"""Every key with its unit and default; the other configs hold only what differs.

Published values of DeepSeek-R1-Zero (arXiv 2501.12948) are marked *reported*, the rest is *our choice*.
"""

from ml_collections import ConfigDict

# What the embedded runs on two cores share of config.rl, our choice.
EMBEDDED_RL = {
    "prompts_per_update": 8,
    "minibatches": 4,
    "max_completion_tokens": 288,
    "length_schedule": (),
    "row_tokens": 320,
    "microbatch_rows": 16,
    "old_logp": "sampler",
}


def get_config() -> ConfigDict:
    """The defaults of every run."""
    return ConfigDict(
        {
            "seed": 0,
            # Stages run in this order, each from what the one before left: pages of r1jax/stages, or names of pipeline.
            "stages": ("reasoning_rl",),
            # Stages by name: {"page": of r1jax/stages, "start": base, a stage or a released-model folder,
            # GROUP: {KEY: its own value}}.
            "pipeline": {},
            "model": {
                "path": "",  # a released-model folder or URL; empty: the packaged base, or packaged:bilingual
                "name": "tiny",  # of configs/models.py; only what starts from nothing (pretrain) reads it
                "compute_dtype": "float32",  # of activations and of the weights while they are used: float32, bfloat16
                "cache_dtype": "float32",  # of the sampler's cache
                # What the backward pass computes again: none, dots, full, attention (all but attention over long rows),
                # experts (nor the experts' first products, nor what an exchange all to all brought to them).
                "remat": "none",
                "scan_unroll": 1,  # layers per step of the scan over layers
                "attention": "auto",  # over rows: whole, blocks, kernel (TPU); auto: what row and device call for
                "expert_exchange": "gather",  # of tokens between devices: gather, all_to_all, ragged_all_to_all
                "expert_slack": 1.5,  # room for what comes from there at once, in multiples of the mean
            },
            "cpu_devices": 1,  # as how many devices the CPU of each host counts; accelerators are not concerned
            # Low-rank adapters (arXiv 2106.09685): only they are trained, the model at model.path stays as it is.
            "lora": {
                "rank": 0,  # of the adapters' matrices; 0: no adapters, every weight is trained
                "alpha": 16.0,  # an adapter counts alpha / rank times
                "targets": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),  # matrices
            },
            # Devices along each axis; one may be -1: whatever is left.
            "mesh": {"data": 1, "fsdp": -1, "expert": 1, "context": 1, "tensor": 1},
            # The same devices while completions are sampled, if other sizes serve there better; all 0: as in mesh.
            "decode_mesh": {"data": 0, "fsdp": 0, "expert": 0, "context": 0, "tensor": 0},
            "data": {
                # countdown, countdown_bilingual, letters, PATH.jsonl, tfds:NAME, reasoning_gym:FAMILY
                "source": "countdown",
                "split": "rl",  # prompts for training
                "eval_split": "test",  # problems for evaluation, never trained on
                "eval_source": "",  # empty: the same source
                "question_column": "question",
                "answer_column": "answer",
                "id_column": "",  # empty: "id" where there is one, else the line's number
                "level_column": "",  # difficulty, a number; empty: none
                "grader": "math",  # of rewards: how answers of a file are graded
                "template": "r1_zero",  # of text.TEMPLATES, or chat: the model's own chat template
                "max_prompt_tokens": 1024,  # a longer prompt is an error
                "gym_size": 2000,  # problems that reasoning-gym generates
                # Prompts of config.data.split that share ten words in a row with these are left out: files or sources.
                "decontaminate": (),
            },
            # Weight of each reward: a name of r1jax.rewards or one of reward_paths. Equal weights are reported.
            "rewards": {"accuracy": 1.0, "format": 1.0},
            # Where your own are: {"brief": "path/to/file.py:function"} or {"brief": "package.module:function"}.
            "reward_paths": {},
            "grading": {
                "workers": 1,  # processes; 0 grades in the trainer itself, unprotected
                "timeout_s": 10.0,  # per completion
                "batch_timeout_s": 600.0,  # for what is left to grade when the last completion is there
                # An answer in text counts in a box, <answer> tags or behind "####"; False: "the answer is 5" does too.
                "marked_answers": True,
                # Layers that the sandbox of programs may lack: landlock, seccomp, ...; else it refuses to run them.
                "sandbox_accepts": (),
            },
            "sampler": {
                "slots": 512,  # completions decoded side by side
                "tokens_per_dispatch": 64,  # at most, between two looks of the host
                "cache_bucket": 64,  # tokens; the smallest cache length
                "prefill_prompts": 32,  # prompts read at once
                "refill_share": 0.125,  # share of free slots at which they are filled again
                "attention": "auto",  # over the cache: plain, kernel (TPU, latent attention); auto: as the device has
                # Of large matrices while rollouts of RL are sampled: int8, fp8 (e4m3), which needs grpo.importance_cap
                # and rl.old_logp=policy; empty: the compute dtype, in which evaluation and curation always sample.
                "weights": "",
            },
            "rl": {
                "updates": 10_400,  # reported
                "prompts_per_update": 32,  # reported
                "group_size": 16,  # reported
                "minibatches": 16,  # updates per rollout, reported
                "max_completion_tokens": 32_768,  # reported
                "length_schedule": ((8200, 65_536),),  # (from update, max_completion_tokens), reported
                "temperature": 1.0,  # reported
                "reference_every": 400,  # updates between replacements of the reference by the policy, reported
                "reference_on": "device",  # between scorings: device, or host: its memory, fetched once a rollout
                "dynamic_sampling": False,  # sample again for groups without a signal (DAPO, arXiv 2503.14476)
                "dynamic_sampling_rounds": 3,  # at most, per rollout
                "old_logp": "policy",  # the old policy's: "policy" scores them anew, "sampler" takes the sampler's
                "router_replay": True,  # train with the experts that the sampler chose
                "share_prompt": True,  # a group's prompt is computed once per packed row
                "row_tokens": 0,  # length of a packed row; 0: the longest prompt and completion that may come
                "microbatch_rows": 0,  # rows whose gradient is taken at once; 0: all of a minibatch
                "stop_texts": (),  # completions end where one of these comes up
            },
            "grpo": {
                "kl_coef": 0.001,  # reported
                "kl_estimator": "k3",  # k1, k2, k3 (reported), k3_corrected
                "clip_eps_low": 0.2,
                "clip_eps_high": 0.2,
                "ratio_level": "token",  # see grpo.RATIO_LEVELS
                "aggregation": "per_sequence_token_mean",  # see grpo.AGGREGATIONS
                "importance_cap": 2.0,  # truncated importance sampling against the sampler; None: off
                "normalize_std": True,  # reported
                "std_ddof": 0,
                "overlong": "none",  # none, mask, soft
                "overlong_soft_tokens": 0,
            },
            "optim": {
                "optimizer": "adamw",  # adamw, muon
                "learning_rate": 3e-6,  # reported
                "warmup_steps": 0,
                "schedule": "constant",  # constant, cosine
                "decay_steps": 0,
                "final_share": 0.1,
                "b1": 0.9,
                "b2": 0.95,
                "eps": 1e-8,
                "weight_decay": 0.0,
                "grad_clip_norm": 1.0,
                "moments_dtype": "float32",  # of the optimizer's moments between steps: float32, bfloat16
                # Where moments lie between steps: device, or host: its memory, from which each step fetches them.
                "moments_on": "device",
                "non_finite_limit": 10,  # skipped steps in a row before the run stops
                "router_bias_rate": 0.0,  # per step, against the experts' load
            },
            "pretrain": {
                "corpus": "",  # folder made by python -m r1jax.corpus
                "valid_corpus": "",  # the same, of another seed
                "steps": 2000,
                "rows": 32,  # packed rows per step
                "row_tokens": 192,
                "mtp_weight": 0.3,  # of multi-token prediction in the loss (DeepSeek-V3: 0.3, then 0.1)
                "valid_every": 250,  # steps
                "valid_rows": 64,
            },
            "sft": {
                "data": "",  # conversations: a .jsonl or .jsonl.gz file in chat format
                "valid_data": "",  # the same, held out; empty: none
                "epochs": 2.0,  # reported: 2 to 3
                "rows": 128,  # packed rows per step; reported: 128 sequences
                "microbatch_rows": 0,  # rows whose gradient is taken at once; 0: all of a step
                "row_tokens": 32_768,  # length of a packed row, reported; a longer conversation is left out
                "valid_every": 100,  # steps
                "valid_rows": 64,
            },
            # Sampling of training data (cold_start, rejection_sft, reward_models).
            "curate": {
                "sampler": "",  # whose policy samples: a stage, base or a folder; empty: the one the stage starts from
                "prompts": 1000,  # of config.data.split, the first in the run's order
                "samples": 4,  # per prompt
                "keep_per_prompt": 1,  # at most, those that came first
                "prompts_per_part": 64,  # sampled between two saves
                "temperature": 1.0,  # reported for the cold start
                "filters": ("whole", "correct", "format", "language", "repetition", "length", "paragraphs", "code"),
                "min_language": 0.95,  # share of the thought's words in the language of the question
                "max_repetition": 0.1,  # share of runs of 20 words that were there before
                "max_characters": 100_000,
                "max_paragraph_characters": 4_000,
                "editor": "",  # rewrites what is kept: tidy, module:function, http(s)://HOST/v1#MODEL; empty: none
                "judge": "",  # says whether answers that no rule grades are right: module:function, http(s)://HOST/v1#MODEL
                # Of editors and judges alike.
                "editor_timeout_s": 120.0,  # per try
                "editor_tries": 3,
                "editor_may_fail": 0.5,  # share of what they are asked; above it the stage stops
                # Conversations mixed in: a chat .jsonl file, "letters", or "general" (letters, facts, translations, who
                # the model is); empty: none.
                "general": "",
                "general_examples": 1000,  # of them, at most, drawn by the seed; 0: all of a file
            },
            "preference": {
                "source": "letters",  # general prompts, as data.source
                "split": "rl",
                # Held out from training: pairs that measure the reward models, and what the alarm looks at.
                "valid_split": "validation",
                "valid_source": "",  # of general prompts; empty: the same source, which then must have splits
                "valid_problems": "",  # of problems; empty: config.data.source, which then must have splits
                "valid_samples": 8,  # the alarm's, of each problem
                "judge": "letters",  # letters, module:function, http(s)://HOST/v1#MODEL
                "safety": "letters",  # what labels responses as safe: letters, module:function (of example, response)
                "safety_responses": 106_000,  # labelled for the safety model, at most, reported
                "judgements": 4,  # of each pair, in random order, reported
                "margin": 0.2,  # mean difference above which a pair is kept; reported: 1, on another scale
                "row_tokens": 8192,  # reported
                "rows": 256,  # per step, reported
                "microbatch_rows": 0,  # rows whose gradient is taken at once; 0: all of a step
                "epochs": 1.0,  # reported
                "valid_every": 100,  # steps
                "from_update": 1300,  # general prompts and preference join then; reported: the last 400 of 1,700
                "share": 0.5,  # of the prompts from then on that are general
                "weight": 1.0,  # of helpfulness and of safety beside the rules
                "models": "reward_models",  # the reward models: the stage that left them, or a folder like models/STAGE
                "alarm_drop": 0.05,  # fall of held-out accuracy, while the score rises, that counts as reward hacking
                "alarm_action": "stop_preference",  # then: warn, stop_preference, stop_run
            },
            # What the report tried and left: r1jax/studies, configs/studies.py.
            "ppo": {
                "gae_lambda": 1.0,  # weight of what came against the value model's estimate; 1: what came alone
                "discount": 1.0,  # of what is a token further
                "value_clip": 0.2,  # how far a value may move in an update; published for rewards of -1 to 1
                "value_learning_rate": 1e-5,
                "whiten": True,  # advantages to mean 0 and deviation 1 over the tokens of a minibatch
            },
            "value_model": {  # value models that are taught from samples (prm, mcts)
                "epochs": 1.0,
                "learning_rate": 1e-5,
                "rows": 64,  # packed rows of config.rl.row_tokens per step
            },
            "prm": {
                "continuations": 8,  # of the policy after each step, whose share of right ends is the step's label
                "together": "least",  # scores of steps to one reward: mean, least, last
            },
            "mcts": {
                "branches": 4,  # continuations drawn of a node
                "segment_tokens": 64,  # of a continuation at most, if its step does not end before
                "exploration": 1.0,  # weight of the prior in PUCT
                "budgets": (1024, 4096, 16_384),  # tokens drawn for a problem, at which the search is looked at
            },
            "checkpoint": {
                "save_every": 20,  # optimizer steps; RL saves at the end of a rollout
                "keep": 2,  # newest checkpoints
                "keep_every": 0,  # steps whose multiples stay for ever; 0: none
            },
            "eval": {
                "problems": 512,  # of the evaluation split, the first in a fixed order; 0: no evaluation
                "samples": 16,  # per problem
                "temperature": 1.0,
                "top_p": 1.0,
                "top_k": 0,
                "max_completion_tokens": 0,  # 0: as in training at that time
                "opening": "",  # what every completion is made to begin with
                # Measured by the stage evaluate in place of config.data, and beside it at the end of every other stage:
                # NAME=PATH.jsonl or NAME=tfds:DATASET, NAME one of benchmarks.TABLE.
                "benchmarks": (),
                "benchmark_problems": 0,  # of each, the first in a fixed order; 0: all
                "benchmark_samples": 0,  # per problem; 0: as the table has it, which has the report's
                "decontaminate": (),  # training data (files, sources) where 10-grams of problems are looked for
                "judge": "",  # of open-ended benchmarks: module:function, http(s)://HOST/v1#MODEL
                # In fine-tuning, steps, and none before the first. In all_scenario_rl the alarm looks at its validation
                # data then, and the problems come after the last.
                "every": 0,  # updates between evaluations; 0: only before the first and after the last, -1: after it
                "general": "",  # instructions that are measured beside the problems: "letters"; empty: none
                "general_samples": 4,  # per instruction
                "baseline": "",  # the stage against which wins on general instructions are counted
            },
            "log": {
                "sample_every": 5,  # updates between two completions shown
                "rollout_groups": 4,  # groups of each rollout and evaluation that are written out in full
            },
        }
    ).lock()
