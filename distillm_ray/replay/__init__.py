"""What each step trains on: schedule, draw, demand, shelves, and the buffer around them. No Ray,
no torch.
"""
