"""Which visual tokens each decoder layer works on, on a running model. Knows no method."""
