"""From Prompt to Rollout: generation engines, and the loop from demand to scored rollouts."""
