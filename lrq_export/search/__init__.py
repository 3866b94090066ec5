"""The group size of each layer: searches over one choice a layer, and the models that such choices stand for."""
