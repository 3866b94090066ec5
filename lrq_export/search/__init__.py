"""The group size of each layer: searches over one choice a layer, which know no model, only what a genome is worth."""
