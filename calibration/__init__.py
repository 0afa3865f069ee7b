"""Calibration as a job: one run for the node and the command line, what it keeps on disk, what it reports."""
