"""What to do and say, as functions of what was observed: no clock, no chance, no network."""
