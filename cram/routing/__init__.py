"""From a sample's image and instruction to gates: features, instruction groups, centroids."""
