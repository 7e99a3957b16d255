"""From a recipe and an architecture to a block whose linears can be fitted, and back to plain weights."""
