"""Methods that keep a cache at its capacity at every step."""
