"""Which visual tokens to keep: one file per idea."""
