"""The engine: many requests in one batch over one attached model."""
