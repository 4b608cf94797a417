"""Backbones that learn from glimpses of any place and scale."""
