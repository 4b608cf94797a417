"""Private training: differentially private SGD on fewer coordinates."""
