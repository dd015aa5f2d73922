"""How good a model is: responses to held-out prompts, ROUGE-L and BLEU."""
