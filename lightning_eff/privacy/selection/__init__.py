"""Which coordinates take part in a private step."""
