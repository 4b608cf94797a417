"""Networks and training-free methods that complete sparse depth: ``(rgb, sparse) -> depth``."""
