"""Makes the base that is packaged with r1jax: python -m r1jax.main --config=configs/pretrain.py --workdir=DIR

The corpora come first: python -m r1jax.corpus --out=runs/corpus (see its --help), and another seed for validation.
Hardware: two CPU cores, 41 minutes, 2.4 GB (*measured*, 2026-11-22); validation loss 0.527 nats per token.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    """Pretraining of the tiny policy; every value is *our choice*."""
    config = base.get_config()
    config.stages = ("pretrain",)
    config.cpu_devices = 2
    config.mesh.update({"data": -1, "fsdp": 1})
    config.pretrain.update(
        {
            "corpus": "runs/corpus",
            "valid_corpus": "runs/corpus_valid",
            "steps": 2600,
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
            "decay_steps": 2600,
            "final_share": 0.02,
            "weight_decay": 0.05,
            "router_bias_rate": 0.003,
        }
    )
    config.checkpoint.save_every = 200
    return config
