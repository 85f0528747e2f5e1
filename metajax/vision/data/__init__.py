"""Image sets, their captions, and the views of images in training."""
