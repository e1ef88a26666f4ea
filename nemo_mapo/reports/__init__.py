"""Plots and pages made from the files of a run directory, and from nothing else."""
