"""Training: options, data, augmentation, the loop, and what a run leaves."""
