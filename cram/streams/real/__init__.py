"""The stream `builtin-real`: real pictures from public packages, composed when the stream is loaded."""
