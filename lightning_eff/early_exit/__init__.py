"""Networks that answer early where they are sure (arXiv 2407.14320)."""
