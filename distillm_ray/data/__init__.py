"""Files of prompts and responses into tokenized splits: files → rows → templates → tokenizing →
splits.
"""
