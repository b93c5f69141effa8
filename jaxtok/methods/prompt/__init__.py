"""Site prompt: which tokens of a prompt the model gets."""
