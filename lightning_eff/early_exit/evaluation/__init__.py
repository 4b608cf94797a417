"""Accuracy against cost: recorded answers, curves, tables and figures."""
