"""Let samples leave: policies, decisions, the engines that stop, streams and exported programs."""
