"""Metrics as plain functions on lists: no model, no data set."""
