"""Serving: frozen and packed layers, the quantised cache, and the folder they live in. Knows nothing of fitting."""
