"""Prompt → Rollout: engines that generate, and the loop that turns demand into scored sequences."""
