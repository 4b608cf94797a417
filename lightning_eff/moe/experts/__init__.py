"""Who computes the experts of a layer: a reference, a fused loop and grouped matrix products."""
