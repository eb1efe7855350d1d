"""Training of the second reference model: emoji scenes in the format of a FLUX pipeline."""
