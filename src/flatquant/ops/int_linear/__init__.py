"""Linear layers on integers."""
