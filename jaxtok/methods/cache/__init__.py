"""Methods that compress a cache once, after a prefill."""
