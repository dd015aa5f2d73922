"""What a reader sees of a run: the live view, the summary, figures and the final table."""
