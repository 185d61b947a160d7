"""What a run folder says, as one HTML page that a person can read without knowing the run.

Everything here works on plain values: predictions, policies, records of a log. What they are taken
from, and what a device costs, is the command line's to find out (``sdq/cli/report.py``).
"""
