"""Parts that methods are made of."""
