"""Training scripts of the zoo, one per model: `python -m reattend.zoo.train.shapes_llava` makes that model from nothing."""
