"""Which entries a prediction used, and what it would be without them."""
