"""From files of prompts and responses to tokenized splits."""
