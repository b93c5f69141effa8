"""Attention of another kind in the place of a layer's own."""
