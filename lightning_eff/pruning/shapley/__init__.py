"""Rank channels by their Shapley values: the channel game, how fast it can be played, and the callback."""
