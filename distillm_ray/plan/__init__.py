"""What a run will take and cost, and how many of each role balance, before it is started."""
