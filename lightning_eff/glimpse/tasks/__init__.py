"""Tasks: classification, reconstruction, segmentation."""
