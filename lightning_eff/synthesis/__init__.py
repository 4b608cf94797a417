"""Private data generation: a generator or a table to hand on, with a formal (epsilon, delta) guarantee."""
