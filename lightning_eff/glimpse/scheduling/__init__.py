"""Who learns when, how fast, and from which random numbers."""
