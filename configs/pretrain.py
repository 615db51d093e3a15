"""Makes the base that is packaged with r1jax: python -m r1jax.main --config=configs/pretrain.py --workdir=DIR

The corpora come first: python -m r1jax.corpus --out=runs/corpus (see its --help), and another seed for validation.
Hardware: two CPU cores, 41 minutes, 2.4 GB (*measured*, 2026-11-22); validation loss 0.527 nats per token.
With --config=configs/pretrain.py:bilingual it is the base of configs/r1.py, from runs/corpus_bilingual and
runs/corpus_bilingual_valid (--mixture=bilingual).
"""

from ml_collections import ConfigDict

from configs import base

# What differs between the bases that are packaged: corpora, values of config.model, steps.
BASES = {
    "english": ("corpus", {}, 2600),
    "bilingual": ("corpus_bilingual", {"path": "packaged:bilingual", "name": "tiny_bilingual"}, 2600),
    "student": ("corpus_bilingual", {"path": "packaged:bilingual", "name": "tiny_student"}, 600),
}


def get_config(base_name: str = "english") -> ConfigDict:
    """Pretraining of a tiny policy, of BASES; every value is *our choice*."""
    if base_name not in BASES:
        raise ValueError(f"there is no base {base_name!r}, wanted {', '.join(BASES)}")
    corpus, model, steps = BASES[base_name]
    config = base.get_config()
    config.model.update(model)
    config.stages = ("pretrain",)
    config.cpu_devices = 2
    config.mesh.update({"data": -1, "fsdp": 1})
    config.pretrain.update(
        {
            "corpus": f"runs/{corpus}",
            "valid_corpus": f"runs/{corpus}_valid",
            "steps": steps,
            "rows": 12,
            "row_tokens": 256,
            "mtp_weight": 0.1,
        }
    )
    config.optim.update(
        {
            "optimizer": "muon",
            "learning_rate": 0.01,
            "warmup_steps": 50,
            "schedule": "cosine",
            "decay_steps": steps,
            "final_share": 0.02,
            "weight_decay": 0.05,
            "router_bias_rate": 0.003,
        }
    )
    config.checkpoint.save_every = 200
    return config
