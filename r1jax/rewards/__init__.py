"""Rule-based rewards: the table of graders, the weighted sum and the processes that grade. Never imports jax."""
