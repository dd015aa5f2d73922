"""What each step trains on: schedule, draw, demand, shelves and the buffer. No Ray, no torch."""
