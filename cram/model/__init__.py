"""The attached model: adapted linears, hooks, and the state of a forward."""
