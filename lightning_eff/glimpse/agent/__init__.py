"""The agent: soft actor-critic of Stable-Baselines3 on a set of tokens."""
