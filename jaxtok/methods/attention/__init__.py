"""Trained attentions that replace a layer's own."""
