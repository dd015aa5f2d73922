"""What a model directory holds, how its output head computes logits, and students cut out of
teachers.
"""
