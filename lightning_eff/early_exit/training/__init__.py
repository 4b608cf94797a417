"""Train in phases: losses, schedules, switches between phases."""
