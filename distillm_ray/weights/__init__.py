"""Student weights on their way out: gathered, written, exported, read again by generators."""
