"""Image sets, their captions and the views that training makes of them."""
