"""Methods that choose what a query reads; nothing is lost."""
