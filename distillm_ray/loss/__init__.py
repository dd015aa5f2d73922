"""The loss: divergences, the terms and their token weights, and the fused walk over the head."""
