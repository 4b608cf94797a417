"""Which lines of a lidar to keep, so that depth completed from them stays good (arXiv 2303.11720)."""
