"""Student weights on their way out of the learners: gathered, handed over, exported."""
