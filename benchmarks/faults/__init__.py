"""Faults for real: several hosts on one machine, commands on them, signals and links; and an account of the rows."""
