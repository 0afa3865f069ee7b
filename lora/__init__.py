"""LoRA files and 4-bit models: read any key layout, extend the low-rank branch. 4-bit codes are never touched."""
