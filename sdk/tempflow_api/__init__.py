"""The contract of TempFlow: the custom resource, its rules, names, exit codes and errors.

The command line, the operator and the trainer stand on this package and never on one another.
It needs pydantic and the standard library only.
"""
