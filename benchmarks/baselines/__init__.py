"""The baselines, one small file per baseline. Each is a function from a problem to a layer."""
