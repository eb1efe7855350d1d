"""Training of the reference model that ships with the package."""
