"""The `minga` command: thin functions over the other parts, imported only when called."""
