"""How good a model is: answers to held-out prompts, ROUGE-L and BLEU."""
