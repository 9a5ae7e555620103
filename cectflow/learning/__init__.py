"""One training loop, exchangeable objectives, scores and augmentation."""
