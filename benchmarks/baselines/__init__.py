"""What the package is compared with: one small file a baseline, each a function from a problem to a layer."""
