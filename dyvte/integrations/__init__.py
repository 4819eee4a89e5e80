"""dyvte inside other software; each part needs what its extra installs."""
