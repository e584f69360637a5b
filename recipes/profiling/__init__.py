"""How methods learn about a model, one file per method; `material` is what they learn from."""
