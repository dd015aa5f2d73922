"""Divergences between teacher and student, from their definition to the fused walk over the
output head.
"""
