"""Pruning or freezing most coordinates once, before the first private step."""
