"""jaxtok: transformers on fewer tokens, as pure JAX transforms."""
