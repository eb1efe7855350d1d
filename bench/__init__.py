"""Rivals, benchmark, training and studies of LayerCache. Not part of the installed package."""
