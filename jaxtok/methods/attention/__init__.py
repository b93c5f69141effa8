"""Trained attention that replaces a layer's own."""
