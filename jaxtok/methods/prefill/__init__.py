"""Methods that choose which keys a prompt attends to in its prefill; the caches keep every row."""
