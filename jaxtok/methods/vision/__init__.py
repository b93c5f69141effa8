"""Encoders and vision-language models: rows merged or dropped in a tower, at its output, between a decoder's layers."""
