"""What a run says of itself: records, the log, the live view, figures and the summary."""
