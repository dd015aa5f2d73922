"""Manifests for clusters, from a config: pure functions from role specs to documents."""
