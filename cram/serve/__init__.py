"""Serving: requests of different experts in one batch, over one attached model."""
