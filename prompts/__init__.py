"""Domain templates and their expansion: a short prompt becomes a good one in one domain. str -> str, no code is run."""
