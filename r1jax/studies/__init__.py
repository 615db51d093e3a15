"""What the R1 report tried and left (section 4.2 and its supplement on GRPO), small: PPO, step rewards, tree search."""
