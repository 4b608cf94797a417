"""Rank channels by importance switches that are learnt in one pass over the data (Dirichlet pruning)."""
