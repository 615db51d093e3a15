"""Makes the base that is packaged with r1jax: python -m r1jax.main --config=configs/pretrain.py --workdir=DIR

The corpora come first: python -m r1jax.corpus --out=DIR/corpus (see its --help), and another seed for validation.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    """Pretraining of the tiny policy; every value is *our choice*."""
    config = base.get_config()
    config.stages = ("pretrain",)
    config.pretrain.update({"corpus": "runs/corpus", "valid_corpus": "runs/corpus_valid", "steps": 1600})
    config.optim.update(
        {
            "learning_rate": 3e-3,
            "warmup_steps": 50,
            "schedule": "cosine",
            "decay_steps": 1600,
            "final_share": 0.03,
            "weight_decay": 0.1,
            "router_bias_rate": 0.003,
        }
    )
    config.checkpoint.save_every = 200
    return config
