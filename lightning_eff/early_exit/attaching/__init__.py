"""Put exits on a backbone: where they stand, what heads read, what leaving costs."""
