"""Training on frozen 4-bit weights: one loop, adapters beside linears, and what is trained with them."""
