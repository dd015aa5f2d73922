"""Rollout → TeacherTargets: the scorer that computes targets and the store that keeps them."""
