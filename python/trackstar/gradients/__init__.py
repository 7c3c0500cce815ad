"""From a model and its examples to rows: per-example gradients, projected while the model runs."""
