"""Decoders: configuration, blocks, prefill and step, loading and saving, text."""
